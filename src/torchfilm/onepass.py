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


def enabled() -> bool:
    """Whether the kernels are on, and nothing is compiled here."""
    return native.kernels is not None and not torch.compiler.is_compiling()


def film(
    x: Tensor, gamma: Tensor, beta: Tensor, dim: int, *, relu: bool = False, in_place: bool = False
) -> Tensor | None:
    """Return gamma * x + beta, or the ReLU of that, in new memory or in x's own; or None.

    Args:
        x: features, the channels on axis `dim`.
        gamma: [C], [B, C], or with an axis for each of x's.
        beta: as gamma.
        dim: the channel axis of x.
        relu: whether to take the ReLU.
        in_place: write into x, where there is no graph.
    """
    if not enabled():
        return None
    graph = has_graph(x, gamma, beta)
    y = native.kernels.film(x, gamma, beta, dim, relu, in_place and not graph)
    if y is None or not graph:
        return y  # type: ignore[no-any-return]
    return _Film.apply((y,), x, gamma, beta, dim, relu)  # type: ignore[no-any-return]


class _Film(torch.autograd.Function):
    """What `film` has made, remembering x, gamma and beta.

    In the older form: for the newer one torch reads the signature of `forward` at every call. It never meets
    a transform.
    """

    @staticmethod
    def forward(ctx: Any, made: tuple[Tensor], *given: Any) -> Tensor:
        *tensors, ctx.dim, ctx.relu = given
        ctx.save_for_backward(*tensors)
        return made[0]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        found = None
        if native.kernels is not None and not torch.is_grad_enabled():
            found = native.kernels.film_gradients(grads[0], *ctx.saved_tensors, ctx.dim, ctx.relu)
        if found is None:  # to be differentiated again, several at once, or what was kept is elsewhere by now
            x, gamma, beta = ctx.saved_tensors
            rows = [1] * x.ndim
            rows[0], rows[ctx.dim] = gamma.numel() // x.shape[ctx.dim], x.shape[ctx.dim]
            aligned, activation = (gamma.view(rows), beta.view(rows)), "relu" if ctx.relu else None
            dx, *found = gradients(grads[0], x, aligned, activation, ctx.needs_input_grad[1:4])
            found = (dx, *(None if one is None else one.view_as(gamma) for one in found))
        return None, *found, None, None


def generated(
    z: Tensor, weight: Tensor, bias: Tensor, offsets: Tensor, sizes: tuple[int, ...]
) -> tuple[Tensor, ...] | None:
    """Return W z + b + offsets, cut along the last axis, of a single z, [..., columns] with one row; or None.

    To be called where the kernels are `enabled`. None with a graph, and for several rows, of which torch's
    product reads the weights once.
    """
    if has_graph(z, weight, bias):
        return None
    return native.kernels.generated(z, weight, bias, offsets, sizes)  # type: ignore[no-any-return]


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
    if not enabled():
        return None
    if norm.dim == -1 and x.shape[-1] < _CHANNELS_FROM:
        return None
    given = (x, gamma, beta, weight, bias)
    graph = torch.is_grad_enabled() and any(one is not None and one.requires_grad for one in given)
    if graph and gamma.numel() == x.shape[norm.dim]:
        return None
    made = native.kernels.norm(*given, *norm)
    if made is None or not graph:
        return made and made[0]  # type: ignore[no-any-return]
    return _Normalised.apply(made, norm, *given)  # type: ignore[no-any-return]


def batch_normalised(norm: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor | None:
    """Return gamma * norm(x) + beta of a batch norm in evaluation, without a graph; or None."""
    if not enabled() or torch.is_grad_enabled():
        return None
    statistics = norm._buffers  # a third of the time that the attributes take
    given = (norm.weight, norm.bias, statistics["running_mean"], statistics["running_var"])
    return native.kernels.batch_norm(x, gamma, beta, *given, norm.eps)  # type: ignore[no-any-return]


class _Normalised(torch.autograd.Function):
    """What `normalised` has made, remembering what it was given and the statistics."""

    @staticmethod
    def forward(ctx: Any, made: tuple[Tensor, Tensor, Tensor], norm: Norm, *given: Any) -> Tensor:
        y, mean, rstd = made
        ctx.norm = norm
        ctx.save_for_backward(*given, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        *given, mean, rstd = ctx.saved_tensors
        dim, number, _ = ctx.norm
        found = None
        if native.kernels is not None and not torch.is_grad_enabled():
            found = native.kernels.norm_gradients(grads[0], *given, mean, rstd, dim, number)
        return None, None, *(_differentiable(ctx, grads[0], *given) if found is None else found)


def _differentiable(
    ctx: Any, grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients by torch's own operations, which can be differentiated again."""
    channels, between = gamma.shape[-1], [1] * (x.ndim - 2)
    rows = (-1, channels, *between) if ctx.norm.dim == 1 else (-1, *between, channels)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
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
