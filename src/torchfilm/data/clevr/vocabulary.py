"""Words to numbers and back, as in the paper's preprocessing: questions, program tokens and answers.

A question is split on single spaces; `;` and `,` are tokens of their own, `?` and `.` are dropped, case
counts. Numbers: <NULL> 0 (padding), <START> 1, <END> 2, <UNK> 3, then the tokens in sorted order. On the
released CLEVR this gives 93 question words (one of them the empty string, from double spaces), 44 program
tokens and 32 answers.
"""

import difflib
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from torchfilm.reading import DAMAGED

from .caches import draft
from .question_types import program_tokens

NULL, START, END, UNK = 0, 1, 2, 3
SPECIALS: Mapping[str, int] = {"<NULL>": NULL, "<START>": START, "<END>": END, "<UNK>": UNK}

_KEYS = ("question_token_to_idx", "program_token_to_idx", "answer_token_to_idx")


def tokenize(question: str) -> list[str]:
    """The words of a question. Typed input may hold stray spaces: give `" ".join(text.split())`."""
    for kept in ";,":
        question = question.replace(kept, " " + kept)
    for dropped in "?.":
        question = question.replace(dropped, "")
    return question.split(" ")


def answer_text(answer: Any) -> str:
    """An answer as released files write it: the public generator's True, False, 3 are yes, no, "3"."""
    if isinstance(answer, bool):
        return "yes" if answer else "no"
    return str(answer)


def _numbered(counts: Mapping[str, int], threshold: int = 1) -> dict[str, int]:
    words = sorted(word for word, count in counts.items() if count >= threshold and word not in SPECIALS)
    return dict(SPECIALS) | {word: len(SPECIALS) + i for i, word in enumerate(words)}


@dataclass(frozen=True)
class Vocabulary:
    """Three maps from token to number: the words of questions, the tokens of programs, the answers."""

    questions: Mapping[str, int]
    programs: Mapping[str, int]
    answers: Mapping[str, int]

    @staticmethod
    def build(questions: Iterable[Mapping[str, Any]], unk_threshold: int = 1) -> "Vocabulary":
        """From question records (`question`, and where there are any `answer` and `program`).

        Question words seen less than `unk_threshold` times are left out and read as <UNK>.
        """
        words: Counter[str] = Counter()
        programs: Counter[str] = Counter()
        answers: Counter[str] = Counter()
        for record in questions:
            words.update(tokenize(record["question"]))
            programs.update(program_tokens(record.get("program") or []))
            if record.get("answer") is not None:
                answers[answer_text(record["answer"])] += 1
        return Vocabulary(_numbered(words, unk_threshold), _numbered(programs), _numbered(answers))

    def expand(self, questions: Iterable[Mapping[str, Any]], unk_threshold: int = 1) -> "Vocabulary":
        """This vocabulary plus the new words of `questions` at the end (CLEVR-Humans: unk_threshold 5).

        No number changes, so an embedding grows by rows. Programs and answers stay as they are.
        """
        words = dict(self.questions)
        for word in Vocabulary.build(questions, unk_threshold).questions:
            words.setdefault(word, len(words))
        return Vocabulary(words, self.programs, self.answers)

    def encode(self, question: str) -> list[int]:
        """<START>, the words, <END>. Unknown words are <UNK>; empty tokens count if it has them."""
        table = self.questions
        words = tokenize(question)
        if "" not in table:
            words = [word for word in words if word]
        return [START, *(table.get(word, UNK) for word in words), END]

    def decode(self, tokens: Sequence[int]) -> str:
        """The words of `tokens` up to <END>, without the special ones; <UNK> stays visible."""
        names = self.question_words
        words: list[str] = []
        for token in tokens:
            if token == END:
                break
            if token not in (NULL, START):
                words.append(names[token])
        return " ".join(words).replace(" ;", ";").replace(" ,", ",")

    @cached_property
    def question_words(self) -> tuple[str, ...]:
        """The question words in the order of their numbers."""
        return _names(self.questions)

    @cached_property
    def program_words(self) -> tuple[str, ...]:
        """The program tokens in the order of their numbers."""
        return _names(self.programs)

    @cached_property
    def answer_words(self) -> tuple[str, ...]:
        """The answers in the order of their numbers, the four special ones first."""
        return _names(self.answers)

    def unknown(self, question: str) -> list[str]:
        """The words of `question` that are not in the vocabulary, in order, each once."""
        return list(dict.fromkeys(word for word in tokenize(question) if word and word not in self.questions))

    def nearest(self, word: str, number: int = 3) -> list[str]:
        """The `number` known words closest to `word` in spelling, best first; case is forgiven."""
        known = [w for w in self.questions if w and w not in SPECIALS]
        by_lower: dict[str, str] = {}
        for w in known:
            by_lower.setdefault(w.lower(), w)
        matches = difflib.get_close_matches(word.lower(), list(by_lower), n=number, cutoff=0.0)
        return [by_lower[match] for match in matches]

    @property
    def digest(self) -> str:
        """A short name of the content, for caches: equal vocabularies have equal digests."""
        content = json.dumps([list(m.items()) for m in (self.questions, self.programs, self.answers)])
        return hashlib.sha256(content.encode()).hexdigest()[:12]

    def save(self, path: Path) -> None:
        """Write vocab.json in the original's format, whole or not at all."""
        content = dict(
            zip(_KEYS, (dict(self.questions), dict(self.programs), dict(self.answers)), strict=True)
        )
        with draft(path) as part:
            part.write_text(json.dumps(content, indent=1), encoding="utf-8")

    @staticmethod
    def load(path: Path) -> "Vocabulary":
        """Read vocab.json as the original's preprocessing writes it."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            maps = [{str(k): int(v) for k, v in content[key].items()} for key in _KEYS]
        except (OSError, ValueError, *DAMAGED) as error:
            raise ValueError(
                f"{path}: expected a vocabulary file with the keys {', '.join(_KEYS)}, got {error!r}. "
                "Build one from the training questions."
            ) from error
        for key, table in zip(_KEYS, maps, strict=True):
            if sorted(table.values()) != list(range(len(table))):
                raise ValueError(
                    f"{path}: {key} must number its {len(table)} tokens 0 to {len(table) - 1}, each once."
                )
            if any(table.get(name) != number for name, number in SPECIALS.items()):
                raise ValueError(f"{path}: {key} must have {dict(SPECIALS)}, got {list(table.items())[:4]}.")
        return Vocabulary(*maps)


def _names(table: Mapping[str, int]) -> tuple[str, ...]:
    return tuple(sorted(table, key=table.__getitem__))
