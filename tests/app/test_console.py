"""What commands print: tables that are whole, and progress that tells a rate."""

import contextlib
import os
import pty
import sys
from collections.abc import Callable

import pytest

from torchfilm.app import console

COLUMNS = ["told [middle half]", *(f"a column of numbers {i}" for i in range(8))]
ROWS = [
    ["reach [a] :cat:", *(f"{i}0.5 % of 300" for i in range(8))],
    [],
    ["push", *(f"{i}" for i in range(8))],
]


def on_a_terminal(write: Callable[[], None], monkeypatch: pytest.MonkeyPatch) -> str:
    """Return what is written to a terminal of 80 columns."""
    reader, writer = pty.openpty()
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERM", "xterm")
    with os.fdopen(writer, "w") as stream, contextlib.redirect_stdout(stream):
        assert sys.stdout.isatty()
        write()
        stream.flush()
        found = os.read(reader, 1 << 16).decode()
    os.close(reader)
    return found


@pytest.mark.parametrize("terminal", [False, True])
def test_every_cell_of_a_table_is_written(terminal: bool, monkeypatch: pytest.MonkeyPatch, capsys):
    if terminal:
        text = on_a_terminal(lambda: console.table(COLUMNS, ROWS), monkeypatch)
    else:
        console.table(COLUMNS, ROWS)
        text = capsys.readouterr().out
    for cell in [*COLUMNS, *ROWS[0], *ROWS[2]]:
        assert cell in text
    assert len(text.splitlines()) == 4


def progress(monkeypatch: pytest.MonkeyPatch, capsys, calls: list[tuple[float, int]]) -> list[str]:
    """Return the lines about calls at these seconds with so many of 100 done."""
    clock = iter([0.0, *(seconds for seconds, _ in calls)])
    monkeypatch.setattr(console.time, "monotonic", lambda: next(clock))
    monkeypatch.setattr(console, "QUIET_SECONDS", 0)
    with console.Bar("training", "steps") as bar:
        for _, done in calls:
            bar(done, 100)
    return capsys.readouterr().err.splitlines()


def test_the_first_call_tells_a_rate_too(monkeypatch: pytest.MonkeyPatch, capsys):
    found = progress(monkeypatch, capsys, [(4.0, 1), (8.0, 2), (10.0, 100)])
    assert found[0] == "training  1 of 100  0.25 steps/s  396 s left"
    assert found[1] == "training  2 of 100  0.25 steps/s  392 s left"
    assert found[2] == "training  100 of 100  10 steps/s  0 s left"


def test_a_fast_first_call_is_counted(monkeypatch: pytest.MonkeyPatch, capsys):
    found = progress(monkeypatch, capsys, [(0.5, 60), (2.0, 80)])
    assert [line.split("  ", 2)[2] for line in found] == ["120 steps/s  0 s left", "40 steps/s  0 s left"]


def test_another_round_starts_where_the_last_one_ended(monkeypatch: pytest.MonkeyPatch, capsys):
    found = progress(monkeypatch, capsys, [(4.0, 100), (6.0, 10), (8.0, 20)])
    assert [line.split("  ")[2] for line in found] == ["25 steps/s", "5 steps/s", "5 steps/s"]
