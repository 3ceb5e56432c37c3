"""FiLM, and group, layer and RMS norm + FiLM, by the kernels of `torchfilm.native` where they can.

They take float32 features in this process's memory, in rows [batch, channels, inner] or in columns
[batch, positions, channels]; binding.cpp looks at what they are given. None, here, is the plain way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchfilm import native
from torchfilm.affine import gradients

# Rows of fewer channels are normalised faster by torch.
_CHANNELS_FROM = 16


def kernels() -> Any:
    """Return the kernels; None where they are off, or something is compiled."""
    by = native.kernels
    return None if by is None or torch.compiler.is_compiling() else by


def film(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    dim: int,
    *,
    relu: bool = False,
    last: bool = False,
    in_place: bool = False,
) -> Tensor | None:
    """Return gamma * x + beta, or the ReLU of that, in new memory or in x's own; or None.

    Args:
        x: features, the channels on axis `dim`.
        gamma: [C], [B, C], or with an axis for each of x's.
        beta: as gamma.
        dim: the channel axis of x.
        relu: whether to take the ReLU.
        last: whether the channels of gamma are on its last axis also where it has one for each of x's.
        in_place: write into x, where there is no graph.
    """
    by = kernels()
    if by is None or (last and gamma.ndim > 2 and dim not in (-1, x.ndim - 1)):
        return None
    return by.film(x, gamma, beta, dim, relu, in_place)  # type: ignore[no-any-return]


def film_gradients(
    grad: Tensor,
    x: Tensor | None,
    gamma: Tensor | None,
    beta: Tensor | None,
    rows: tuple[int, ...],
    relu: bool,  # noqa: FBT001 - graphs.h gives positions
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, gamma and beta by torch's own operations, which can be differentiated again.

    Args:
        grad: that of gamma * x + beta, or of its ReLU.
        x: features; None where gamma needs no gradient, and without a ReLU.
        gamma: with an axis for each of x's; None where x needs no gradient, and without a ReLU.
        beta: as gamma; None without a ReLU.
        rows: the shape of gamma and beta.
        relu: whether there is a ReLU.
        needs: which of the three need theirs.
    """
    if relu:
        assert x is not None
        assert gamma is not None
        assert beta is not None
        return gradients(grad, x, (gamma, beta), "relu", needs)
    dx = None if gamma is None else grad * gamma
    dgamma = None if x is None else (grad * x).sum_to_size(rows)
    return dx, dgamma, grad.sum_to_size(rows) if needs[2] else None


class Norm(NamedTuple):
    """A norm that the kernels compute, modulation included.

    dim: the channel axis of its features: 1, of groups of channels [B, C, ...], or -1, of rows [B, ..., C].
    number: how many groups; of rows, 1 where their mean is taken off (layer norm) and 0 where not (RMS norm).
    """

    dim: int
    number: int
    eps: float


def normalised(
    norm: Norm, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Return gamma * (weight * n(x) + bias) + beta, n(x) the features as the norm leaves them, or None.

    gamma and beta are [B, C], or one row for all samples.
    """
    by = kernels()
    if by is None or (gamma.ndim > 2 if norm.dim == 1 else x.shape[-1] < _CHANNELS_FROM):
        return None
    return by.norm(x, gamma, beta, weight, bias, *norm)  # type: ignore[no-any-return]


BATCH_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
"""The norms that the kernels compute in evaluation, and how many axes the features of each may have."""


def norm_gradients(
    grad: Tensor,
    x: Tensor,
    gamma: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    plan: tuple[int, int, float],
    needs: tuple[bool, ...],
) -> tuple[Tensor | None, ...]:
    """Return the gradients of x, gamma, beta, weight and bias, as `film_gradients`; the plan is a `Norm`."""
    norm = Norm(*plan)
    channels, between = gamma.shape[-1], [1] * (x.ndim - 2)
    rows = (-1, channels, *between) if norm.dim == 1 else (-1, *between, channels)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        x, gamma = _apart(x, needs[0]), _apart(gamma, needs[1])
        beta = _apart(torch.zeros_like(gamma), needs[2])  # whose value no gradient depends on
        weight = None if weight is None else _apart(weight, needs[3])
        bias = None if bias is None else _apart(bias, needs[4])
        y = gamma.view(rows) * _by_torch(norm, x, weight, bias) + beta.view(rows)
    inputs = zip((x, gamma, beta, weight, bias), needs, strict=True)
    wanted = [one for one, needed in inputs if needed and one is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
    return tuple(next(found) if needed else None for needed in needs)


def _apart(one: Tensor, needed: bool) -> Tensor:  # noqa: FBT001
    """Return a view, at which gradients stop: what made the features may depend on gamma or weight too.

    Compiled autograd gives back what was kept without a graph.
    """
    view = one.view_as(one)
    return view.requires_grad_() if needed and not view.requires_grad else view


def _by_torch(norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if norm.dim == 1:
        return nn.functional.group_norm(x, norm.number, weight, bias, norm.eps)
    if norm.number:
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    return nn.functional.rms_norm(x, x.shape[-1:], weight, norm.eps)
