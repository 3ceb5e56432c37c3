"""Numbers between -1 and 1: each by its least and largest value, kept with the weights."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

_CONSTANT = 1e-4  # a number that moves less than this is constant, and becomes 0


class MinMax(nn.Module):
    """y = 2 (x - low) / (high - low) - 1 for each number; low and high are buffers, saved with weights.

    A constant number becomes 0 and not noise blown up. Numbers beyond what was seen go beyond -1 and 1.

    Args:
        shape: sizes of the last axes, over which each number has its own range.

    Example:
        >>> scale = MinMax(2)
        >>> scale.fit(torch.tensor([[0.0, 1.0], [4.0, 3.0]]))
        >>> scale(torch.tensor([[2.0, 3.0]])).tolist()
        [[0.0, 1.0]]
    """

    low: Tensor
    high: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("low", -torch.ones(shape))
        self.register_buffer("high", torch.ones(shape))

    @torch.no_grad()
    def fit(self, values: Float[Tensor, "n ..."]) -> None:
        """Take the least and largest over the first axis.

        Raises ValueError for another shape, no rows, or numbers that are not finite.
        """
        if values.shape[1:] != self.low.shape or len(values) == 0:
            raise ValueError(
                f"MinMax: expected rows of {tuple(self.low.shape)} numbers, got {tuple(values.shape)}.\n"
                f"Build the network for this data, or pass the data it was built for."
            )
        if not values.isfinite().all():
            raise ValueError(
                f"MinMax: expected finite numbers, got {int((~values.isfinite()).sum())} that are not.\n"
                f"Look for dropped sensor readings, and leave those frames out."
            )
        self.low.copy_(values.amin(dim=0))
        self.high.copy_(values.amax(dim=0))

    def forward(self, values: Tensor) -> Tensor:
        """Return numbers [..., *shape] scaled to -1..1."""
        half, middle, constant = self._scale()
        return torch.where(constant, 0, (values - middle) / half)

    def inverse(self, values: Tensor) -> Tensor:
        """Return numbers [..., *shape] in their own unit."""
        half, middle, constant = self._scale()
        return torch.where(constant, middle, values * half + middle)

    def _scale(self) -> tuple[Tensor, Tensor, Tensor]:
        constant = self.high - self.low < _CONSTANT
        half = torch.where(constant, 1, (self.high - self.low) / 2)
        return half, (self.high + self.low) / 2, constant
