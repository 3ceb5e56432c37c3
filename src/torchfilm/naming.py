"""Names that patterns match; and what to say about a name, a choice or a size that there is not."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any, Generic, NoReturn, TypeVar

Name = str | re.Pattern[str]
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


def each_match(names: Collection[str], patterns: Iterable[Name], who: str = "Sites") -> Iterator[list[str]]:
    """Yield for each pattern the name that is its text, else the names that it matches from start to end.

    "1.0" is the name, where there is one, and not "100" too, which it matches as an expression.

    Args:
        names: the names that there are.
        patterns: names, or regular expressions, compiled or not.
        who: whose patterns they are, as messages start.

    Raises:
        ValueError: for what is neither a name nor a regular expression, and for what matches nothing, with
            the three nearest names.

    Example:
        >>> list(each_match(["block1", "block2", "stem", "block[0]"], ["block.", "block[0]"]))
        [['block1', 'block2'], ['block[0]']]
    """
    names = dict.fromkeys(names)
    for pattern in patterns:
        yield matched(names, pattern, who) or no_match(names, pattern, who=who)


def matched(names: Collection[str], pattern: Name, who: str = "Sites") -> list[str]:
    """Return the names of one pattern, as `each_match`; none where it matches nothing."""
    if not isinstance(pattern, str | re.Pattern):
        remedy = "Give the names of modules; or a function: lambda name, module: module in mine."
        if isinstance(name := getattr(pattern, "name", None), str):
            remedy = f"Give its name: {name!r}."
        raise ValueError(
            f"{who}: expected patterns for names, got a {type(pattern).__name__} among them.\n{remedy}"
        )
    if isinstance(pattern, str) and pattern in names:
        return [pattern]
    try:
        matches = re.compile(pattern).fullmatch
    except re.error as error:
        raise ValueError(
            f"{who}: expected a name, or a regular expression, got {pattern!r}: {error}.\n"
            f"A dot stands for any character; put a backslash before brackets and stars of a name."
        ) from error
    return [name for name in names if matches(name)]


def no_match(names: Collection[str], *given: Name, who: str = "Sites") -> NoReturn:
    """Raise ValueError for patterns that match nothing, with the names nearest to the first."""
    patterns = [one.pattern if isinstance(one, re.Pattern) else one for one in given]
    raise ValueError(
        f"{who}: {' or '.join(map(repr, patterns))} matches the whole name of none of the {len(names)} "
        f"modules.\n"
        f"The nearest names are {nearest(patterns[0], names)}.\n"
        f"A pattern has to match a name from its start to its end: put '.*' where anything may stand."
    )


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
