"""Record the modulations of a conditioned network, and edit them.

Everything happens to the values between the generator and the sites, at the root of the network. Nothing is a
hook, so all of it works on a compiled network too: compiled once more for the block, and not for every call.
"""

from __future__ import annotations

import itertools
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchfilm.filling import Onlooker
from torchfilm.injection import conditioning
from torchfilm.modulation import Modulation, check_modulations
from torchfilm.modulations import Modulations, SitePattern, fields_of, matching
from torchfilm.naming import UnknownNameError, each_match, entry
from torchfilm.restoring import same_chance

Change = Callable[[Modulation], Modulation] | Modulation
Key = TypeVar("Key", bound=str | re.Pattern[str])  # those of a mapping in a variable are of one kind
T = TypeVar("T")


class Recording(Mapping[str, Modulation], Onlooker):
    """What went to the sites while `record` was active: `rec[site].gamma` is [N, C] over all calls.

    Where some calls have a gate and others none, that of the others is one.

    A network takes it as it is: `model(x, modulation=rec)`. `rec.calls` has the values of each call apart, of
    any fusion, without graphs.
    """

    # Each is itself, whatever it holds: of two that are nested, the inner one ends first.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self) -> None:
        self.ended = False
        self._calls: list[dict[str, Any]] = []
        self._pending: list[tuple[str, list[Tensor]]] = []
        self._ticket = torch.tensor(next(_TICKETS), device="cpu")
        _OPEN[int(self._ticket)] = self

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        """Note the values, and hand them on; not at a second run of what was checkpointed, after the end."""
        if self.ended:
            return values
        if not torch.compiler.is_compiling():
            copied = pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone(), dict(values))
            self.calls.append(copied)
            return values
        leaves, structure = pytree.tree_flatten(dict(values))
        kind = _kind(values)
        _note(self._ticket, kind, [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)])
        others = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        # An attribute: a table would be a guard, and one more graph for each entry.
        setattr(self, kind, (structure, others))
        return values

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Return the values of each call, in order."""
        for kind, tensors in self._pending:
            (structure, others), left = getattr(self, kind), iter(tensors)
            leaves = [next(left) if other is None else other for other in others]
            self._calls.append(pytree.tree_unflatten(leaves, structure))
        self._pending.clear()
        return self._calls

    @property
    def modulations(self) -> Modulations:
        """Return all sites as one value, for arithmetic and for saving."""
        return Modulations(self)

    def __getitem__(self, site: str) -> Modulation:
        values = [call[site] for call in self._known(site)]
        if not isinstance(values[0], Modulation):
            raise ValueError(
                f"Recording: expected modulations, got {type(values[0]).__name__} at site '{site}'.\n"
                f"This fusion has values of its own: they are in rec.calls."
            )
        if any(value.gate is not None for value in values):
            values = [v if v.gate is not None else v.replace(gate=torch.ones_like(v.gamma)) for v in values]
        every = [fields_of(value) for value in values]
        try:
            return Modulation(**{field: torch.cat([one[field] for one in every]) for field in every[0]})
        except RuntimeError as error:
            shapes = sorted({tuple(one["gamma"].shape) for one in every})
            raise ValueError(
                f"Recording: expected calls of one shape at site '{site}', got {shapes}.\n"
                f"Their values are in rec.calls, one by one."
            ) from error

    def __contains__(self, site: object) -> bool:
        return bool(self.calls) and site in self.calls[0]

    def __repr__(self) -> str:
        return f"Recording(calls={len(self.calls)}, sites={len(self)})"

    def __iter__(self) -> Iterator[str]:
        return iter(self.calls[0] if self.calls else ())

    def __len__(self) -> int:
        return len(self.calls[0]) if self.calls else 0

    def frame(self) -> dict[str, Any]:
        """Return all calls as a long table; see `Modulations.frame`."""
        return self.modulations.frame()

    def save(self, path: str | Path) -> Path:
        """Write all calls as safetensors, for `load_modulations`; return the path."""
        return self.modulations.save(path)

    def _known(self, site: str) -> list[dict[str, Any]]:
        if not self.calls:
            raise UnknownNameError(
                "Recording: expected calls of the network, got none.\n"
                "Call it inside the block, with a condition: with record(model) as rec: model(x, cond=z). "
                "Parts that are called alone, under `using`, are not recorded: see modulations(model, z)."
            )
        entry("Recording", self.calls[0], site)
        return self.calls


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record what goes to the sites in the block, in this thread; also edits made outside of this block.

    The values are detached and stay on their device. Each call of the network is one entry; parts of it that
    are called by themselves, under `using`, are none.

    Raises:
        ValueError: for a network that is not conditioned.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> with record(model) as rec:
        ...     y = model(torch.rand(2, 3), cond=torch.rand(2, 7))
        >>> rec["0"].gamma.shape
        torch.Size([2, 5])
    """
    recording = Recording()
    try:
        with conditioning(model).transformed(recording):
            yield recording
    finally:
        recording.ended = True


@contextmanager
def edit(model: nn.Module, changes: Mapping[Key, Change]) -> Iterator[None]:
    """Change modulations in the block, in this thread: `edit(model, {r"layer4\\..*": lambda m: 0.5 * m})`.

    Args:
        model: a conditioned network.
        changes: from a regular expression that matches whole names of sites to a function of the modulation,
            which gets a copy, or to a modulation that takes its place. Where several match, they follow one
            another. Each new function costs a compiled network a graph; to try many, change
            `modulations(model, cond)` instead and give it as `modulation=`. Together with `using`, a function
            is also called where the inner block begins, for parts that are called alone, and may be called
            again if blocks do not end in order.

    Raises:
        ValueError: for an expression that matches no site or is none, for a change that is neither, for a
            function that returns no `Modulation`, for one of gamma and beta where another fusion has none.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> with edit(model, {".*": lambda m: m.replace(gamma=0 * m.gamma)}):
        ...     y = model(torch.rand(2, 3), cond=torch.rand(2, 7))
        >>> y.abs().max().item()
        0.0
    """
    film = conditioning(model)
    chosen: dict[str, list[Change]] = {name: [] for name in film.sites}
    for (pattern, change), found in zip(changes.items(), each_match(film.sites, changes), strict=True):
        if not isinstance(change, Modulation) and not callable(change):
            raise ValueError(
                f"edit: expected a function of the modulation, or a Modulation, for {pattern!r}, "
                f"got {type(change).__name__}.\n"
                f"For a factor: lambda m: m.replace(gamma=factor * m.gamma)."
            )
        for name in found:
            chosen[name].append(change)
    with film.transformed(_Edit(chosen)):
        yield


def strength(modulation: Modulation, by: float | Tensor) -> Modulation:
    """Return the modulation nearer to the identity (0), as it is (1), or exaggerated (above 1).

    gamma = 1 + by (gamma - 1), beta = by beta, and the gate likewise.
    """
    gate = None if modulation.gate is None else 1 + by * (modulation.gate - 1)
    return Modulation(1 + by * (modulation.gamma - 1), by * modulation.beta, gate)


def sweep(
    model: nn.Module,
    sites: SitePattern,
    values: Iterable[float | Tensor],
    call: Callable[[], T],
    *,
    change: Callable[[Modulation, Tensor], Modulation] = strength,
) -> list[T]:
    """Run the same call for several strengths of a change to the modulations; return the results.

    Each call starts from the present state of torch's random numbers, which is put back in the end: so all
    share their numbers, as do those of a sweep that follows. Call `torch.manual_seed` before it for others.

    Args:
        model: a conditioned network.
        sites: names, or a regular expression for whole names; a list of such; or a function of the name.
        values: what `change` gets, one after the other, as a tensor (so that a compiled network stays one).
        call: runs the network: `lambda: model(x, cond=z)`. Where the network writes into x, or into a cache,
            give it a copy: `lambda: model(x.clone(), cond=z)`.
        change: what to do to the modulation, of which it gets a copy; without it, its `strength`.

    Raises:
        ValueError: for sites that match none, and for a change that returns no `Modulation`.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> x, z = torch.rand(2, 3), torch.rand(2, 7)
        >>> outputs = sweep(model, ".*", [0, 0.5, 1], lambda: model(x, cond=z))
    """
    film = conditioning(model)
    chosen = matching(list(film.sites), sites)
    found = []
    for value in values:
        number = torch.tensor(float(value), dtype=torch.float64, device="cpu")
        with same_chance(), film.transformed(_Turn(chosen, change, number)):
            found.append(call())
    return found


class _Edit:
    def __init__(self, changes: dict[str, list[Change]]) -> None:
        self.changes = changes

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        edited = dict(values)
        for name, changes in self.changes.items():
            for change in changes:
                edited[name] = _changed("edit", name, edited[name], change)
        return edited


class _Turn:
    def __init__(self, sites: list[str], change: Callable[..., Modulation], value: Tensor) -> None:
        self.sites, self.change, self.value = sites, change, value

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        if self.change is strength:
            check_modulations("sweep", {name: values[name] for name in self.sites})
        turned = {}
        for name in self.sites:
            dtypes = [leaf.dtype for leaf in pytree.tree_leaves(values[name]) if isinstance(leaf, Tensor)]
            by = self.value.double() if torch.float64 in dtypes else self.value.float()
            turned[name] = _changed("sweep", name, values[name], self.change, by)
        return {**values, **turned}


def _changed(function: str, site: str, value: Any, change: Any, *more: Tensor) -> Any:
    """Return what takes the place of a site's value: a modulation, or what a function makes of a copy of it.

    A change that writes into what it gets writes into the copy alone; ValueError for another kind of value.
    """
    new = change if isinstance(change, Modulation) else _made(function, site, value, change, *more)
    if type(new) is not type(value):
        raise ValueError(
            f"{function}: expected a {type(value).__name__} for site '{site}', got {type(new).__name__}.\n"
            f"Return a new one: lambda m: m.replace(gamma=0 * m.gamma)."
        )
    return new


def _made(function: str, site: str, value: Any, change: Callable[..., Any], *more: Tensor) -> Any:
    """Return what a change written by somebody else makes of a copy; other fusions have other fields."""
    value = pytree.tree_map_only(Tensor, torch.clone, value)
    if isinstance(value, Modulation):
        return change(value, *more)
    try:
        return change(value, *more)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{function}: expected a change of what site '{site}' hears, a {type(value).__name__} of "
            f"{', '.join(vars(value))}, got one that fails on it: {error}.\n"
            f"gamma and beta are of fusion film, scale, bias and gate; change the fields of this one by "
            f"dataclasses.replace."
        ) from error


_TICKETS = itertools.count()
_OPEN: weakref.WeakValueDictionary[int, Recording] = weakref.WeakValueDictionary()


# What a compiled network leaves in a list becomes a guard, and each call a graph of its own. An operator that
# claims to change the ticket runs at every call, in order, and is nothing but a node of the graph.
@torch.library.custom_op(
    "torchfilm::note",
    mutates_args=("ticket",),
    schema="(Tensor(a!) ticket, str kind, Tensor[] tensors) -> ()",
)
def _note(ticket: Tensor, kind: str, tensors: list[Tensor]) -> None:
    recording = _OPEN.get(int(ticket))
    if recording is not None:
        recording._pending.append((kind, [tensor.clone() for tensor in tensors]))


def _kind(values: Mapping[str, Any]) -> str:
    """Name what the values are made of: their classes, and the path of each leaf, with what is no tensor."""
    found = [f"values {' '.join([type(value).__name__ for value in values.values()])}"]
    for path, leaf in pytree.tree_flatten_with_path(dict(values))[0]:
        found.append(pytree.keystr(path) + ("" if isinstance(leaf, Tensor) else f"={leaf!r}"))
    return " ".join(found).replace(".", "/")  # a constant of each graph, and an attribute's name
