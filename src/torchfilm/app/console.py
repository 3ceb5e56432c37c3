"""What the commands say: results on stdout, everything else (progress, notes) on stderr."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

QUIET_SECONDS = 15.0
"""Seconds between two progress lines where stderr is no terminal."""


def note(text: str) -> None:
    """One line on stderr, at once; under torchrun from rank 0 alone."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)


def emit(content: dict[str, Any]) -> None:
    """One JSON object on stdout; what JSON has no number for (nan, infinity) becomes null."""
    print(json.dumps(_finite(content)), flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_WIDE = 1000
"""Characters that a table may be wide: a terminal breaks its lines, where rich would cut its cells off."""


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table on stdout: the first column is text, the others are numbers; an empty row is a line."""
    shown = Table(box=None, pad_edge=False, header_style="bold")
    for number, name in enumerate(columns):
        shown.add_column(name, justify="right" if number else "left", no_wrap=True)
    for row in rows:
        if row:
            shown.add_row(*row)
        else:
            shown.add_section()
            shown.add_row(*("" for _ in columns))
    Console(highlight=False, markup=False, emoji=False, width=_WIDE).print(shown)


def percent(share: float | None) -> str:
    """A share 0..1 as a percentage with one decimal."""
    return "" if share is None or math.isnan(share) else f"{100 * share:.1f} %"


class Bar:
    """Progress on stderr with rate and time left: a bar on a terminal, else a line now and then.

    Call it with what is done and of how much; use it as a context, so that the terminal is left clean.
    """

    def __init__(self, label: str, unit: str) -> None:
        self._label, self._unit = label, unit
        self._start = self._last = self._called = time.monotonic()
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Bar:
        if sys.stderr.isatty():
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=Console(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(self._label, total=None, rate="")
        return self

    def __call__(self, done: int, total: int) -> None:
        """Show that `done` of `total` are done."""
        now = time.monotonic()
        if done < self._done:  # another round with the same bar
            self._start = self._called
        self._called, self._done = now, done
        seconds = now - self._start
        rate = done / seconds if seconds > 0 else 0.0
        shown = f"{rate:,.0f} {self._unit}/s" if rate >= 10 else f"{rate:.2g} {self._unit}/s"
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, rate=shown)
        elif now - self._last >= QUIET_SECONDS:
            self._last = now
            left = f"{(total - done) / rate:,.0f} s left" if rate else "?"
            note(f"{self._label}  {done:,} of {total:,}  {shown}  {left}")

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
