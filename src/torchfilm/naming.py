"""What to say about a name or a choice that there is not, with those most like it; and about sizes."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class UnknownNameError(ValueError, KeyError):
    """An unknown name. It is also a `KeyError`, so that `in` and `get` of mappings work."""

    __str__ = Exception.__str__  # KeyError shows the repr of its message


def nearest(name: str, names: Iterable[str]) -> str:
    """Return the three names most like one, for messages."""
    near = difflib.get_close_matches(str(name), list(names), n=3, cutoff=0.0)
    return ", ".join(map(repr, near)) or "none, for there are no names"


def entry(what: str, entries: Mapping[str, T], name: str) -> T:
    """Return the entry of that name; UnknownNameError with the nearest names for one that there is not."""
    if name not in entries:
        raise UnknownNameError(
            f"{what}: expected one of {len(entries)} names, got {name!r}.\n"
            f"The nearest are {nearest(name, entries)}."
        )
    return entries[name]


class Entries(Generic[T]):
    """What a report is made of: goes through its entries, counts them, and finds one by its name.

    An entry is in it, and so is its name.
    """

    def _by_name(self) -> dict[str, T]:
        """Return the entries by their names, in order."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[T]:
        return iter(self._by_name().values())

    def __len__(self) -> int:
        return len(self._by_name())

    def __contains__(self, one: object) -> bool:
        return any(one in named for named in self._by_name().items())

    def __getitem__(self, name: str) -> T:
        return entry(type(self).__name__, self._by_name(), name)


def check_choice(
    what: str,
    value: Any,
    choices: Collection[Any],
    *,
    patterns: Sequence[str] = (),
    remedy: str = "Choose one of these.",
) -> None:
    """Refuse what is none of a few choices; ValueError with all of them, and with what was probably meant.

    Args:
        what: what was chosen, as the message starts: "Maybe: null".
        value: what was given.
        choices: what there is.
        patterns: what there is besides, as "tanh:R": the caller checks those.
        remedy: what to do where no choice is like the value.
    """
    if value in choices:
        return
    near = _meant(str(value), [*map(str, choices)])
    hint = f"Did you mean {' or '.join(map(repr, near))}?" if near else remedy
    raise ValueError(f"{what} expected one of {[*choices, *patterns]}, got {value!r}.\n{hint}")


def check_size(what: str, value: Any, remedy: str = "") -> None:
    """Refuse what is no size; ValueError that starts with what it is of: "Vector: dim"."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        remedy = remedy or "Give how many there are: a size like 64, not a value, a text or a flag."
        raise ValueError(f"{what} expected a whole number from 1 on, got {value!r}.\n{remedy}")


def _meant(name: str, choices: Sequence[str]) -> list[str]:
    """Return what was probably meant: what has the name as a part, or is a part of it; else what is alike."""
    parts = [one for one in choices if min(len(one), len(name)) > 2 and (one in name or name in one)]
    return parts[:3] or difflib.get_close_matches(name, choices, n=3, cutoff=0.6)
