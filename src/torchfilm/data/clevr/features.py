"""Read the HDF5 files of the original's preprocessing: image features and encoded questions."""

from pathlib import Path
from types import TracebackType
from typing import Any

import h5py
import numpy as np

from .encoding import NO_ANSWER, EncodedQuestions
from .question_types import TYPES
from .vocabulary import END, NULL, START, Vocabulary


class FeatureFile:
    """Pre-extracted image features: one dataset `features`, float32 [N, C, H, W], row = image_index.

    The released recipe gives [N, 1024, 14, 14] (56 GB for train). Rows are read on demand; close it, or use
    `with`.
    """

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        rows = self._file.get("features")
        if not isinstance(rows, h5py.Dataset) or rows.ndim != 4:
            got = f"{list(self._file)}" if rows is None else f"features {getattr(rows, 'shape', rows)}"
            self._file.close()
            raise ValueError(f"{path}: expected a dataset 'features' of shape (N, C, H, W), got {got}.")
        self._rows, self.path = rows, path

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(N, C, H, W)."""
        return self._rows.shape

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        """Features of the images `rows` (any order, repeats allowed), float32 [len(rows), C, H, W].

        Each image is read once, however often it is asked for: ten questions share one in CLEVR.
        """
        unique, position = np.unique(np.asarray(rows), return_inverse=True)
        if len(unique) and not 0 <= unique[0] <= unique[-1] < len(self):
            raise ValueError(
                f"{self.path}: expected image rows 0 to {len(self) - 1}, got {unique[0]} to {unique[-1]}. "
                "Are these the features of another split?"
            )
        return np.asarray(self._rows[unique], np.float32)[position]

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> "FeatureFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def write_features(path: Path, features: np.ndarray) -> None:
    """Write features [N, C, H, W] as the original's extraction does, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with h5py.File(part, "w") as file:
        file.create_dataset("features", data=np.asarray(features, np.float32))
    part.replace(path)


def read_question_file(path: Path, vocabulary: Vocabulary) -> EncodedQuestions:
    """Read the questions file of the original's preprocessing, made with `vocabulary` (its vocab.json).

    The file's own `types` are numbered differently in every run and are not used: the type is the first token
    of the prefix program. Files without answers or programs (test splits) are read as such.
    """
    with _open(path) as file:
        if "questions" not in file or "image_idxs" not in file:
            raise ValueError(f"{path}: expected the datasets questions and image_idxs, got {list(file)}.")
        names = ("questions", "image_idxs", "programs", "answers", "question_families")
        stored = {name: _dataset(file, name) for name in names if name in file}
    tokens = stored["questions"].astype(np.int16)
    largest = int(tokens.max(initial=0))
    if largest >= len(vocabulary.questions):
        raise ValueError(
            f"{path}: expected question tokens below {len(vocabulary.questions)}, the vocabulary's size, "
            f"got {largest}. Give the vocab.json that was written with this file."
        )
    number = len(tokens)
    programs, program_lengths = _bare(
        stored.get("programs", np.zeros((number, 1), np.int16)).astype(np.int16)
    )
    answers = stored.get("answers", np.full(number, NO_ANSWER)).astype(np.int16)
    return EncodedQuestions(
        tokens=tokens,
        lengths=(tokens != NULL).sum(1).astype(np.int16),
        answers=np.where((answers >= 0) & (answers < len(vocabulary.answers)), answers, NO_ANSWER).astype(
            np.int16
        ),
        image_index=stored["image_idxs"].astype(np.int32),
        families=stored.get("question_families", np.full(number, -1)).astype(np.int16),
        types=_types(programs[:, 0], vocabulary),
        programs=programs,
        program_lengths=program_lengths,
    )


def _types(first: np.ndarray, vocabulary: Vocabulary) -> np.ndarray:
    table = np.full(len(vocabulary.programs) + 1, -1, np.int8)
    for name, number in vocabulary.programs.items():
        if name in TYPES:
            table[number] = TYPES.index(name)
    return table[np.clip(first, 0, len(vocabulary.programs))]


def _bare(programs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Programs without <START>, <END> and what follows, shifted to the left; and their lengths."""
    if programs.size and (programs[:, 0] == START).any():
        programs = programs[:, 1:]
    ended = np.cumsum(programs == END, axis=1) > 0
    programs = np.where(ended, np.int16(NULL), programs)
    lengths = (programs != NULL).sum(1).astype(np.int16)
    return np.ascontiguousarray(programs[:, : max(1, int(lengths.max(initial=1)))]), lengths


def _open(path: Path) -> h5py.File:
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{path}: expected an HDF5 file, got {error}.") from error


def _dataset(file: h5py.File, name: str) -> np.ndarray:
    dataset: Any = file[name]
    return np.asarray(dataset[()])
