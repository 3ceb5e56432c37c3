from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from toy import TRUE_BIAS, TRUE_WEIGHTS, Line, Points, mean_error, squared_error, toy_config

from torchfilm.training import Draw, train


def files_of(run: Path) -> dict[str, bytes]:
    newest = max((run / "checkpoints").glob("step_*"))
    files = {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}
    return {**files, "final": (run / "weights.safetensors").read_bytes()}


def lines_of(run: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "items_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def test_the_true_line_is_found(tmp_path: Path) -> None:
    module, points = Line(), Points()
    config = toy_config(steps=400, batch_size=57, lr=0.1, weight_decay=0.0)
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
    assert files_of(broken) == files_of(whole)
    assert lines_of(broken) == lines_of(whole)
