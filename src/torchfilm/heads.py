"""The last layer of a generator: from a condition to all rows of all sites, zero at the start.

- `Head` (in `layers.py`): y = W z + b; rows * (cond_dim + 1) parameters.
- `LowRankHead`: y = U (V z) + b; rows * (rank + 1) + rank * cond_dim.
- `SharedHead`: one projection for all sites of one width, and an offset per site.
- `TableHead`: y = E[k]; rows * classes, and no product at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.layers import Head

__all__ = ["AnyHead", "Head", "LowRankHead", "SharedHead", "TableHead", "build_head", "fill"]


class LowRankHead(nn.Module):
    """Predict the rows through a bottleneck: y = U (V z) + b, with U and b zero at the start.

    Args:
        cond_dim: size of the condition's last axis.
        rows: how many numbers are predicted.
        rank: size of the bottleneck.
        device: where the parameters live.
    """

    def __init__(self, cond_dim: int, rows: int, rank: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.down = nn.Parameter(torch.empty(rank, cond_dim, device=device))
        self.up = Head(rank, rows, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set U and b to zero and V to the start of `nn.Linear`."""
        nn.init.uniform_(self.down, -(self.cond_dim**-0.5), self.cond_dim**-0.5)
        self.up.reset_parameters()

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> Float[Tensor, "*batch rows"]:
        """Return the rows in float32 or wider; ValueError where the last axis is not `cond_dim`."""
        _check_size(condition, self.cond_dim)
        return self.up(functional.linear(condition, self.down))

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, rank={self.down.shape[0]}"


class SharedHead(nn.Module):
    """Predict one set of rows for all sites of one width, and learn an offset for each: y_s = W z + b_s.

    adaLN-single (Chen et al. 2023, section 2.3, arXiv 2310.00426). Sites of different widths share within
    their width. Zero at the start. W is shared, so what the sites of one width hear differs by a constant
    alone.

    Args:
        cond_dim: size of the condition's last axis.
        widths: rows of each site, in order.
        device: where the parameters live.
    """

    def __init__(
        self, cond_dim: int, widths: Sequence[int], device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.widths = tuple(widths)
        self.groups = tuple(dict.fromkeys(widths))
        self.weight = nn.Parameter(torch.empty(sum(self.groups), cond_dim, device=device))
        self.bias = nn.Parameter(torch.empty(sum(self.widths), device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the projection and all offsets to zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> Float[Tensor, "*batch rows"]:
        """Return the rows in float32 or wider; ValueError where the last axis is not `cond_dim`."""
        _check_size(condition, self.cond_dim)
        raw = functional.linear(condition, self.weight)
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        parts = dict(zip(self.groups, raw.split(self.groups, dim=-1), strict=True))
        return torch.cat([parts[width] for width in self.widths], dim=-1) + self.bias

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, widths={list(self.groups)}"


class TableHead(nn.Module):
    """Look the rows up: y = E[k], zero at the start. Weights over the classes give a mixture: y = w E.

    Mixtures of styles are such weights (Dumoulin et al. 2017, section 3.2, arXiv 1610.07629).

    Args:
        classes: how many classes there are.
        rows: how many numbers each has.
        device: where the table lives.
    """

    def __init__(self, classes: int, rows: int, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.cond_dim = classes
        self.weight = nn.Parameter(torch.empty(classes, rows, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the table to zero."""
        nn.init.zeros_(self.weight)

    def forward(
        self, condition: Int[Tensor, "*batch"] | Float[Tensor, "*batch classes"]
    ) -> Float[Tensor, "*batch rows"]:
        """Return the rows of classes (integers), or of weights over the classes (floats).

        Raises:
            ValueError: for weights whose last axis is not the number of classes.
        """
        if condition.is_floating_point():
            _check_size(condition, self.cond_dim)
            raw = condition @ self.weight.to(condition.dtype)
        else:
            raw = functional.embedding(condition, self.weight)
        return raw.to(torch.promote_types(raw.dtype, torch.float32))

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, {self.weight.shape[1]}"


AnyHead = Head | LowRankHead | SharedHead | TableHead


def build_head(
    kind: str, cond_dim: int, widths: Sequence[int], device: torch.device | str | None = None
) -> AnyHead:
    """Return the head of a kind: "linear", "shared", "lowrank:R" or "table".

    Raises:
        ValueError: for another kind, or a rank that is no number from 1 on.
    """
    if kind == "linear":
        return Head(cond_dim, sum(widths), device=device)
    if kind == "shared":
        return SharedHead(cond_dim, widths, device=device)
    if kind == "table":
        return TableHead(cond_dim, sum(widths), device=device)
    name, _, rank = kind.partition(":")
    if name != "lowrank" or not rank.isdecimal() or int(rank) < 1:
        raise ValueError(
            f"Generator: head expected 'linear', 'shared', 'lowrank:R' or 'table', got {kind!r}.\n"
            f"R is the size of the bottleneck: 'lowrank:16'."
        )
    return LowRankHead(cond_dim, sum(widths), int(rank), device=device)


def fill(head: AnyHead, std: float | None) -> None:
    """Give the last layer a random start: weights of this spread, biases left; None for `nn.Linear`'s own."""
    last = head.up if isinstance(head, LowRankHead) else head
    fan_in = 1 if isinstance(last, TableHead) else last.cond_dim
    if std is not None:
        nn.init.normal_(last.weight, std=std)
        return
    nn.init.uniform_(last.weight, -(fan_in**-0.5), fan_in**-0.5)
    if not isinstance(last, TableHead):
        nn.init.uniform_(last.bias, -(fan_in**-0.5), fan_in**-0.5)


def own_parameters(head: AnyHead, rows: int) -> int:
    """Return how many parameters belong to some rows alone; the others are shared by all rows."""
    if isinstance(head, SharedHead):
        return rows
    if isinstance(head, TableHead):
        return rows * head.cond_dim
    return rows * ((head.up.cond_dim if isinstance(head, LowRankHead) else head.cond_dim) + 1)


def _check_size(condition: Tensor, cond_dim: int) -> None:
    if condition.ndim == 0 or condition.shape[-1] != cond_dim:
        raise ValueError(
            f"condition: expected {cond_dim} numbers on the last axis (cond_dim), got shape "
            f"{tuple(condition.shape)}.\n"
            f"Build the generator with the condition's size, or project the condition first."
        )
