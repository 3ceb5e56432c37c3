"""How an affine map of the channels disappears into the weights of the layer before or behind it.

`affine_of` and `affine_of_norm` return such a map. `fold_output` and `fold_input` know torch's own layers and
write into a `Draft`. What is not exact raises `NotExactError`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm, conv, instancenorm
from torch.utils import _pytree as pytree

from torchfilm.dataflow import first_layer, last_layer, passes
from torchfilm.fold_draft import Affine, Draft, NotExactError, in_float64
from torchfilm.fold_quantised import is_packed, repacked, rescaled
from torchfilm.mixing import Mixing
from torchfilm.modulation import Modulation
from torchfilm.sites import Site, is_patched, kind_of

Rule = Callable[[Draft, Any, Affine, int], nn.Module]
Side = Literal["start", "end"]


def affine_of(fusion: Any, value: Any, site: Site) -> Affine:
    """Return the map of the channels that a value of a fusion is, in float64.

    Raises:
        ValueError: for values of several conditions.
        NotExactError: for what is no such map, or another one at each position.
    """
    exact = pytree.tree_map_only(Tensor, lambda t: in_float64(t) if t.is_floating_point() else t, value)
    fold = getattr(fusion, "fold", None) or (lambda value: None)
    try:
        made = fold(exact)
    except RuntimeError:  # it has tensors of its own, in another precision
        made = fold(value)
    if isinstance(made, Modulation):
        factor, shift = made.gamma, made.beta
    elif isinstance(made, Mixing):
        weight = in_float64(made.weight)
        factor, shift = weight + torch.eye(site.features, device="cpu").to(weight), made.shift
    else:
        raise NotExactError(f"{type(fusion).__name__} is no affine map of the channels")
    inner = 2 if isinstance(made, Mixing) else 1
    for tensor, own in ((factor, inner), (shift, 1)):
        outer = tensor.shape[: tensor.ndim - own]
        if outer and outer[0] > 1:
            raise ValueError(
                f"fold, site '{site.name}': expected one condition, got {outer[0]}.\n"
                f"One set of weights holds one condition: fold(model, cond=z[:1]), or once for each; for a "
                f"fixed set of conditions use tabulate(model, conds=z)."
            )
        if any(size > 1 for size in outer):
            raise NotExactError(f"each of {outer.numel()} positions is modulated differently")
    return Affine(in_float64(factor).reshape(factor.shape[-inner:]), in_float64(shift).reshape(-1))


def affine_of_norm(draft: Draft, norm: Any) -> Affine:
    """Return what a BatchNorm in evaluation does: scale and shift by its statistics and its affine."""
    mean, variance, weight, bias = _numbers(draft, norm)
    factor = (variance + norm.eps).rsqrt() * weight
    return Affine(factor, bias - mean * factor)


def fold_output(draft: Draft, module: nn.Module, affine: Affine, dim: int) -> nn.Module:
    """Write affine(module(x)) into weights of the module or of the last layer inside of it.

    Args:
        draft: what collects the changes.
        module: the layer whose output is modulated.
        affine: the map of its channels.
        dim: the axis of the output that holds them.

    Returns:
        The layer whose tensors change.

    Raises:
        NotExactError: with the reason.
    """
    return _fold("end", draft, module, affine, dim)


def fold_input(draft: Draft, module: nn.Module, affine: Affine, dim: int) -> nn.Module:
    """Write module(affine(x)) into weights of the module or of the first layer inside of it.

    Arguments, result and errors as `fold_output`.
    """
    return _fold("start", draft, module, affine, dim)


def _fold(side: Side, draft: Draft, module: nn.Module, affine: Affine, dim: int) -> nn.Module:
    """Write a map into the module, or into the layer inside of it that is on this side."""
    draft.without_constants(module)
    for kind, rule in (_OUTPUT if side == "end" else _INPUT).items():
        if isinstance(module, kind):
            check_forward(module, kind)
            return rule(draft, module, affine, dim)
    if side == "end" and is_packed(module):
        return _packed_output(draft, module, affine, dim)
    name = last_layer(module) if side == "end" else first_layer(module)
    if not name:
        however = ", however its code may be called" if list(module.children()) else ""
        raise NotExactError(
            f"{kind_of(module).__name__} does not {side} with a layer whose weights could take it{however}"
        )
    inner = module
    for part in name.split("."):  # it and all that holds it belong to this module alone
        inner = inner.get_submodule(part)
        draft.alone(inner, module)
    return _fold(side, draft, inner, affine, dim)


def fold_border(draft: Draft, module: nn.Module, affine: Affine, dim: int) -> Tensor:
    """Write module(affine(x)) into a convolution that pads with zeros, by padding x with another number.

    gamma * x + beta between zeros is gamma * (x between -beta / gamma) + beta. The convolution's own padding
    becomes zero; arguments and errors are those of `fold_output`.

    Returns:
        What x is to be padded with, one number per channel.
    """
    draft.without_constants(module)
    if not isinstance(module, _CONVS) or not pads_with_zeros(module):
        raise NotExactError("no convolution that pads with zeros")
    check_forward(module, next(kind for kind in _CONVS if isinstance(module, kind)))
    _check_apart(module, affine)
    if (affine.factor == 0).any():
        raise NotExactError("a channel with gamma = 0 has no border that could become beta")
    _check_axis(module, dim, -1 - len(module.kernel_size), 1)
    border = -affine.shift / affine.factor
    if not border.to(module.weight.dtype).isfinite().all():
        raise NotExactError("a channel with gamma near 0 has a border beyond the range of its weight")
    _conv_columns(draft, module, affine)
    draft.write(module, padding=(0,) * len(module.kernel_size))
    return border


def check_forward(module: nn.Module, kind: type[nn.Module]) -> None:
    """Refuse subclasses and instances that compute something else with the same weights."""
    own = kind_of(module)
    methods = ("forward", "_conv_forward") if issubclass(kind, conv._ConvNd) else ("forward",)
    torchs = next(c for c in own.__mro__ if c.__module__.startswith("torch."))
    if is_patched(module) or any(getattr(own, m, None) is not getattr(torchs, m, None) for m in methods):
        raise NotExactError(f"{own.__name__} computes something of its own on top of {torchs.__name__}")


def _check_axis(module: nn.Module, dim: int, *allowed: int) -> None:
    if dim not in allowed:
        raise NotExactError(
            f"dim={dim} is modulated, but {kind_of(module).__name__} has its channels on dim={allowed[0]}"
        )


def _check_apart(module: nn.Module, affine: Affine) -> None:
    if affine.mixes:
        raise NotExactError(f"the fusion mixes channels, and {kind_of(module).__name__} keeps them apart")


def _read(draft: Draft, module: nn.Module, name: str = "weight") -> Tensor:
    """Return a tensor that the module surely has."""
    found = draft.read(module, name)
    assert found is not None
    return found


def _bias(draft: Draft, module: nn.Module, added: Tensor, affine: Affine | None = None) -> dict[str, Tensor]:
    """Return the new bias, the old one mapped; or none where there was none and none is needed."""
    bias = draft.read(module, "bias")
    if bias is None:
        return {"bias": added} if added.any() else {}
    return {"bias": (bias if affine is None else affine.rows(bias)) + added}


def _conv_output(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    spatial = len(module.kernel_size)
    _check_axis(module, dim, -1 - spatial, 1)
    if module.groups > 1:
        _check_apart(module, affine)
    weight = _read(draft, module)
    if not module.transposed:
        weight = affine.rows(weight)
    elif affine.mixes:
        weight = affine.rows(weight.transpose(0, 1)).transpose(0, 1)
    else:  # [in, out / groups, ...]: the output channels of a group are on axis 1 of its inputs' rows
        factor = affine.factor.view(module.groups, 1, -1, *[1] * spatial)
        weight = (factor * weight.unflatten(0, (module.groups, -1))).flatten(0, 1)
    draft.write(module, weight=weight, **_bias(draft, module, affine.shift, affine))
    return module


def _linear_output(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    _check_axis(module, dim, -1)
    weight = None if affine.mixes else rescaled(draft.latest(module, "weight"), affine.factor)
    if weight is None:
        weight = affine.rows(_read(draft, module))
    draft.write(module, weight=weight, **_bias(draft, module, affine.shift, affine))
    return module


def _packed_output(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    _check_axis(module, dim, -1)
    _check_apart(module, affine)
    packed = draft.latest(module._packed_params, "_packed_params")
    if module._packed_params.dtype != torch.qint8:
        raise NotExactError(
            f"its weight is packed as {module._packed_params.dtype}, not as integers with scales"
        )
    if torch.backends.quantized.engine == "qnnpack" and not (affine.factor > 0).all():
        raise NotExactError("the engine qnnpack takes no scale that is not positive, and so no such gamma")
    draft.write(module._packed_params, _packed_params=repacked(packed, affine.factor, affine.shift))
    return module


def _embedding_output(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    _check_axis(module, dim, -1)
    if module.max_norm is not None:
        raise NotExactError("max_norm rescales the rows of the table while it is used")
    draft.write(module, weight=affine.rows(_read(draft, module).T).T + affine.shift)
    return module


def _norm_output(draft: Draft, module: Any, affine: Affine, flag: str, spread: int = 0) -> nn.Module:
    """Into factor and shift of a norm, made where it has none; `spread` axes follow the channels'."""
    _check_apart(module, affine)
    factor, shift = (t.view(-1, *[1] * spread) for t in (affine.factor, affine.shift))
    if affine.shift.any() and isinstance(module, nn.RMSNorm):
        raise NotExactError("RMSNorm has no bias for beta")
    weight = draft.read(module, "weight")
    bias = None if isinstance(module, nn.RMSNorm) else draft.read(module, "bias")
    shape = getattr(module, "normalized_shape", factor.shape)
    values: dict[str, Any] = {"weight": factor.expand(shape) if weight is None else factor * weight}
    if bias is not None or affine.shift.any():
        values["bias"] = shift.expand(shape) if bias is None else factor * bias + shift
    draft.write(module, **values, **{flag: True})
    return module


def _channel_norm_output(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    without_batch = isinstance(module, instancenorm._InstanceNorm)
    _check_axis(module, dim, *((-module._get_no_batch_dim(), 1) if without_batch else (1,)))
    return _norm_output(draft, module, affine, "affine")


def _last_axes_norm_output(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    _check_axis(module, dim, *range(-1, -1 - len(module.normalized_shape), -1))
    return _norm_output(draft, module, affine, "elementwise_affine", spread=-1 - dim)


def _inner_output(name: str) -> Rule:
    def rule(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
        _check_axis(module, dim, -1)
        inner = getattr(module, name)
        if inner is None or getattr(module, "norm_first", False):
            raise NotExactError(
                f"{kind_of(module).__name__} ends with a residual sum, not with a layer of weights"
            )
        draft.alone(inner, module)
        return fold_output(draft, inner, affine, dim)

    return rule


def _sequential(side: Side) -> Rule:
    def rule(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
        for child in reversed(list(module)) if side == "end" else module:
            if not passes(child):
                draft.alone(child, module)
                return _fold(side, draft, child, affine, dim)
        raise NotExactError("Sequential has no layer with weights")

    return rule


def _conv_input(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    _check_axis(module, dim, -1 - len(module.kernel_size), 1)
    if draft.latest(module, "padding") != module.padding:
        raise NotExactError("its border is a constant of another site")
    if affine.shift.any() and pads_with_zeros(module):
        raise NotExactError("beta is missing from the zeros of the padding, so the border would differ")
    return _conv_columns(draft, module, affine)


def _conv_columns(draft: Draft, module: Any, affine: Affine) -> nn.Module:
    if module.groups > 1:
        _check_apart(module, affine)
    weight = _read(draft, module)
    grouped = weight.unflatten(0, (module.groups, -1))  # [groups, out / groups, in / groups, ...]
    per_group = [_group(affine, i, module.groups) for i in range(module.groups)]
    pairs = list(zip(grouped, per_group, strict=True))
    added = torch.cat([torch.tensordot(w.flatten(2).sum(-1), a.shift, dims=1) for w, a in pairs])
    draft.write(module, weight=torch.cat([a.columns(w) for w, a in pairs]), **_bias(draft, module, added))
    return module


def _transposed_input(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    _check_axis(module, dim, -1 - len(module.kernel_size), 1)
    if module.groups > 1:
        _check_apart(module, affine)
    if affine.shift.any():
        raise NotExactError("beta reaches the border of a transposed convolution less often than its inside")
    weight = _read(draft, module)
    transposed = Affine(affine.factor.T if affine.mixes else affine.factor, affine.shift)
    draft.write(module, weight=transposed.rows(weight))
    return module


def _linear_input(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    _check_axis(module, dim, -1)
    weight = _read(draft, module)
    draft.write(module, weight=affine.columns(weight), **_bias(draft, module, weight @ affine.shift))
    return module


def _batch_norm_input(draft: Draft, module: Any, affine: Affine, dim: int) -> nn.Module:
    _check_axis(module, dim, 1)
    _check_apart(module, affine)
    if module.training or module.running_mean is None:
        raise NotExactError("BatchNorm normalises by the batch here and takes the modulation out again")
    mean, variance, weight, bias = _numbers(draft, module)
    moved = affine.shift - mean + affine.factor * mean
    bias = bias + weight * moved * (variance + module.eps).rsqrt()
    draft.write(module, weight=affine.factor * weight, bias=bias, affine=True)
    return module


def pads_with_zeros(module: Any) -> bool:
    """Whether a convolution puts zeros around what it reads."""
    padding = module.padding
    amounts = (padding,) if isinstance(padding, str | int) else padding
    padded = any(amount not in (0, "valid") for amount in amounts)
    reaches = any(size > 1 for size in module.kernel_size) or "same" not in amounts
    return module.padding_mode == "zeros" and padded and reaches


def _numbers(draft: Draft, norm: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the statistics of a BatchNorm, mean and variance, and its affine: ones and zeros without one."""
    mean, variance = _read(draft, norm, "running_mean"), _read(draft, norm, "running_var")
    weight, bias = draft.read(norm, "weight"), draft.read(norm, "bias")
    weight = torch.ones_like(mean) if weight is None else weight
    return mean, variance, weight, torch.zeros_like(mean) if bias is None else bias


def _group(affine: Affine, index: int, groups: int) -> Affine:
    if groups == 1:
        return affine
    return Affine(affine.factor.chunk(groups)[index], affine.shift.chunk(groups)[index])


_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

_OUTPUT: dict[Any, Rule] = {
    **dict.fromkeys((*_CONVS, *_TRANSPOSED), _conv_output),
    nn.Linear: _linear_output,
    nn.Embedding: _embedding_output,
    **dict.fromkeys((batchnorm._BatchNorm, instancenorm._InstanceNorm, nn.GroupNorm), _channel_norm_output),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _last_axes_norm_output),
    nn.MultiheadAttention: _inner_output("out_proj"),
    nn.TransformerEncoderLayer: _inner_output("norm2"),
    nn.TransformerDecoderLayer: _inner_output("norm3"),
    nn.TransformerEncoder: _inner_output("norm"),
    nn.TransformerDecoder: _inner_output("norm"),
    nn.Sequential: _sequential("end"),
}
_INPUT: dict[Any, Rule] = {
    **dict.fromkeys(_CONVS, _conv_input),
    **dict.fromkeys(_TRANSPOSED, _transposed_input),
    nn.Linear: _linear_input,
    batchnorm._BatchNorm: _batch_norm_input,
    nn.Sequential: _sequential("start"),
}
