"""Packages of others that not everyone needs: one line that says how to get one that is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class MissingError(ModuleNotFoundError, ValueError):
    """A package of an extra cannot be imported."""


@contextmanager
def needed(need: str, extra: str) -> Iterator[None]:
    """Say how to get what is imported inside and cannot be.

    Args:
        need: who needs what: "the table needs MuJoCo".
        extra: the optional dependencies of the project that have it.

    Raises:
        MissingError: which is a ValueError, too; but for names that torchfilm itself lacks.
    """
    try:
        yield
    except MissingError:
        raise
    except ImportError as error:
        if (error.name or "").partition(".")[0] == "torchfilm":
            raise
        raise MissingError(
            f"{need}: pip install 'torchfilm[{extra}]' ({type(error).__name__}: {error})"
        ) from error
