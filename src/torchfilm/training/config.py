"""What a training run is: budget, optimiser, schedule, precision, intervals, as one frozen value."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints


@dataclass(frozen=True)
class TrainConfig:
    """All that decides how a module is trained; two runs with equal configs, data and module are equal.

    Exactly one of `steps` and `minutes` is the budget. With `steps` the schedule is a function of the
    step and a resumed run equals the uninterrupted one to the bit. (With `compile`: up to the order in
    which the compiler meets the shapes.) With `minutes` it is a function of the wall clock, so a resumed
    run is the same up to the clock. Everything done inside `train` counts: batches, compilation,
    checkpoints, evaluations on the way; only the evaluation after the last step does not.
    """

    steps: int | None = None
    minutes: float | None = None
    batch_size: int = 64
    """Items in the global batch, over all processes."""
    seed: int = 0
    optimiser: Literal["adamw", "adam_l2", "muon"] = "adamw"
    """`adam_l2` adds weight_decay * w to the gradient, as the FiLM paper's Adam does (3e-4 and 1e-5).
    `muon` makes the updates of matrices and kernels orthogonal (`optimisers.Muon`), at AdamW's rates;
    vectors, embeddings and `outputs` remain AdamW's."""
    outputs: tuple[str, ...] = ()
    """With `muon`, modules by name whose rows are answers and not features: the last layers."""
    lr: float = 3e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-2
    decay: Literal["matrices", "all"] = "matrices"
    """What weight_decay applies to: parameters of two and more dimensions, or every parameter."""
    grad_clip: float | None = 5.0
    """Largest norm of the whole gradient."""
    warmup_steps: int = 100
    schedule: Literal["constant", "linear", "cosine"] = "linear"
    """`linear`: constant, then in a straight line to 0 over the last `cooldown` of the budget."""
    cooldown: float = 0.3
    ema: float | None = 0.998
    """Decay of the weight average; None trains without one."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """`bfloat16` runs the loss under autocast; weights and optimiser stay as they are."""
    compile: bool = False
    checkpoint_seconds: float | None = 60.0
    checkpoint_steps: int | None = None
    keep: int = 2
    """How many checkpoints stay on disk."""
    log_steps: int = 50
    evaluate_steps: int | None = None
    evaluate_seconds: float | None = None
    best: str | None = None
    """Name of a measured value: the weights count at which an evaluation found it largest, the first of
    equals. None, or without evaluations: the last weights count."""
    tensorboard: bool = True

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(
                f"TrainConfig: expected one budget, got steps={self.steps} and minutes={self.minutes}. "
                "Set steps for a run that resumes to the bit, or minutes for one that ends with the clock."
            )
        positive = ("steps", "minutes", "batch_size", "lr", "grad_clip", "keep", "log_steps")
        positive += ("checkpoint_seconds", "checkpoint_steps", "evaluate_steps", "evaluate_seconds")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"TrainConfig.{name}: expected a number above 0, got {value}.")
        for name in ("warmup_steps", "weight_decay", "seed"):
            if getattr(self, name) < 0:
                raise ValueError(f"TrainConfig.{name}: expected 0 or more, got {getattr(self, name)}.")
        if self.seed >= 2**63:
            raise ValueError(f"TrainConfig.seed: expected a number below 2**63, got {self.seed}.")
        if not 0 < self.cooldown <= 1:
            raise ValueError(f"TrainConfig.cooldown: expected a share in (0, 1], got {self.cooldown}.")
        if self.ema is not None and not 0 <= self.ema < 1:
            raise ValueError(f"TrainConfig.ema: expected a decay in [0, 1) or None, got {self.ema}.")
        for name, allowed in _CHOICES.items():
            got = getattr(self, name)
            if got not in allowed:
                raise ValueError(f"TrainConfig.{name}: expected one of {', '.join(allowed)}, got {got!r}.")

    def progress(self, step: int, seconds: float) -> float:
        """Spent share of the budget in [0, 1] before step number `step` (from 0), at `seconds`."""
        if self.steps is not None:
            return min(step / self.steps, 1.0)
        assert self.minutes is not None
        return min(seconds / (60.0 * self.minutes), 1.0)

    def learning_rate(self, step: int, progress: float) -> float:
        """Learning rate of step number `step`: lr * min(1, (step + 1) / warmup_steps) * shape(progress)."""
        warm = min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else 1.0
        if self.schedule == "cosine":
            shape = 0.5 * (1.0 + math.cos(math.pi * progress))
        elif self.schedule == "linear":
            shape = min(1.0, (1.0 - progress) / self.cooldown)
        else:
            shape = 1.0
        return self.lr * warm * shape


_CHOICES = {
    name: get_args(kind) for name, kind in get_type_hints(TrainConfig).items() if get_origin(kind) is Literal
}
