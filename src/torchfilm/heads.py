"""From a condition to rows of numbers: the last layer of a generator, the only one of a layer that listens.

- `AffineHead`: y = W z + b; rows * (cond_dim + 1) parameters.
- `LowRankHead`: y = U (V z) + b; rows * (rank + 1) + rank * cond_dim.
- `SharedHead`: one projection for all sites of one width, and an offset per site.
- `TableHead`: y = E[k]; rows * classes, and no product at all.

Each owns its start, "zero" unless told otherwise, so that it finds it again after the meta device. None is an
`nn.Linear` or has Linear, Conv or Norm in its name, on purpose: the initialisation hooks of other libraries
pick such modules and would refill them (a common port of adaRMS lost its zero start in this way). A hook that
walks over parameters and not over modules cannot be evaded; call `reset_parameters()` after it.
"""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

# "zero", "default" for the start of `nn.Linear`, or the standard deviation of the weights, biases zero.
Start = Literal["zero", "default"] | float


class AffineHead(nn.Module):
    """Predict the rows from the condition: y = W z + b.

    The parameter names are those of `nn.Linear`, so checkpoints convert by renaming alone.

    Args:
        cond_dim: size of the condition's last axis.
        rows: how many numbers are predicted.
        start: how W and b start; a bias that is not zero modulates every sample alike.
        device: where the parameters live.
        dtype: their precision.
    """

    def __init__(
        self,
        cond_dim: int,
        rows: int,
        start: Start = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.start: Start = start
        self.weight = nn.Parameter(torch.empty(rows, cond_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give W and b their start."""
        _fill(self.weight, self.bias, self.start, self.cond_dim)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> Float[Tensor, "*batch rows"]:
        """Return the rows in float32 or wider; ValueError where the last axis is not `cond_dim`."""
        check_cond_dim(condition, self.cond_dim)
        weight = self.weight
        return wide(functional.linear(like_weights(condition, weight), weight, self.bias))

    def own_parameters(self, rows: int) -> int:
        """Return how many parameters belong to some rows alone."""
        return rows * (self.cond_dim + 1)

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, {self.weight.shape[0]}"


class LowRankHead(nn.Module):
    """Predict the rows through a bottleneck: y = U (V z) + b.

    Args:
        cond_dim: size of the condition's last axis.
        rows: how many numbers are predicted.
        rank: size of the bottleneck.
        start: how U and b start; V starts as the weight of an `nn.Linear`.
        device: where the parameters live.
        dtype: their precision.
    """

    def __init__(
        self,
        cond_dim: int,
        rows: int,
        rank: int,
        start: Start = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.down = nn.Parameter(torch.empty(rank, cond_dim, device=device, dtype=dtype))
        self.reset_parameters()
        self.up = AffineHead(rank, rows, start, device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Give V its start; U and b are those of `up`."""
        nn.init.uniform_(self.down, -(self.cond_dim**-0.5), self.cond_dim**-0.5)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> Float[Tensor, "*batch rows"]:
        """Return the rows in float32 or wider; ValueError where the last axis is not `cond_dim`."""
        check_cond_dim(condition, self.cond_dim)
        return self.up(functional.linear(like_weights(condition, self.down), self.down))

    def own_parameters(self, rows: int) -> int:
        """Return how many parameters belong to some rows alone."""
        return self.up.own_parameters(rows)

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, rank={self.down.shape[0]}"


class SharedHead(nn.Module):
    """Predict one set of rows for all sites of one width, and learn an offset for each: y_s = W z + b_s.

    adaLN-single (Chen et al. 2023, section 2.3, arXiv 2310.00426). Sites of different widths share within
    their width. What the sites of one width hear differs by a constant alone.

    Args:
        cond_dim: size of the condition's last axis.
        widths: rows of each site, in order.
        start: how the projection and the offsets start.
        device: where the parameters live.
        dtype: their precision.
        kinds: what the rows of each site are; other kinds of one width do not share. None for one kind.
    """

    def __init__(
        self,
        cond_dim: int,
        widths: Sequence[int],
        start: Start = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        kinds: Sequence[Hashable] | None = None,
    ) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.start: Start = start
        self.widths = tuple(widths)
        own = list(zip(widths, itertools.repeat(None) if kinds is None else kinds, strict=False))
        shared = list(dict.fromkeys(own))
        self.groups = tuple(width for width, _ in shared)
        self._group_of = tuple(map(shared.index, own))
        self.weight = nn.Parameter(torch.empty(sum(self.groups), cond_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(sum(self.widths), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the projection and the offsets their start."""
        _fill(self.weight, self.bias, self.start, self.cond_dim)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> Float[Tensor, "*batch rows"]:
        """Return the rows in float32 or wider; ValueError where the last axis is not `cond_dim`."""
        check_cond_dim(condition, self.cond_dim)
        return self.spread(functional.linear(like_weights(condition, self.weight), self.weight))

    def spread(self, projected: Float[Tensor, "*batch groups"]) -> Float[Tensor, "*batch rows"]:
        """Return the rows of all sites for the projection W z, one set of rows for each group of sites."""
        parts = wide(projected).split(self.groups, dim=-1)
        return torch.cat([parts[group] for group in self._group_of], dim=-1) + self.bias

    def own_parameters(self, rows: int) -> int:
        """Return how many parameters belong to some rows alone: their offsets."""
        return rows

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, widths={list(self.groups)}"


class TableHead(nn.Module):
    """Look the rows up: y = E[k]. Weights over the classes give a mixture: y = w E.

    Mixtures of styles are such weights (Dumoulin et al. 2017, section 3.5, arXiv 1610.07629).

    Args:
        classes: how many classes there are.
        rows: how many numbers each has.
        start: how the table starts.
        device: where the table lives.
        dtype: its precision.
    """

    def __init__(
        self,
        classes: int,
        rows: int,
        start: Start = "zero",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cond_dim = classes
        self.start: Start = start
        self.weight = nn.Parameter(torch.empty(classes, rows, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the table its start."""
        _fill(self.weight, None, self.start, self.cond_dim)

    def forward(
        self, condition: Int[Tensor, "*batch"] | Float[Tensor, "*batch classes"]
    ) -> Float[Tensor, "*batch rows"]:
        """Return the rows of classes (integers), or of weights over the classes (floats).

        Raises:
            ValueError: for weights whose last axis is not the number of classes.
            IndexError: for a class outside the table (compiled and on an accelerator, torch's own).
        """
        if not condition.is_floating_point():
            return wide(looked_up("Table of classes", self.weight, condition))
        check_cond_dim(condition, self.cond_dim)
        return wide(functional.linear(like_weights(condition, self.weight), self.weight.T))

    def own_parameters(self, rows: int) -> int:
        """Return how many parameters belong to some rows alone."""
        return rows * self.cond_dim

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, {self.weight.shape[1]}"


AnyHead = AffineHead | LowRankHead | SharedHead | TableHead


def build_head(
    kind: str,
    cond_dim: int,
    widths: Sequence[int],
    start: Start = "zero",
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    kinds: Sequence[Hashable] | None = None,
) -> AnyHead:
    """Return the head of a kind: "linear", "shared", "lowrank:R" or "table".

    Raises:
        ValueError: for another kind, or a rank that is no number from 1 on.
    """
    if kind == "linear":
        return AffineHead(cond_dim, sum(widths), start, device=device, dtype=dtype)
    if kind == "shared":
        return SharedHead(cond_dim, widths, start, device=device, dtype=dtype, kinds=kinds)
    if kind == "table":
        return TableHead(cond_dim, sum(widths), start, device=device, dtype=dtype)
    name, _, rank = kind.partition(":")
    if name != "lowrank" or not rank.isdecimal() or int(rank) < 1:
        raise ValueError(
            f"Generator: head expected 'linear', 'shared', 'lowrank:R' or 'table', got {kind!r}.\n"
            f"R is the size of the bottleneck: 'lowrank:16'."
        )
    return LowRankHead(cond_dim, sum(widths), int(rank), start, device=device, dtype=dtype)


def _fill(weight: Tensor, bias: Tensor | None, start: Start, fan_in: int) -> None:
    if isinstance(start, float | int):
        nn.init.normal_(weight, std=start)
    elif start == "zero":
        nn.init.zeros_(weight)
    else:
        nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)
    if bias is not None and start == "default":
        nn.init.uniform_(bias, -(fan_in**-0.5), fan_in**-0.5)
    elif bias is not None:
        nn.init.zeros_(bias)


def wide(x: Tensor) -> Tensor:
    """Return numbers in float32 or wider, whatever precision autocast took for what made them."""
    return x if x.dtype == torch.float32 else x.to(torch.promote_types(x.dtype, torch.float32))


def looked_up(
    what: str, table: Float[Tensor, "k numbers"], index: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch numbers"]:
    """Return rows of a table.

    Args:
        what: what the table is, for messages.
        table: the rows.
        index: which, from 0 on.

    Raises:
        IndexError: for an index that is no row (compiled and on accelerators, torch's own).

    Example:
        >>> looked_up("Table", torch.eye(3), torch.tensor([2, 0])).tolist()
        [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]]
    """
    try:
        return functional.embedding(index, table)
    except IndexError as error:
        raise no_row(what, len(table), index) from error


def no_row(what: str, rows: int, index: int | Int[Tensor, "*batch"]) -> IndexError:
    """Return the error for an index that is no row of a table.

    Args:
        what: what the table is.
        rows: how many rows it has.
        index: what was asked for, of which those are named that are no rows.
    """
    wrong = [index] if isinstance(index, int) else index[(index < 0) | (index >= rows)].unique().tolist()
    return IndexError(
        f"{what}: expected an index from 0 to {rows - 1}, got {', '.join(map(str, wrong))}: out of range.\n"
        f"Indices count from 0: there are {rows} rows."
    )


def like_weights(condition: Tensor, weight: Tensor | None) -> Tensor:
    """Return a condition in the precision of the weights: of a network that was converted to bfloat16.

    Raises:
        ValueError: for a condition that is not of floating-point numbers.
    """
    if weight is None or condition.dtype == weight.dtype:
        return condition
    if not condition.is_floating_point():
        raise ValueError(
            f"condition: expected floating-point numbers, got {condition.dtype} of shape "
            f"{tuple(condition.shape)}.\n"
            f"Give condition.float(), or, for indices of classes, Classes or a generator with head='table'."
        )
    return condition.to(weight.dtype)


def check_cond_dim(condition: Tensor, cond_dim: int, who: str = "condition") -> None:
    """Refuse a condition with another number of numbers than `cond_dim` on its last axis."""
    if condition.ndim == 0 or condition.shape[-1] != cond_dim:
        raise ValueError(
            f"{who}: expected {cond_dim} numbers on the last axis (cond_dim), got shape "
            f"{tuple(condition.shape)}.\n"
            f"Build the layer or generator with the condition's size, or project the condition first."
        )
