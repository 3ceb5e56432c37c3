"""Multiply a modulation into the affine of a norm, so that it costs no pass over the features.

gamma * (w * n + b) + beta = (gamma * w) * n + (gamma * b + beta), with n the normalised features. An affine
has one number per channel, a modulation one per sample and channel. But group and instance norms never look
beyond a sample, so a batch of B samples with G groups is one sample with B * G groups, whose affine has B * C
numbers: per-sample modulation at any batch, forward and backward, in torch's own kernels. The other norms
take one modulation for all rows, as at batch 1; of batch norms those in evaluation, which look at no batch.

Where one modulation is for all rows, the affine can be made before the features are there. At batch 1, where
convolutions leave no code of other operations in the caches, the affines of four sites in a row cost what two
cost between convolutions.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import cudnn as _cudnn
from torch.compiler import is_compiling
from torch.nn import functional

from torchfilm import native, onepass
from torchfilm.modulation import Modulation
from torchfilm.sharding import is_sharded

Affine = tuple[Tensor, Tensor]
"""Weight and bias of a norm, one number per channel, with a modulation in them."""


class Ready(NamedTuple):
    """A norm with a modulation in it, before its features are there.

    weight, bias: the norm's own, which the modulation is in already.
    place, version: of these in memory, and how often they were written into (None where inference hides it):
        by these a change is seen, but for what is written into `weight.data`.
    training: the norm's mode.
    dtype: of the features that it takes.
    axes: how many they may have.
    call: from the features to what the norm gives.
    """

    norm: nn.Module
    weight: Tensor
    bias: Tensor | None
    place: int
    version: int | None
    training: bool
    dtype: torch.dtype
    axes: Collection[int]
    call: Callable[[Tensor], Tensor]

    def applied(self, norm: Any, x: Any) -> Tensor | None:
        """Return what the norm gives; None for another norm, one changed since, and other features."""
        own, weight, bias = norm._parameters, self.weight, self.bias
        if norm is not self.norm or own["weight"] is not weight or own.get("bias") is not bias:
            return None
        if norm.training is not self.training or torch.is_grad_enabled() or weight.data_ptr() != self.place:
            return None
        if self.version is not None and self.version != _version(weight, bias):
            return None
        fits = isinstance(x, Tensor) and x.dtype is self.dtype and x.ndim in self.axes
        return self.call(x) if fits else None


def _version(weight: Tensor, bias: Tensor | None) -> int:
    return weight._version if bias is None else weight._version + bias._version


def absorbed(
    kind: type[nn.Module],
    norm: Any,
    x: Any,
    modulation: Modulation,
    dim: int | None = None,
    *,
    bare: bool = True,
) -> Tensor | None:
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
        dim: the axis of x that it modulates, which must be that of the norm's channels; None for that.
        bare: without the kernels, also into a norm that has no affine, which with one of ones, gamma's at the
            start, rounds otherwise than alone.
    """
    if is_compiling():
        return None
    way = _WAYS.get(kind)
    if way is None or not isinstance(x, Tensor) or (axes := x.ndim) not in way.axes or not way.takes(norm):
        return None
    if torch._C._is_tracing() or (dim is not None and (dim - way.channel_axis) % axes):
        return None
    if type(x) is not Tensor and is_sharded(x):
        return None
    gamma, beta = modulation.gated()
    if native.kernels is not None and way.plan is not None and (plan := way.plan(norm, x)) is not None:
        bias = None if kind is nn.RMSNorm else norm.bias
        y = onepass.normalised(plan, x, gamma, beta, norm.weight, bias)
        if y is not None:
            return y
    channels, weight = x.shape[way.channel_axis], norm.weight
    reach = _reach(gamma, beta, x, channels)
    if reach is None or not (bare if weight is None else weight.shape == (channels,)):
        return None
    if reach == "all":
        learns = torch.is_grad_enabled() and (gamma.requires_grad or beta.requires_grad)
        if kind is nn.GroupNorm and learns and not (x.requires_grad or x.is_contiguous()):
            return None  # torch's backward pass writes a gradient of x that nobody asked for, and crashes
        return way.whole(norm, _affine(norm, gamma, beta))(x)
    return way.per_sample(norm, x, gamma, beta) if way.per_sample else None


def ahead() -> bool:
    """Whether affines are made before the network runs: without gradients, and without the kernels.

    These take a norm's affine and a modulation as they are.
    """
    if native.kernels is not None or torch.is_grad_enabled():
        return False
    return not (is_compiling() or torch._C._is_tracing())


def prepared(kind: type[nn.Module], norm: Any, modulation: Modulation, dim: int) -> Ready | None:
    """Return a norm that does what it does and then `modulation`, or None.

    None where samples have modulations of their own, with gradients (FSDP puts the weights that have them in
    place later), and where the weights are still to come: by a hook, or from another device.

    Args:
        kind: as in `absorbed`.
        norm: the norm itself.
        modulation: channels last.
        dim: the channel axis of the features that it modulates.
    """
    if kind not in _WAYS or not _modulates_channels(kind, dim):
        return None
    way, weight = _WAYS[kind], norm._parameters.get("weight")
    if type(weight) is not nn.Parameter or norm._forward_pre_hooks or not way.takes(norm):
        return None
    if torch.is_grad_enabled() or weight.device != modulation.gamma.device:
        return None
    channels, dtype = weight.numel(), weight.dtype
    for field in modulation.present():
        if field.dtype is not dtype or field.shape not in ((channels,), (1, channels)):
            return None
    bias, call = norm._parameters.get("bias"), way.whole(norm, _affine(norm, *modulation.gated()))
    version = None if weight.is_inference() else _version(weight, bias)
    return Ready(norm, weight, bias, weight.data_ptr(), version, norm.training, dtype, way.axes, call)


def _batch(norm: Any, affine: Affine) -> Callable[[Tensor], Tensor]:
    (weight, bias), training, momentum = affine, False, 0.0

    def call(x: Tensor) -> Tensor:
        statistics: Any = norm._buffers  # a third of the time that the attributes take
        mean, variance, cudnn = statistics["running_mean"], statistics["running_var"], _cudnn.enabled
        # `functional.batch_norm` checks more than there is to check, which would cost what the affine saves.
        return torch.batch_norm(x, weight, bias, mean, variance, training, momentum, norm.eps, cudnn)

    return call


def _group(norm: Any, affine: Affine) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.group_norm(x, norm.num_groups, *affine, norm.eps)


def _group_each(norm: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor | None:
    strides = x.stride()
    if not x.is_contiguous() or strides[-1] >= strides[1] * x.shape[1]:  # or channels-last as well
        return None
    if x.numel() == len(x) * norm.num_groups:  # of one number: torch wants two
        return None
    flat, affine = _as_one_sample(x, norm, gamma, beta)
    return functional.group_norm(flat, len(x) * norm.num_groups, *affine, norm.eps).view(x.shape)


def _group_plan(norm: Any, x: Tensor) -> onepass.Norm:
    return onepass.Norm(1, norm.num_groups, norm.eps)


def _instance(norm: Any, affine: Affine) -> Callable[[Tensor], Tensor]:
    weight, bias = affine
    return lambda x: functional.instance_norm(x, weight=weight, bias=bias, eps=norm.eps)


def _instance_each(norm: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor | None:
    if not x.is_contiguous():
        return None
    flat, affine = _as_one_sample(x, norm, gamma, beta)
    return _instance(norm, affine)(flat).view(x.shape)


def _instance_plan(norm: Any, x: Tensor) -> onepass.Norm:
    return onepass.Norm(1, x.shape[1], norm.eps)  # without an affine any number of channels is right


def _layer(norm: Any, affine: Affine) -> Callable[[Tensor], Tensor]:
    return lambda x: functional.layer_norm(x, norm.normalized_shape, *affine, norm.eps)


def _layer_plan(norm: Any, x: Tensor) -> onepass.Norm | None:
    return onepass.Norm(-1, 1, norm.eps) if x.shape[-1:] == norm.normalized_shape else None


def _rms(norm: Any, affine: Affine) -> Callable[[Tensor], Tensor]:
    weight, bias = affine
    return lambda x: functional.rms_norm(x, norm.normalized_shape, weight, norm.eps) + bias


def _rms_plan(norm: Any, x: Tensor) -> onepass.Norm | None:
    if x.shape[-1:] != norm.normalized_shape:
        return None
    return onepass.Norm(-1, 0, torch.finfo(x.dtype).eps if norm.eps is None else norm.eps)


class _Way(NamedTuple):
    """How a kind of norm takes another affine.

    channel_axis: of its features.
    axes: how many they may have.
    takes: whether a norm, with its options and in its mode, takes any.
    whole: from one affine to the norm's call with it.
    plan: what the kernels compute, or None for features that it does not take; of batch norms sites ask.
    per_sample: its call with gamma and beta of each sample, or None for features that it does not take so.
    """

    channel_axis: int
    axes: Collection[int]
    takes: Callable[[Any], bool]
    whole: Callable[[Any, Affine], Callable[[Tensor], Tensor]]
    plan: Callable[[Any, Tensor], onepass.Norm | None] | None = None
    per_sample: Callable[[Any, Tensor, Tensor, Tensor], Tensor | None] | None = None


def _evaluates(norm: Any) -> bool:
    return not norm.training and norm._buffers.get("running_mean") is not None


def _keeps_nothing(norm: Any) -> bool:
    return not norm.track_running_stats


def _of_one_axis(norm: Any) -> bool:
    return len(norm.normalized_shape) == 1


_WAYS: dict[type[nn.Module], _Way] = {
    **{kind: _Way(1, axes, _evaluates, _batch) for kind, axes in onepass.BATCH_NORMS.items()},
    # torch has 64 axes at most
    nn.GroupNorm: _Way(1, range(3, 65), lambda norm: True, _group, _group_plan, _group_each),
    nn.InstanceNorm1d: _Way(1, (3,), _keeps_nothing, _instance, _instance_plan, _instance_each),
    nn.InstanceNorm2d: _Way(1, (4,), _keeps_nothing, _instance, _instance_plan, _instance_each),
    nn.InstanceNorm3d: _Way(1, (5,), _keeps_nothing, _instance, _instance_plan, _instance_each),
    nn.LayerNorm: _Way(-1, range(2, 65), _of_one_axis, _layer, _layer_plan),
    nn.RMSNorm: _Way(-1, range(2, 65), _of_one_axis, _rms, _rms_plan),
}


@functools.cache
def _modulates_channels(kind: type[nn.Module], dim: int) -> bool:
    """Whether an axis is that of the norm's channels, however many axes the features have."""
    way = _WAYS[kind]
    return all((dim - way.channel_axis) % axes == 0 for axes in way.axes)


NORMS = frozenset(_WAYS)
"""The norms into which a modulation is absorbed."""


def _reach(gamma: Tensor, beta: Tensor, x: Tensor, channels: int) -> Literal["all", "sample"] | None:
    """Say how far one row of gamma and beta reaches: all of x, a sample of it, or neither (None)."""
    everywhere, axes, samples = True, 0, x.shape[0]
    for field in (gamma, beta):
        if field.dtype != x.dtype or field.shape[-1:] != (channels,):
            return None
        axes = max(axes, field.ndim)
        if field.numel() != channels:
            everywhere = False
            if field.shape != (samples, channels) or not samples:
                return None
    if everywhere:
        return "all" if axes <= x.ndim and samples else None  # an affine instance norm refuses no samples
    return "sample" if axes <= 2 else None


def _affine(norm: Any, gamma: Tensor, beta: Tensor) -> Affine:
    """Return gamma * weight and gamma * bias + beta of one row, [C]."""
    if gamma.ndim > 1 or beta.ndim > 1:
        gamma, beta = gamma.reshape(-1), beta.reshape(-1)
    weight, bias = norm.weight, getattr(norm, "bias", None)  # RMSNorm has none
    return gamma if weight is None else gamma * weight, beta if bias is None else gamma * bias + beta


def _as_one_sample(x: Tensor, norm: Any, gamma: Tensor, beta: Tensor) -> tuple[Tensor, Affine]:
    """View [B, C, ...] as [1, B * C, ...], and give its affine B * C numbers."""
    rows, weight, bias = x.shape[:2], norm.weight, norm.bias
    weight = gamma if weight is None else gamma * weight
    bias = beta if bias is None else torch.addcmul(beta, gamma, bias)
    affine = weight.expand(rows).reshape(-1), bias.expand(rows).reshape(-1)
    return x.view(1, rows.numel(), *x.shape[2:]), affine
