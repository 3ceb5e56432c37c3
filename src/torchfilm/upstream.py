"""What encoder and generator tell the sites: the same for every condition, or nothing that was learned?

A network can hear at every site and still ignore its condition: the encoder has collapsed or was always
dropped, the generator is at its start, its weights have decayed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchfilm.counterfactual import columns, keys, of_samples
from torchfilm.filling import Active, Conditioning
from torchfilm.generator import Generator
from torchfilm.heads import AffineHead, SharedHead, TableHead
from torchfilm.mixing import Attentions, Concatenations
from torchfilm.sensitivity import tensors_of
from torchfilm.several import Masked, Maybe, Several
from torchfilm.sharding import is_sharded

START = (
    "The generator is at its start, the same for every condition: has training not begun, or was the "
    "optimiser built before condition()?"
)
"""No problem before training; afterwards one that no site shows."""


def untouched(generator: nn.Module) -> bool | None:
    """Whether all that starts at zero in a generator is there still; None where nothing is known of it."""
    heads = [part for part in generator.modules() if isinstance(part, AffineHead | SharedHead | TableHead)]
    zeros: list[Tensor] = [p for head in heads if head.start == "zero" for p in head.parameters()]
    for part in generator.modules():
        if isinstance(part, Generator) and part.scale is not None:
            zeros.append(part.scale)
        elif isinstance(part, Attentions):
            zeros += part.outputs
        elif isinstance(part, Concatenations) and part.ups is not None:
            zeros += part.ups
    if not zeros:
        return False if heads else None
    return not any(bool(tensor.any()) for tensor in zeros)


def active_condition(film: Conditioning, cond: Any) -> Any:
    """Return the condition of a call, or of the block around it; None where there is none."""
    active = film.active
    return active.cond if cond is None and isinstance(active, Active) else cond


def said_once(cond: Any) -> bool:
    """Whether a condition has equal rows, whatever dropout does."""
    try:
        return len(set(keys(of_samples(cond)))) == 1
    except ValueError:  # none, or one of a kind of its own: nothing is known about its rows
        return False


def reads_once(read: Any, values: Mapping[str, Any], told: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether all samples have one condition: by what the generator read, since at its start it makes the
    same of every condition; by the values where those were given.
    """
    found = _moved(values, told) if read is None else columns(read) or [read] * isinstance(read, Tensor)
    return bool(found) and all(map(_one_row, found))


def tells_one_thing(values: Mapping[str, Any], told: Mapping[str, tuple[str, ...]], cond: Any) -> bool:
    """Whether what the condition moves is the same at all sites for all samples, though these differ in it.

    Args:
        values: the value of each site.
        told: the names of the fields that the condition moves, by site; others are weights of the fusion.
        cond: the condition.
    """
    leaves = pytree.tree_leaves(cond, is_leaf=lambda one: isinstance(one, Masked))
    if said_once(cond) or any(isinstance(one, Masked) and _is_missing(one) for one in leaves):
        return False
    rows = [tensor for tensor in _moved(values, told) if tensor.ndim > 1 and len(tensor) > 1]
    return bool(rows) and all(map(_one_row, rows))


def _moved(values: Mapping[str, Any], told: Mapping[str, tuple[str, ...]]) -> list[Tensor]:
    """Return the fields of all sites that the condition moves."""
    fields = [(name, *field) for name, value in values.items() for field in tensors_of(value)]
    return [tensor for name, part, tensor in fields if part in told.get(name, ())]


def is_cut_off(encoder: nn.Module, values: Mapping[str, Any]) -> bool:
    """Whether an encoder has parameters to be trained, of which none has a part in the graph of the values.

    Left out is what stands for missing conditions, which has a part where some are missing alone; single
    numbers, as a temperature that belongs to another loss; and what is sharded, which is gathered in calls.
    """
    layers = [layer for layer in encoder.modules() if not isinstance(layer, Maybe | Several)]
    all_own = [p for layer in layers for p in layer.parameters(recurse=False)]
    own = [p for p in all_own if p.requires_grad and p.numel() > 1 and not is_sharded(p)]
    found = [tensor for value in values.values() for _, tensor in tensors_of(value) if tensor.requires_grad]
    if not own or not found:
        return False
    total = torch.stack([tensor.sum() for tensor in found]).sum()
    return all(one is None for one in torch.autograd.grad(total, own, allow_unused=True))


def _is_missing(cond: Masked) -> bool:
    return cond.value is None or (
        cond.present is not None and not bool(torch.as_tensor(cond.present, device="cpu").all())
    )


def _one_row(column: Any) -> bool:
    """Whether all rows say the same, but for rounding; a single vector [C] is one row."""
    if not isinstance(column, Tensor):
        return len(set(map(str, column))) == 1
    if column.ndim < 1 + column.is_floating_point():
        return True
    if not column.is_floating_point():
        return bool((column == column[:1]).all())
    wide = column.detach().cpu().double()
    return bool((wide - wide[:1]).abs().max() <= 1e-6 * wide.abs().max())
