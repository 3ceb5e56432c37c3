"""Ctrl-C and SIGTERM asked for the end: finish the step, write a checkpoint, exit with 130."""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType
from typing import Any

SAME_REQUEST_SECONDS = 1.0


class Interrupted(SystemExit):
    """Training stopped by a signal after a whole step, checkpoint written; uncaught, the exit code is 130."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(130)
        self.step = step
        self.message = message

    def __str__(self) -> str:
        return self.message


class StopRequest:
    """Inside this context the first SIGINT or SIGTERM sets `asked`; a later one acts as ever.

    Within a second it is taken for the same one: under torchrun a Ctrl-C arrives twice. Signals reach the
    main thread only: elsewhere nothing is installed, and `asked` stays False.
    """

    def __init__(self) -> None:
        self.asked = False
        self._first = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _ask(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked and now - self._first > SAME_REQUEST_SECONDS:
            self._restore()
            signal.raise_signal(number)
        elif not self.asked:
            self.asked, self._first = True, now

    def _restore(self) -> None:
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)
