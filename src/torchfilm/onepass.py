"""FiLM, and group, layer and RMS norm + FiLM, by the kernels of `torchfilm.native` where they can.

They take large float32 features in this process's memory, in rows [batch, channels, inner] or in columns
[batch, positions, channels]. None, here, is the plain way.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from torchfilm import native

# Below this many features the way through Python costs more than the passes that are saved.
_FROM = 65_536
_FEATURES_PER_THREAD = 32_768
# Rows of fewer channels are normalised faster by torch.
_CHANNELS_FROM = 16


class Geometry(NamedTuple):
    """How features lie in memory, in the order in which the kernels of film take it."""

    batch: int
    channels: int
    others: int
    stride: int
    in_columns: bool


def geometry(x: Tensor, gamma: Tensor, beta: Tensor) -> Geometry | None:
    """Return how the kernels take features and a modulation, or None.

    gamma and beta are aligned with x, axis by axis: one row for each sample, or one for all.
    """
    if native.kernels is None or torch.compiler.is_compiling() or x.numel() < _FROM or x.ndim < 3:
        return None
    if gamma.ndim != x.ndim or gamma.shape != beta.shape or not _plain(x, gamma, beta):
        return None
    axes = [axis for axis, size in enumerate(gamma.shape) if axis and size != 1]
    columns = _in_columns(x, axes[0]) if len(axes) == 1 else None
    if columns is None:
        return None
    batch, channels = len(x), gamma.shape[axes[0]]
    stride = channels if len(gamma) == batch else 0
    return Geometry(batch, channels, x.numel() // (batch * channels), stride, columns)


def takes(grad: Tensor) -> bool:
    """Whether the kernels are on and take this gradient of what they made."""
    return native.kernels is not None and _plain(grad)


def _in_columns(x: Tensor, axis: int) -> bool | None:
    """Whether neighbours in memory are of different channels; None for memory of another order."""
    if x.is_contiguous():
        return {1: False, x.ndim - 1: True}.get(axis)
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    return True if axis == 1 and last is not None and x.is_contiguous(memory_format=last) else None


def _plain(*tensors: Tensor) -> bool:
    """Whether these are numbers in this process's memory, and nothing watches or transforms them."""
    watched = torch.jit.is_tracing() or is_in_torch_dispatch_mode()  # type: ignore[reportPrivateImportUsage]
    if watched or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        if tensor.dtype is not torch.float32 or tensor.device.type != "cpu" or tensor.is_neg():
            return False
        if type(tensor) not in (Tensor, nn.Parameter):
            return False
        try:
            tensor.data_ptr()
        except RuntimeError:  # torch.vmap and its kin
            return False
    return True


def film(
    at: Geometry, x: Tensor, gamma: Tensor, beta: Tensor, *, relu: bool, into: Tensor | None = None
) -> Tensor:
    """Return gamma * x + beta, or the ReLU of that, in new memory or in `into`, which may be x."""
    y = torch.empty_like(x) if into is None else into
    _call("film_forward", (x, gamma.contiguous(), beta.contiguous(), y), *at, relu)
    return y


def film_gradients(
    at: Geometry, grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, *, relu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, gamma and beta, given that of `film`."""
    dx = torch.empty_like(x)
    dgamma, dbeta = (gamma.new_empty((at.batch, *gamma.shape[1:])) for _ in range(2))
    tensors = (_lying_as(x, grad), x, gamma.contiguous(), beta.contiguous(), dx, dgamma, dbeta)
    _call("film_backward", tensors, *at, relu)
    return dx, dgamma.sum_to_size(gamma.shape), dbeta.sum_to_size(beta.shape)


def _call(name: str, tensors: tuple[Tensor | None, ...], *numbers: Any) -> None:
    """Call a kernel with pointers, numbers, and the threads that are worth their start."""
    first = tensors[0]
    assert first is not None
    threads = min(torch.get_num_threads(), 1 + first.numel() // _FEATURES_PER_THREAD)
    pointers = (None if tensor is None else tensor.data_ptr() for tensor in tensors)
    getattr(native.kernels, name)(*pointers, *numbers, threads)


def _lying_as(x: Tensor, grad: Tensor) -> Tensor:
    """Return the gradient as x lies in memory; that of a sum is one number for all features."""
    return grad if grad.stride() == x.stride() else torch.empty_like(x).copy_(grad)


class Norm(NamedTuple):
    """A norm that the kernels compute, modulation included.

    kernel: "norm" of groups of channels [B, C, ...], "token_norm" of rows [B, ..., C].
    number: how many groups; of rows, 1 where their mean is taken off (layer norm) and 0 where not (RMS norm).
    """

    kernel: Literal["norm", "token_norm"]
    number: int
    eps: float


def normalised(
    norm: Norm, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, bias: Tensor | None
) -> Tensor | None:
    """Return gamma * (weight * n(x) + bias) + beta, n(x) the features as the norm leaves them, or None.

    gamma and beta are [B, C], or one row for all samples.
    """
    if native.kernels is None or x.numel() < _FROM or x.ndim < 3 or not x.is_contiguous():
        return None
    given = [tensor for tensor in (x, gamma, beta, weight, bias) if tensor is not None]
    if gamma.shape != beta.shape or not _plain(*given):
        return None
    if norm.kernel == "token_norm" and x.shape[-1] < _CHANNELS_FROM:
        return None
    affines: Any = (None if one is None else one.contiguous() for one in (gamma, beta, weight, bias))
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given):
        return _Normalised.apply(norm, x, *affines)
    return _normalised(norm, x, *affines)[0]


def _normalised(
    norm: Norm, x: Tensor, gamma: Tensor, *others: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return y, and mean and one over the standard deviation of each group, or row."""
    sizes = _sizes(norm, x, gamma)
    statistics = sizes[0] * (norm.number if norm.kernel == "norm" else sizes[2])
    y, mean, rstd = torch.empty_like(x), x.new_empty(statistics), x.new_empty(statistics)
    _call(f"{norm.kernel}_forward", (x, gamma, *others, y, mean, rstd), *sizes, norm.eps)
    return y, mean, rstd


def _sizes(norm: Norm, x: Tensor, gamma: Tensor) -> tuple[int, int, int, int, int]:
    """Return batch, channels, features of each, the norm's number, and from one row of gamma to the next."""
    batch, channels = len(x), x.shape[1 if norm.kernel == "norm" else -1]
    stride = channels if gamma.numel() == batch * channels else 0
    return batch, channels, x.numel() // (batch * channels), norm.number, stride


class _Normalised(torch.autograd.Function):
    """`normalised`, remembering what it is given and the statistics."""

    @staticmethod
    def forward(ctx: Any, norm: Norm, *given: Any) -> Tensor:
        ctx.norm = norm
        y, mean, rstd = _normalised(norm, *given)
        ctx.save_for_backward(*given, mean, rstd)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gamma, beta, weight, bias, mean, rstd = ctx.saved_tensors
        if torch.is_grad_enabled() or not takes(grads[0]):
            return _differentiable(ctx, grads[0], x, gamma, beta, weight, bias)
        dx, sizes = torch.empty_like(x), _sizes(ctx.norm, x, gamma)
        dgamma, dbeta = (x.new_empty(sizes[:2]) for _ in range(2))
        dweight, dbias = (None if own is None else torch.zeros_like(own) for own in (weight, bias))
        tensors = (_lying_as(x, grads[0]), x, gamma, weight, bias, mean, rstd)
        _call(f"{ctx.norm.kernel}_backward", (*tensors, dx, dgamma, dbeta, dweight, dbias), *sizes)
        dgamma, dbeta = (one.sum_to_size(gamma.shape[-2:]).view_as(gamma) for one in (dgamma, dbeta))
        return None, dx, dgamma, dbeta, dweight, dbias


def _differentiable(
    ctx: Any, grad: Tensor, x: Tensor, gamma: Tensor, beta: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return the gradients by torch's own operations, which can be differentiated again."""
    channels, between = gamma.shape[-1], [1] * (x.ndim - 2)
    rows = (-1, channels, *between) if ctx.norm.kernel == "norm" else (-1, *between, channels)
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        y = gamma.view(rows) * _by_torch(ctx.norm, x, weight, bias) + beta.view(rows)
    needed = [
        one if wanted else None
        for one, wanted in zip((x, gamma, beta, weight, bias), ctx.needs_input_grad[1:], strict=True)
    ]
    wanted = [one for one in needed if one is not None]
    found = iter(torch.autograd.grad(y, wanted, grad, create_graph=again))
    return (None, *(None if one is None else next(found) for one in needed))


def _by_torch(norm: Norm, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    if norm.kernel == "norm":
        return nn.functional.group_norm(x, norm.number, weight, bias, norm.eps)
    if norm.number:
        return nn.functional.layer_norm(x, x.shape[-1:], weight, bias, norm.eps)
    return nn.functional.rms_norm(x, x.shape[-1:], weight, norm.eps)
