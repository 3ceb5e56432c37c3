from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from toy_line import Points, toy_config

from torchfilm.training import Draw, Loss, NonFiniteError, train


class Planted(nn.Module):
    """Passes its input on; at the call number `at` it makes what is planted."""

    def __init__(self, planted: str) -> None:
        super().__init__()
        self.planted = planted
        self.active = False

    def forward(self, x: Tensor) -> Tensor:
        if not self.active:
            return x
        if self.planted == "output":
            return torch.where(torch.arange(x.shape[1]) == 1, float("nan"), x)
        zero = x - x.detach()
        return x + (zero + 0.0).sqrt() * 0.0  # finite forward, 0 * inf = nan backward


class Chain(nn.Module):
    def __init__(self, planted: str) -> None:
        super().__init__()
        torch.manual_seed(2)
        self.first = nn.Linear(3, 5)
        self.blocks = nn.ModuleList([nn.Linear(5, 5), Planted(planted), nn.Linear(5, 5)])
        self.head = nn.Linear(5, 1)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        for block in self.blocks:
            x = block(x)
        return self.head(x)[:, 0]


def attempt(tmp_path: Path, planted: str) -> tuple[NonFiniteError, Chain]:
    module, points = Chain(planted), Points()

    def batches(draw: Draw) -> tuple[Tensor, Tensor]:
        x, y = points(draw)
        if draw.step == 6:
            planter = module.blocks[1]
            assert isinstance(planter, Planted)
            planter.active = planted in ("output", "gradient")
            if planted == "batch":
                y = y.clone()
                y[2] = float("inf")
            if planted == "parameter":
                module.head.weight.data[0, 1] = float("nan")
        return x, y

    def loss(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
        value = (module(batch[0]) - batch[1]).square().mean()
        if planted == "loss" and len(points.asked) == 7:
            value = value / (value - value.detach())
        return Loss(value, len(batch[1]))

    with pytest.raises(
        NonFiniteError, match=r"Training stopped at step 6: .*last good checkpoint is .*step_0000004"
    ) as e:
        train(module, loss, batches, toy_config(evaluate_steps=None), tmp_path)
    return e.value, module


@pytest.mark.parametrize(
    ("planted", "where"),
    [
        ("output", "the output of layer 'blocks.1' (Planted)"),
        ("gradient", "the gradient that arrives at the output of layer 'blocks.0' (Linear)"),
        ("batch", "the batch, in batch[1]"),
        ("parameter", "parameter 'head.weight' itself"),
        ("loss", "the loss function: every module's output is finite"),
    ],
)
def test_the_place_of_a_nan_is_named(tmp_path: Path, planted: str, where: str) -> None:
    error, module = attempt(tmp_path, planted)
    assert error.step == 6
    assert error.where == where
    assert where in str(error)
    assert all(not m._forward_hooks for m in module.modules())
    assert not (tmp_path / "weights.safetensors").exists()
