"""What a site applies, to which part of what its module gives or is given, and how rows meet the conditions.

Each site has a slot of its own, local to the thread, which the root of the network fills for the duration of
a call. One dictionary by names of sites would give a compiled block a graph for each name, and a value shared
by threads would mix up their conditions.
"""

from __future__ import annotations

import copy
import dataclasses
import threading
from collections.abc import MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from torchfilm.absorption import Ready
from torchfilm.fusion import Film, Fusion
from torchfilm.mixing import Attending, Bilinear, Mixing
from torchfilm.modulation import Modulation
from torchfilm.sharding import beside
from torchfilm.sites import Site


class Slot(threading.local):
    """What one site applies now, in this thread: a value of the fusion, PLAIN, or None without a condition.

    Copies and pickles carry the site and start empty.

    Attributes:
        value: what the site applies.
        lent: what it applies where no call of the network runs, or None.
        backward: the backward pass in which that holds, or -1.
        ready: the norm that is the site with the value in its affine, made before it is called, if it can be.
    """

    def __init__(self, site: Site, fusion: Fusion) -> None:
        self.site = site
        self.fusion = fusion
        self.value: Any = None
        self.lent: Any = None
        self.backward = -1
        self.ready: Ready | None = None
        self.is_plain_film = is_plain_film(site, fusion)

    def in_its_pass(self) -> bool:
        """Tell whether what is lent holds in the pass that runs."""
        return self.backward == backward_pass()

    def __reduce__(self) -> tuple[Any, ...]:
        return Slot, (self.site, self.fusion)


class Kept:
    """What a module applies at each call, in the place of a `Slot`: a value that never changes.

    Args:
        module: whose buffers hold the value.
        site: where; its `where`, `field` and `dim` count.
        fusion: how the value meets the features.
        value: a dataclass of tensors; each becomes a buffer.
    """

    ready = None

    def __init__(self, module: nn.Module, site: Site, fusion: Fusion, value: Any) -> None:
        self.buffers = module._buffers  # the module itself would be a cycle
        self.site = site
        self.fusion = fusion
        self.is_plain_film = is_plain_film(site, fusion)
        self.kind = type(value)
        self.names = tuple(field.name for field in dataclasses.fields(value))
        for name in self.names:
            tensor = getattr(value, name)
            module.register_buffer(f"kept_{name}", None if tensor is None else tensor.detach().clone())

    @property
    def value(self) -> Any:
        """The value, made of the buffers."""
        return self.kind(*[self.buffers[f"kept_{name}"] for name in self.names])


Holding = Slot | Kept


def backward_pass() -> int:
    """Return the number of the backward pass that runs in this thread, or -1."""
    return torch._C._current_graph_task_id()


# A compiled call asks while it is compiled, and is no other one in each backward pass. Asking `is_compiling`
# would cost `Conditioning.lend` its effect there.
backward_pass._dynamo_marked_constant = True  # type: ignore[attr-defined]
Slot.in_its_pass._dynamo_marked_constant = True  # type: ignore[attr-defined]


def is_plain_film(site: Site, fusion: Fusion) -> bool:
    """Tell whether a site applies FiLM to the whole of its output, each row by its own modulation."""
    whole = (site.where, site.repeat, site.batch, site.field) == ("output", 1, 0, None)
    return whole and type(fusion) is Film and fusion.align is None


def _modulated(slot: Holding, x: Any) -> Tensor | PackedSequence:
    """Apply the slot's value; rows that share a condition get an axis of their own, behind the batch's."""
    site = slot.site
    # The name would become a guard of a compiled block, and each block a graph of its own.
    name = "" if is_compiling() else site.name
    if isinstance(x, PackedSequence):
        return _packed(slot, x, name)
    if not isinstance(x, Tensor):
        raise ValueError(
            f"Site '{site.name}': expected a tensor at its {site.where}, got {type(x).__name__}.\n"
            f"Say which part is to be modulated: field=<index or name>."
        )
    if site.batch == 1 and x.ndim >= 3:
        dim = {0: 1, 1: 0}.get(site.dim % x.ndim, site.dim)
        return _of_rows(slot, x.transpose(0, 1), dim, name).transpose(0, 1)
    return _of_rows(slot, x, site.dim, name)


def _of_rows(slot: Holding, x: Tensor, dim: int, name: str) -> Tensor:
    """Apply the slot's value to features whose first axis is the batch."""
    site, value = slot.site, slot.value if type(x) is Tensor else beside(x, slot.value)
    if site.repeat == 1:
        return slot.fusion.apply(x, value, dim, name)
    rows = x.unflatten(0, _groups(slot, x))
    return slot.fusion.apply(rows, value, dim + 1 if dim >= 0 else dim, name).flatten(0, 1)


def _packed(slot: Holding, x: PackedSequence, name: str) -> PackedSequence:
    """Apply the slot's value to sequences as [B, T, C], and pack them again in the very same way."""
    padded, lengths = pad_packed_sequence(x, batch_first=True)
    if isinstance(slot.fusion, Film) and slot.fusion.align is not None:
        _check_steps(slot, padded, slot.fusion.align)
    y = _of_rows(slot, padded, -1, name)
    if x.sorted_indices is not None:
        y, lengths = y.index_select(0, x.sorted_indices), lengths[x.sorted_indices.cpu()]
    data = pack_padded_sequence(y, lengths, batch_first=True).data
    return PackedSequence(data, x.batch_sizes, x.sorted_indices, x.unsorted_indices)


def _check_steps(slot: Holding, padded: Tensor, align: str) -> None:
    """Refuse steps that would be stretched over the longest sequence, whichever that is in this batch."""
    longest, sizes = padded.shape[1], slot.value.spread()[0].shape
    if len(sizes) == padded.ndim + (slot.site.repeat != 1) and sizes[-2] not in (1, longest):
        raise ValueError(
            f"Site '{slot.site.name}': expected steps for sequences of at most {longest}, got {sizes[-2]} "
            f"and align={align!r}, which would stretch them over the longest of the batch.\n"
            f"Give packed sequences a condition for each of their own steps, padded as they are."
        )


def _groups(slot: Holding, x: Tensor) -> tuple[int, int]:
    """Return how many conditions the rows of x have, and how many rows each; ValueError where uneven."""
    site, total = slot.site, x.shape[0]
    given = num_conditions(slot.value)
    if site.repeat != "any":
        groups, each, wanted = total // site.repeat, site.repeat, f"{site.repeat} rows"
    elif given is not None:
        groups, each, wanted = given, total // max(given, 1), "equally many rows"
    else:
        raise ValueError(
            f"Site '{site.name}': repeat='any' expected a value of a fusion of the library, got "
            f"{type(slot.value).__name__}, whose number of conditions is unknown.\n"
            f"Give the rows per condition as a number: condition(..., repeat=5)."
        )
    if groups * each == total and (given is None or given == 1 or given == groups):
        return groups, each
    told = "" if given is None else f" and {given} condition{'s' * (given != 1)}"
    remedy = (
        "Condition the network with the number of rows that each condition serves, or with repeat='any', "
        "where it may be another one at each call."
    )
    if site.repeat == "any":
        remedy = "Say which condition each row has: modulation=tf.modulations(model, cond).rows(index)."
    raise ValueError(
        f"Site '{site.name}': expected {wanted} for each condition (repeat={site.repeat!r}), got {total} "
        f"rows in all{told}.\n"
        f"  x  {tuple(x.shape)}\n"
        f"{remedy}"
    )


_BATCHED: dict[type, str] = {Mixing: "shift", Bilinear: "factor", Attending: "keys"}


def num_conditions(value: Any) -> int | None:
    """Return for how many conditions a value is, 1 where for all samples; None for those of others.

    Example:
        >>> num_conditions(Modulation.identity(2, 3))
        2
    """
    if isinstance(value, Modulation):
        fields = value.present()
    elif type(value) in _BATCHED:
        fields = [getattr(value, _BATCHED[type(value)])]
    else:
        return None
    rows = 1
    for field in fields:
        if field.ndim > 1 and field.shape[0] != 1:
            rows = field.shape[0]
    return rows


def with_output_modulated(slot: Holding, output: Any) -> Any:
    """Return the output of a module with the part of it modulated that the site names."""
    if isinstance(output, (Tensor, PackedSequence)) and slot.site.field is None:
        return _modulated(slot, output)
    field = slot.site.field
    if isinstance(output, tuple | list) and isinstance(field, int | None) and not hasattr(output, "_fields"):
        return _with_element(slot, output, field or 0)
    return _with_field(slot, output, field)


def _with_element(slot: Holding, output: Sequence[Any], index: int) -> Any:
    if not -len(output) <= index < len(output):
        raise ValueError(
            f"Site '{slot.site.name}': expected an output {index}, got {len(output)} of them.\n"
            f"Give field= an index below."
        )
    parts = list(output)
    parts[index] = _modulated(slot, parts[index])
    return parts if isinstance(output, list) else tuple(parts)


def _with_field(slot: Holding, output: Any, field: int | str | None) -> Any:
    """Replace one field of a named tuple, a dataclass (as in transformers and diffusers) or a mapping."""
    if isinstance(output, PackedSequence):
        raise ValueError(
            f"Site '{slot.site.name}': expected no field= where sequences are packed, got a PackedSequence "
            f"and {field!r}.\n"
            f"Leave field= out: they are modulated as they are."
        )
    names = _field_names(output)
    index = 0 if field is None else field
    wanted = names[index] if isinstance(index, int) and -len(names) <= index < len(names) else field
    name = wanted if isinstance(wanted, str) and wanted in names else None
    if name is None:
        raise ValueError(
            f"Site '{slot.site.name}': expected an output with the field {field!r}, got a "
            f"{type(output).__name__} with {', '.join(names) or 'none'}.\n"
            f"Give field= one of them, or condition a module that returns a tensor."
        )
    if type(output) is dict:
        return {**output, name: _modulated(slot, output[name])}
    if isinstance(output, MutableMapping) and not dataclasses.is_dataclass(output):
        changed = copy.copy(output)
        changed[name] = _modulated(slot, output[name])
        return changed
    parts = {name: _modulated(slot, getattr(output, name))}
    if isinstance(output, tuple):
        return output._replace(**parts)  # type: ignore[attr-defined]
    return dataclasses.replace(output, **parts)


def _field_names(output: Any) -> Sequence[str]:
    if isinstance(output, tuple):
        return getattr(output, "_fields", ())
    if dataclasses.is_dataclass(output):
        return [field.name for field in dataclasses.fields(output)]
    return list(output) if isinstance(output, MutableMapping) else ()


def with_input_modulated(
    slot: Holding, names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a module, whose names are given, with the one modulated that the site names."""
    field = slot.site.field or 0
    if isinstance(field, int) and field < 0:  # from the last one that is given, by position or by name
        given = [*range(len(args)), *(name for name in names if name in kwargs)]
        field = given[field] if -len(given) <= field else field
    index = names.index(field) if isinstance(field, str) and field in names else field
    name = names[index] if isinstance(index, int) and 0 <= index < len(names) else field
    if isinstance(index, int) and 0 <= index < len(args):
        parts = list(args)
        parts[index] = _modulated(slot, parts[index])
        return tuple(parts), kwargs
    if name in kwargs:
        return args, {**kwargs, name: _modulated(slot, kwargs[name])}
    raise ValueError(
        f"Site '{slot.site.name}': expected the input {field!r}, got {len(args)} by position and "
        f"{list(kwargs)} by name.\n"
        f"Give field= the name of the input that is to be modulated."
    )
