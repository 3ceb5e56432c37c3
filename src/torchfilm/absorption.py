"""Multiply a modulation into the affine of a norm, so that it costs no pass over the features.

gamma * (w * n + b) + beta = (gamma * w) * n + (gamma * b + beta), with n the normalised features. An affine
has one number per channel, a modulation one per sample and channel. But group and instance norms never look
beyond a sample, so a batch of B samples with G groups is one sample with B * G groups, whose affine has B * C
numbers: per-sample modulation at any batch, forward and backward, in torch's own kernels. The other norms
take one modulation for all rows, as at batch 1; of batch norms those in evaluation, which look at no batch.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from torchfilm import onepass
from torchfilm.modulation import Modulation


def absorbed(kind: type[nn.Module], norm: nn.Module, x: Tensor, modulation: Modulation) -> Tensor | None:
    """Return gamma * norm(x) + beta (times the gate) in one call of the norm, or None where that cannot be.

    It cannot be where gamma and beta differ within a sample, where statistics are taken and kept, for
    features of another precision than gamma's, for channels-last memory of several samples, in a compiler,
    which fuses the plain form itself, and in a trace: both keep the batch dynamic.

    Args:
        kind: which of torch's norms computes: BatchNorm1d to 3d, GroupNorm, InstanceNorm1d to 3d, LayerNorm
            or RMSNorm; others are never absorbed.
        norm: that norm, or an object with its attributes; its own `forward` is not called.
        x: features as the norm takes them.
        modulation: channels last, [C], [B, C] or [B, T, C].
    """
    absorb = _ABSORBING.get(kind)
    traced = torch.jit.is_tracing()  # type: ignore[reportPrivateImportUsage]
    if absorb is None or torch.compiler.is_compiling() or traced:
        return None
    return absorb(norm, x, modulation)


def _batch(norm: nn.BatchNorm2d, x: Tensor, modulation: Modulation, axes: tuple[int, ...]) -> Tensor | None:
    if norm.training or norm.running_mean is None or x.ndim not in axes or x.shape[1] != norm.num_features:
        return None
    if _reach(modulation, x, norm.num_features) != "all":
        return None
    weight, bias = _affine(norm.weight, norm.bias, *_gated(modulation))
    affine, statistics = (weight.reshape(-1), bias.reshape(-1)), (norm.running_mean, norm.running_var)
    training, momentum, cudnn = False, 0.0, torch.backends.cudnn.enabled
    # `functional.batch_norm` checks more than there is to check here, which would cost what the affine saves.
    return torch.batch_norm(x, *affine, *statistics, training, momentum, norm.eps, cudnn)


def _group(norm: nn.GroupNorm, x: Tensor, modulation: Modulation) -> Tensor | None:
    reach = _reach(modulation, x, norm.num_channels)
    if reach is None or x.ndim < 3 or x.shape[1] != norm.num_channels:
        return None
    gamma, beta = _gated(modulation)
    y = onepass.normalised(x, gamma, beta, norm.weight, norm.bias, norm.num_groups, norm.eps)
    if y is not None:
        return y
    weight, bias = _affine(norm.weight, norm.bias, gamma, beta)
    if reach == "all":
        return functional.group_norm(x, norm.num_groups, weight.reshape(-1), bias.reshape(-1), norm.eps)
    if not x.is_contiguous():
        return None
    flat, weight, bias = _as_one_sample(x, weight, bias)
    return functional.group_norm(flat, len(x) * norm.num_groups, weight, bias, norm.eps).view(x.shape)


def _instance(norm: nn.InstanceNorm2d, x: Tensor, modulation: Modulation, axes: int) -> Tensor | None:
    reach = _reach(modulation, x, norm.num_features)
    if reach is None or x.ndim != axes or norm.track_running_stats or x.shape[1] != norm.num_features:
        return None
    gamma, beta = _gated(modulation)
    y = onepass.normalised(x, gamma, beta, norm.weight, norm.bias, norm.num_features, norm.eps)
    if y is not None:
        return y
    weight, bias = _affine(norm.weight, norm.bias, gamma, beta)
    if reach == "all":
        return functional.instance_norm(x, weight=weight.reshape(-1), bias=bias.reshape(-1), eps=norm.eps)
    if not x.is_contiguous():
        return None
    flat, weight, bias = _as_one_sample(x, weight, bias)
    return functional.instance_norm(flat, weight=weight, bias=bias, eps=norm.eps).view(x.shape)


def _layer(norm: nn.LayerNorm, x: Tensor, modulation: Modulation) -> Tensor | None:
    if _reach(modulation, x, norm.normalized_shape[0]) != "all" or len(norm.normalized_shape) > 1:
        return None
    weight, bias = _affine(norm.weight, norm.bias, *_gated(modulation))
    return functional.layer_norm(x, norm.normalized_shape, weight.reshape(-1), bias.reshape(-1), norm.eps)


def _rms(norm: nn.RMSNorm, x: Tensor, modulation: Modulation) -> Tensor | None:
    if _reach(modulation, x, norm.normalized_shape[0]) != "all" or len(norm.normalized_shape) > 1:
        return None
    weight, bias = _affine(norm.weight, None, *_gated(modulation))
    y = functional.rms_norm(x, norm.normalized_shape, weight.reshape(-1), norm.eps)
    return y + bias.reshape(-1)


_ABSORBING = {
    nn.BatchNorm1d: partial(_batch, axes=(2, 3)),
    nn.BatchNorm2d: partial(_batch, axes=(4,)),
    nn.BatchNorm3d: partial(_batch, axes=(5,)),
    nn.GroupNorm: _group,
    nn.InstanceNorm1d: partial(_instance, axes=3),
    nn.InstanceNorm2d: partial(_instance, axes=4),
    nn.InstanceNorm3d: partial(_instance, axes=5),
    nn.LayerNorm: _layer,
    nn.RMSNorm: _rms,
}

CHANNEL_AXIS: dict[type[nn.Module], int] = {
    kind: -1 if kind in (nn.LayerNorm, nn.RMSNorm) else 1 for kind in _ABSORBING
}
"""The norms into which a modulation is absorbed, and on which axis of theirs the channels are."""


def _reach(modulation: Modulation, x: Tensor, channels: int) -> Literal["all", "sample"] | None:
    """Say how far one row of gamma and beta reaches: all of x, a sample of it, or neither (None)."""
    everywhere, axes = True, 0
    for field in (modulation.gamma, modulation.beta, modulation.gate):
        if field is None:
            continue
        if field.dtype != x.dtype or field.shape[-1:] != (channels,):
            return None
        axes = max(axes, field.ndim)
        if field.numel() != channels:
            everywhere = False
            if field.shape != (len(x), channels) or not len(x):
                return None
    if everywhere:
        return "all" if axes <= x.ndim else None
    return "sample" if axes <= 2 else None


def _gated(modulation: Modulation) -> tuple[Tensor, Tensor]:
    """Return gamma and beta, times the gate."""
    gamma, beta, gate = modulation.gamma, modulation.beta, modulation.gate
    return (gamma, beta) if gate is None else (gate * gamma, gate * beta)


def _affine(weight: Tensor | None, bias: Tensor | None, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Return gamma * weight and gamma * bias + beta."""
    shift = beta if bias is None else torch.addcmul(beta, gamma, bias)
    return gamma if weight is None else gamma * weight, shift


def _as_one_sample(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """View [B, C, ...] as [1, B * C, ...], and give its affine B * C numbers."""
    rows = x.shape[:2]
    weight, bias = weight.expand(rows).reshape(-1), bias.expand(rows).reshape(-1)
    return x.view(1, rows.numel(), *x.shape[2:]), weight, bias
