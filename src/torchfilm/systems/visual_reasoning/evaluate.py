"""Measure a network as the paper does: accuracy by kind, type and family, and the errors."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchfilm.data.clevr.catalogue import KINDS, TERMINAL_KINDS
from torchfilm.data.clevr.encoding import EncodedQuestions
from torchfilm.data.clevr.question_types import TYPES
from torchfilm.data.clevr.vocabulary import SPECIALS, Vocabulary
from torchfilm.training.checkpoint import write_json

from .exam import Exam, Progress, predict, silent


@dataclass(frozen=True)
class Score:
    """Accuracy 0..1 on n questions with its 95 % interval (Wilson; questions taken as independent)."""

    n: int
    correct: int
    accuracy: float
    low: float
    high: float

    @staticmethod
    def of(right: np.ndarray) -> "Score":
        """From one bool per question."""
        n, correct = len(right), int(right.sum())
        low, high = wilson(correct, n)
        return Score(n, correct, correct / n if n else math.nan, low, high)


@dataclass(frozen=True)
class CountErrors:
    """How far off the counts are: `differences` maps predicted - true to how often it occurs.

    `off_by_one`: share of the wrong counts that are off by exactly one (the paper: 96.1 %); nan without
    errors.
    `no_number`: wrong answers that are no number at all.
    """

    n: int
    wrong: int
    off_by_one: float
    no_number: int
    differences: dict[int, int]


@dataclass(frozen=True)
class Report:
    """What an evaluation found. Accuracies are shares 0..1.

    `low`, `high`: 95 % interval of the accuracy by resampling scenes, since questions about one scene go
    wrong together.
    `confusion`: true answer -> given answer -> how often. `blind`, `mode`: the same questions answered
    without the picture by another network, and by the most frequent training answer of the question's
    type; None where not asked for.
    """

    n: int
    scenes: int
    accuracy: float
    low: float
    high: float
    seed: int
    kinds: dict[str, Score]
    types: dict[str, Score]
    families: dict[int, Score]
    question_lengths: dict[int, Score]
    program_lengths: dict[int, Score]
    count_errors: CountErrors
    confusion: dict[str, dict[str, int]]
    blind: "Report | None" = None
    mode: "Report | None" = None

    @property
    def by_kind(self) -> dict[str, float]:
        """Accuracy of each of the five kinds."""
        return {name: score.accuracy for name, score in self.kinds.items()}

    def to_json(self) -> dict[str, Any]:
        """Plain values: accuracy, by_kind, n, seed, and the rest; group intervals are under `scores`."""
        groups = ("kinds", "types", "families", "question_lengths", "program_lengths")
        plain: dict[str, Any] = {
            "accuracy": self.accuracy,
            "by_kind": self.by_kind,
            "by_type": {name: score.accuracy for name, score in self.types.items()},
            "by_family": {str(name): score.accuracy for name, score in self.families.items()},
            "n": self.n,
            "scenes": self.scenes,
            "seed": self.seed,
            "interval": [self.low, self.high],
            "scores": {
                group: {str(name): vars(score) for name, score in getattr(self, group).items()}
                for group in groups
            },
            "count_errors": _finite(vars(self.count_errors)),
            "confusion": self.confusion,
        }
        for name in ("blind", "mode"):
            other: Report | None = getattr(self, name)
            if other is not None:
                plain[name] = {
                    "accuracy": other.accuracy,
                    "by_kind": other.by_kind,
                    "by_type": other.to_json()["by_type"],
                }
        return plain

    def save(self, path: Path) -> None:
        """Write `to_json` to a file."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, self.to_json())


def evaluate(
    model: nn.Module,
    exam: Exam,
    *,
    blind: nn.Module | None = None,
    train: EncodedQuestions | None = None,
    seed: int = 0,
    progress: Progress = silent,
) -> Report:
    """Answer every question of the exam and report.

    blind: a network that gets the same input and ignores the picture, reported beside. train: training
    questions for the baseline that gives the most frequent answer of the question's type. seed: of the
    resampling, and for the record. progress: hears how many questions are answered.
    Raises ValueError if no question has an answer (test splits).
    """
    beside = {}
    if blind is not None:
        beside["blind"] = score(exam, predict(blind, exam), seed=seed)
    if train is not None:
        beside["mode"] = score(exam, most_frequent(train, exam.questions), seed=seed)
    return score(exam, predict(model, exam, progress), seed=seed, **beside)


def score(
    exam: Exam,
    predictions: np.ndarray,
    *,
    seed: int = 0,
    blind: Report | None = None,
    mode: Report | None = None,
) -> Report:
    """The report on given answers (numbers in the vocabulary), one per question of the exam.

    An answer that the vocabulary lacks cannot be given and counts as wrong.
    """
    questions = exam.questions
    if len(predictions) != len(questions):
        raise ValueError(
            f"score: expected {len(questions)} predictions, one per question, got {len(predictions)}."
        )
    if not questions.answered.any():
        raise ValueError(
            f"score: expected answers that the vocabulary knows, got none for {len(questions)} questions. "
            "Test splits have none; evaluate on a val split."
        )
    right = predictions == questions.answers
    scenes, low, high = resampled_interval(right, questions.image_index, seed)
    kinds = np.array([KINDS.index(TERMINAL_KINDS[name]) for name in TYPES] + [-1])[questions.types]
    return Report(
        n=len(right),
        scenes=scenes,
        accuracy=float(right.mean()),
        low=low,
        high=high,
        seed=seed,
        kinds=_by(right, kinds, KINDS),
        types=_by(right, questions.types, TYPES),
        families=_by(right, questions.families),
        question_lengths=_by(right, questions.lengths - 2),
        program_lengths=_by(right, np.where(questions.program_lengths > 0, questions.program_lengths, -1)),
        count_errors=count_errors(exam, predictions),
        confusion=confusion(questions, predictions, exam.vocabulary),
        blind=blind,
        mode=mode,
    )


def most_frequent(train: EncodedQuestions, questions: EncodedQuestions) -> np.ndarray:
    """Answer each question by the most frequent training answer of its type (the paper's "Q-type mode")."""
    usual = np.full(len(TYPES) + 1, _mode(train.answers[train.answered]), np.int16)
    for number in range(len(TYPES)):
        of_type = train.answers[(train.types == number) & train.answered]
        if len(of_type):
            usual[number] = _mode(of_type)
    return usual[questions.types]


def _mode(answers: np.ndarray) -> int:
    if not len(answers):
        raise ValueError("most_frequent: expected training questions with answers, got none.")
    return int(np.bincount(answers).argmax())


def wilson(correct: int, n: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927); (0, 1) without observations."""
    if n == 0:
        return 0.0, 1.0
    p, w = correct / n, z * z / n
    half = z * math.sqrt(p * (1 - p) / n + w / (4 * n))
    return max(0.0, (p + w / 2 - half) / (1 + w)), min(1.0, (p + w / 2 + half) / (1 + w))


def resampled_interval(
    right: np.ndarray, scene: np.ndarray, seed: int, draws: int = 1000
) -> tuple[int, float, float]:
    """Number of scenes, and the 95 % interval of the accuracy when scenes are drawn with replacement."""
    _, position = np.unique(scene, return_inverse=True)
    asked = np.bincount(position).astype(float)
    hit = np.bincount(position, right.astype(float))
    rng = np.random.default_rng(seed)
    drawn = (rng.integers(0, len(asked), len(asked)) for _ in range(draws))
    found = np.array([hit[rows].sum() / asked[rows].sum() for rows in drawn])
    low, high = np.quantile(found, [0.025, 0.975])
    return len(asked), float(low), float(high)


def _by(right: np.ndarray, group: np.ndarray, names: Iterable[str] | None = None) -> dict[Any, Score]:
    """Scores per group number, or per name where there are names; -1 (the file does not say) is left out."""
    present = [int(number) for number in np.unique(group) if number >= 0]
    known = dict(enumerate(names)) if names is not None else {number: number for number in present}
    return {known[number]: Score.of(right[group == number]) for number in present}


def count_errors(exam: Exam, predictions: np.ndarray) -> CountErrors:
    """The profile of errors on the questions that ask for a number."""
    words = exam.vocabulary.answer_words
    value = np.array([int(word) if word.isdigit() else -1 for word in words])
    asked = (exam.questions.types == TYPES.index("count")) & exam.questions.answered
    true, given = value[exam.questions.answers[asked]], value[predictions[asked]]
    number = (given >= 0) & (true >= 0)
    found, times = np.unique((given - true)[number], return_counts=True)
    wrong = int((given != true).sum())
    off = int((np.abs(given - true)[number] == 1).sum())
    return CountErrors(
        n=int(asked.sum()),
        wrong=wrong,
        off_by_one=off / wrong if wrong else math.nan,
        no_number=int((~number).sum()),
        differences={int(d): int(t) for d, t in zip(found, times, strict=True)},
    )


def confusion(
    questions: EncodedQuestions, predictions: np.ndarray, vocabulary: Vocabulary
) -> dict[str, dict[str, int]]:
    """True answer -> given answer -> how often, over the questions with an answer."""
    words, size = vocabulary.answer_words, len(vocabulary.answers)
    true, given = questions.answers[questions.answered], predictions[questions.answered]
    table = np.bincount(true.astype(np.int64) * size + given, minlength=size * size).reshape(size, size)
    return {
        words[i]: {words[j]: int(table[i, j]) for j in np.flatnonzero(table[i])}
        for i in range(len(SPECIALS), size)
        if table[i].any()
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """For JSON, which has no nan: None instead, and text keys."""
    plain: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            plain[name] = {str(k): v for k, v in value.items()}
        else:
            plain[name] = None if isinstance(value, float) and math.isnan(value) else value
    return plain
