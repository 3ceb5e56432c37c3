from __future__ import annotations

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from torchfilm.training.metrics import Events, Mean, MetricsFile, ProgressLine


def test_a_mean_is_weighted_by_items_and_goes_on_from_its_state() -> None:
    whole, first = Mean(), Mean()
    for mean in (whole, first):
        mean.add({"loss": 0.1, "rare": 7.0}, 3)
    second = Mean(json.loads(json.dumps(first.state())))
    for mean in (whole, second):
        mean.add({"loss": 0.7}, 5)
    assert whole.result() == {"loss": pytest.approx((0.1 * 3 + 0.7 * 5) / 8), "rare": 7.0}
    assert second.result() == whole.result()
    assert second.state() == whole.state()


def test_lines_after_the_checkpoint_are_cut_off_and_half_lines_too(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path, size=0)
    first.write({"step": 1})
    size = first.size
    first.write({"step": 2})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    second = MetricsFile(path, size=size)
    second.write({"step": 2, "loss": float("nan")})
    second.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2, "loss": None},
    ]


def test_tensorboard_reads_what_was_written_once_per_step(tmp_path: Path) -> None:
    first = Events(tmp_path, wanted=True, step=0)
    for step in (5, 10):
        first.write("train", step, {"loss": 1.0 / step})
    first.close()
    second = Events(tmp_path, wanted=True, step=5)  # resumed from a checkpoint of step 5
    second.write("train", 10, {"loss": 0.25})
    second.close()
    read = EventAccumulator(str(tmp_path)).Reload()
    scalars = read.Scalars("train/loss")
    assert [e.step for e in scalars] == [5, 10]
    assert [e.value for e in scalars] == pytest.approx([0.2, 0.25])


def test_no_events_are_written_unless_wanted(tmp_path: Path) -> None:
    events = Events(tmp_path / "tensorboard", wanted=False, step=0)
    events.write("train", 1, {"loss": 1.0})
    events.close()
    assert not (tmp_path / "tensorboard").exists()


def test_off_the_terminal_there_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("torchfilm.training.metrics.time.monotonic", lambda: now[0])
    line = ProgressLine(shown=True)
    for step in range(1, 81):  # 80 steps of one second, 64 items each
        now[0] += 1.0
        line.update(step / 160, step, float(step), 64, {"loss": 0.5})
    line.close()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.splitlines()) == 2
    assert "37.5%  step 60  loss 0.5  64 items/s  1:40 left" in captured.err


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(shown=False)
    line.say("hello")
    line.update(0.5, 1, 1.0, 1, {})
    line.close()
    assert capsys.readouterr().err == ""
