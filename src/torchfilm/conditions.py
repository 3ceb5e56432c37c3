"""What a condition can be: a vector, one of some classes, or tokens; each becomes what a generator reads.

Every class has `dim`, the size of the vector it gives; a `Generator` or a layer takes it as its `cond_dim`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Vector(nn.Module):
    """A condition that is a vector already: z = v, checked for its size.

    Args:
        dim: size of the last axis.

    Example:
        >>> z = Vector(512)(torch.rand(2, 512))
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, vector: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Return the vector itself.

        Raises:
            ValueError: where the last axis is not `dim`, or the numbers are integers.
        """
        _check_floats("Vector", vector, self.dim)
        return vector

    def extra_repr(self) -> str:
        """Show the size in `repr`."""
        return f"{self.dim}"


class Classes(nn.Module):
    """A condition that is one of some classes: z = E[k], a learned row for each class.

    Conditional instance normalisation for styles (Dumoulin et al. 2017, arXiv 1610.07629) is this in front of
    a layer.

    Args:
        num_classes: how many classes there are; k is from 0 to num_classes - 1.
        dim: size of the vector of each class.
        device: where the table lives.

    Example:
        >>> z = Classes(10, dim=64)(torch.tensor([3, 0]))
    """

    def __init__(self, num_classes: int, dim: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.dim = dim
        self.table = nn.Embedding(num_classes, dim, device=device)

    def forward(self, classes: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"]:
        """Return the rows of the classes.

        Raises:
            ValueError: for numbers that are no integers.
            IndexError: for a class outside the table (on an accelerator, its own assertion).
        """
        if classes.dtype not in (torch.int64, torch.int32):
            raise ValueError(
                f"Classes: expected int64 or int32 numbers, got {classes.dtype} {tuple(classes.shape)}.\n"
                f"Give indices, not one-hot rows: one_hot.argmax(dim=-1)."
            )
        return self.table(classes)


class Tokens(nn.Module):
    """A condition that is a sequence: z = the mean of its real tokens, sum_t m_t x_t / sum_t m_t.

    Padding does not count, whatever it holds (NaN included), so z depends neither on how far a batch is
    padded nor on the other sequences in it. A sequence without a single real token gives zero.

    Args:
        dim: size of each token.

    Example:
        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> z = Tokens(512)(torch.rand(2, 3, 512), mask)
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.dim = dim

    def forward(
        self, tokens: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch dim"]:
        """Return the mean over the real tokens, in float32 or wider.

        Args:
            tokens: [B, T, dim].
            mask: [B, T], True where a token is real; None where all are.

        Raises:
            ValueError: where sizes do not fit, or the mask is not boolean (attention masks of other libraries
            are
                floats, with 0 for real tokens in some and for padding in others).
        """
        _check_floats("Tokens", tokens, self.dim)
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        if mask is None:
            return wide.mean(dim=-2)
        if mask.dtype != torch.bool or mask.shape != tokens.shape[:-1]:
            raise ValueError(
                f"Tokens: expected a boolean mask {tuple(tokens.shape[:-1])}, True where a token is real, "
                f"got {mask.dtype} {tuple(mask.shape)}.\n"
                f"For 0 and 1 with 1 for real tokens use mask.bool(); for lengths use "
                f"torch.arange(T) < lengths[:, None]."
            )
        kept = torch.where(mask[..., None], wide, 0)
        return kept.sum(dim=-2) / mask.sum(dim=-1, keepdim=True).clamp(min=1)

    def extra_repr(self) -> str:
        """Show the size in `repr`."""
        return f"{self.dim}"


def _check_floats(kind: str, value: Tensor, dim: int) -> None:
    if not value.is_floating_point() or value.ndim == 0 or value.shape[-1] != dim:
        raise ValueError(
            f"{kind}: expected floating-point numbers with {dim} on the last axis, "
            f"got {value.dtype} of shape {tuple(value.shape)}.\n"
            f"For class numbers use Classes; else build {kind}({value.shape[-1] if value.ndim else 'dim'})."
        )
