"""What is written: files whole or not at all, numbers with the digits that tell, and text in columns."""

from __future__ import annotations

import math
import uuid
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Yield a name of its own beside the path to write to: it takes the path's place, or is gone on an error.

    No other writer has that name, in this process or in another. Folders above are made; of a link, what it
    leads to is written.

    Raises:
        ValueError: where a file has the name of one of the folders, and for what is there and is no file: a
            folder, a device, a pipe.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        file = next(one for one in (path.parent, *path.parent.parents) if one.exists())
        raise ValueError(
            f"{path.name}: expected a folder to write it to, got {path.parent}, where {file} is a file.\n"
            f"Give another name, or move that file first."
        ) from error
    if path.exists() and not path.is_file():
        kind = "a folder" if path.is_dir() else "a device or a pipe"
        raise ValueError(
            f"{path.name}: expected a file, or none yet, got {path}, {kind}.\nGive another name."
        )
    target = path.resolve()
    part = target.with_name(f"{target.name[:40]}.{uuid.uuid4().hex}.part")
    try:
        yield part
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)


def in_digits(*numbers: float, apart: float = 0.0, sign: str = "") -> list[str]:
    """Return numbers that are read together, down to the same place: two digits of what tells them apart.

    There are three decimals at least, fewer of numbers from 100 on, and powers of ten below 1e-4 and from 1e5
    on, and of a number that would read as zero and is not. Zero has no minus.

    Args:
        apart: what tells them apart, as half of an interval; without it, three digits of the largest tell.
        sign: "+" for a sign in front of all.

    Example:
        >>> in_digits(0.5, apart=0.25), in_digits(0.00123, 0.001, apart=0.00023), in_digits(6.1e-5)
        (['0.500'], ['0.00123', '0.00100'], ['6.10e-05'])
    """
    largest = max((abs(number) for number in numbers if math.isfinite(number)), default=0.0) or 1.0
    power = _power(largest)
    more = min(power - math.floor(math.log10(apart)) + 1, 8) if 0 < apart < math.inf else 2
    found = []
    for number in numbers:
        text = f"{number:{sign}z.{max(more - power, min(3, 4 - power), 0)}f}"
        if not -4 <= power < 5 or (number and not float(text)):
            own = _power(number) if number and math.isfinite(number) else power
            text = f"{number:{sign}z.{max(more - power + own, 2)}e}"
        found.append(text)
    return found


def _power(number: float) -> int:
    return math.floor(math.log10(abs(number)))


def with_interval(value: float, low: float, high: float, *, sign: str = "") -> str:
    """Return a number and its interval.

    Example:
        >>> with_interval(0.5, 0.25, 0.75)
        '0.500 [0.250, 0.750]'
    """
    middle, *ends = in_digits(value, low, high, apart=(high - low) / 2, sign=sign)
    return f"{middle} [{', '.join(ends)}]"


def some(names: Collection[str]) -> str:
    """Return names for a message, of many the first five and how many more there are."""
    first, more = list(names)[:5], len(names) - 5
    return f"{', '.join(first)} and {more} more" if more > 0 else ", ".join(first)


def in_columns(rows: Sequence[Sequence[str]], *, right: bool = False) -> str:
    """Return rows of as many cells as a table, two spaces between columns.

    Args:
        rows: the names of the columns first.
        right: align all columns but the first to the right, as numbers are.

    Example:
        >>> print(in_columns([("site", "gamma"), ("stem", "2")], right=True))
        site  gamma
        stem      2
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [str.ljust, *[str.rjust if right else str.ljust] * (len(widths) - 1)]
    return "\n".join(
        "  ".join(
            align(cell, width) for align, cell, width in zip(aligned, row, widths, strict=True)
        ).rstrip()
        for row in rows
    )
