"""The optimiser a config asks for, its state as named tensors, and the average of weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

from .config import TrainConfig

_MOMENTUM = 0.95  # of Muon


def build_optimiser(module: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """What the config asks for, over the module's trainable parameters, weight decay where it says.

    The fused kernel is used: on a CPU one step over 60 small tensors costs a fraction of the loop over them.
    Raises ValueError for a module without any, and for `outputs` that are no modules of it.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            f"build_optimiser: expected trainable parameters, got a {type(module).__name__} with none. "
            "Are all parameters frozen (requires_grad False)?"
        )
    inner = _inner(module, config.outputs) if config.optimiser == "muon" else set()
    sorts: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in named:
        sorts.setdefault((name in inner, config.decay == "all" or p.ndim >= 2), []).append(p)
    groups = [
        {"params": sort, "weight_decay": config.weight_decay if decayed else 0.0, "orthogonal": orthogonal}
        for (orthogonal, decayed), sort in sorted(sorts.items(), reverse=True)
    ]
    fused = all(p.is_floating_point() and p.device.type in ("cpu", "cuda") for _, p in named)
    kind = {"adamw": torch.optim.AdamW, "adam_l2": torch.optim.Adam, "muon": Muon}[config.optimiser]
    return kind(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def _inner(module: nn.Module, outputs: tuple[str, ...]) -> set[str]:
    """Names of the weights between features: matrices and kernels, not embeddings and not the outputs'."""
    modules = dict(module.named_modules())
    unknown = [name for name in outputs if name not in modules]
    if unknown:
        raise ValueError(
            f"build_optimiser: expected outputs among the modules of {type(module).__name__}, got "
            f"{', '.join(unknown)}. Name the layers that predict, as named_modules() does."
        )
    return {
        f"{name}.{own}" if name else own
        for name, part in modules.items()
        if name not in outputs and not isinstance(part, nn.Embedding | nn.EmbeddingBag)
        for own, p in part.named_parameters(recurse=False)
        if p.ndim >= 2
    }


class Muon(torch.optim.AdamW):
    """AdamW, and for groups that are `orthogonal` momentum whose updates are made orthogonal.

        m <- 0.95 m + 0.05 g,  U S V^T = 0.05 g + 0.95 m
        W <- (1 - lr decay) W - 0.2 lr sqrt(max(rows, columns)) U V^T

    A kernel [out, in, h, w] is a matrix of `out` rows. Jordan et al. 2024; the factor, with which AdamW's
    learning rates fit, is Liu et al.'s (2025, arXiv 2502.16982, section 2.2). `torch.optim.Muon` with
    adjust_lr_fn="match_rms_adamw" does the same for matrices alone.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step along the gradients at hand."""
        every = self.param_groups
        self.param_groups = [group for group in every if not group["orthogonal"]]
        try:
            super().step(closure)
        finally:
            self.param_groups = every
        for group in every:
            for p in group["params"] if group["orthogonal"] else ():
                if p.grad is not None:
                    self._turn(p, p.grad, group["lr"], group["weight_decay"])

    def _turn(self, p: Tensor, grad: Tensor, rate: float, decay: float) -> None:
        state = self.state[p]
        if not state:
            state["momentum"] = torch.zeros_like(p)
        momentum = state["momentum"].lerp_(grad, 1 - _MOMENTUM)
        update = orthogonalised(grad.lerp(momentum, _MOMENTUM).flatten(1))
        p.mul_(1 - rate * decay)
        p.add_(update.view_as(p), alpha=-0.2 * rate * max(update.shape) ** 0.5)


def orthogonalised(matrix: Float[Tensor, "rows columns"]) -> Float[Tensor, "rows columns"]:
    """Return U V^T of a matrix U S V^T, nearly, by five steps of a Newton-Schulz iteration in bfloat16.

    Singular values above about a thousandth of the matrix's norm come to between 0.6 and 1.3; smaller ones
    grow by at most 3.4445^5, some 485; zero stays zero.
    """
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):  # x <- a x + b (x x^T) x + c (x x^T)^2 x, which drives singular values to about 1
        square = x @ x.T
        x = torch.addmm(x, torch.addmm(square, square, square, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.T if tall else x).to(matrix.dtype)


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
        own = torch.empty_like(p, requires_grad=False) if value.ndim else value.new_empty((), device=p.device)
        states.setdefault(name, {})[slot] = own.copy_(value)
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
        pairs = self._pairs + self._copies
        sizes: dict[torch.device, int] = {}
        for _, value in pairs:
            sizes[value.device] = max(sizes.get(value.device, 0), value.nbytes)
        # Room for the largest, before one changes: memory may run out.
        room = {at: torch.empty(size, dtype=torch.uint8, device=at) for at, size in sizes.items()}
        for average, value in pairs:
            before = room[value.device][: value.nbytes].view(value.dtype).view(value.shape)
            before.copy_(value)
            value.copy_(average)
            average.copy_(before)
