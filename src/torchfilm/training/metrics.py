"""What a run tells: metrics.jsonl (append-only), TensorBoard events, and a progress line on stderr."""

from __future__ import annotations

import json
import math
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

QUIET_SECONDS = 30.0
"""Seconds between two progress lines where stderr is no terminal."""


class Mean:
    """Means over a window of steps, weighted by items; its state is plain numbers, so it resumes exactly."""

    def __init__(self, state: Mapping[str, Any] | None = None) -> None:
        self.items = float(state["items"]) if state else 0.0
        self.sums: dict[str, list[float]] = {k: list(v) for k, v in state["sums"].items()} if state else {}

    def add(self, values: Mapping[str, float], items: float) -> None:
        """Take the mean `values` of `items` items into the window."""
        self.items += items
        for name, value in values.items():
            pair = self.sums.setdefault(name, [0.0, 0.0])
            pair[0] += value * items
            pair[1] += items

    def result(self) -> dict[str, float]:
        """The mean of each value over the items it was given for."""
        return {name: total / items for name, (total, items) in self.sums.items() if items}

    def state(self) -> dict[str, Any]:
        """Plain numbers from which `Mean` goes on."""
        return {"items": self.items, "sums": self.sums}


class MetricsFile:
    """RUN/metrics.jsonl, one object per line: {"split": "train" or "evaluate", "step": 50, "loss": ...}."""

    def __init__(self, path: Path, *, size: int) -> None:
        """Open the file cut to `size` bytes, those a checkpoint knows of; later lines are written again."""
        self.path = path
        path.touch()
        with path.open("r+b") as file:
            file.truncate(min(size, path.stat().st_size))
        self._file = path.open("a", encoding="utf-8")

    @property
    def size(self) -> int:
        """Bytes written, to be stored in the checkpoint."""
        return self.path.stat().st_size

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line and hand it to the system, so that a killed process leaves it behind."""
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class Events:
    """TensorBoard events under RUN/tensorboard; nothing where it is not installed or not wanted."""

    def __init__(self, folder: Path, *, wanted: bool, step: int) -> None:
        self._writer = None
        if not wanted:
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its own imports use names that numpy and protobuf deprecate
            try:
                from torch.utils.tensorboard.writer import SummaryWriter
            except ImportError:
                return
            self._writer = SummaryWriter(str(folder), purge_step=step + 1 if step else None)

    def write(self, split: str, step: int, values: Mapping[str, float]) -> None:
        """One scalar per value, tagged SPLIT/NAME."""
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Write what is pending."""
        if self._writer is not None:
            self._writer.close()


class ProgressLine:
    """Progress on stderr, with rate and time left: a bar on a terminal, else a line now and then."""

    def __init__(self, *, shown: bool) -> None:
        self._bar: Any = None
        self._shown = shown
        self._last = self._mark = time.monotonic()
        self._items = 0.0
        if shown and sys.stderr.isatty():
            self._bar = _rich_bar()
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("train", total=1.0, rate="", note="")

    def update(
        self, progress: float, step: int, seconds: float, items: float, values: Mapping[str, float]
    ) -> None:
        """Show the state after a step of `items` items. Cheap enough for every step."""
        if not self._shown:
            return
        self._items += items
        now = time.monotonic()
        if now - self._last < (0.5 if self._bar is not None else QUIET_SECONDS):
            return
        rate = self._items / (now - self._mark)
        self._last = self._mark = now
        self._items = 0.0
        note = "  ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:3])
        if self._bar is not None:
            self._bar.update(
                self._task, completed=progress, rate=f"{rate:,.0f} items/s", note=f"step {step}  {note}"
            )
        else:
            left = seconds * (1 - progress) / progress if progress > 0 else math.nan
            self.say(f"train {progress:6.1%}  step {step}  {note}  {rate:,.0f} items/s  {_clock(left)} left")

    def say(self, line: str) -> None:
        """One line on stderr, above the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.console.print(line, highlight=False, markup=False)
        else:
            sys.stderr.write(line + "\n")
            sys.stderr.flush()

    def close(self) -> None:
        """Leave the terminal as it was."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _rich_bar() -> Any:
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn
    except ImportError:
        return None
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def _clock(seconds: float) -> str:
    if not math.isfinite(seconds):
        return "?"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
