"""The signature of code that others wrote."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any


def signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """Return a signature whose annotations may name what exists for type checkers only, as if in quotes.

    Raises ValueError or TypeError, as `inspect.signature` does: for what is written in C++, say.
    """
    if sys.version_info >= (3, 14):  # there annotations are evaluated where they are asked for
        from annotationlib import Format

        return inspect.signature(function, annotation_format=Format.FORWARDREF)
    return inspect.signature(function)
