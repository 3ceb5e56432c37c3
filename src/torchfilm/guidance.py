"""Classifier-free guidance: push the output, or the modulations, from the unconditional to the conditional.

The network learns to do without its condition by dropout of conditions (`Maybe`, `Several`); what it gives
without is then the point to move away from (Ho and Salimans 2022, arXiv 2207.12598).
"""

from __future__ import annotations

import dataclasses
import itertools
import numbers
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal, TypeVar, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from torchfilm.filling import Conditioning
from torchfilm.injection import conditioning, film_of, unwrapped
from torchfilm.masks import as_mask, viewed
from torchfilm.modulation import Modulation, aligned
from torchfilm.naming import check_choice
from torchfilm.restoring import in_mode
from torchfilm.several import Masked, Maybe, Several
from torchfilm.sharding import check_apart

Scale = float | Tensor
Scales = Scale | Sequence[float]
Space = Literal["output", "modulation"]
Output = TypeVar("Output")

# What has no rows: one is for all samples.
_SINGLE = (numbers.Number, str, bytes, type(None))
_LISTED = (numbers.Real, str)


def guide(
    model: Callable[..., Output],
    *inputs: Any,
    cond: Any,
    scale: Scales | Mapping[str, Scales],
    null: Any = None,
    space: Space = "output",
    **keywords: Any,
) -> Output:
    """Run a network with its condition exaggerated: y = y_null + scale * (y_cond - y_null).

    A scale of 1 is the conditional output and 0 the unconditional one, that of `Masked(cond, False)`, to the
    bit (that of `Masked(None)`, one row for all samples, but for rounding); beyond 1 the condition is
    exaggerated (Ho and Salimans 2022, eq. 6, where their w is scale - 1). With several conditions each has a
    scale of its own, and they come in one after the other, in the order of `scale`:

        y = y(null) + s_1 (y(c_1) - y(null)) + s_2 (y(c_1, c_2) - y(c_1)) + ...

    (Brooks et al. 2023, eq. 3, arXiv 2211.09800); conditions without a scale are given throughout. Outputs
    whose weight in this sum is the number 0 are not computed. Conditions that training took away together
    and never apart (`Several(joint_dropout=)`) take one scale, {"text": 3.0, "goal": 3.0}: then none has one
    without the other.

    - space="output": one call of the network, on the batch repeated once for each output that is needed.
      Inputs that name rows by number, as the edges of a graph, cannot be repeated so: use the other. Norms
      that take their statistics from the batch (in training, or without running ones) see all copies.
    - space="modulation": one call on the batch itself, with gamma, beta and gate extrapolated in the same
      way. It costs what an unguided call costs; it is another function, as the network is not linear.

    A network in training mode drops no condition while it is guided, in other threads that call it meanwhile
    neither: train and guide in turn, or guide a copy.

    Args:
        model: a conditioned network, or anything called as model(x, ..., cond=...).
        inputs: its positional arguments; tensors with one row per sample are repeated, others stay. How
            many samples there are is read off the first tensor; where that has one row, off the next with as
            many axes that has more, or the condition.
        cond: the condition; a number is for all samples, a list of numbers or texts has one for each.
        scale: a number, or a tensor or list with one per sample; for conditions by name, a mapping from names
            to those. What is not on the device yet is copied there at each call, for which the host waits.
        null: what stands for a missing condition, in the form of `cond` (a mapping from names, for conditions
            by name). None for models that know what is missing themselves, by `Maybe` or `Several`.
        space: as above.
        keywords: its keyword arguments, repeated likewise.

    Returns:
        What the model returns, each tensor in it guided, also in fields of dataclasses.

    Raises:
        ValueError: for a condition that cannot be missing, names without a condition, conditions by name with
            one scale for all of them, a scale that is no number, space="modulation" without a conditioned
            network and FiLM, modulations in the place of the condition, and for conditions or outputs of
            which nobody knows how to join or to weigh them.

    Example:
        >>> from torchfilm.conditions import Classes
        >>> from torchfilm.injection import condition
        >>> model = nn.Sequential(nn.Linear(3, 5), nn.ReLU())
        >>> model = condition(model, "0", Maybe(Classes(10, 7), dropout=0.1)).eval()
        >>> y = guide(model, torch.rand(2, 3), cond=torch.tensor([4, 9]), scale=3.0)
    """
    meaning = "The first is the guidance of the papers, the second costs no second pass through the network."
    check_choice("guide: space", space, get_args(Space), remedy=meaning)
    _check_alone(model, keywords)
    names, scales = _read_scale(cond, scale)
    device = _device((cond, inputs, keywords))
    weights = _weights([_per_sample(one, device) for one in scales])
    needed = [i for i, weight in enumerate(weights) if isinstance(weight, Tensor) or weight != 0]
    _check_missing(model, names[needed[0] :], null)
    chosen = [weights[i] for i in needed]
    copies = [_copy(cond, null, names, i) for i in needed]
    with _without_dropout(model):
        if space == "modulation":
            if not isinstance(model, nn.Module):
                raise ValueError(
                    f"guide: space='modulation' expected a conditioned network, got {type(model).__name__}.\n"
                    f"Use space='output', which takes any function."
                )
            mixed = _mixed_modulations(conditioning(model), copies, chosen)
            return model(*inputs, modulation=mixed, **keywords)
        if len(copies) == 1 and not isinstance(chosen[0], Tensor):
            return model(*inputs, cond=copies[0], **keywords)
        rows = _rows(inputs, cond, keywords)
        tiled = partial(_tiled, times=len(copies), rows=rows)
        args, kwargs = pytree.tree_map(tiled, (inputs, keywords), is_leaf=_is_packed)
        output = model(*args, cond=_joined(copies, rows, device), **kwargs)
        return pytree.tree_map(partial(_combined, weights=chosen, rows=rows), output)


def _check_alone(model: Callable[..., Any], keywords: Mapping[str, Any]) -> None:
    """Raise ValueError for modulations, where the network takes any."""
    root = unwrapped(model) if isinstance(model, nn.Module) else None
    given = keywords.get("modulation") is not None
    if given and "modulation" in getattr(type(root), "_film_keywords", ()):
        raise ValueError(
            "guide: expected a condition alone, got modulations too.\n"
            "Give cond=..., which it also takes away: of modulations it does not know what they are without. "
            "Where you know, call model(x, modulation=null + scale * (m - null))."
        )


def _without_dropout(model: Callable[..., Any]) -> AbstractContextManager[Any]:
    """Return a block in which no part of a module drops conditions: what is missing is said here."""
    film = film_of(model)
    if film is not None and not (model.training or film.training):  # type: ignore[attr-defined]
        return nullcontext()
    parts = model.modules() if isinstance(model, nn.Module) else ()
    dropping = [one for one in parts if one.training and isinstance(one, Conditioning | Maybe | Several)]
    return in_mode(*dropping, training=False) if dropping else nullcontext()


def _read_scale(
    cond: Any, scale: Scales | Mapping[str, Scales]
) -> tuple[Sequence[str | None], Sequence[Scales]]:
    """Return the names of the guided conditions, None for the only one, and their scales."""
    if not isinstance(cond, Mapping):
        if isinstance(scale, Mapping):
            raise ValueError(
                f"guide: expected one scale for one condition, got scales for {list(scale)}.\n"
                f"Give scale=3.0; scales by name belong to conditions by name."
            )
        return [None], [scale]
    if not isinstance(scale, Mapping) or not scale:
        raise ValueError(
            f"guide: expected a scale by name for conditions by name {list(cond)}, got {scale!r}.\n"
            f"Name those to exaggerate, scale={{{next(iter(cond), 'name')!r}: 3.0}}; the others, such as a "
            f"time step, are given throughout."
        )
    unknown = [name for name in scale if name not in cond]
    if unknown:
        raise ValueError(
            f"guide: expected scales for conditions among {list(cond)}, got {unknown}.\n"
            f"Give the condition (None where no sample has it), or leave its scale out."
        )
    return list(scale), list(scale.values())


def _per_sample(scale: Scales, device: torch.device | None) -> Scale:
    """Return a number, or a tensor on a device, without axes of size one behind the batch's."""
    if not isinstance(scale, Tensor | numbers.Real):
        try:
            scale = torch.as_tensor(scale, device=device)
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"guide: expected a scale that is a number, a tensor or a list of numbers, got {scale!r}.\n"
                f"Give scale=3.0, or one for each sample."
            ) from error
    while isinstance(scale, Tensor) and scale.ndim > 1 and scale.shape[-1] == 1:
        scale = scale.squeeze(-1)
    return scale.to(device) if isinstance(scale, Tensor) else scale


def _weights(scales: Sequence[Scale]) -> list[Scale]:
    """Return the weight of each output in y_0 + s_1 (y_1 - y_0) + s_2 (y_2 - y_1) + ...; their sum is one.

    Scales of 0 and 1 give weights of exactly 0 and 1, so that these outputs come out to the bit.
    """
    return [1 - scales[0], *(one - other for one, other in itertools.pairwise(scales)), scales[-1]]


def _copy(cond: Any, null: Any, names: Sequence[str | None], given: int) -> Any:
    """Return the condition with the first `given` of the named ones, and without the others."""
    if names == [None]:
        return cond if given else _without(cond, null)
    nulls = null or {}
    missing = {str(name): _without(cond[name], nulls.get(name)) for name in names[given:]}
    return {**cond, **missing}


def _without(value: Any, null: Any) -> Any:
    if value is None:
        return None
    if null is not None:
        return null
    inner = value.value if isinstance(value, Masked) else value
    return Masked(inner, torch.zeros((), dtype=torch.bool, device=_device(inner)))


def _joined(copies: Sequence[Any], rows: int, device: torch.device | None) -> Any:
    """Return one condition with the rows of all copies, one copy after the other, numbers on a device."""
    if any(isinstance(copy, Masked) for copy in copies):
        values = [copy.value if isinstance(copy, Masked) else copy for copy in copies]
        masks = [_present(copy, rows, device) for copy in copies]
        axes = max(mask.ndim for mask in masks)
        steps = next(mask.shape[1:] for mask in masks if mask.ndim == axes)
        wide = [viewed(mask, axes).expand(-1, *steps) for mask in masks]
        value, present = _joined(values, rows, device), torch.cat(wide)
        if isinstance(value, numbers.Real):  # of all samples, which a mask has one by one
            value = torch.as_tensor(value, device=present.device).expand(len(present))
        return Masked(value, present)
    if any(isinstance(copy, Mapping) for copy in copies):
        names = dict.fromkeys(name for copy in copies for name in copy)
        return {name: _joined([copy.get(name) for copy in copies], rows, device) for name in names}
    return pytree.tree_map(lambda *leaves: _stacked(leaves, rows, device), *copies, is_leaf=_is_listed)


def _present(copy: Any, rows: int, device: torch.device | None) -> Tensor:
    """Return the mask of a copy with one boolean per row."""
    present = copy.present if isinstance(copy, Masked) and copy.present is not None else True
    own = _device(copy.value if isinstance(copy, Masked) else copy)
    mask = as_mask(present, device if own is None else own)
    return mask.expand(rows, *mask.shape[1:]) if mask.ndim == 0 or mask.shape[0] == 1 else mask


def _stacked(leaves: Sequence[Any], rows: int, device: torch.device | None) -> Any:
    """Return the rows of all leaves; those with one row, or none, are the same for every sample."""
    if any(_is_listed(leaf) for leaf in leaves):
        return [one for leaf in leaves for one in _listed(leaf, rows)]
    if _are_one(leaves):
        return leaves[0]
    tensors = _tensors(leaves, device)
    same = [leaf.ndim == 0 or leaf.shape[0] == 1 for leaf in tensors]
    full = [x.expand(rows, *x.shape[1:]) if one else x for x, one in zip(tensors, same, strict=True)]
    if any(leaf.shape[0] != rows or leaf.shape[1:] != full[0].shape[1:] for leaf in full):
        raise ValueError(
            f"guide: expected conditions and nulls of {rows} rows, or one, and otherwise of one shape, "
            f"got {[tuple(leaf.shape) for leaf in tensors]}.\n"
            f"Give every sample its condition; pad tokens to one length. Conditions that each serve several "
            f"rows are guided by space='modulation'."
        )
    return torch.cat(full)


def _are_one(leaves: Sequence[Any]) -> bool:
    """Whether something that is no tensor is the same in all copies."""
    first = leaves[0]
    equal = (leaf is first or (isinstance(first, _SINGLE) and leaf == first) for leaf in leaves)
    return not any(isinstance(leaf, Tensor) for leaf in leaves) and all(equal)


def _tensors(leaves: Sequence[Any], device: torch.device | None) -> list[Tensor]:
    """Return tensors as they are, and numbers as tensors without axes."""
    if not all(isinstance(leaf, Tensor | numbers.Real) for leaf in leaves):
        kinds = " and ".join(dict.fromkeys(type(leaf).__name__ for leaf in leaves))
        raise ValueError(
            f"guide: expected conditions and nulls of tensors, numbers or lists of texts where they differ, "
            f"got {kinds}.\n"
            f"Give tensors, torch.as_tensor(value), and texts as a list with one for each sample."
        )
    own = _device(leaves)
    return [torch.as_tensor(leaf, device=device if own is None else own) for leaf in leaves]


def _is_listed(value: Any) -> bool:
    """Whether a condition is a list with one text or number for each sample."""
    return isinstance(value, list) and len(value) > 0 and all(isinstance(one, _LISTED) for one in value)


def _listed(leaf: Any, rows: int) -> list[Any]:
    """Return a text or a number for each sample; one alone is that of all."""
    each = leaf if isinstance(leaf, list) else [leaf]
    if len(each) not in (1, rows) or not _is_listed(each):
        raise ValueError(
            f"guide: expected a list with one text or number for each of {rows} samples, or one for all, got "
            f"{leaf!r}.\nGive every sample its own, and its null."
        )
    return each * rows if len(each) == 1 else each


def _is_packed(value: Any) -> bool:
    return isinstance(value, PackedSequence)


def _tiled(leaf: Any, times: int, rows: int) -> Any:
    """Return the rows of a tensor once for each output; ValueError for what has no row per sample."""
    if _is_packed(leaf):
        raise ValueError(
            "guide: space='output' expected inputs that can be repeated for each output, got a "
            "PackedSequence.\nUse space='modulation', which repeats nothing."
        )
    if not isinstance(leaf, Tensor):
        return leaf
    if leaf.ndim and leaf.shape[0] == rows:
        return torch.cat([leaf] * times)
    numbered = leaf.dtype in (torch.int64, torch.int32) and leaf.ndim == 2 and len(leaf) == 2
    if numbered and leaf.numel() and leaf.max() < rows:
        raise ValueError(
            f"guide: expected inputs that can be repeated for each output, got numbers {tuple(leaf.shape)} "
            f"below {rows}, the rows of the batch, as the edges of a graph are.\n"
            f"Use space='modulation', which repeats nothing. Numbers that name no rows may be bound by a "
            f"function around the network, as lambda x, cond: model(x, numbers, cond=cond)."
        )
    return leaf


def _combined(leaf: Any, weights: Sequence[Scale], rows: int) -> Any:
    """Return the weighted sum of a tensor's copies, which lie behind one another on its first axis."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        given = {field.name: getattr(leaf, field.name) for field in dataclasses.fields(leaf) if field.init}
        combined = partial(_combined, weights=weights, rows=rows)
        return dataclasses.replace(leaf, **pytree.tree_map(combined, given))
    if not isinstance(leaf, Tensor):
        if isinstance(leaf, _SINGLE):
            return leaf
        raise ValueError(
            f"guide: expected an output of tensors, numbers and texts, in tuples, lists, mappings or "
            f"dataclasses, got a {type(leaf).__name__}, which would stay unguided.\n"
            f"Guide a function around the network that returns its tensors; transformers keep no cache with "
            f"use_cache=False."
        )
    copies = len(weights)
    if leaf.ndim == 0 or leaf.shape[0] % max(copies * rows, 1):
        raise ValueError(
            f"guide: expected outputs with rows for each of {copies} copies of a batch of {rows}, "
            f"got a tensor {tuple(leaf.shape)}.\n"
            f"Guide what the network gives for each sample, with the batch first: a function around it that "
            f"returns that alone will do. For graphs use space='modulation'."
        )
    return _weighted(leaf.tensor_split(copies), weights)


def _weighted(parts: Sequence[Tensor], weights: Sequence[Scale]) -> Tensor:
    """Return the weighted sum, in float32 or wider, rounded once; integers are those of the last part."""
    last = parts[-1]
    if not (last.is_floating_point() or last.is_complex()):
        return last
    wide = torch.promote_types(last.dtype, torch.float32)
    terms = [_like(weight, part) * part.to(wide) for weight, part in zip(weights, parts, strict=True)]
    return sum(terms[1:], start=terms[0]).to(last.dtype)


def _like(weight: Scale, part: Tensor) -> Scale:
    """View one weight per sample with axes of size one behind it."""
    if not isinstance(weight, Tensor) or weight.ndim == 0:
        return weight
    own = part.shape[: weight.ndim]
    if len(own) < weight.ndim or any(
        n != 1 and m not in (1, n) for m, n in zip(weight.shape, own, strict=True)
    ):
        raise ValueError(
            f"guide: expected a scale for each of {len(part)} samples, got {tuple(weight.shape)} of them for "
            f"a tensor {tuple(part.shape)}.\n"
            f"Give a number, or a tensor [{len(part)}]."
        )
    return viewed(weight.to(part.device), part.ndim)


def _mixed_modulations(
    film: Conditioning, copies: Sequence[Any], weights: Sequence[Scale]
) -> dict[str, Modulation]:
    """Return the weighted sum of the modulations of all copies, site by site."""
    check_apart(film)
    each = [film(copy) for copy in copies]
    for name, value in each[0].items():
        if not isinstance(value, Modulation):
            raise ValueError(
                f"guide: space='modulation' expected a Modulation at '{name}', got {type(value).__name__}.\n"
                f"Use space='output' for this fusion; gamma and beta can be extrapolated, attention cannot."
            )
    if len(each) == 1:
        return each[0]
    return {name: _mixed([one[name] for one in each], weights) for name in each[0]}


def _mixed(modulations: Sequence[Modulation], weights: Sequence[Scale]) -> Modulation:
    axes = max(1 + weight.ndim if isinstance(weight, Tensor) else 0 for weight in weights)
    fields = zip(*(m.present() for m in modulations), strict=True)
    return Modulation(*(_weighted(aligned(*field, axes=axes), weights) for field in fields))


def _check_missing(model: Callable[..., Any], dropped: Sequence[str | None], null: Any) -> None:
    """Refuse to drop what may not be missing and has no null; of a function that is unknown."""
    alone = [name for name in dropped if (null is None if name is None else (null or {}).get(name) is None)]
    if not alone or not isinstance(model, nn.Module):
        return
    film = film_of(model)
    encoder = film.cond if film is not None else None
    several = encoder.condition if isinstance(encoder, Maybe) else encoder
    needed = [name for name in alone if isinstance(several, Several) and name in several.required]
    if not needed and any(isinstance(part, Maybe) for part in model.modules()):
        return
    without = f"{needed}, whose null training never met" if needed else f"{type(model).__name__} without one"
    raise ValueError(
        f"guide: expected a condition that may be missing, got {without}.\n"
        f"Wrap it in Maybe(condition, dropout=0.1) and train with that (also around a Several inside of "
        f"another), or pass null=..."
    )


def _rows(inputs: Any, cond: Any, keywords: Any) -> int:
    """Return how many samples there are: the rows of the first input.

    One row may be a time step's, which all samples share: then those of the next input of as many axes that
    has more, or else of the condition.
    """
    given = _with_rows(inputs) or _with_rows(keywords)
    axes = given[0].ndim if given else 0
    counted = [leaf for leaf in given if leaf.ndim >= axes] + _with_rows(cond)
    sizes = (leaf.shape[0] for leaf in counted)
    return next((size for size in sizes if size != 1), 1)


def _with_rows(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor) and leaf.ndim]


def _device(value: Any) -> torch.device | None:
    """Return where the first tensor is, or None where there is none."""
    return next((leaf.device for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)), None)
