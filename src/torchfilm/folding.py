"""Fold a fixed condition into the weights of the network: the condition then costs nothing.

FiLM behind a convolution, gamma * (W x + b) + beta, is a convolution: (gamma W) x + (gamma b + beta); and so
for linear layers, the affine of norms, the scales of quantised weights, and some layers behind the
modulation.
"""

from __future__ import annotations

import copy
import itertools
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules import batchnorm
from torch.nn.utils import parametrize
from torch.utils import _pytree as pytree

from torchfilm.costs import num_parameters
from torchfilm.dataflow import (
    Code,
    code_of,
    conv_norm_pairs,
    fed_in_float32,
    read_by_code,
    shows,
    surroundings,
)
from torchfilm.filling import Conditioning
from torchfilm.fold_check import all_given, check_copied, difference, rounding, rounding_here
from torchfilm.fold_draft import Affine, Draft, NotExactError, Undo, restore
from torchfilm.fold_report import FoldedSite, FoldReport, Reference
from torchfilm.fold_rules import (
    affine_of,
    affine_of_norm,
    check_forward,
    fold_border,
    fold_input,
    fold_output,
)
from torchfilm.freezing import Frozen
from torchfilm.injection import Network, check_forwards, conditioning, remove
from torchfilm.kept import Border, Margin, keep, keeps
from torchfilm.naming import check_choice, entry
from torchfilm.restoring import fresh, same_chance
from torchfilm.sites import Site, is_root
from torchfilm.slots import PLAIN, rebased

Leftover = Literal["error", "constant"]


@dataclass
class _Plan:
    """What is to change in a plain copy of the network.

    Args:
        model: the copy.
        code: the graphs of its code.
        draft: the new tensors.
        targets: the layer that takes each site's modulation, by the site's name.
        references: what each of these layers computes before.
        ties: the names of the tensors that share one parameter, by its id.
        notes: what else changed, by the site's name.
        kept: why a site stays a constant, by its name.
        borders: what pads instead where a convolution's padding takes a part, by the site's name.
    """

    model: nn.Module
    code: Code
    draft: Draft
    targets: dict[str, nn.Module] = field(default_factory=dict)
    references: dict[nn.Module, Reference] = field(default_factory=dict)
    ties: dict[int, list[str]] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    kept: dict[str, str] = field(default_factory=dict)
    borders: dict[str, tuple[Border, Margin]] = field(default_factory=dict)


def fold(
    model: Network,
    cond: Any = None,
    *,
    modulation: Mapping[str, Any] | None = None,
    leftover: Leftover = "error",
    fuse_norms: bool | Sequence[Sequence[str]] = False,
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor | None = None,
) -> tuple[Network, FoldReport]:
    """Return a plain copy of a conditioned network that computes what it computes under one condition.

    The copy has the original classes and keys, plus biases and affines that were missing (the report says
    which), no generator, and no code of this library where nothing is left over. The conditioned network
    stays as it is. Weights are computed in float64 and rounded once.

    Where a modulation goes: behind a convolution (also grouped or transposed), a linear layer, an embedding,
    an affine norm (which gets its affine where it has none), attention, a branch that ends with one of
    these, or a linear layer quantised to int8 (into its scales), into those; in front of a convolution, a
    linear layer or a BatchNorm in evaluation, where it is exact. A gate goes along: gate * gamma and gate *
    beta. Where the code of a branch asks whether an argument is None, both answers have to lead to the same
    layer.

    Args:
        model: a conditioned network.
        cond: one condition, with or without a batch axis of size one, of `Several` all; or
        modulation: a ready value for each site.
        leftover: what is not exact is an "error", or kept as a "constant" (or as the border of a
            convolution), for which the module's class stays swapped.
        fuse_norms: True to merge each BatchNorm in evaluation into the convolution whose output it alone
            reads, as the model's code says; or the pairs of names (convolution, norm), which are refused
            where that code shows something else. The norm becomes an Identity.
        inputs: arguments of the model, by position or by name, or its only one, to measure how far the
            outputs differ, and to refuse a copy that computes something else: a network whose code reads
            weights, or branches by isinstance, in ways that cannot be seen from here. Both run on copies of
            them, and with the same random numbers of torch.

    Returns:
        The copy, and a report of each site: where it went, and the measured error.

    Raises:
        ValueError: for several conditions at once, for values that are not finite, and for sites that cannot
            be folded exactly (with leftover="error"), all of them with the reasons; for a layer, or outputs
            on the inputs, that differ by more than rounding.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "0", Vector(7))
        >>> plain, report = fold(model, cond=torch.rand(1, 7))
        >>> plain
        Sequential(
          (0): Conv2d(3, 8, kernel_size=(3, 3), stride=(1, 1))
          (1): ReLU()
        )
        >>> report["0"].target
        '0.weight, 0.bias'
    """
    film, values = _values(model, cond, modulation, leftover)
    own = {id(t): t for t in (*film.parameters(), *film.buffers())}  # not copied: they go with the generator
    named = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    shared = {id(tensor) for name, tensor in named if not name.startswith("film.")}
    memo: dict[int, Any] = {key: own[key] for key in own.keys() - shared}
    plain, places = _plain_copy(model, memo)
    for path in places.values():
        _make_plain(plain.get_submodule(path))
    plan = _planned(plain, places, film, values, leftover)
    pairs = _pairs(plan, fuse_norms)
    for pair in pairs:
        _fuse(plan, *pair)
    plan.draft.apply()
    here = {name: replace(site, name=places[name]) for name, site in film.sites.items()}
    for name in plan.kept:
        keep(plain, here[name], film.fusion, values[name])
    for name, border in plan.borders.items():
        keep(plain, replace(here[name], repeat=1), *border)
    for _, norm in pairs:
        parent, _, child = norm.rpartition(".")
        setattr(plain.get_submodule(parent), child, nn.Identity())
    error = None if inputs is None else difference(film, model, plain, values, inputs)
    report = _report(plan, film, pairs, (num_parameters(plain), num_parameters(model)), error)
    if error is not None and not error <= (allowed := rounding_here(plain)):
        raise ValueError(
            f"fold: expected a network that computes the same, but its outputs differ by {error:.1e} of the "
            f"largest, and rounding by {allowed:.1e} at most.\n{report}\n"
            f"Its code reads a weight without calling the layer, or watches a layer by hooks: condition "
            f"another site, or use leftover='constant'."
        )
    return plain, report


@contextmanager
def folded(
    model: Network,
    cond: Any = None,
    *,
    modulation: Mapping[str, Any] | None = None,
    leftover: Leftover = "error",
) -> Iterator[Network]:
    """Fold one condition into the network itself for the block: `model(x)` without a condition, at no cost.

    At the end, also after an exception, the very tensors are back that were there before; in the block both
    are in memory. Weights are shared by all threads, so no other thread may use the network meanwhile. What
    is left over (leftover="constant") stays modulated as it was. An `edit` around the block is folded as
    well; inside of it, `edit`, `record`, `using` and a call's own `cond=` raise, since the weights would not
    hear them; so do copies, pickles, `save`, `remove` and `freeze_base`, since the weights hold the
    condition, as does `state_dict()`. What is written into folded layers, by `load_state_dict`, `to` or an
    optimiser, is lost at the end.

    Args:
        model: a conditioned network.
        cond: one condition, as in `fold`; likewise modulation and leftover.
        modulation: a ready value for each site.
        leftover: "error" or "constant".

    Raises:
        ValueError: as `fold`; the network is then as it was.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), "0", Vector(7))
        >>> with folded(model, cond=torch.rand(7)):
        ...     y = model(torch.rand(2, 3, 5, 5))
    """
    film, values = _values(model, cond, modulation, leftover)
    undo: Undo = []
    try:
        kept = _fold_in_place(model, film, values, leftover, undo)
        rest = {name: value if name in kept else PLAIN for name, value in values.items()}
        with film.fixed(rest if kept else PLAIN):
            yield model
    finally:
        restore(undo)


def _fold_in_place(
    model: nn.Module, film: Conditioning, values: dict[str, Any], leftover: str, undo: Undo
) -> Collection[str]:
    """Fold a copy, check it, give the network its tensors; return the sites left over."""
    memo: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    memo[id(film.frozen)] = Frozen()  # the copy shares the parameters, which stay frozen
    plain, places = _plain_copy(model, memo)
    plan = _planned(plain, places, film, values, leftover, borders=False)
    plan.draft.apply()
    _errors(plan)
    names = {module: name for name, module in plain.named_modules()}
    film.check_open("another `folded`")
    undo.append((film, "folded", False))
    film.folded = object()
    plan.draft.apply(lambda module: model.get_submodule(names[module]), undo)
    return plan.kept


def _values(
    model: nn.Module, cond: Any, modulation: Mapping[str, Any] | None, leftover: str
) -> tuple[Conditioning, dict[str, Any]]:
    """Return the conditioning and the value of each site, checked."""
    film = conditioning(model)
    if not is_root(model):
        raise ValueError(
            f"fold: expected the conditioned network itself, got it inside of {type(model).__name__}.\n"
            f"Fold the network, then compile or wrap the result."
        )
    film.check(model)
    check_forwards("fold", model)
    check_copied(model)
    check_choice("fold: leftover", leftover, get_args(Leftover))
    if (cond is None) == (modulation is None):
        raise ValueError(
            f"fold: expected a condition or a modulation, got {'neither' if cond is None else 'both'}.\n"
            f"Give the one condition that is to be folded: fold(model, cond=z)."
        )
    with torch.no_grad(), film.predicting(), same_chance(), all_given(film.cond, cond):
        values = film.values(fresh(cond), modulation)
    if values is PLAIN:
        raise ValueError(
            "fold: expected a network that hears its condition, got it inside `unconditioned`.\n"
            "Leave that block first."
        )
    for name, value in values.items():
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor) and not leaf.isfinite().all():
                raise ValueError(
                    f"fold, site '{name}': expected finite numbers, got {int((~leaf.isfinite()).sum())} "
                    f"that are not.\nFolded into weights they would spoil the network for good."
                )
    return film, values


def _plain_copy(model: Network, memo: dict[int, Any]) -> tuple[Network, dict[str, str]]:
    """Return a copy without the conditioning, and the path of each site's module in it.

    That path is the one in the network: a module that copies itself leaves its slot behind. In the modes of
    the network: copies of others lose theirs, as that of a torchvision feature extractor, which has another
    graph in each. With classes of its own where tensors are parametrized: torch takes a parametrization off
    the class, which a plain copy shares.
    """
    copied = remove(copy.deepcopy(model, memo))
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        if module.training is not modes[name]:
            module.train(modes[name])
        if parametrize.is_parametrized(module):
            module.__class__ = rebased(type(module), type(module).__bases__)
    paths = conditioning(model).paths(model)
    return copied, {name: found[0] for name, found in paths.items()}


def _planned(
    plain: nn.Module,
    places: Mapping[str, str],
    film: Conditioning,
    values: dict[str, Any],
    leftover: str,
    *,
    borders: bool = True,
) -> _Plan:
    """Plan each site, inner modules first: what they add happens before what is around them adds its own.

    A module has more modules inside than any of these, whatever their names are.
    """
    code = code_of(plain)
    fixed, float32, around = read_by_code(plain, code), fed_in_float32(plain, code), surroundings(plain, code)
    plan = _Plan(plain, code, Draft(plain, fixed, float32, around))
    for name, module in plain.named_modules():
        if keeps(module):  # from an earlier fold
            plan.draft.kept.add(module)
        for key, parameter in module._parameters.items():
            if parameter is not None:
                plan.ties.setdefault(id(parameter), []).append(f"{name}.{key}")
    modules = {name: plain.get_submodule(path) for name, path in places.items()}
    for site in sorted(film.sites.values(), key=lambda site: len(list(modules[site.name].modules()))):
        module = modules[site.name]
        try:
            affine = affine_of(film.fusion, values[site.name], site)
            _plan_site(plan, site, module, affine, borders=borders and leftover == "constant")
        except NotExactError as reason:
            plan.kept[site.name] = str(reason)
            plan.draft.kept.add(module)
    if plan.kept and leftover == "error":
        reasons = "\n".join(f"  {name}  {plan.kept[name]}" for name in film.sites if name in plan.kept)
        copies = "\nfold(model) makes parametrized weights plain, in the copy that it returns."
        parametrized = any(" is parametrized" in reason for reason in plan.kept.values())
        raise ValueError(
            f"fold: expected sites that fold exactly into weights, got {len(plan.kept)} of {len(values)} "
            f"that do not:\n{reasons}\n"
            f"Use leftover='constant' to keep these as constants, or condition a layer with weights."
            f"{copies if parametrized else ''}"
        )
    return plan


def _plan_site(plan: _Plan, site: Site, module: nn.Module, affine: Affine, *, borders: bool) -> None:
    if site.field not in (None, 0):
        raise NotExactError(f"only its {site.where} {site.field!r} is modulated")
    rule = fold_output if site.where == "output" else fold_input
    try:
        target = rule(plan.draft, module, affine, site.dim)
    except NotExactError:
        if site.where == "output" or not borders:
            raise
        value = fold_border(plan.draft, module, affine, site.dim)
        plan.borders[site.name] = _border(module, value)
        target = module
    plan.targets[site.name] = target
    plan.notes[site.name] = "; ".join(_notes(plan, site, target))
    if target not in plan.references:
        plan.references[target] = Reference.of(target)
    reference = plan.references[target]
    if site.where == "output":
        reference.outputs.append((affine, site.dim))
    else:
        reference.inputs.insert(0, (affine, site.dim))


def _notes(plan: _Plan, site: Site, target: nn.Module) -> Iterator[str]:
    """Say what else changes where a layer takes the modulation of a site."""
    if site.name in plan.borders:
        yield "its padding became a border of -beta / gamma"
    names = plan.draft.tensors(target)
    if new := [name for name in names if target._parameters[name] is None]:
        yield f"new: {', '.join(new)}"
    ties = [plan.ties.get(id(target._parameters[name]), []) for name in names]
    if tied := next((tied for tied in ties if len(tied) > 1), None):
        yield f"was tied: {' = '.join(tied)}"


def _make_plain(site: nn.Module) -> None:
    """Replace parametrized tensors by what they are now; weights that are computed cannot be folded into."""
    for module in filter(parametrize.is_parametrized, site.modules()):
        for name in list(module.parametrizations):  # type: ignore[arg-type]
            parametrize.remove_parametrizations(module, name, leave_parametrized=True)


def _pairs(plan: _Plan, wanted: Literal[False, True] | Sequence[Sequence[str]]) -> list[tuple[str, str]]:
    """Return the pairs of convolution and norm to merge, checked."""
    if wanted is False:
        return []
    found = conv_norm_pairs(plan.model, plan.code, plan.draft.kept)
    if wanted is True:
        return [pair for pair in found if not _not_mergeable(plan, *pair)]
    if wrong := [pair for pair in wanted if isinstance(pair, str) or len(pair) != 2]:
        raise ValueError(
            f"fold: expected pairs of names (convolution, BatchNorm), got {wrong[0]!r} among fuse_norms.\n"
            f"Give a list of pairs: fuse_norms=[('conv1', 'bn1')]; or fuse_norms=True to find them."
        )
    given = [(first, second) for first, second in wanted]
    if twice := [name for name, count in Counter(itertools.chain(*given)).items() if count > 1]:
        raise ValueError(
            f"fold: expected each module in one pair (convolution, BatchNorm), got '{twice[0]}' in several.\n"
            f"Give each pair once, or fuse_norms=True to find them."
        )
    modules = dict(plan.model.named_modules(remove_duplicate=False))
    for name in itertools.chain(*given):
        entry("fold, fuse_norms", modules, name)
    for pair in given:
        reason = _not_mergeable(plan, *pair) or ("" if pair in found else _not_shown(plan, *pair))
        if reason:
            raise ValueError(
                f"fold: expected pairs (convolution, BatchNorm) that merge exactly, got {pair}: {reason}.\n"
                f"Leave this pair out, or give fuse_norms=True to find those that do."
            )
    return given


def _not_shown(plan: _Plan, first: str, second: str) -> str:
    """Say what the network's code shows against a pair; "" where it shows nothing."""
    if (first, second) in conv_norm_pairs(plan.model, plan.code):
        return "a constant is kept between them"
    alone = f"not {second} alone reads what {first} gives, as the network's code shows"
    return alone if shows(plan.code, first, second) else ""


def _not_mergeable(plan: _Plan, first: str, second: str) -> str:
    """Say why a BatchNorm cannot go into a layer exactly; "" where it can."""
    layer, norm = plan.model.get_submodule(first), plan.model.get_submodule(second)
    if not isinstance(norm, batchnorm._BatchNorm) or norm.training or norm.running_mean is None:
        return f"{second} is no BatchNorm in evaluation with running statistics"
    inside = [set(module.modules()) for module in plan.draft.kept]
    if any((layer in modules) != (norm in modules) for modules in inside):
        return "a constant is kept between them"
    try:
        check_forward(norm, batchnorm._BatchNorm)
        plan.draft.alone(layer)
        plan.draft.alone(norm)
        fold_output(plan.draft.trial(), layer, affine_of_norm(plan.draft, norm), 1)
    except NotExactError as reason:
        return str(reason)
    return ""


def _fuse(plan: _Plan, first: str, second: str) -> None:
    """Plan to write a BatchNorm into the convolution in front of it."""
    layer, norm = plan.model.get_submodule(first), plan.model.get_submodule(second)
    reference = plan.references.setdefault(layer, Reference.of(layer))
    reference.following = plan.references.pop(norm, None) or Reference.of(norm)
    fold_output(plan.draft, layer, affine_of_norm(plan.draft, norm), 1)
    plan.targets |= {name: layer for name, target in plan.targets.items() if target is norm}


def _border(conv: Any, value: Tensor) -> tuple[Border, Margin]:
    """Return what pads by this value as a convolution pads now; torch's note is of when it was made."""
    if conv.padding == "same":
        sums = [step * (size - 1) for step, size in zip(conv.dilation, conv.kernel_size, strict=True)]
    else:
        alike = isinstance(conv.padding, int)  # as others set it afterwards
        sums = [2 * amount for amount in ([conv.padding] * len(conv.kernel_size) if alike else conv.padding)]
    amounts = [amount for both in reversed(sums) for amount in (both // 2, both - both // 2)]
    return Border(amounts), Margin(value.to(conv.weight))


def _errors(plan: _Plan) -> dict[nn.Module, float]:
    """Return the error of each layer whose tensors changed, measured.

    Raises:
        ValueError: for one above rounding.
    """
    names = {module: repr(name) for name, module in plan.model.named_modules()}
    names |= {target: f"site '{name}'" for name, target in plan.targets.items()}
    errors = {target: reference.error(target) for target, reference in plan.references.items()}
    for target, error in errors.items():
        if not error <= (allowed := rounding(target)):
            raise ValueError(
                f"fold, {names[target]}: expected folded weights that compute the same, got an error of "
                f"{error:.1e} on random features, where rounding makes {allowed:.1e} at most.\n"
                f"These are beyond its precision: fold in float32, then convert the result."
            )
    return errors


def _report(
    plan: _Plan,
    film: Conditioning,
    pairs: list[tuple[str, str]],
    counts: tuple[int, int],
    error: float | None,
) -> FoldReport:
    names = {module: name for name, module in plan.model.named_modules()}
    errors, sites = _errors(plan), []
    for name in film.sites:
        if name in plan.kept:
            sites.append(FoldedSite(name, "constant", 0.0, plan.kept[name]))
            continue
        target = plan.targets[name]
        where = ", ".join(f"{names[target]}.{tensor}" for tensor in plan.draft.tensors(target) or ["scales"])
        sites.append(FoldedSite(name, where, errors[target], plan.notes.get(name, "")))
    return FoldReport(tuple(sites), counts, error, tuple(pairs))
