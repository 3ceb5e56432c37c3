"""Which samples have a condition: masks of booleans, one per sample or one for all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor


def drawn(z: Tensor, dropout: float, generator: torch.Generator | None = None) -> Bool[Tensor, "*batch"]:
    """Draw which samples keep a condition: True with probability 1 - dropout, one number per row of z."""
    shape = z.shape[:1] if z.ndim > 1 else ()
    if generator is None:  # written out: Dynamo refuses generator=None
        return torch.rand(shape, device=z.device) >= dropout
    return torch.rand(shape, generator=generator, device=z.device) >= dropout


def as_mask(present: Any, device: torch.device | None) -> Tensor:
    """Return a mask as a tensor on a device; a boolean is made there, since the host waits for a copy."""
    if isinstance(present, bool):
        return torch.full((), present, device=device)
    return torch.as_tensor(present, device=device)


def cleared(value: Any, present: Any, is_good: Callable[[Tensor], Tensor]) -> Any:
    """Return numbers with 0 for those that are missing and not good: NaN times a gradient of 0 is NaN."""
    if not isinstance(value, Tensor) or value.is_complex() or not value.dtype.is_signed:
        return value
    if value.layout is not torch.strided or value.is_nested:
        return value
    present = as_mask(present, value.device)
    if present.dtype != torch.bool or present.shape != value.shape[: present.ndim]:
        return value  # refused behind the encoder, unless it has no rows
    return torch.where(viewed(present, value.ndim) | is_good(value), value, 0)


def each_row(z: Tensor, present: Tensor | None) -> Tensor:
    """Give a vector that all samples share a row for each sample of a mask."""
    if present is None or present.ndim == 0 or (z.ndim > 1 and len(z) == len(present)):
        return z
    return z.expand(len(present), *z.shape[1:] if z.ndim > 1 else z.shape)


def viewed(per_sample: Tensor, ndim: int) -> Tensor:
    """View a mask, or a number per sample, with axes of size one behind it."""
    return per_sample.reshape((*per_sample.shape, *[1] * (ndim - per_sample.ndim)))


def check_present(present: Tensor, z: Tensor, inner: int) -> None:
    """Refuse a mask that is not boolean or not as long as the batch; `inner` axes of z are no batch axes."""
    batch = z.shape[: z.ndim - inner]
    if present.dtype == torch.bool and present.shape == batch[: present.ndim]:
        return
    if present.dtype != torch.bool:
        remedy = "For 0 and 1 with 1 for present use present.bool()"
    elif not batch:
        remedy = (
            "A value that all samples share is there or not, True or False; or give each its own, [B, ...]"
        )
    elif present.shape[: len(batch)] == batch:
        remedy = "A sample is there as a whole: for one boolean per number use present.all(dim=-1)"
    else:
        remedy = "Give as many as there are samples, or one for all"
    raise ValueError(
        f"Masked: expected booleans, one per sample {tuple(batch)}, True where it is present, "
        f"got {present.dtype} {tuple(present.shape)}.\n{remedy}."
    )
