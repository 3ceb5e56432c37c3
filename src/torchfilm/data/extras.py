"""Packages of others that only some worlds need: one line that says how to get one that is missing."""

from __future__ import annotations


def missing(need: str, extra: str, error: ImportError) -> ValueError:
    """Return what to raise where a package cannot be imported.

    Args:
        need: who needs what: "the table needs MuJoCo".
        extra: the optional dependencies of the project that have it.
        error: what importing it raised.
    """
    return ValueError(
        f"{need}; in torchfilm's folder: pip install '.[{extra}]' ({type(error).__name__}: {error})"
    )
