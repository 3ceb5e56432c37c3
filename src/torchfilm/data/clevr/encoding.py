"""Questions as compact arrays: a million questions in about 160 MB, parsed once and kept in a cache file."""

import tokenize
import zipfile
import zlib
from array import array
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from torchfilm.reading import DAMAGED

from .caches import damaged, draft
from .question_types import TYPES, family, function, program_tokens
from .vocabulary import UNK, Vocabulary, answer_text

NO_ANSWER = -100
"""The answer of a question without one, or with one that the vocabulary lacks.

No prediction equals it, so it counts as wrong, and cross-entropy ignores it by PyTorch's default.
"""

FORMAT = 1
_OF_ARCHIVES = (zipfile.BadZipFile, zlib.error, tokenize.TokenError)  # what numpy's reader lets through
LONGEST = 2**15
"""A question has fewer characters than that: its words are counted in int16."""


@dataclass(frozen=True, eq=False)
class EncodedQuestions:
    """N questions as arrays; row i of each belongs to the i-th question of the file.

    tokens:         int16 [N, T]  <START> words <END>, padded with 0
    lengths:        int16 [N]     tokens in use, <START> and <END> included
    answers:        int16 [N]     number in the vocabulary, or NO_ANSWER
    image_index:    int32 [N]     row of the image in `images` and in feature files
    families:       int16 [N]     0 to 89, or -1
    types:          int8  [N]     index into TYPES, or -1 where there is no program
    programs:       int16 [N, P]  program tokens in prefix order, padded with 0; no <START>, no <END>
    program_lengths:int16 [N]     nodes of the program, 0 where there is none
    """

    tokens: np.ndarray
    lengths: np.ndarray
    answers: np.ndarray
    image_index: np.ndarray
    families: np.ndarray
    types: np.ndarray
    programs: np.ndarray
    program_lengths: np.ndarray

    def __post_init__(self) -> None:
        sizes = {field.name: len(getattr(self, field.name)) for field in fields(self)}
        if len(set(sizes.values())) != 1:
            raise ValueError(f"expected arrays with one row per question, got {sizes}.")

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def answered(self) -> np.ndarray:
        """bool [N]: the question has an answer that the vocabulary knows."""
        return self.answers != NO_ANSWER

    def select(self, rows: np.ndarray | slice) -> "EncodedQuestions":
        """The questions in `rows` (indices, a mask or a slice), in that order."""
        return EncodedQuestions(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def save(self, path: Path) -> None:
        """Write all arrays to one .npz file, whole or not at all."""
        with draft(path) as part, part.open("wb") as stream:
            np.savez(stream, **{field.name: getattr(self, field.name) for field in fields(self)})

    @staticmethod
    def load(path: Path) -> "EncodedQuestions":
        """Read a file that `save` wrote."""
        try:
            with path.open("rb") as stream, np.load(stream) as file:
                return EncodedQuestions(
                    **{field.name: file[field.name] for field in fields(EncodedQuestions)}
                )
        except FileNotFoundError:
            raise
        except (OSError, ValueError, EOFError, NotImplementedError, *_OF_ARCHIVES, *DAMAGED) as error:
            raise damaged(path, "encoded questions", error) from error


def encode_questions(questions: Iterable[Mapping[str, Any]], vocabulary: Vocabulary) -> EncodedQuestions:
    """Read question records of any CLEVR-like file, one at a time, into arrays.

    A record needs `question` and `image_index`. Without `answer` or `program` (test splits, CLEVR-Humans) the
    arrays say so: NO_ANSWER, type -1, program length 0. Unknown words and program tokens become <UNK>.
    """
    tokens, programs = _Ragged(), _Ragged()
    answers, image_index, families, types = array("h"), array("i"), array("h"), array("b")
    type_index = {name: i for i, name in enumerate(TYPES)}
    for question in questions:
        tokens.append(vocabulary.encode(question["question"]))
        answer = question.get("answer")
        known = -1 if answer is None else vocabulary.answers.get(answer_text(answer), -1)
        answers.append(known if known >= 0 else NO_ANSWER)
        image_index.append(int(question["image_index"]))
        families.append(family(question))
        program = question.get("program") or []
        types.append(type_index.get(function(program[-1]), -1) if program else -1)
        programs.append([vocabulary.programs.get(token, UNK) for token in program_tokens(program)])
    return EncodedQuestions(
        tokens=tokens.padded(),
        lengths=tokens.sizes(),
        answers=np.array(answers, np.int16),
        image_index=np.array(image_index, np.int32),
        families=np.array(families, np.int16),
        types=np.array(types, np.int8),
        programs=programs.padded(),
        program_lengths=programs.sizes(),
    )


class _Ragged:
    """Rows of different length in two flat arrays; numbers up to 32,767."""

    def __init__(self) -> None:
        self.flat, self.lengths = array("h"), array("h")

    def append(self, row: list[int]) -> None:
        self.flat.extend(row)
        self.lengths.append(len(row))

    def sizes(self) -> np.ndarray:
        return np.array(self.lengths, np.int16)

    def padded(self) -> np.ndarray:
        sizes = self.sizes()
        width = int(sizes.max(initial=1))
        rows = np.zeros((len(sizes), width), np.int16)
        rows[np.arange(width) < sizes[:, None]] = np.frombuffer(self.flat, np.int16)
        return rows
