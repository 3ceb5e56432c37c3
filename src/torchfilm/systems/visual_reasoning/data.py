"""What this system feeds: batches of questions, grouped by scene, the easiest first at the start."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchfilm.data.clevr.encoding import EncodedQuestions
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.training import Draw, EpochOrder


@dataclass(frozen=True)
class Batch:
    """Questions about scenes; several questions share a scene, whose images come once.

    images:       float [scenes, C, H, W], pixels, features or perception maps, as the model's config says
    questions:    int64 [B, T], padded with 0
    lengths:      int64 [B], words of each, <START> and <END> counted; on the CPU, where they are read
    scene_index:  int64 [B], row of `images` of each question
    answers:      int64 [B], number in the vocabulary
    """

    images: Float[Tensor, "scenes C H W"]
    questions: Int[Tensor, "B T"]
    lengths: Int[Tensor, " B"]
    scene_index: Int[Tensor, " B"]
    answers: Int[Tensor, " B"]

    on_cpu = ("lengths",)


@dataclass(frozen=True)
class Curriculum:
    """Easiest questions first: only those until the network has found out what the words mean, then more.

    start: share of all questions that is asked at first, in (0, 1]; 1 is no curriculum.
    hold: number of questions asked before it grows, 0 or more.
    until: number of questions asked when all may come, the share growing evenly; above hold.

    Counted in questions and not in time, so that a slow machine learns in the same order.
    """

    start: float = 1.0
    hold: int = 120_000
    until: int = 400_000

    def share(self, asked: int) -> float:
        """Return the share of all questions, the easiest, that may come after `asked` questions."""
        grown = min(max((asked - self.hold) / (self.until - self.hold), 0.0), 1.0)
        return self.start + (1 - self.start) * grown


class QuestionBatches:
    """Batches for `torchfilm.training.train`: each scene in turn, some of its questions at a time.

    Every scene comes once per epoch, epochs in random order, and asks `questions_per_scene` different ones
    of its questions. The batch is a function of (seed, step) alone. Its size is that of the draw,
    which must be a multiple of `questions_per_scene`.
    """

    def __init__(
        self,
        images: Tensor | np.ndarray,
        questions: EncodedQuestions,
        *,
        questions_per_scene: int = 8,
        curriculum: Curriculum | None = None,
        difficulty: Int[np.ndarray, " Q"] | None = None,
    ) -> None:
        """Sort the questions by scene and difficulty.

        images: [N, C, H, W], row = image_index of the questions; a memory map is read a batch at a time.
        difficulty: what the curriculum sorts by, one number per question (`reasoning_steps`); None: words.
        """
        harder = questions.lengths if difficulty is None else difficulty
        order = np.lexsort((questions.lengths, harder, questions.image_index))
        order = order[questions.answered[order]]
        self.questions = questions.select(order)
        self._difficulty = harder[order]
        self._ranked = np.sort(self._difficulty)
        self._easier: dict[int, np.ndarray] = {}
        self.images = images
        self.questions_per_scene = questions_per_scene
        self.curriculum = curriculum or Curriculum()
        self.scenes, self.first, self.count = np.unique(
            self.questions.image_index, return_index=True, return_counts=True
        )
        if len(self.scenes) == 0 or self.scenes[-1] >= len(images):
            raise ValueError(
                f"QuestionBatches: expected questions about images 0 to {len(images) - 1}, got "
                f"{len(self.questions)} with answers, about images up to {max(self.scenes, default=-1)}.\n"
                f"Give the questions and the images of the same split."
            )
        self._order = EpochOrder(len(self.scenes))

    def __call__(self, draw: Draw) -> Batch:
        """Return this process's share of the batch of one step."""
        per_scene = self.questions_per_scene
        if draw.batch_size % per_scene:
            raise ValueError(
                f"QuestionBatches: expected a batch size that is a multiple of "
                f"questions_per_scene={per_scene}, got {draw.batch_size}.\n"
                f"Change one of the two in the recipe."
            )
        num_scenes = draw.batch_size // per_scene
        of_all_processes = Draw(draw.step, draw.seed, draw.progress, num_scenes)
        picked = self._order.indices(of_all_processes)
        rows = self._rows_of(picked, draw)
        part = draw.share(num_scenes)
        return self._batch(picked[part], rows[part])

    def _rows_of(self, picked: np.ndarray, draw: Draw) -> np.ndarray:
        """Question rows [scenes, questions_per_scene], without repeats where a scene has enough."""
        allowed = self._allowed(self.curriculum.share(draw.step * draw.batch_size))[picked]
        keys = draw.rng().random((len(picked), int(self.count.max())))
        keys[np.arange(keys.shape[1])[None] >= allowed[:, None]] = 2.0
        order = keys.argsort(axis=1)
        columns = np.arange(self.questions_per_scene)[None] % allowed[:, None]
        return self.first[picked][:, None] + np.take_along_axis(order, columns, axis=1)

    def _allowed(self, share: float) -> np.ndarray:
        """How many questions of each scene are among the easiest `share` of all; at least one."""
        hardest = int(self._ranked[max(int(share * len(self._ranked)) - 1, 0)])
        if hardest not in self._easier:  # a few whole numbers, each counted once
            below = np.concatenate([[0], np.cumsum(self._difficulty <= hardest)])
            self._easier[hardest] = np.maximum(below[self.first + self.count] - below[self.first], 1)
        return self._easier[hardest]

    def _batch(self, picked: np.ndarray, rows: np.ndarray) -> Batch:
        flat = rows.reshape(-1)
        lengths = self.questions.lengths[flat].astype(np.int64)
        tokens = self.questions.tokens[flat, : int(lengths.max(initial=1))].astype(np.int64)
        images = self.images[self.scenes[picked]]
        return Batch(
            images=images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images)),
            questions=torch.from_numpy(tokens),
            lengths=torch.from_numpy(lengths),
            scene_index=torch.arange(len(picked)).repeat_interleave(rows.shape[1]),
            answers=torch.from_numpy(self.questions.answers[flat].astype(np.int64)),
        )


def reasoning_steps(questions: EncodedQuestions, vocabulary: Vocabulary) -> Int[np.ndarray, " Q"]:
    """Return how many steps each question takes: the nodes of its program that are no filters.

    3 for "what color is the cube?", 5 with one relation, 11 for a comparison of two related objects. Only the
    order of a curriculum comes from it; no network sees a program. Without programs, the number of words.
    """
    filters = [number for word, number in vocabulary.programs.items() if word.startswith("filter_")]
    steps = ((questions.programs > 0) & ~np.isin(questions.programs, filters)).sum(axis=1)
    return np.where(questions.program_lengths > 0, steps, questions.lengths)
