"""Where a layer keeps its channels: known for the layers of torch, asked for everywhere else.

A shape is never guessed from sizes, for a guess is wrong as soon as the width equals the number of channels.
What is read here is the layer's own documented layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.nn.modules import batchnorm, conv, instancenorm

Where = Literal["output", "input"]


def channels(module: nn.Module, where: Where) -> tuple[int | None, int | None]:
    """Return the number of channels and their axis, at the output or the input of a layer; None where
    unknown.

    Axes are counted from the back where a layer takes samples without a batch too (convolutions), so that
    they are right for both. Subclasses count as their base, except for layers whose subclasses move the
    channels (a channels-first LayerNorm is a common one): those must inherit `forward` unchanged.

    Example:
        >>> channels(nn.Conv2d(3, 5, 1), "output"), channels(nn.Conv2d(3, 5, 1), "input")
        ((5, -3), (3, -3))
        >>> channels(nn.ReLU(), "output")
        (None, None)
    """
    for kind, read in _KNOWN.items():
        if isinstance(module, kind):
            return read(module)[where == "input"]
    for kind, read in _KNOWN_UNCHANGED.items():
        if isinstance(module, kind) and type(module).forward is kind.forward:
            return read(module)[where == "input"]
    return _one_dimensional_weight(module), None


def batch_axis(model: nn.Module, name: str, where: Where = "output", field: int | str | None = None) -> int:
    """Return the axis of the batch at a site: 1 inside of torch's time-first layers, else 0.

    Not so what stands beside the sequences: states of a recurrence are [layers, B, C], weights of an
    attention [B, T, T].
    """
    *above, module = lineage(model, name)
    if isinstance(module, nn.RNNBase) and field in ((1, "hx") if where == "input" else (1, -1)):
        return 1
    if isinstance(module, nn.MultiheadAttention) and where == "output" and field in (1, -1):
        return 0
    return int(any(map(_is_time_first, (*above, module))))


def lineage(model: nn.Module, name: str) -> list[nn.Module]:
    """Return the modules from the model down to the named one, both included.

    Example:
        >>> [type(module).__name__ for module in lineage(nn.Sequential(nn.ReLU()), "0")]
        ['Sequential', 'ReLU']
    """
    modules = [model]
    for part in name.split(".") if name else ():
        modules.append(getattr(modules[-1], part))
    return modules


Sides = tuple[tuple[int | None, int | None], tuple[int | None, int | None]]


def _same(features: int | None, dim: int | None) -> Sides:
    return (features, dim), (features, dim)


def _conv(module: Any) -> Sides:
    axis = -1 - len(module.kernel_size)
    return (module.out_channels, axis), (module.in_channels, axis)


def _linear(module: Any) -> Sides:
    return (module.out_features, -1), (module.in_features, -1)


def _bilinear(module: Any) -> Sides:
    return (module.out_features, -1), (module.in1_features, -1)


def _embedding(module: Any) -> Sides:
    return (module.embedding_dim, -1), (None, None)


def _batch_norm(module: Any) -> Sides:
    return _same(module.num_features, 1)


def _instance_norm(module: Any) -> Sides:
    return _same(module.num_features, -module._get_no_batch_dim())


def _group_norm(module: Any) -> Sides:
    return _same(module.num_channels, 1)


def _last_axes_norm(module: Any) -> Sides:
    """Over several axes the channels may be any of them."""
    known = len(module.normalized_shape) == 1
    return _same(module.normalized_shape[0], -1) if known else _same(None, None)


def _recurrence(module: Any) -> Sides:
    width = (module.proj_size or module.hidden_size) * (2 if module.bidirectional else 1)
    return (width, -1), (module.input_size, -1)


def _recurrent_cell(module: Any) -> Sides:
    return (module.hidden_size, -1), (module.input_size, -1)


def _attention(module: Any) -> Sides:
    return _same(module.embed_dim, -1)


def _transformer_layer(module: Any) -> Sides:
    return _same(module.linear2.out_features, -1)


def _first_layer(module: Any) -> Any:
    return module.layers[0]


def _is_time_first(module: Any) -> bool:
    """Tell whether a layer was made with batch_first=False: time on axis 0, the batch on axis 1."""
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention | nn.Transformer):
        return not module.batch_first
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return not module.self_attn.batch_first
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        return _is_time_first(_first_layer(module))
    return False


def _transformer_stack(module: Any) -> Sides:
    return _transformer_layer(_first_layer(module))


def _one_dimensional_weight(module: nn.Module) -> int | None:
    """The width of a norm that torch does not know, as RMS norms and frozen ones; its axis stays unknown.

    A single number, as a slope or a scale, is the same for all channels and says nothing about them.
    """
    own = (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    weight = dict(own).get("weight")
    alone = not list(module.children())
    if weight is None or weight.ndim != 1 or weight.numel() == 1 or not alone:
        return None
    return weight.numel()


_KNOWN: dict[type[nn.Module], Callable[[Any], Sides]] = {
    conv._ConvNd: _conv,
    nn.Linear: _linear,
    nn.Bilinear: _bilinear,
    nn.Embedding: _embedding,
    nn.EmbeddingBag: _embedding,
    instancenorm._InstanceNorm: _instance_norm,
    batchnorm._BatchNorm: _batch_norm,
    nn.GroupNorm: _group_norm,
    nn.RNNBase: _recurrence,
    nn.RNNCellBase: _recurrent_cell,
    nn.MultiheadAttention: _attention,
    nn.TransformerEncoderLayer: _transformer_layer,
    nn.TransformerDecoderLayer: _transformer_layer,
    nn.TransformerEncoder: _transformer_stack,
    nn.TransformerDecoder: _transformer_stack,
}
_KNOWN_UNCHANGED: dict[type[nn.Module], Callable[[Any], Sides]] = {
    nn.LayerNorm: _last_axes_norm,
    nn.RMSNorm: _last_axes_norm,
}
