"""FiLM, and group, layer and RMS norm + FiLM, by the kernels of `torchfilm.native` where they can.

They take float32 features in this process's memory, in rows [batch, channels, inner] or in columns
[batch, positions, channels]; binding.cpp looks at what they are given. None, here, is the plain way.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from torchfilm import native
from torchfilm.affine import gradients, has_graph

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
    if not has_graph(x, gamma, beta):
        return by.film(x, gamma, beta, dim, relu, in_place)  # type: ignore[no-any-return]
    y = by.film(x, gamma, beta, dim, relu, False)  # noqa: FBT003 - the kernels take positions
    if y is None:
        return None
    rows = [1] * x.ndim
    rows[0], rows[dim] = gamma.numel() // x.shape[dim], x.shape[dim]
    way = _FilmAndReLU if relu else _Film
    return way.apply((y,), x, gamma.view(rows), beta.view(rows), dim)  # type: ignore[no-any-return]


class _Film(torch.autograd.Function):
    """What `film` has made, remembering what torch's product does: gamma for x, and x for gamma.

    Checkpoints compare what is kept with what is kept again, which may be the other way. In the older form:
    for the newer one torch reads the signature of `forward` at every call. It never meets a transform.
    """

    @staticmethod
    def forward(ctx: Any, made: tuple[Tensor], x: Tensor, gamma: Tensor, beta: Tensor, dim: int) -> Tensor:
        _, for_x, for_gamma, *_ = ctx.needs_input_grad
        ctx.dim, ctx.rows = dim, gamma.shape
        ctx.save_for_backward(gamma if for_x else None, x if for_gamma else None)
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        grad, (gamma, x) = grads[0], ctx.saved_tensors
        by = None if torch.is_grad_enabled() or gamma is None or x is None else kernels()
        found = None if by is None else by.film_gradients(grad, x, gamma, gamma, ctx.dim, False)  # noqa: FBT003
        if found is None:
            dx = None if gamma is None else grad * gamma
            dgamma = None if x is None else (grad * x).sum_to_size(ctx.rows)
            found = dx, dgamma, grad.sum_to_size(ctx.rows) if ctx.needs_input_grad[3] else None
        return None, *found, None


class _FilmAndReLU(torch.autograd.Function):
    """The same with a ReLU, remembering x, gamma and beta."""

    @staticmethod
    def forward(ctx: Any, made: tuple[Tensor], x: Tensor, gamma: Tensor, beta: Tensor, dim: int) -> Tensor:
        ctx.dim = dim
        ctx.save_for_backward(x, gamma, beta)
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta = ctx.saved_tensors
        by = None if torch.is_grad_enabled() else kernels()
        found = None if by is None else by.film_gradients(grads[0], x, gamma, beta, ctx.dim, True)  # noqa: FBT003
        if found is None:  # to be differentiated again, several at once, or what was kept is elsewhere by now
            found = gradients(grads[0], x, (gamma, beta), "relu", ctx.needs_input_grad[1:4])
        return None, *found, None


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

    gamma and beta are [B, C]; or, where there is no graph, one row for all samples, which torch's own affine
    takes faster where there is one.
    """
    by = kernels()
    if by is None or (gamma.ndim > 2 if norm.dim == 1 else x.shape[-1] < _CHANNELS_FROM):
        return None
    given = (x, gamma, beta, weight, bias)
    if not has_graph(*(one for one in given if one is not None)):
        made = by.norm(*given, *norm)
        return None if made is None else made[0]  # type: ignore[no-any-return]
    if gamma.numel() == x.shape[norm.dim] or not (x.requires_grad or gamma.requires_grad):
        return None
    made = by.norm(*given, *norm)
    return None if made is None else _Normalised.apply(made, norm, *given)  # type: ignore[no-any-return]


BATCH_NORMS = {nn.BatchNorm1d: (2, 3), nn.BatchNorm2d: (4,), nn.BatchNorm3d: (5,)}
"""The norms that the kernels compute in evaluation, and how many axes the features of each may have."""


class _Normalised(torch.autograd.Function):
    """What `normalised` has made, remembering what it was given, but for beta, and the statistics."""

    @staticmethod
    def forward(
        ctx: Any, made: tuple[Tensor, Tensor, Tensor], norm: Norm, x: Tensor, gamma: Tensor, *others: Any
    ) -> Tensor:
        y, mean, rstd = made
        _, weight, bias = others
        ctx.norm = norm
        ctx.save_for_backward(x, gamma, weight, bias, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, mean, rstd = ctx.saved_tensors
        dim, number, _ = ctx.norm
        by = None if torch.is_grad_enabled() else kernels()
        found = None if by is None else by.norm_gradients(grads[0], *given, mean, rstd, dim, number)
        return None, None, *(_differentiable(ctx, grads[0], *given) if found is None else found)


def _differentiable(
    ctx: Any, grad: Tensor, x: Tensor, gamma: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients by torch's own operations, which can be differentiated again."""
    channels, between = gamma.shape[-1], [1] * (x.ndim - 2)
    rows = (-1, channels, *between) if ctx.norm.dim == 1 else (-1, *between, channels)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        # Views, at which the gradients stop: what made x may depend on gamma, weight and bias too.
        x, gamma = x.view_as(x), gamma.view_as(gamma)
        weight, bias = (None if one is None else one.view_as(one) for one in (weight, bias))
        beta = torch.zeros_like(gamma).requires_grad_()  # whose value no gradient depends on
        y = gamma.view(rows) * _by_torch(ctx.norm, x, weight, bias) + beta.view(rows)
    needed = [
        one if wanted else None
        for one, wanted in zip((x, gamma, beta, weight, bias), ctx.needs_input_grad[2:], strict=True)
    ]
    wanted = [one for one in needed if one is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
    return tuple(None if one is None else next(found) for one in needed)


def _by_torch(norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if norm.dim == 1:
        return nn.functional.group_norm(x, norm.number, weight, bias, norm.eps)
    if norm.number:
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    return nn.functional.rms_norm(x, x.shape[-1:], weight, norm.eps)
