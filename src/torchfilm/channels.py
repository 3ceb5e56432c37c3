"""Where a layer keeps its channels: known for layers of torch and of torchfilm, asked for everywhere else.

A shape is never guessed from sizes, for a guess is wrong as soon as the width equals the number of channels.
What is read here is the layer's own documented layout.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from torch import nn
from torch.nn.modules import batchnorm, conv, instancenorm

from torchfilm.layers import Listening

Where = Literal["output", "input"]


def channels(module: nn.Module, where: Where) -> tuple[int | None, int | None]:
    """Return the number of channels and their axis, at the output or the input of a layer; None where
    unknown.

    Axes are counted from the back where a layer takes samples without a batch too (convolutions), so that
    they are right for both. Subclasses count as their base, except for layers whose subclasses move the
    channels (a channels-first LayerNorm is a common one): those must inherit `forward` unchanged, of torch or
    of torchfilm.

    Example:
        >>> channels(nn.Conv2d(3, 5, 1), "output"), channels(nn.Conv2d(3, 5, 1), "input")
        ((5, -3), (3, -3))
        >>> channels(nn.ReLU(), "output")
        (None, None)
    """
    side = -1 if where == "input" else 0
    for kind, read in _KNOWN.items():
        if isinstance(module, kind) and not _may_move(kind, type(module).forward):
            return read[side](module)
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


def _is_time_first(module: Any) -> bool:
    """Tell whether a layer was made with batch_first=False: time on axis 0, the batch on axis 1."""
    if isinstance(module, nn.RNNBase | nn.MultiheadAttention | nn.Transformer):
        return not module.batch_first
    if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
        return not module.self_attn.batch_first
    if isinstance(module, nn.TransformerEncoder | nn.TransformerDecoder):
        return _is_time_first(module.layers[0])
    return False


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


def _may_move(kind: type[nn.Module], forward: Any) -> bool:
    """Tell whether a subclass of a layer has a forward of its own, before which the channels may move."""
    if kind is Listening:
        return not forward.__module__.startswith("torchfilm.")
    return kind in (nn.LayerNorm, nn.RMSNorm) and forward is not kind.forward


Side = Callable[[Any], tuple[int | None, int | None]]


def _last(features: str) -> Side:
    """Return how to read that number of channels, on the last axis."""
    return lambda m: (getattr(m, features), -1)


def _axes_norm(module: Any) -> tuple[int | None, int | None]:
    """Over several axes the channels may be any of them."""
    return (module.normalized_shape[0], -1) if len(module.normalized_shape) == 1 else (None, None)


def _modulated(module: Any) -> tuple[int | None, int | None]:
    """A layer that listens modulates its channels: those of its FiLM, or its own."""
    film = getattr(module, "film", module)
    return getattr(film, "features", None), getattr(film, "dim", None)


# Channels and their axis at the output and at the input; one entry for both where they are the same.
_KNOWN: dict[type[nn.Module], tuple[Side, ...]] = {
    Listening: (_modulated,),
    conv._ConvNd: (
        lambda m: (m.out_channels, -1 - len(m.kernel_size)),
        lambda m: (m.in_channels, -1 - len(m.kernel_size)),
    ),
    nn.Linear: (_last("out_features"), _last("in_features")),
    nn.Bilinear: (_last("out_features"), _last("in1_features")),
    nn.Embedding: (_last("embedding_dim"), lambda m: (None, None)),
    nn.EmbeddingBag: (_last("embedding_dim"), lambda m: (None, None)),
    instancenorm._InstanceNorm: (lambda m: (m.num_features, -m._get_no_batch_dim()),),
    batchnorm._BatchNorm: (lambda m: (m.num_features, 1),),
    nn.GroupNorm: (lambda m: (m.num_channels, 1),),
    nn.RNNBase: (
        lambda m: ((m.proj_size or m.hidden_size) * (2 if m.bidirectional else 1), -1),
        _last("input_size"),
    ),
    nn.RNNCellBase: (_last("hidden_size"), _last("input_size")),
    nn.MultiheadAttention: (_last("embed_dim"),),
    nn.TransformerEncoderLayer: (lambda m: (m.linear2.out_features, -1),),
    nn.TransformerDecoderLayer: (lambda m: (m.linear2.out_features, -1),),
    nn.TransformerEncoder: (lambda m: (m.layers[0].linear2.out_features, -1),),
    nn.TransformerDecoder: (lambda m: (m.layers[0].linear2.out_features, -1),),
    nn.LayerNorm: (_axes_norm,),
    nn.RMSNorm: (_axes_norm,),
}
