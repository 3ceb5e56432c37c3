"""The optimiser a config asks for, its state as named tensors, and the average of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .config import TrainConfig


def build_optimiser(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW, or Adam with L2, over the module's trainable parameters, weight decay where the config says.

    The fused kernel is used: on a CPU one step over 60 small tensors costs a fraction of the loop over them.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"build_optimiser: expected trainable parameters, got a {type(module).__name__} with none. "
            "Are all parameters frozen (requires_grad False)?"
        )
    decayed = [p for _, p in named if config.decay == "all" or p.ndim >= 2]
    spared = [p for _, p in named if not (config.decay == "all" or p.ndim >= 2)]
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": spared, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in named)
    kind = torch.optim.AdamW if config.optimiser == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def optimiser_tensors(module: nn.Module, optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimiser's state by name, PARAMETER/SLOT, such as conv.weight/exp_avg."""
    tensors = {}
    for name, p in module.named_parameters():
        for slot, value in optimiser.state.get(p, {}).items():
            tensors[f"{name}/{slot}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    return tensors


def restore_optimiser(
    module: nn.Module, optimiser: torch.optim.Optimizer, tensors: Mapping[str, Tensor]
) -> None:
    """Put named state back, each tensor in its parameter's layout; checks all before it changes any."""
    parameters = dict(module.named_parameters())
    trained = {id(p) for group in optimiser.param_groups for p in group["params"]}
    states: dict[str, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        name, _, slot = key.rpartition("/")
        if name not in parameters or id(parameters[name]) not in trained:
            raise ValueError(
                f"restore_optimiser: the checkpoint has {key!r}, the module trains no parameter {name!r}. "
                "Build the module as in the first run, with the same parameters frozen."
            )
        p = parameters[name]
        if value.ndim and value.shape != p.shape:
            raise ValueError(
                f"restore_optimiser: state {key!r} has shape {tuple(value.shape)}, parameter {name!r} "
                f"has {tuple(p.shape)}. Build the module as in the first run."
            )
        own = (
            torch.empty_like(p, requires_grad=False).copy_(value)
            if value.ndim
            else value.to(p.device).clone()
        )
        states.setdefault(name, {})[slot] = own
    optimiser.state.clear()
    for name, state in states.items():
        optimiser.state[parameters[name]] = state


class WeightAverage:
    """Exponential moving average of a module's weights and buffers.

    After update t (from 1): average <- d average + (1 - d) weights, d = min(decay, (1 + t) / (10 + t)),
    so that the start is forgotten quickly. Integer buffers are copied.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.tensors: dict[str, Tensor] = {}
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._copies: list[tuple[Tensor, Tensor]] = []
        averages: dict[tuple[object, ...], Tensor] = {}  # tied weights share one average
        for name, value in module.state_dict().items():
            place = (value.data_ptr(), value.shape, value.stride()) if value.numel() else (name,)
            if place not in averages:
                averages[place] = value.detach().clone()
                pairs = self._pairs if value.is_floating_point() else self._copies
                pairs.append((averages[place], value))
            self.tensors[name] = averages[place]

    @torch.no_grad()
    def update(self) -> None:
        """Take the module's present weights into the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        averages, weights = [a for a, _ in self._pairs], [w for _, w in self._pairs]
        torch._foreach_lerp_(averages, weights, 1.0 - decay)  # type: ignore[reportPrivateImportUsage]
        for average, value in self._copies:
            average.copy_(value)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange average and weights, bit for bit; a second call undoes the first."""
        for average, value in self._pairs + self._copies:
            before = value.clone()
            value.copy_(average)
            average.copy_(before)
