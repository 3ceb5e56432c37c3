"""gamma * x + beta of aligned tensors, and an activation behind it, in the form that is fastest here.

`torchfilm.functional` checks and aligns what comes here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing

Activation = Literal["relu", "silu"]

# From this many features on, where the channels are innermost in memory (tokens, channels-last images) and
# without a graph, one pass (`addcmul`) beats a product and a sum in place: 20 against 32 us for 150 thousand
# features. Where one gamma holds for a whole row of memory (NCHW) its inner loop is slow: 178 against 136 us
# for 200 thousand, 74 against 30 for 100 thousand. With a graph its backward pass loses everywhere. So it is
# on CPUs; on a device one kernel reads and writes x once, whatever its size and layout.
_ONE_PASS_FROM = 100_000


def has_graph(*tensors: Tensor) -> bool:
    """Whether what comes of these is differentiated."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def affine(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Return gamma * x + beta, not yet rounded to the precision of x."""
    if torch.compiler.is_compiling() or beta.dtype != gamma.dtype:
        wide = torch.promote_types(gamma.dtype, beta.dtype)
        return x * gamma.to(wide) + beta
    large = x.numel() >= _ONE_PASS_FROM and x.dtype == gamma.dtype and _channels_inner(x, gamma)
    if (large or not x.is_cpu) and not (has_graph(x, gamma, beta) or is_tracing()):
        return torch.addcmul(beta, gamma, x)
    y = x * gamma
    # A subclass may give one of its kind, which y cannot become. `torch.func.linearize` records what is
    # differentiated forwards, and runs it again: nothing in place.
    if y.dtype != beta.dtype or type(beta) is not Tensor or forward_ad._current_level >= 0:
        return y + beta
    try:
        y += beta
    except RuntimeError:  # torch.vmap over beta alone: y has no batch axis to add into
        y = y + beta
    return y


def rounded(y: Tensor, x: Tensor) -> Tensor:
    """Return y in the precision of x; ValueError where that has no such numbers, as integers."""
    if y.dtype == x.dtype:  # nothing to convert still is a call of torch
        return y
    if x.is_complex() < y.is_complex() or not (x.is_floating_point() or x.is_complex()):
        raise ValueError(
            f"FiLM: expected features x that can hold the result in {y.dtype}, got {x.dtype}.\n"
            f"  x  {tuple(x.shape)}\n"
            f"Convert x first, with x.float() or x.to({y.dtype})."
        )
    return y.to(x.dtype)


class _Shape(NamedTuple):
    """An activation: its value in place, and a gradient times its slope, differentiable and in place."""

    value: Callable[[Tensor], Tensor]
    sloped: Callable[[Tensor, Tensor], Tensor]
    sloped_in_place: Callable[[Tensor, Tensor], Tensor]


def _silu_sloped(grad: Tensor, before: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(before)
    return grad * sigmoid * (1 + before * (1 - sigmoid))


_SHAPES = {
    "relu": _Shape(
        torch.relu_,
        lambda grad, before: torch.where(before > 0, grad, 0),
        lambda grad, before: torch.ops.aten.threshold_backward.grad_input(grad, before, 0, grad_input=before),
    ),
    "silu": _Shape(
        lambda before: torch.nn.functional.silu(before, inplace=True),
        _silu_sloped,
        lambda grad, before: torch.ops.aten.silu_backward.grad_input(grad, before, grad_input=before),
    ),
}


def activated(x: Tensor, gamma: Tensor, beta: Tensor, activation: str) -> Tensor:
    """Return activation(gamma * x + beta) in x's precision; ValueError for an unknown activation."""
    if activation not in _SHAPES:
        raise ValueError(
            f"film: activation expected one of {list(get_args(Activation))} or None, got {activation!r}.\n"
            f"Leave it out and apply any function to the result; these two are computed again in backward."
        )
    if forward_ad._current_level >= 0 or is_tracing():
        return rounded(getattr(torch.nn.functional, activation)(affine(x, gamma, beta)), x)
    if has_graph(x, gamma, beta):
        transformed = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        way = _Activated if transformed else _ActivatedInOne
        return way.apply(x, gamma, beta, activation)  # type: ignore[no-any-return]
    return _activated_now(x, gamma, beta, activation)


def _activated_now(x: Tensor, gamma: Tensor, beta: Tensor, activation: str) -> Tensor:
    return rounded(_SHAPES[activation].value(affine(x, gamma, beta)), x)


class _ActivatedInOne(torch.autograd.Function):
    """activation(gamma * x + beta), remembering x, gamma and beta, where nothing transforms it.

    In the older form: for the newer one torch reads the signature of `forward` at every call, a tenth of a
    pass over 6 MB and back.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor, activation: str) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(x, gamma, beta)
        return _activated_now(x, gamma, beta, activation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, *aligned = ctx.saved_tensors
        return *gradients(grads[0], x, aligned, ctx.activation, ctx.needs_input_grad), None


class _Activated(torch.autograd.Function):
    """activation(gamma * x + beta), remembering x, gamma and beta and nothing else."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, gamma: Tensor, beta: Tensor, activation: str) -> Tensor:
        return _activated_now(x, gamma, beta, activation)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor, str], output: Tensor) -> None:
        *tensors, ctx.activation = inputs
        ctx.save_for_backward(*tensors)

    backward = staticmethod(_ActivatedInOne.backward)


def gradients(
    grad: Tensor, x: Tensor, aligned: Sequence[Tensor], activation: str, needs: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return those of x, gamma and beta, as far as needed, given that of activation(gamma * x + beta)."""
    gamma, beta = aligned
    before = affine(x, gamma, beta)
    grad, in_place = _before_activation(grad.to(before.dtype), before, activation)
    grad_x = (grad * gamma).to(x.dtype) if needs[0] else None
    grad_beta = grad.sum_to_size(beta.shape).to(beta.dtype) if needs[2] else None
    in_place = in_place and beta.shape != grad.shape  # else grad_beta is grad itself
    product = (grad.mul_(x) if in_place else grad * x) if needs[1] else None
    grad_gamma = None if product is None else product.sum_to_size(gamma.shape).to(gamma.dtype)
    return grad_x, grad_gamma, grad_beta


def _before_activation(grad: Tensor, before: Tensor, activation: str) -> tuple[Tensor, bool]:
    """Return the gradient in front of the activation, and whether it may be overwritten."""
    shape = _SHAPES[activation]
    if torch.is_grad_enabled() or torch.compiler.is_compiling():  # differentiated again, or fused
        return shape.sloped(grad, before), False
    try:
        return shape.sloped_in_place(grad, before), True
    except RuntimeError:  # torch.vmap has no rule for writing into a tensor
        return shape.sloped(grad, before), False


def _channels_inner(x: Tensor, gamma: Tensor) -> bool:
    """Whether neighbours in memory have a gamma each: then one pass is fast, else its inner loop is slow."""
    return any(size != 1 and stride == 1 for size, stride in zip(gamma.shape, x.stride(), strict=True))
