"""How much the output depends on each channel's gamma and beta: the gradient, at the modulation itself.

At zero initialisation every difference of outputs is zero, whatever the network is like; the gradient with
respect to gamma and beta is not. So it tells a site that works from one that never will.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchfilm.filling import Conditioning, Off
from torchfilm.injection import conditioning
from torchfilm.modulation import Modulation, check_modulations
from torchfilm.naming import check_size
from torchfilm.restoring import fresh, undisturbed

Measure = Callable[[Any], Any]


class Leaves:
    """Values of all sites that gradients can be taken for, and those given before; both of the last call."""

    def __init__(self, start: Callable[[str, Any], Any]) -> None:
        self.start = start
        self.given: dict[str, Any] = {}
        self.values: dict[str, Any] = {}

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        """Cut each value off from what made it, and hand on leaves."""
        self.given = values
        self.values = {
            name: pytree.tree_map(_leaf, self.start(name, value)) for name, value in values.items()
        }
        return self.values

    def fields(self) -> Iterator[tuple[str, str, Tensor]]:
        """Yield site, field and tensor of every leaf."""
        for name, value in self.values.items():
            for part, tensor in tensors_of(value):
                if tensor.requires_grad:
                    yield name, part, tensor


@contextmanager
def leaves(
    model: nn.Module, start: Callable[[str, Any], Any] = lambda name, value: value
) -> Iterator[Leaves]:
    """Give the sites leaves that require gradients, in the block: `start` of name and what they would get.

    Raises:
        ValueError: inside of `unconditioned`, where no site gets any.
    """
    found, film = Leaves(start), conditioning(model)
    if isinstance(film.active, Off):
        raise ValueError(
            "doctor, sensitivity: expected a network that is conditioned at present, got it inside of "
            "`with unconditioned(model):`, where its sites hear nothing.\n"
            "Call this outside of the block."
        )
    with film.transformed(found):
        yield found


def probe(output: Any, measure: Measure | None, seed: int) -> tuple[Tensor, float, float]:
    """Return a scalar to take gradients of, the unit to divide squared gradients by, and that of all of y.

    Raises:
        ValueError: for an output or a measure without a gradient, and for one of no sample.
    """
    kinds = Tensor if measure is None else object  # a measure may read what is no tensor
    parts = [part for part in pytree.tree_leaves(output) if part is not None and isinstance(part, kinds)]
    empty = [part for part in parts if isinstance(part, Tensor) and not part.numel()]
    if empty and len(empty) == len(parts):
        raise ValueError(
            f"Output: expected at least one sample, got shape {tuple(empty[0].shape)}.\n"
            f"Give a batch with samples, as in training."
        )
    return _projected(output, seed) if measure is None else _measured(measure(output))


def _measured(value: Any) -> tuple[Tensor, float, float]:
    """Return the sum of a measure of each sample, and how many there are."""
    if not isinstance(value, Tensor) or not value.requires_grad or value.is_complex():
        kind = f"{value.dtype}" if isinstance(value, Tensor) else f"{type(value).__name__} without one"
        raise ValueError(
            f"measure: expected a tensor with a gradient, got {kind}.\n"
            f"Compute it from the output in real floating point, without argmax or detach."
        )
    rows = float(len(value) if value.ndim else 1)
    return value.sum(), rows, rows


def _projected(output: Any, seed: int) -> tuple[Tensor, float, float]:
    """Return the product of an output with normally distributed numbers, and its units.

    Its squared gradients are in the mean those of the whole Jacobian, E[(v . dy/dg)^2] = |dy/dg|^2, and the
    unit is |y - m|^2, where m is the mean over samples, rows of y: an offset of the output is no part of it.
    Where rows do not differ, as where there is one, it is |y|^2, as is that of all of y. Masked entries are
    left out: those that are -inf, and those of about `torch.finfo(y.dtype).min`; so are single numbers, as a
    loss, beside outputs with rows.
    """
    found = [
        torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
        for y in pytree.tree_leaves(output)
        if isinstance(y, Tensor) and y.requires_grad
    ]
    if not found:
        raise ValueError(
            "Output: expected one with a gradient, got none.\n"
            "Either no site has a part in it, or the network ends in argmax or runs without gradients, as "
            "generate does: call the part before."
        )
    chance = torch.Generator().manual_seed(seed)
    total, square, apart = torch.zeros((), device=found[0].device), 0.0, 0.0
    for y in [y for y in found if y.ndim] or found:
        y, counts = _unmasked(y)
        wide = torch.promote_types(y.dtype, torch.float32)
        v = torch.randn(y.shape, generator=chance, dtype=wide, device="cpu").to(y.device)
        total = total + (v * y).sum().to(total.device)
        values = y.detach().cpu().double()
        size, own = float(values.square().sum()), _apart(values, counts.cpu())
        square += size
        apart += own if own > size * (2 * torch.finfo(y.dtype).eps) ** 2 else 0.0  # else by rounding
    tiny = torch.finfo(torch.float64).tiny
    return total, max(apart or square, tiny), max(square, tiny)


def _unmasked(y: Tensor) -> tuple[Tensor, Tensor]:
    """Return an output with 0 for what is masked, and what is not; all that has overflowed is no mask."""
    masked = y.detach() <= 0.9 * torch.finfo(y.dtype).min
    masked = masked & ~masked.all()
    return y.masked_fill(masked, 0), ~masked


def _apart(y: Tensor, counts: Tensor) -> float:
    """Return the sum of squares around the mean over rows, of entries that count; 0 for a single row."""
    if y.ndim == 0:
        return 0.0
    mean = y.sum(dim=0) / counts.sum(dim=0).clamp(min=1)
    return float(((y - mean) * counts).square().sum())


def sensitivity(
    model: nn.Module,
    *args: Any,
    cond: Any = None,
    modulation: Mapping[str, Any] | None = None,
    measure: Measure | None = None,
    draws: int = 1,
    **kwargs: Any,
) -> dict[str, Modulation]:
    """Return how much each channel's gamma and beta moves the output: one Modulation [C] for each site.

    Without a measure: |dy/dgamma_c| / |y| over all samples, so 0.1 says that gamma_c + 1 changes the output
    by about a tenth of how far samples are from their mean: |y| is without what they share, but where they do
    not differ, or there is one. Left out of y are masked entries, those that are -inf or
    torch.finfo(y.dtype).min, and single numbers beside it, such as a loss. If your mask is another number,
    such as -1e9, give a measure of the other entries.

    With a measure m: |dm/dgamma_c|, root mean square over what it gives for each sample; where one modulation
    is for all, that takes a backward pass for each. The network is left as it was.

    Args:
        model: a conditioned network, compiled or not; it runs in its present mode.
        args: what the network takes besides the condition; kwargs likewise.
        cond: the condition, or
        modulation: ready modulations.
        measure: from the output to a tensor [B], such as a logit of each sample. For a single number, such as
            a mean loss, the squares of all rows of gamma_c are added: sqrt(B) times less than for [B] where
            it is the mean of B samples with rows of their own.
        draws: how many random projections of the output are averaged, at least 1, a backward pass each. A
            number is off by about 0.7 / sqrt(N draws) of itself where all N samples move the output alike,
            and by up to 0.7 / sqrt(draws) where one does nearly all. With a measure nothing is drawn.

    Raises:
        ValueError: for a batch of no samples, for an output or a measure without a gradient, for another
            fusion than FiLM, inside of `unconditioned`, and for no draws.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> sensitivity(model, torch.rand(2, 3), cond=torch.rand(2, 7))["0"].beta.shape
        torch.Size([5])
    """
    check_size("sensitivity: draws", draws, "Leave draws= out for a single one.")
    draws = 1 if measure is not None else draws
    with undisturbed(model), leaves(model) as found:
        args, kwargs, cond = fresh((args, kwargs, cond))
        output = model(*args, cond=cond, modulation=modulation, **kwargs)
        check_modulations("sensitivity", found.values)
        squares: dict[str, dict[str, Tensor]] = {name: {} for name in found.values}
        for total, unit, fields in _passes(output, measure, draws, list(found.fields())):
            gradients = torch.autograd.grad(
                total, [tensor for _, _, tensor in fields], retain_graph=True, materialize_grads=True
            )
            for (name, field, _), gradient in zip(fields, gradients, strict=True):
                rows = gradient.cpu().double().reshape(-1, gradient.shape[-1])
                square = rows.square().sum(dim=0) / (unit * draws)
                squares[name][field] = squares[name].get(field, 0) + square
    return {
        name: Modulation(**{field: s.sqrt().to(getattr(value, field)) for field, s in squares[name].items()})
        for name, value in found.values.items()
    }


@dataclass(frozen=True)
class Moved:
    """What the condition moves.

    Args:
        fields: the names of the fields of each site's value that depend on it; all where that is unknown.
        at_start: whether none does at present, though with other weights it would; not asked of modulations
            that are given.
    """

    fields: dict[str, tuple[str, ...]]
    at_start: bool


def moved(film: Conditioning, read: Any, values: Mapping[str, Any]) -> Moved:
    """Ask the generator, for two conditions, which fields of its values differ: the others are constant.

    At its zero start none does; so it is asked with weights drawn at random as well. The condition moves
    neither the weight of `concat` nor, where beta alone is emitted, gamma.

    Args:
        film: the conditioning.
        read: what the generator read, or None where modulations were given: then it is asked for vectors.
        values: the value of each site, for the names of the fields.
    """
    all_fields = {name: tuple(part for part, _ in tensors_of(value)) for name, value in values.items()}
    dim = getattr(film.cond, "dim", None)
    given = read is None
    if given:
        place = next((p for p in film.generator.parameters() if p.is_floating_point()), torch.zeros(()))
        read = torch.zeros(2, dim, device=place.device) if isinstance(dim, int) else None
    try:
        pair = [pytree.tree_map(partial(_drawn, last=last, dim=dim), read) for last in (False, True)]
        weights = {
            name: torch.randn_like(weight) * 0.1 if weight.is_floating_point() else weight
            for name, weight in film.generator.named_parameters()
        }
        with torch.no_grad(), film.predicting():
            drawn = _differing(film, pair, weights)
            own = _differing(film, pair, {})
    except (RecursionError, torch.OutOfMemoryError):  # say nothing about the generator
        raise
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError):
        return Moved(all_fields, at_start=False)  # a generator that takes nothing but its encoder's own
    fields = {name: drawn.get(name, ()) or every for name, every in all_fields.items()}
    return Moved(fields, at_start=not given and any(drawn.values()) and not any(own.values()))


def shaken(value: Any, fields: Sequence[str]) -> Any:
    """Return the value of a site with random numbers added to all but these fields."""

    def one(path: Any, tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or _name(path) in fields:
            return tensor
        return tensor + 0.1 * torch.randn_like(tensor)

    return pytree.tree_map_with_path(one, value)


def _differing(film: Conditioning, pair: list[Any], weights: dict[str, Tensor]) -> dict[str, tuple[str, ...]]:
    first, second = (torch.func.functional_call(film.generator, weights, (read,)) for read in pair)
    return {
        name: tuple(
            part
            for (part, one), (_, other) in zip(tensors_of(first[name]), tensors_of(second[name]), strict=True)
            if not torch.equal(one, other)
        )
        for name in first
    }


def _drawn(value: Any, *, last: bool, dim: Any) -> Any:
    """Return another number in the place of one that the generator read; classes: the first, or a later."""
    if isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool):
        return value
    if isinstance(value, Tensor) and value.is_floating_point():
        return torch.randn_like(value)
    if not isinstance(value, Tensor | int):
        return value
    largest = int(value.max() if isinstance(value, Tensor) else value)
    largest = largest or (dim - 1 if isinstance(dim, int) else 0)
    return torch.full_like(value, largest * last) if isinstance(value, Tensor) else largest * last


def tensors_of(value: Any) -> list[tuple[str, Tensor]]:
    """Return name and tensor of each field of a value that is made of floating-point numbers."""
    return [
        (_name(path), tensor)
        for path, tensor in pytree.tree_flatten_with_path(value)[0]
        if isinstance(tensor, Tensor) and tensor.is_floating_point()
    ]


def _name(path: Any) -> str:
    return pytree.keystr(path).lstrip(".") or "value"


def _passes(
    output: Any, measure: Measure | None, draws: int, fields: list[tuple[str, str, Tensor]]
) -> Iterator[tuple[Tensor, float, list[tuple[str, str, Tensor]]]]:
    """Yield what to take gradients of, its unit, and for which fields.

    Fields that all samples share get a pass for each sample's measure, of which the sum says less.
    """
    rows = 1 if measure is None else int(probe(output, measure, 0)[1])
    shared = [one for one in fields if rows > 1 and (one[2].ndim < 2 or len(one[2]) == 1)]
    own = [one for one in fields if all(one is not other for other in shared)]
    for draw in range(draws if own else 0):
        yield *probe(output, measure, draw)[:2], own
    for sample in measure(output) if measure is not None and shared else ():
        yield sample.sum(), float(rows), shared


def _leaf(value: Any) -> Any:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return value.detach().clone().requires_grad_()
