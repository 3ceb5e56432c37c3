"""Layers that listen: FiLM, DenseFiLM and conditional normalisation.

Each layer takes features and a condition vector, or a ready `Modulation` by keyword; each is the identity, to
the bit, until it is trained.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional


class Head(nn.Module):
    """Predict modulation parameters from a condition: y = W z + b, with W and b zero at the start.

    Not a subclass of `nn.Linear`, on purpose: the initialisation hooks of other libraries pick `nn.Linear`
    modules and would refill them (a common port of adaRMS lost its zero start in this way). A hook that walks
    over parameters and not over modules cannot be evaded; call `reset_parameters()` after it. The parameter
    names are those of `nn.Linear`, so checkpoints convert by renaming alone.

    Args:
        cond_dim: size of the condition's last axis.
        rows: how many numbers are predicted.
        device: where the parameters live.
        dtype: precision of the parameters.
    """

    def __init__(
        self,
        cond_dim: int,
        rows: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.cond_dim = cond_dim
        self.weight = nn.Parameter(torch.empty(rows, cond_dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(rows, device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set weight and bias to zero; a bias left as it was would modulate every sample alike."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> Float[Tensor, "*batch rows"]:
        """Return W z + b in float32 or wider, whatever precision autocast took for the product.

        Raises:
            ValueError: where the condition's last axis is not `cond_dim`.
        """
        if condition.ndim == 0 or condition.shape[-1] != self.cond_dim:
            raise ValueError(
                f"condition: expected {self.cond_dim} numbers on the last axis (cond_dim), got shape "
                f"{tuple(condition.shape)}.\n"
                f"Build the layer with the condition's size, or project the condition first."
            )
        raw = functional.linear(condition, self.weight, self.bias)
        return raw.to(torch.promote_types(raw.dtype, torch.float32))

    def extra_repr(self) -> str:
        """Show the sizes in `repr`."""
        return f"{self.cond_dim}, {self.weight.shape[0]}"
