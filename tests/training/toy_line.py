"""A toy world with a known answer: noise-free y = w . x + b, learned through a batch norm and a dropout."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchfilm.training import Draw, EpochOrder, Loss, TrainConfig, train

TRUE_WEIGHTS = torch.tensor([1.5, -2.0, 0.5], dtype=torch.float64)
TRUE_BIAS = 0.25


class Line(nn.Module):
    """BatchNorm, dropout (off by default) and one linear layer: the true line is among its functions."""

    def __init__(self, *, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(3, 1)
        generator = torch.Generator().manual_seed(7)
        for p in self.head.parameters():
            nn.init.normal_(p, std=0.3, generator=generator)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(self.norm(x)))[:, 0]


class Points:
    """57 points of the line, in the order of epochs; remembers which steps were asked for."""

    def __init__(self) -> None:
        rng = np.random.default_rng(11)
        self.x = torch.from_numpy(rng.normal(size=(57, 3)) * [1.0, 2.0, 0.5] + [0.0, 1.0, -1.0])
        self.y = self.x @ TRUE_WEIGHTS + TRUE_BIAS
        self.order = EpochOrder(57)
        self.asked: list[Draw] = []

    def __call__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        self.asked.append(draw)
        chosen = self.order.indices(draw)
        return self.x[chosen], self.y[chosen]


def squared_error(module: nn.Module, batch: tuple[Tensor, Tensor]) -> Loss:
    x, y = batch
    error = module(x) - y
    return Loss(error.square().mean(), len(y), {"absolute": error.abs().mean()})


def toy_config(**changes: object) -> TrainConfig:
    fields = {
        "steps": 24,
        "batch_size": 13,
        "seed": 3,
        "lr": 0.05,
        "warmup_steps": 3,
        "ema": 0.9,
        "log_steps": 5,
        "evaluate_steps": 6,
        "checkpoint_steps": 4,
        "checkpoint_seconds": None,
        "tensorboard": False,
    }
    return TrainConfig(**{**fields, **changes})  # type: ignore[arg-type]


def mean_error(module: nn.Module) -> dict[str, float]:
    points = Points()
    return {"error": float((module(points.x) - points.y).abs().mean())}


def learned(run: Path) -> dict[str, bytes]:
    """Every byte of a run's newest checkpoint and of its final weights."""
    newest = max((run / "checkpoints").glob("step_*"))
    files = {p.name: p.read_bytes() for p in newest.glob("*.safetensors")}
    return {**files, "final": (run / "weights.safetensors").read_bytes()}


def told(run: Path) -> list[dict[str, object]]:
    """The lines of a run's metrics, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "items_per_second")
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


def main(out: str, resume: str, signal_name: str, at_step: str, dropout: str) -> None:
    """Train in a process of its own, which sends itself a signal when it draws the batch of `at_step`."""
    points = Points()

    def batches(draw: Draw) -> tuple[Tensor, Tensor]:
        if draw.step == int(at_step):
            os.kill(os.getpid(), getattr(signal, signal_name))
        return points(draw)

    module = Line(dropout=float(dropout))
    train(
        module,
        squared_error,
        batches,
        toy_config(),
        Path(out),
        evaluate=mean_error,
        resume=resume == "resume",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
