"""Which version of the library this is; files say which one wrote them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

VERSION = "0.1.0"
WRITER = {"torchfilm": VERSION}
"""What every file says of its writer; earlier ones say nothing."""

_ENTRY = "torchfilm.about"


def in_one_entry(about: Mapping[str, str]) -> dict[str, str]:
    """Return the metadata of a safetensors file: several entries come in any order, one makes equal files."""
    return {_ENTRY: json.dumps(about)}


def from_entries(metadata: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return what the metadata of a file says: in one entry, or as earlier files do, in one for each."""
    entries = metadata or {}
    return json.loads(entries[_ENTRY]) if _ENTRY in entries else entries


def check_format(what: str, path: Path, found: Any, expected: Any, about: Any) -> None:
    """Refuse a file of another format.

    Args:
        what: the function that reads.
        path: the file.
        found: the number of its format.
        expected: the number that this version writes.
        about: a mapping with what the file says of its writer.

    Raises:
        ValueError: for another number, with the versions that wrote it and that read it.
    """
    if found != expected:
        writer = about.get("torchfilm")
        wrote = f"torchfilm {writer} wrote" if writer else "an unknown version of torchfilm wrote"
        raise ValueError(
            f"{what}: expected format {expected}, which torchfilm {VERSION} reads, got {found!r} in {path}, "
            f"which {wrote}.\n"
            f"Read it with that version, or write it again with this one."
        )
