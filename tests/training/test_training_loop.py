from __future__ import annotations

import json
import math
import os
import pty
import re
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from toy_line import (
    TRUE_BIAS,
    TRUE_WEIGHTS,
    Line,
    Points,
    learned,
    mean_error,
    squared_error,
    told,
    toy_config,
)

from torchfilm.training import CheckpointError, Draw, Loss, find_weights, started, train
from torchfilm.training.distributed import Ranks


def test_the_true_line_is_found(tmp_path: Path) -> None:
    module, points = Line(), Points()
    config = toy_config(
        steps=400, batch_size=57, lr=0.1, weight_decay=0.0, evaluate_steps=None, checkpoint_steps=None
    )
    result = train(module, squared_error, points, config, tmp_path / "run", evaluate=mean_error)
    assert result.steps == 400
    assert result.evaluation["error"] < 0.05
    norm = module.norm
    slope = (module.head.weight[0] * norm.weight / (norm.running_var + norm.eps).sqrt()).detach()
    at_mean = module.head.bias.detach() + module.head.weight[0].detach() @ norm.bias.detach()
    # In training a batch norm divides by the biased variance, in evaluation by the unbiased one of 57 points.
    torch.testing.assert_close(slope, TRUE_WEIGHTS * (56 / 57) ** 0.5, atol=1e-3, rtol=0)
    assert float(at_mean) == pytest.approx(float(TRUE_WEIGHTS @ points.x.mean(0) + TRUE_BIAS), abs=1e-3)


@pytest.mark.parametrize("stop_at", [4, 5, 10, 23])
def test_a_stopped_and_resumed_run_equals_the_uninterrupted_one_to_the_bit(
    tmp_path: Path, stop_at: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    config = toy_config()
    train(Line(dropout=0.3), squared_error, Points(), config, whole, evaluate=mean_error)

    points = Points()

    def failing(draw: Draw) -> object:
        if draw.step == stop_at:
            raise KeyError("the power is gone")
        return points(draw)

    with pytest.raises(KeyError, match="power"):
        train(Line(dropout=0.3), squared_error, failing, config, broken, evaluate=mean_error)
    torch.manual_seed(99)
    other = Line(dropout=0.3)
    torch.nn.init.normal_(other.head.weight)
    train(other, squared_error, Points(), config, broken, evaluate=mean_error, resume=True)
    assert learned(broken) == learned(whole)
    assert told(broken) == told(whole)


def test_each_step_is_told_once(tmp_path: Path) -> None:
    train(Line(), squared_error, Points(), toy_config(), tmp_path, evaluate=mean_error)
    steps = [(line["split"], line["step"]) for line in told(tmp_path)]
    logged = [("train", s) for s in (5, 10, 15, 20, 24)]
    assert sorted(steps) == sorted(logged + [("evaluate", s) for s in (6, 12, 18, 24)])


def test_progress_in_a_draw_is_the_share_of_the_budget(tmp_path: Path) -> None:
    points = Points()
    train(Line(), squared_error, points, toy_config(), tmp_path)
    assert [d.step for d in points.asked] == list(range(24))
    assert [d.progress for d in points.asked] == [s / 24 for s in range(24)]


def test_minutes_end_the_run_and_count_on_over_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [500.0]

    def tick() -> float:  # the loop looks at the clock once per step: a step takes an eighth of a second
        now[0] += 0.125
        return now[0]

    monkeypatch.setattr("torchfilm.training.loop.time", SimpleNamespace(monotonic=tick))
    config = toy_config(steps=None, minutes=0.25, schedule="linear", cooldown=1.0, log_steps=1)  # 120 steps
    points = Points()

    def failing(draw: Draw) -> object:
        if draw.step == 66:
            raise KeyError("the power is gone")
        return points(draw)

    with pytest.raises(KeyError, match="power"):
        train(Line(), squared_error, failing, config, tmp_path)
    now[0] += 1000.0  # the time between does not count
    result = train(Line(), squared_error, points, config, tmp_path, resume=True)
    assert 15.0 <= result.seconds < 15.5
    assert 118 <= result.steps <= 122
    progress = [draw.progress for draw in points.asked]
    assert points.asked[66].step == 64
    assert progress[66] == pytest.approx(progress[64], abs=0.02)
    assert progress[-1] == pytest.approx(1.0, abs=0.02)
    rates = [line["lr"] for line in told(tmp_path)]
    assert rates[60] == pytest.approx(0.05 * (1 - progress[60]))
    assert len(rates) == result.steps


def test_evaluation_sees_the_average_in_eval_mode_and_leaves_no_trace(tmp_path: Path) -> None:
    seen = []

    def evaluate(module: torch.nn.Module) -> dict[str, float]:
        assert isinstance(module, Line)
        seen.append((module.training, module.norm.training, torch.is_grad_enabled()))
        torch.rand(5)
        return {"slope": float(module.head.weight.detach()[0, 0])}

    with_it, without = tmp_path / "with", tmp_path / "without"
    module = Line(dropout=0.3)
    module.norm.eval()  # a part the caller froze stays as it is
    result = train(module, squared_error, Points(), toy_config(), with_it, evaluate=evaluate)
    other = Line(dropout=0.3)
    other.norm.eval()
    train(other, squared_error, Points(), toy_config(), without)
    assert learned(with_it) == learned(without)
    assert seen == [(False, False, False)] * 4
    assert result.evaluation == {"slope": float(module.head.weight.detach()[0, 0])}
    assert (module.training, module.norm.training) == (True, False)


def score_of_step(module: torch.nn.Module) -> dict[str, float]:
    """A score with its largest value at step 12, again at 18, and none at 6."""
    assert isinstance(module, Line)
    steps = int(module.norm.num_batches_tracked or 0)
    return {"steps": steps, "score": {6: math.nan, 12: 0.9, 18: 0.9, 24: 0.5}[steps]}


def test_the_weights_of_the_best_evaluation_count(tmp_path: Path) -> None:
    config, module = toy_config(best="score", keep=99), Line()
    result = train(module, squared_error, Points(), config, tmp_path, evaluate=score_of_step)
    at_12 = load_file(tmp_path / "checkpoints" / "step_0000012" / "ema.safetensors")
    for name, value in module.state_dict().items():
        assert torch.equal(value, at_12[name])
        assert torch.equal(load_file(result.weights)[name], at_12[name])
    assert result.evaluation == {"steps": 12, "score": 0.9}
    with pytest.raises(ValueError, match=r"expected evaluate to give best='score', got error"):
        train(Line(), squared_error, Points(), config, tmp_path / "other", evaluate=mean_error)


@pytest.mark.parametrize("stop_at", [14, 17, 23])
def test_the_best_weights_survive_a_stop_to_the_bit(tmp_path: Path, stop_at: int) -> None:
    whole, broken, config = tmp_path / "whole", tmp_path / "broken", toy_config(best="score")
    train(Line(), squared_error, Points(), config, whole, evaluate=score_of_step)
    points = Points()

    def failing(draw: Draw) -> object:
        if draw.step == stop_at:
            raise KeyError("the power is gone")
        return points(draw)

    with pytest.raises(KeyError, match="power"):
        train(Line(), squared_error, failing, config, broken, evaluate=score_of_step)
    found = find_weights(broken).parent.name, find_weights(broken).name
    assert (
        found
        == {
            14: ("step_0000012", "ema.safetensors"),
            17: ("step_0000016", "best.safetensors"),
            23: ("step_0000020", "best.safetensors"),
        }[stop_at]
    )
    result = train(Line(), squared_error, Points(), config, broken, evaluate=score_of_step, resume=True)
    assert learned(broken) == learned(whole)
    assert "best.safetensors" in learned(whole)
    assert result.evaluation == {"steps": 12, "score": 0.9}


def test_channels_last_weights_resume_to_the_bit(tmp_path: Path) -> None:
    def build() -> torch.nn.Module:
        torch.manual_seed(4)
        convolution = torch.nn.Conv2d(3, 5, 3)
        return torch.nn.Sequential(convolution, torch.nn.BatchNorm2d(5)).to(memory_format=torch.channels_last)

    def loss(module: torch.nn.Module, x: torch.Tensor) -> Loss:
        return Loss((module(x) - x[:, :1, 1:-1, 1:-1]).abs().mean(), len(x))

    def batches(draw: Draw) -> torch.Tensor:
        return torch.from_numpy(draw.rng().normal(size=(2, 3, 7, 11))).float()

    config = toy_config(precision="bfloat16")
    train(build(), loss, batches, config, tmp_path / "whole")

    def failing(draw: Draw) -> torch.Tensor:
        if draw.step == 13:
            raise KeyError("the power is gone")
        return batches(draw)

    with pytest.raises(KeyError, match="power"):
        train(build(), loss, failing, config, tmp_path / "broken")
    train(build(), loss, batches, config, tmp_path / "broken", resume=True)
    assert learned(tmp_path / "broken") == learned(tmp_path / "whole")


def test_a_loss_of_another_kind_is_refused(tmp_path: Path) -> None:
    def mean_only(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return squared_error(module, batch).value

    with pytest.raises(ValueError, match=r"expected loss\(module, batch\) to give a Loss .* got Tensor"):
        train(Line(), mean_only, Points(), toy_config(), tmp_path / "a")  # type: ignore[arg-type]

    def unreduced(module: torch.nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> Loss:
        return Loss((module(batch[0]) - batch[1]).square(), len(batch[1]))

    with pytest.raises(ValueError, match=r"got value of shape \(13,\)"):
        train(Line(), unreduced, Points(), toy_config(), tmp_path / "b")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # torch's own, in inductor
def test_a_compiled_module_learns_the_same(tmp_path: Path) -> None:
    eager = train(Line(), squared_error, Points(), toy_config(), tmp_path / "eager", evaluate=mean_error)
    module = _Watched()
    config = toy_config(compile=True)
    compiled = train(module, squared_error, Points(), config, tmp_path / "compiled", evaluate=mean_error)
    assert compiled.train["loss"] == pytest.approx(eager.train["loss"], rel=1e-9)
    assert module._compiled_call_impl is None
    assert module.compiled == {True: True, False: False}  # evaluation's shapes are not worth their compiling


def test_a_module_whose_compiling_is_interrupted_is_left_as_it_was(tmp_path: Path) -> None:
    class Interrupted(Line):
        def compile(self) -> None:
            self._compiled_call_impl = self._call_impl
            raise KeyboardInterrupt

    module = Interrupted()
    with pytest.raises(KeyboardInterrupt):
        train(module, squared_error, Points(), toy_config(compile=True), tmp_path)
    assert module._compiled_call_impl is None


class _Watched(Line):
    """The line; `compiled` tells by mode (training or not) whether its forward was compiled."""

    compiled: ClassVar[dict[bool, bool]] = {}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.compiled[self.training] = torch.compiler.is_compiling()
        return super().forward(x)


def test_fewer_items_than_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchfilm.training.loop.joined", lambda device: nullcontext(Ranks(1, 3)))
    with pytest.raises(ValueError, match=r"expected batch_size >= 3, one item for each process, got 2"):
        train(Line(), squared_error, Points(), toy_config(batch_size=2), tmp_path)


def test_the_bar_on_a_terminal_shows_rate_and_time_left_and_leaves_stdout_alone(tmp_path: Path) -> None:
    main, side = pty.openpty()
    code = (
        "from torchfilm.training.metrics import ProgressLine; import time\n"
        "line = ProgressLine(shown=True)\n"
        "for step in range(3):\n"
        "    time.sleep(0.6); line.update((step + 1) / 40, step, 0.6 * step, 60, {'loss': 0.5})\n"
        "line.close()"
    )
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "120"}
    ended = subprocess.run(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=side,
        env=environment,
        timeout=600,
        check=True,
    )
    os.close(side)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    assert ended.stdout == b""
    assert "items/s" in shown
    assert "loss 0.5" in shown
    assert re.search(r"  8%.* \x1b\[36m0:0\d:\d\d", shown)


def test_a_run_and_its_weights_are_named_by_a_text_too(tmp_path: Path) -> None:
    out = str(tmp_path / "run")
    assert not started(out)
    result = train(Line(), squared_error, Points(), toy_config(steps=1), out)
    assert started(out)
    assert find_weights(out) == result.weights


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("counters"), r"KeyError\('counters'\)"),
        (lambda state: state.pop("window"), r"KeyError\('window'\)"),
        (lambda state: state["counters"].update(later=1), "TypeError.* unexpected keyword argument 'later'"),
        (lambda state: state["sha256"].clear(), r"KeyError\('ema'\)"),
    ],
)
def test_a_state_of_another_version_is_named(tmp_path: Path, change: Any, said: str) -> None:
    train(Line(), squared_error, Points(), toy_config(steps=4), tmp_path)
    folder = tmp_path / "checkpoints" / "step_0000004"
    state = json.loads((folder / "state.json").read_text())
    change(state)
    (folder / "state.json").write_text(json.dumps(state))
    (folder / "state.sha256").unlink()
    with pytest.raises(
        CheckpointError, match=rf"step_0000004: expected the state of a run, got {said}.* another ver"
    ):
        train(Line(), squared_error, Points(), toy_config(steps=4), tmp_path, resume=True)
