"""Derived files: each is written whole or not at all, and can be made again from what it was made of."""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import DTypeLike

from torchfilm.writing import whole


@contextlib.contextmanager
def draft(kept: Path) -> Iterator[Path]:
    """A file to write instead of `kept`: it becomes `kept` at the end, and is deleted after an error."""
    try:
        with whole(kept) as part:
            yield part
    except OSError as error:
        if not is_full(error):
            raise
        raise OSError(
            error.errno, f"no space left for {kept}. Free some space, or write to another folder"
        ) from error


def is_full(error: OSError) -> bool:
    """Return whether an error says that there is no room left to write."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def write_rows(
    kept: Path, dtype: DTypeLike, shape: tuple[int, ...], fill: Callable[[np.ndarray], None]
) -> None:
    """Write an .npy file of this type and shape, as large as the disk allows; `fill` is given its rows."""
    with draft(kept) as part:
        rows = np.lib.format.open_memmap(part, mode="w+", dtype=dtype, shape=shape)
        if hasattr(os, "posix_fallocate"):  # a page of a map that the disk has no room for ends the process
            with part.open("rb+") as file:
                try:
                    os.posix_fallocate(file.fileno(), 0, part.stat().st_size)
                except OSError as error:
                    if is_full(error):  # else the file system knows no such call
                        raise
        fill(rows)
        rows.flush()
        del rows


def read_rows(kept: Path) -> np.ndarray:
    """What `write_rows` wrote, as a read-only map of the file."""
    try:
        return np.load(kept, mmap_mode="r")
    except (ValueError, EOFError) as error:
        raise damaged(kept, "rows", error) from error


def damaged(kept: Path, what: str, error: Exception) -> ValueError:
    """Return what to raise where a derived file is not what was written."""
    return ValueError(
        f"{kept}: expected a cache of {what}, got {error!r}. Delete the file; it is made again."
    )


def drop_older(kept: Path) -> None:
    """Delete caches of the same thing that were made from an older source."""
    stem = kept.stem.rsplit("-", 1)[0]
    for path in kept.parent.glob(f"{stem}-*{kept.suffix}"):
        if path != kept and len(path.stem) == len(kept.stem):
            path.unlink(missing_ok=True)
