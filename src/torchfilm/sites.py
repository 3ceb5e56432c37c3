"""Where a network is conditioned: find its modules by name and say what is known about each.

`find` changes nothing: it is the dry run of `condition`, which takes its result as well as a pattern.
"""

from __future__ import annotations

import re
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, Literal, SupportsIndex, get_args, overload

from torch import nn
from torch.jit import ScriptModule
from torch.nn.parameter import is_lazy

from torchfilm.adaptive import AdaLNZero, AdaRMSNorm
from torchfilm.channels import Where, batch_axis, channels, lineage
from torchfilm.naming import Name, each_match, no_match
from torchfilm.presets import Preset, Told
from torchfilm.writing import in_columns

Repeat = int | Literal["any"]


@dataclass(frozen=True)
class Site:
    """One place where a network listens: the output, or the input, of one of its modules.

    Args:
        name: the module's dotted name, as in `model.named_modules()`.
        type: the name of its class.
        features: how many channels there are.
        dim: the axis of the channels.
        where: "output" or "input".
        field: which part is modulated where there are several: an index or a name; None for the first.
        repeat: rows of features that each condition serves (views, frames, windows); "any" for as many as
            each call has.
        batch: the axis of the batch; 1 where time comes first, as in torch's recurrences and transformers.
        note: what is special about the site, in words.
    """

    name: str
    type: str
    features: int
    dim: int
    where: Where = "output"
    field: int | str | None = None
    repeat: Repeat = 1
    batch: int = 0
    note: str = ""


class Sites(tuple[Site, ...]):
    """The sites that were found, in the order of the model; prints as a table, and `+` joins two searches.

    A part of them is what was found too: `found[-4:]`, `[site for site in found if site.features > 64]`.
    """

    __slots__ = ()

    @overload
    def __getitem__(self, index: SupportsIndex) -> Site: ...

    @overload
    def __getitem__(self, index: slice) -> Sites: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Site | Sites:
        chosen = super().__getitem__(index)
        return chosen if isinstance(chosen, Site) else Sites(chosen)

    def __add__(self, other: Any) -> Sites:
        return Sites((*self, *other))

    def __repr__(self) -> str:
        rows = [("name", "type", "features", "dim", "where", "note")]
        rows += [(s.name, s.type, str(s.features), str(s.dim), s.where, s.note) for s in self]
        return in_columns(rows)


Pattern = Name | Sequence[Name] | Callable[[str, nn.Module], bool] | Preset | Site | Sequence[Site]


def find(
    model: nn.Module,
    sites: Pattern,
    *,
    where: Where = "output",
    dim: Told | None = None,
    features: Told | None = None,
    field: int | str | None = None,
    repeat: Repeat = 1,
    batch: int | None = None,
) -> Sites:
    """Return the modules that `condition` would condition, as a table; nothing is changed.

    Args:
        model: any network.
        sites: a name, or a regular expression, compiled or not, that matches whole names (`re.fullmatch`); a
            list of such, each of which must match something; a function of name and module that returns True
            or False; a `preset`; or what `find` returned, all or some of it, with its options and no others.
        where: modulate what each module returns ("output") or what it is given ("input").
        dim: the axis of the channels; needed where the type of a module does not tell. A number for all
            sites, or a function of name and module that returns it; None from that leaves it to the module.
        features: how many channels there are; needed where neither type nor a one-dimensional weight tells.
            A number or a function, as dim: features=lambda name, block: block.out_channels.
        field: which of several outputs or inputs, by index or name; None for the first.
        repeat: rows of features for each condition: [B * repeat, ...], those of one condition in a row; "any"
            for as many as each call has, in equal numbers.
        batch: the axis of the batch, 0 or 1; None for what is known: 1 in torch's layers that take time
            first, else 0. For layers of others that take time first, [T, B, C], it is to be said.

    Returns:
        The sites, in the order of the model. A module used under several names is listed once, with a note.

    Raises:
        ValueError: where nothing matches (with the three nearest names), where channels are unknown, and for
            modules that cannot be conditioned.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> find(model, r"[01]")
        name  type         features  dim  where   note
        0     Conv2d       8         -3   output
        1     BatchNorm2d  8         1    output
    """
    check_network(model)
    names = aliases(model)
    earlier = _found(sites)
    if earlier is not None:
        _check_unsaid(where=where, dim=dim, features=features, field=field, repeat=repeat, batch=batch)
        return Sites(
            _described(model, site.name, names.get(site.name), site, site.dim, site.features, site.batch)
            for site in earlier
        )
    flags = isinstance(repeat, bool) or isinstance(batch, bool)
    if isinstance(repeat, Integral) and not flags:  # also one of numpy's
        repeat = int(repeat)
    counts = repeat == "any" or (isinstance(repeat, int) and repeat >= 1)
    if where not in get_args(Where) or not counts or batch not in (None, 0, 1) or flags:
        raise ValueError(
            f"find: expected where 'output' or 'input', repeat at least 1 or 'any', and batch 0 or 1, got "
            f"{where!r}, {repeat!r} and {batch!r}.\n"
            f"repeat is the number of rows of features for each condition, batch the axis of the rows."
        )
    usual = sites if isinstance(sites, Preset) else Preset(())
    plain = Site("", "", 0, 0, where, field, repeat)
    return Sites(
        _described(model, name, names[name], plain, dim, features, batch, usual)
        for name in _chosen(model, names, sites)
    )


def _found(sites: Any) -> Sequence[Site] | None:
    """Return sites that were found before: all of them, some, or one; None for what is still to be found."""
    if isinstance(sites, Sites):
        return sites
    some = sites if isinstance(sites, list | tuple) else [sites]
    return some if some and all(isinstance(one, Site) for one in some) else None


def _check_unsaid(**options: Any) -> None:
    """Refuse options beside sites that have their own."""
    plain = {"where": "output", "repeat": 1}
    given = [f"{key}={value!r}" for key, value in options.items() if value != plain.get(key)]
    if given:
        raise ValueError(
            f"find: expected no options beside sites that were found with theirs, got {', '.join(given)}.\n"
            f"Give them where the sites are found: condition(model, find(model, pattern, repeat=3), ...)."
        )


def aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return the names of all modules but the root and what `condition` added, each with its other names.

    Example:
        >>> layer = nn.Linear(3, 3)
        >>> aliases(nn.Sequential(layer, nn.ReLU(), layer))
        {'0': ['2'], '1': []}
    """
    ours = [f"{name}.film".lstrip(".") for name, module in model.named_modules() if is_root(module)]
    first: dict[int, str] = {}
    names: dict[str, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if not name or any(f"{name}.".startswith(f"{own}.") for own in ours):
            continue
        canonical = first.setdefault(id(module), name)
        if canonical == name:
            names[name] = []
        else:
            names[canonical].append(name)
    return names


def check_network(model: Any) -> None:
    """Raise ValueError for what is no `nn.Module`, as a function around one."""
    if not isinstance(model, nn.Module):
        kind = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise ValueError(
            f"Network: expected an nn.Module, got {kind}.\n"
            f"Give the network itself; what is called around it becomes the forward of a module of its own."
        )


def is_root(module: nn.Module) -> bool:
    """Tell whether a module is a conditioned network, one that takes `cond=`."""
    return getattr(type(module), "_film_root", False)


def is_site(module: nn.Module) -> bool:
    """Tell whether a module is a site of a conditioned network."""
    return "_film_slot" in module.__dict__


def kind_of(module: nn.Module) -> type[nn.Module]:
    """Return the class that a module had before it was conditioned."""
    return getattr(type(module), "_film_base", type(module))


def is_patched(module: nn.Module) -> bool:
    """Tell whether another forward was put on the instance; its class's own, put back there, is none."""
    own = vars(module).get("forward")
    return own is not None and own != types.MethodType(type(module).forward, module)


def _chosen(model: nn.Module, names: dict[str, list[str]], sites: Any) -> list[str]:
    """Return the matching names in the order of the model; each pattern has to match something."""
    called = {one: name for name, others in names.items() for one in (name, *others)}
    if isinstance(sites, Preset):
        found = [sites.among(called) or no_match(called, *sites.patterns)]
    elif isinstance(sites, nn.Module):
        own = [name for name in names if model.get_submodule(name) is sites]
        remedy = "It is none inside of this network: sites come first, condition(model, sites, cond)."
        if own:
            remedy = f"Give its name: {own[0]!r}; or a function: lambda name, module: module is mine."
        raise ValueError(
            f"find: expected a pattern for names, got a module, {type(sites).__name__}.\n{remedy}"
        )
    elif isinstance(sites, type):
        raise ValueError(
            f"find: expected a pattern for names, got the class {sites.__name__}.\n"
            f"Give a function: lambda name, module: isinstance(module, {sites.__name__})."
        )
    elif callable(sites):
        chosen = [name for name in names if sites(name, model.get_submodule(name))]
        if not chosen:
            raise ValueError(
                f"Sites: expected a function that is true for some of the {len(names)} modules, got one that "
                f"is true for none.\n"
                f"It gets the name and the module: lambda name, module: isinstance(module, torch.nn.Linear)."
            )
        found = [chosen]
    else:
        patterns = [sites] if isinstance(sites, str | re.Pattern) else list(sites)
        found = list(each_match(called, patterns)) or no_match(called, "an empty list")
    chosen = {called[one] for each in found for one in each}
    return [name for name in names if name in chosen]


def _described(
    model: nn.Module,
    name: str,
    others: list[str] | None,
    wanted: Site,
    dim: Told | None,
    features: Told | None,
    batch: int | None,
    usual: Preset = Preset(()),  # noqa: B008 - frozen
) -> Site:
    """Say what is known about one module, or why it cannot be conditioned."""
    if others is None:
        no_match(aliases(model), name)
    above = lineage(model, name)
    module = above[-1]
    _check_module(name, module, above[-2])
    known_features, known_dim = channels(module, wanted.where)
    usual_features = usual.features if wanted.where == "output" else None
    features = _first(
        _told("features", features, name, module),
        known_features,
        _told("features", usual_features, name, module),
    )
    dim = _first(_told("dim", dim, name, module), known_dim, usual.dim)
    if features is None or dim is None:
        lacking = " and ".join(key for key, value in (("features", features), ("dim", dim)) if value is None)
        raise ValueError(
            f"Site '{name}': expected a module whose channels are known, got a {type(module).__name__} "
            f"(its {wanted.where}).\n"
            f"Give {lacking}: the number of channels is features=, their axis is dim=. Nothing is guessed "
            f"from shapes."
        )
    batch = batch_axis(model, name, wanted.where, wanted.field) if batch is None else batch
    kind, note = type(module).__name__, "; ".join(_notes(above, others, wanted, batch))
    return replace(wanted, name=name, type=kind, features=features, dim=dim, batch=batch, note=note)


def _told(key: str, value: Told | None, name: str, module: nn.Module) -> int | None:
    """Return the number that was said for all sites, or that a function says for this one."""
    number = value(name, module) if callable(value) else value
    if number is not None and not isinstance(number, Integral):
        raise ValueError(
            f"find: expected {key} as a whole number, or a function that returns it, got {number!r} for "
            f"site '{name}'.\n"
            f"dim is the axis of the channels, as 1 or -1, features how many there are."
        )
    return number


def _first(*numbers: int | None) -> int | None:
    return next((number for number in numbers if number is not None), None)


def _notes(above: list[nn.Module], others: list[str], wanted: Site, batch: int) -> list[str]:
    """Say what a reader of the table should know."""
    module = above[-1]
    notes = [f"also used as {', '.join(others)}: the same modulation for each use"] if others else []
    if wanted.where == "output" and wanted.field is None and isinstance(module, _SEVERAL_OUTPUTS):
        notes.append("the first of its outputs")
    elif wanted.field is not None:
        notes.append(f"{wanted.where} {wanted.field!r}")
    elif wanted.where == "input" and isinstance(module, nn.MultiheadAttention):
        notes.append("the query alone")
    if batch == 1:
        notes.append("time first, the batch on axis 1")
    if wanted.repeat != 1:
        notes.append(f"{wanted.repeat} rows for each condition".replace("any", "any number of"))
    if any(isinstance(one, nn.TransformerEncoderLayer | nn.TransformerEncoder) for one in above[:-1]):
        notes.append("without torch's fast path")
    return notes


_SEVERAL_OUTPUTS = (nn.RNNBase, nn.LSTMCell, nn.MultiheadAttention, AdaLNZero, AdaRMSNorm)


def _check_module(name: str, module: nn.Module, parent: nn.Module) -> None:
    """Refuse modules that are never called, whose class cannot be swapped, or that somebody else calls."""
    kind = type(module).__name__
    if isinstance(parent, nn.MultiheadAttention):
        fact = "expected a module that is called, but nn.MultiheadAttention reads the weight of its out_proj"
        remedy = "Condition the attention itself: its output is that of out_proj."
    elif type(module).forward is nn.Module.forward:
        fact = f"expected a module that is called, got a {kind}, which has no forward"
        remedy = "Give the modules inside of it."
    elif isinstance(module, ScriptModule):
        fact = "expected a module of Python, got a compiled TorchScript module"
        remedy = "Condition the network before torch.jit.script or torch.jit.trace."
    elif any(map(is_lazy, module.parameters(recurse=False))):
        fact = f"expected a module with its sizes, got a {kind} that was never called"
        remedy = "Run the network once first."
    elif is_patched(module):
        fact = f"expected the forward of its class, got a {kind} whose forward was replaced on the instance"
        remedy = "Condition the network first, and let accelerate, or whoever patches it, come after."
    elif is_site(module) and any(name.startswith("kept_") for name in module._buffers):
        fact = f"expected a plain module, got a {kind} that applies a constant which a fold kept"
        remedy = "Condition the module around it, or all sites of the original network, and fold that once."
    elif is_site(module) or is_root(module):
        fact = f"expected a plain module, got a {kind} that is conditioned already"
        remedy = (
            "Give all sites to one condition() (find(...) + find(...) joins them), or remove(model) first, "
            "where model is what condition() was given: a part of it cannot be freed alone."
        )
    else:
        return
    raise ValueError(f"Site '{name}': {fact}.\n{remedy}")
