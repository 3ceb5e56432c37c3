from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from toy_line import Line, Points, learned, mean_error, squared_error, told, toy_config

from torchfilm.training import Draw, Interrupted, train
from torchfilm.training.interruption import StopRequest

TOY = Path(__file__).with_name("toy_line.py")


def in_a_process(out: Path, signal_name: str, at_step: int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOY), str(out), "start", signal_name, str(at_step), "0.3"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("uninterrupted") / "run"
    train(Line(dropout=0.3), squared_error, Points(), toy_config(), out, evaluate=mean_error)
    return out


def go_on(out: Path) -> list[int]:
    points = Points()
    train(Line(dropout=0.3), squared_error, points, toy_config(), out, evaluate=mean_error, resume=True)
    return [draw.step for draw in points.asked]


def test_a_killed_run_loses_the_last_interval_and_goes_on_to_the_bit(
    tmp_path: Path, uninterrupted: Path
) -> None:
    ended = in_a_process(tmp_path / "run", "SIGKILL", at_step=11)
    assert ended.returncode == -signal.SIGKILL
    assert go_on(tmp_path / "run") == list(range(8, 24))
    assert learned(tmp_path / "run") == learned(uninterrupted)
    assert told(tmp_path / "run") == told(uninterrupted)


def test_ctrl_c_ends_the_step_saves_and_exits_with_130(tmp_path: Path, uninterrupted: Path) -> None:
    ended = in_a_process(tmp_path / "run", "SIGINT", at_step=9)
    assert ended.returncode == 130
    assert "stopped at step 10; to go on, run the same command with --resume\n" in ended.stderr
    assert "Traceback" not in ended.stderr
    assert ended.stdout == ""
    assert go_on(tmp_path / "run") == list(range(10, 24))
    assert learned(tmp_path / "run") == learned(uninterrupted)
    assert told(tmp_path / "run") == told(uninterrupted)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_either_signal_stops_and_the_handlers_are_put_back(
    tmp_path: Path, number: signal.Signals, uninterrupted: Path
) -> None:
    points = Points()

    def batches(draw: Draw) -> object:
        if draw.step == 5:  # the end of the step is where an evaluation is due: it comes after resuming
            signal.raise_signal(number)
        return points(draw)

    before = signal.getsignal(number)
    with pytest.raises(Interrupted, match="stopped at step 6") as caught:
        train(Line(dropout=0.3), squared_error, batches, toy_config(), tmp_path, evaluate=mean_error)
    assert caught.value.code == 130
    assert caught.value.step == 6
    assert signal.getsignal(number) is before
    go_on(tmp_path)
    assert learned(tmp_path) == learned(uninterrupted)
    assert told(tmp_path) == told(uninterrupted)


@pytest.fixture
def ctrl_c_interrupts():
    """Python's own handler: a shell that starts the tests in the background has SIGINT ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_a_second_ctrl_c_breaks_at_once_unless_it_is_the_first_one_arriving_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [50.0]
    monkeypatch.setattr("torchfilm.training.interruption.time.monotonic", lambda: now[0])
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.asked
        now[0] += 0.3
        signal.raise_signal(signal.SIGTERM)
        now[0] += 1.0

        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
