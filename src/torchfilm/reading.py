"""What is read: content of files that is not what was written ends in words, before it costs memory."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

DAMAGED = (
    KeyError,
    TypeError,
    AttributeError,
    IndexError,
    OverflowError,
    RecursionError,
    json.JSONDecodeError,
    UnicodeDecodeError,
)
"""What comes of content that lacks something, or has something of another kind in its place."""


@contextmanager
def intact(
    path: str | Path, expected: str, remedy: str, raised: type[ValueError] = ValueError
) -> Iterator[None]:
    """Let what makes objects of a file's content end in words that name the file, and in no other error.

    Args:
        path: the file, or its folder. A ValueError that names it is left as it is.
        expected: what the content should be.
        remedy: a sentence.
        raised: the class of the error.

    Raises:
        ValueError: for content that lacks something, or has something of another kind in its place.

    Example:
        >>> with intact("film.json", "an entry 'sites'", "Save again."):
        ...     {}["sites"]
        Traceback (most recent call last):
        ValueError: film.json: expected an entry 'sites', got KeyError('sites'). Save again.
    """
    try:
        yield
    except DAMAGED as error:
        raise raised(f"{path}: expected {expected}, got {error!r}. {remedy}") from error
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise raised(f"{path}: {error}") from error


@contextmanager
def sketched() -> Iterator[None]:
    """Make modules without numbers, so that sizes from a file are seen before memory is taken for them.

    Raises:
        ValueError: for sizes that no tensor can have.
    """
    try:
        with torch.device("meta"):
            yield
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"expected sizes that tensors can have, got others: {error}") from error
