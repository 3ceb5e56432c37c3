"""Factors and shifts that go into the scales of quantised weights: exact, and nothing is quantised again.

A weight that is kept as integers and one scale for each output channel, W[o, i] = scale[o] * (q[o, i] -
zero[o]), takes a factor for each output channel into its scale; a negative one too.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn


def rescaled(weight: Tensor, factor: Float[Tensor, " out"]) -> Tensor | None:
    """Return a quantised weight with the factor in its scales; None where it is none that this knows.

    Knows tensors that take themselves apart into integers and a `scale` with a row for each output channel,
    as those of `torchao.quantization` do, weight-only or with dynamic activations. Whether the result is what
    it should be is checked on the numbers.
    """
    kind: Any = type(weight)
    if kind in (Tensor, nn.Parameter) or not hasattr(kind, "__tensor_flatten__"):
        return None
    apart: Any = weight
    names, attributes = apart.__tensor_flatten__()
    tensors = {name: getattr(weight, name) for name in names}
    scale = tensors.get("scale")
    by_rows = scale is not None and scale.ndim > 0 and scale.shape[0] == weight.shape[0]
    if scale is None or not by_rows or not hasattr(kind, "dequantize"):
        return None
    tensors["scale"] = (_rows(factor, scale) * scale).to(scale.dtype)
    result = kind.__tensor_unflatten__(tensors, attributes, weight.shape, weight.stride())
    before, after = apart.dequantize(), result.dequantize()
    rows, info = _rows(factor, before), torch.finfo(after.dtype)
    expected = rows * before
    # Both were rounded; numbers near zero to a step of the subnormal ones, which the factor makes larger.
    allowed = 2 * info.eps * expected.abs() + info.eps * info.smallest_normal * (1 + rows.abs())
    return result if ((after - expected).abs() <= allowed).all() else None


def is_packed(module: nn.Module) -> bool:
    """Whether a module is a dynamically quantised linear layer of `torch.ao.quantization`."""
    named = hasattr(module, "set_weight_bias") and hasattr(module, "_packed_params")
    return named and type(module).__module__.startswith("torch.ao.nn.quantized.dynamic")


def repacked(packed: Any, factor: Float[Tensor, " out"], shift: Float[Tensor, " out"]) -> Any:
    """Return the packed weights of such a layer with the factor in their scales and the shift in the bias.

    One scale for the whole tensor becomes one for each output channel.

    Args:
        packed: what the layer keeps in `_packed_params._packed_params`.
        factor: what each output is multiplied with; positive on the engine qnnpack.
        shift: what is added to it then.
    """
    weight, bias = torch.ops.quantized.linear_unpack(packed)
    rows = weight.shape[0]
    if weight.qscheme() == torch.per_tensor_affine:
        scales = torch.full((rows,), weight.q_scale(), dtype=torch.float64, device="cpu")
        zeros = torch.full((rows,), weight.q_zero_point(), dtype=torch.int64, device="cpu")
    else:
        scales, zeros = weight.q_per_channel_scales(), weight.q_per_channel_zero_points()
    make: Any = getattr(torch, "_make_per_channel_quantized_tensor")  # noqa: B009 (missing in the stubs)
    scaled = make(weight.int_repr(), scales * factor.to(scales), zeros, 0)
    new = shift if bias is None else bias * factor + shift
    return torch.ops.quantized.linear_prepack(scaled, new.float())


def _rows(factor: Tensor, like: Tensor) -> Tensor:
    return factor.to(like.device).view(-1, *[1] * (like.ndim - 1))
