"""How a results file becomes a Markdown table: what the tables of all subjects share."""

from collections.abc import Mapping, Sequence
from typing import Any

PENDING = "Not measured yet.\n"

Result = Mapping[str, Any]
Results = Mapping[str, Result]


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; the first columns, so many, are text, the others are numbers."""
    rule = [*["---"] * texts, *["---:"] * (len(head) - texts)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def measured_on(found: Result) -> str:
    clock, command = found.get("clock", "CPU time"), found["command"]
    return f"{clock} on {found['machine']}; torch {found['torch']}; {found['date']}: `{command}`.\n"
