"""How a results file becomes a Markdown table: what the tables of all subjects share."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

PENDING = "Not measured yet.\n"

Result = Mapping[str, Any]
Results = Mapping[str, Result]


def of(file: str) -> Callable[[Callable[[Result], str]], Callable[[Results], str]]:
    """Make a table of all results from one of a single file's; pending where that is missing."""

    def of_all(made: Callable[[Result], str]) -> Callable[[Results], str]:
        @functools.wraps(made)
        def table(results: Results) -> str:
            return made(results[file]) if file in results else PENDING

        return table

    return of_all


def table(head: Sequence[str], rows: Sequence[Sequence[str]], texts: int = 1) -> str:
    """A Markdown table; the first columns, so many, are text, the others are numbers."""
    rule = [*["---"] * texts, *["---:"] * (len(head) - texts)]
    return "".join(f"| {' | '.join(row)} |\n" for row in (head, rule, *rows))


def measured_on(found: Result) -> str:
    clock = found.get("clock", "CPU time")
    return f"{clock} on {found['machine']}; torch {found['torch']}; {made_by(found)}"


def made_by(found: Result) -> str:
    return f"{found['date']}: `{found['command']}`.\n"
