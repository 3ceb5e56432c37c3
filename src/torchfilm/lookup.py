"""Ready modulations in the place of encoder and generator: a condition is the index of a row."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchfilm.heads import looked_up, no_row
from torchfilm.modulation import Modulation

Index = int | Int[Tensor, "*batch"]

_MOST_KEPT = 10_000  # modulations that a table keeps for the next call, of some 1 KB each


def row(table: Float[Tensor, "k numbers"], index: Index) -> Float[Tensor, "*batch numbers"]:
    """Return rows of a table.

    Raises:
        IndexError: for an index that is no row, as a negative one (compiled and on an accelerator, torch's
            own).
    """
    if isinstance(index, Tensor):
        return looked_up("Table", table, index)
    if not 0 <= index < len(table):
        raise no_row("Table", len(table), index)
    return table[index]


class Row(nn.Module):
    """A condition that is the index of a row of a table, checked.

    Args:
        dim: how many rows there are.

    Example:
        >>> Row(11)(10)
        10
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, index: Index | np.integer[Any]) -> Index:
        """Return the index itself.

        Raises:
            ValueError: for numbers that are no integers.
            IndexError: for an int that is no row; for tensors the lookup raises it.
        """
        what = f"Table of {self.dim} conditions"
        if isinstance(index, Tensor):
            if index.dtype in (torch.int64, torch.int32):
                return index
            fact = f"expected indices, int64 or int32, got {index.dtype} {tuple(index.shape)}"
        elif isinstance(index, int | Integral) and not isinstance(index, bool):  # those of numpy are no int
            if not 0 <= index < self.dim:
                raise no_row(what, self.dim, int(index))
            return index if isinstance(index, int) else int(index)
        else:
            fact = f"expected the index of one, or a tensor of them, got {type(index).__name__}"
        raise ValueError(f"{what}: {fact}.\nGive the number of the condition, in the order of tabulate.")

    def extra_repr(self) -> str:
        """Show the number of rows in `repr`."""
        return f"{self.dim}"


class Table(nn.Module):
    """A row of ready modulations for each condition, in the place of a generator.

    Args:
        table: [K, numbers], the fields of all sites side by side.
        layout: channels and number of fields (gamma, beta and perhaps gate) of each site, in order.

    Example:
        >>> rows = Table(torch.rand(11, 6), {"here": (3, 2)})
        >>> rows(torch.tensor([10, 0]))["here"].gamma.shape
        torch.Size([2, 3])
    """

    table: Tensor

    def __init__(self, table: Float[Tensor, "k numbers"], layout: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        self.register_buffer("table", table)
        self.layout = layout
        self._widths = [channels for channels, fields in layout.values() for _ in range(fields)]
        self._seen: tuple[Tensor, dict[int, dict[str, Modulation]]] = (table, {})

    def forward(self, index: Index) -> dict[str, Modulation]:
        """Return the modulation of each site: [C] for an int, [*batch, C] for a tensor."""
        if isinstance(index, Tensor) or torch.compiler.is_compiling():
            return self._split(row(self.table, index))
        table, rows = self._seen
        if table is not self._buffers["table"]:  # moved since; what is written into it, the views see
            rows = {}
            self._seen = (self.table, rows)
        if (found := rows.get(index)) is None:
            found = self._split(row(self.table, index))
            if len(rows) * len(found) < _MOST_KEPT:
                rows[index] = found
        return found.copy()

    def _split(self, row: Float[Tensor, "*batch numbers"]) -> dict[str, Modulation]:
        parts = iter(row.split(self._widths, dim=-1))
        return {
            name: Modulation(*[next(parts) for _ in range(fields)])
            for name, (_, fields) in self.layout.items()
        }

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_seen": (None, {})}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:  # noqa: FBT001, FBT002
        """Move with the network, but stay in float32 or wider: a gamma near one is lost in bfloat16."""
        table = self.table
        super()._apply(fn, recurse)
        if torch.finfo(self.table.dtype).eps > torch.finfo(torch.float32).eps:
            self.table = table.to(self.table.device)
        return self

    def extra_repr(self) -> str:
        """Show the size in `repr`."""
        return f"{len(self.table)} conditions, {len(self.layout)} sites"
