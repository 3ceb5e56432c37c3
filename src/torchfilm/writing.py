"""What is written: files whole or not at all, and rows of text in columns."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
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
