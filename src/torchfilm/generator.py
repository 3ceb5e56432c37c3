"""From a condition to one Modulation per site: one fused head for all sites.

One matrix product and views of its result, where a Linear per site would launch as many products: faster
where launches decide (small conditions, batch 1), and no slower where the weights' bandwidth does.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.layers import Head
from torchfilm.modulation import Modulation

Bound = Literal["sigmoid", "tanh", "exp"]
Emitted = Literal["gamma", "beta"]
Init = Literal["identity", "default"]

_BOUNDS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp}


class Generator(nn.Module):
    """Predict the modulation of every site from one condition: gamma = offset + f(W z + b), beta = V z + c.

    Perez et al. 2018, eq. 1 (arXiv 1709.07871). Unbounded, gamma = 1 + delta, and the network starts as if it
    were not conditioned. The bounds are those of the paper's ablations and give the final gamma: sigmoid in
    (0, 1), tanh in (-1, 1), exp in (0, inf), without the one (table 2: 95.9, 96.3 and 96.3 % against 97.4 %
    unbounded).

    The rows of the head are [gamma of C, beta of C] for each site in order, as in the paper's own system, so
    that its checkpoints convert by renaming. Modulations come out in float32 also under autocast, which may
    take the matrix product in bfloat16; the one is added after.

    Args:
        cond_dim: size of the condition's last axis.
        sites: name and number of channels of each site, in order.
        bound: f, applied to gamma only; None leaves gamma free.
        emit: what is predicted; the other is constant (beta = 0, or gamma = 1).
        init: "identity" (weight and bias zero) or "default" (uniform, as `nn.Linear`).
        gamma_offset: what is added to f; None for 1 without a bound and 0 with one. A start well below 1 is a
            choice of small training runs.
        init_std: standard deviation of the weights with init="default", biases zero; None for `nn.Linear`'s
            own start.
        device: where the parameters live.

    Raises:
        ValueError: for no sites, unknown options, or an "identity" that the bound makes impossible.

    Example:
        >>> generator = Generator(512, {"block1": 64, "block2": 128})
        >>> generator(torch.rand(2, 512))["block2"].gamma.shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        cond_dim: int,
        sites: Mapping[str, int],
        *,
        bound: Bound | None = None,
        emit: Sequence[Emitted] = ("gamma", "beta"),
        init: Init = "identity",
        gamma_offset: float | None = None,
        init_std: float | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check(sites, bound, emit, init)
        self.sites = dict(sites)
        self.bound = bound
        self.emit = tuple(emit)
        self.init = init
        self.init_std = init_std
        self.gamma_offset = gamma_offset if gamma_offset is not None else (1.0 if bound is None else 0.0)
        self._check_start()
        self.head = Head(cond_dim, sum(self.sites.values()) * len(self.emit), device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the head its start again: the identity, or random weights with init="default"."""
        self.head.reset_parameters()
        if self.init == "default" and self.init_std is not None:
            nn.init.normal_(self.head.weight, std=self.init_std)
        elif self.init == "default":
            limit = self.head.cond_dim**-0.5
            nn.init.uniform_(self.head.weight, -limit, limit)
            nn.init.uniform_(self.head.bias, -limit, limit)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> dict[str, Modulation]:
        """Return the modulation of each site by name, in the order of `sites`; gamma, beta: [*batch, C]."""
        raw = self.head(condition)
        widths = [features * len(self.emit) for features in self.sites.values()]
        parts = raw.split(widths, dim=-1)
        return {name: self._modulation(part) for name, part in zip(self.sites, parts, strict=True)}

    def describe(self) -> str:
        """Return a table of what each site costs: channels, parameters of its rows, share of the head."""
        rows = [("site", "channels", "parameters", "share")]
        total = self.head.weight.numel() + self.head.bias.numel()
        for name, features in self.sites.items():
            cost = features * len(self.emit) * (self.head.cond_dim + 1)
            rows.append((name, str(features), f"{cost:,}", f"{cost / total:.1%}"))
        rows.append(("total", str(sum(self.sites.values())), f"{total:,}", f"{1:.1%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        return "\n".join(
            "  ".join([row[0].ljust(widths[0])] + [row[i].rjust(widths[i]) for i in range(1, 4)])
            for row in rows
        )

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        options = f"bound={self.bound!r}, emit={self.emit}, gamma_offset={self.gamma_offset}"
        return f"sites={len(self.sites)}, {options}"

    def _modulation(self, raw: Tensor) -> Modulation:
        if self.emit == ("beta",):
            return Modulation(torch.ones_like(raw), raw)
        raw_gamma, beta = raw.chunk(2, dim=-1) if len(self.emit) == 2 else (raw, torch.zeros_like(raw))
        gamma = raw_gamma if self.bound is None else _BOUNDS[self.bound](raw_gamma)
        return Modulation(gamma + self.gamma_offset, beta)

    def _check_start(self) -> None:
        if self.init_std is not None and self.init == "identity":
            raise ValueError(
                f"Generator: init='identity' has zero weights, got init_std={self.init_std} beside it.\n"
                f"Use init='default' with init_std, or leave init_std out."
            )
        start = self.gamma_offset + {None: 0.0, "sigmoid": 0.5, "tanh": 0.0, "exp": 1.0}[self.bound]
        if self.init == "identity" and "gamma" in self.emit and start != 1.0:
            raise ValueError(
                f"Generator: init='identity' needs gamma = 1 at the start, but bound={self.bound!r} with "
                f"gamma_offset={self.gamma_offset} starts at {start}.\n"
                f"Use init='default', or another gamma_offset."
            )


def _check(sites: Mapping[str, int], bound: str | None, emit: Sequence[str], init: str) -> None:
    if not sites:
        raise ValueError(
            "Generator: expected at least one site, got none.\n"
            "Give a mapping from name to channels: {'block1': 64}."
        )
    for name, features in sites.items():
        if features < 1:
            raise ValueError(
                f"Generator site '{name}': expected at least 1 channel, got {features}.\n"
                f"Give the size of the channel axis that is modulated there."
            )
    _check_choice("bound", bound, (None, *get_args(Bound)))
    _check_choice("init", init, get_args(Init))
    for name in emit:
        _check_choice("emit", name, get_args(Emitted))
    if tuple(emit) not in {("gamma", "beta"), ("gamma",), ("beta",)}:
        raise ValueError(
            f"Generator: expected emit ('gamma', 'beta'), ('gamma',) or ('beta',), got {tuple(emit)}.\n"
            f"The order is always gamma, beta."
        )


def _check_choice(option: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value in choices:
        return
    near = difflib.get_close_matches(str(value), [str(choice) for choice in choices], n=3, cutoff=0.4)
    hint = (
        f"Did you mean {' or '.join(repr(name) for name in near)}?"
        if near
        else f"Choose one of {list(choices)}."
    )
    raise ValueError(f"Generator: {option} expected one of {list(choices)}, got {value!r}.\n{hint}")
