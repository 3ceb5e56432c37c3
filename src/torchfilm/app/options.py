"""Options that may be left out, as the help shows them (no "None"), and what is refused of those given."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

OptionalPath = Annotated[Path | None, arg(metavar="PATH", help_behavior_hint="")]
OptionalText = Annotated[str | None, arg(metavar="NAME", help_behavior_hint="")]
OptionalInt = Annotated[int | None, arg(metavar="NUMBER", help_behavior_hint="")]
OptionalFloat = Annotated[float | None, arg(metavar="NUMBER", help_behavior_hint="")]
SystemName = Annotated[Positional[str], arg(metavar="SYSTEM")]
RunPath = Annotated[Positional[Path | None], arg(metavar="RUN", help_behavior_hint="")]


def check_own(
    options: DataclassInstance, own: Mapping[str, Collection[str]], name: str, kind: str = ""
) -> None:
    """Raise ValueError where an option was given that others of the kind have for themselves, and not `name`.

    Args:
        options: of a command.
        own: name -> the options that not all have. An option that is in none of them is everybody's.
        name: whose command it is.
        kind: what the names are those of, as "system"; none where a name says it all, as "with --data".
    """
    whose = f"to the {kind} {name!r}" if kind else name
    others = {option for one in own.values() for option in one} - set(own[name])
    for option in fields(options):
        if option.name in others and getattr(options, option.name) != option.default:
            raise ValueError(f"{_flag(option.name)} says nothing {whose}. Leave it out.")


def check_least(options: Any, **least: int) -> None:
    """Raise ValueError unless these options are at least so much; None, left out, is."""
    for name, low in least.items():
        value = getattr(options, name)
        if value is not None and not value >= low:
            raise ValueError(f"{_flag(name)}: expected {low} or more, got {value:g}.")


def check_finite(options: Any, name: str) -> None:
    """Raise ValueError for an option that is nan or infinite."""
    value = getattr(options, name)
    if not math.isfinite(value):
        raise ValueError(f"{_flag(name)}: expected a finite number, got {value:g}.")


def _flag(name: str) -> str:
    """The option of a field, as it is typed."""
    return "RUN" if name == "run" else f"--{name.replace('_', '-')}"
