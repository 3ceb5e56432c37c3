"""Look at the modulations of a conditioned network, edit them, calculate with them, keep them.

Everything happens to the values between the generator and the sites, at the root of the network. Nothing is a
hook, so all of it works on a compiled network too: compiled once more for the block, and not for every call.
"""

from __future__ import annotations

import itertools
import json
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchfilm.injection import conditioning
from torchfilm.modulation import Modulation, check_modulations
from torchfilm.sites import entry, nearest

Change = Callable[[Modulation], Modulation] | Modulation
SitePattern = str | Sequence[str] | Callable[[str], bool]
T = TypeVar("T")

_FIELDS = ("gamma", "beta", "gate")


class Modulations(dict[str, Modulation]):
    """The modulation of every site by name, as one value: `a + (b - c)`, `a.interpolate(b, 0.5)`.

    Arithmetic acts site by site and field by field, as in `Modulation`; a network takes the result:
    `model(x, modulation=a + (b - c))` (Perez et al. 2018, section 4.6).

    Raises:
        ValueError: for values of another fusion; in arithmetic, where the two do not have the same sites.

    Example:
        >>> a = Modulations({"here": Modulation.identity(2, 3)})
        >>> (a + (a - a))["here"].gamma.shape
        torch.Size([2, 3])
    """

    def __init__(self, values: Mapping[str, Modulation] | Iterable[tuple[str, Modulation]] = ()) -> None:
        super().__init__(values)
        check_modulations("Modulations", self)

    def __add__(self, other: Mapping[str, Modulation]) -> Modulations:
        return self._with(other, Modulation.__add__)

    def __sub__(self, other: Mapping[str, Modulation]) -> Modulations:
        return self._with(other, Modulation.__sub__)

    def __mul__(self, weight: float | Tensor) -> Modulations:
        return self.map(lambda m: m * weight)

    __rmul__ = __mul__

    def interpolate(self, other: Mapping[str, Modulation], weight: float | Tensor) -> Modulations:
        """Return the way from this (0) to the other (1); weights [N, 1] and [C] give N steps, [N, C]."""
        return self._with(other, lambda m, n: m.interpolate(n, weight))

    def swap(self, other: Mapping[str, Modulation], sites: SitePattern) -> Modulations:
        """Return these with the matching sites of the other: `a.swap(b, r"layer4\\..*")`.

        Raises:
            ValueError: for a pattern that matches no site.
        """
        chosen = matching(list(self), sites)
        return Modulations({name: other[name] if name in chosen else m for name, m in self.items()})

    def rows(self, rows: Any) -> Modulations:
        """Return the rows of the batch picked by an integer, a slice, a list or an index tensor."""
        return self.map(lambda m: m[rows])

    def map(self, function: Callable[[Modulation], Modulation]) -> Modulations:
        """Return the function's result for every site."""
        return Modulations({name: function(m) for name, m in self.items()})

    def frame(self) -> dict[str, Any]:
        """Return a long table, one line per site, row and channel: `pandas.DataFrame(a.frame())`.

        Its columns are site, row, step (for modulations [N, T, C]; else 0), channel, gamma, beta and, where
        a site has one, gate (NaN elsewhere).
        """
        if not self:
            raise ValueError(
                "Modulations.frame: expected at least one site, got none.\nRecord a call: record(model)."
            )
        parts: list[dict[str, Any]] = []
        gated = any(m.gate is not None for m in self.values())
        for name, m in self.items():
            fields = _fields(m)
            gamma = fields["gamma"].reshape(len(fields["gamma"]), -1, fields["gamma"].shape[-1])
            row, step, channel = (axis.ravel() for axis in np.indices(gamma.shape))
            part = {"site": np.full(gamma.numel(), name), "row": row, "step": step, "channel": channel}
            part |= {field: _column(value) for field, value in fields.items()}
            if gated and m.gate is None:
                part["gate"] = np.full(gamma.numel(), np.nan)
            parts.append(part)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def save(self, path: str | Path) -> Path:
        """Write them as safetensors, for `load_modulations`; return the path."""
        return save_modulations(self, path)

    def _with(
        self, other: Mapping[str, Modulation], function: Callable[[Modulation, Modulation], Modulation]
    ) -> Modulations:
        if self.keys() != other.keys():
            lacking = sorted(self.keys() ^ other.keys())
            raise ValueError(
                f"Modulations arithmetic: expected the same sites on both sides, got {lacking} on one.\n"
                f"Both have to come from the same network, or be completed: Modulations({{**a, **b}})."
            )
        return Modulations({name: function(m, other[name]) for name, m in self.items()})


class Recording(Mapping[str, Modulation]):
    """What went to the sites while `record` was active: `rec[site].gamma` is [N, C] over all calls.

    A network takes it as it is: `model(x, modulation=rec)`. `rec.calls` has the values of each call apart, of
    any fusion, without graphs.
    """

    # Each is itself, whatever it holds: of two that are nested, the inner one ends first.
    __eq__ = object.__eq__
    __hash__ = object.__hash__  # type: ignore[assignment]

    def __init__(self) -> None:
        self.ended = False
        self._calls: list[dict[str, Any]] = []
        self._pending: list[list[Tensor]] = []
        self._structure: Any = None
        self._ticket = torch.tensor(next(_TICKETS))
        _OPEN[int(self._ticket)] = self

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        """Note the values, and hand them on; not at a second run of what was checkpointed, after the end."""
        if self.ended:
            return values
        tensors, structure = pytree.tree_flatten(dict(values))
        tensors = [tensor.detach() for tensor in tensors]
        if torch.compiler.is_compiling():
            _note(self._ticket, tensors)
        else:
            self.calls.append(pytree.tree_unflatten(tensors, structure))
        self._structure = structure
        return values

    def note(self, tensors: list[Tensor]) -> None:
        """Take a call of a compiled network, which says afterwards how its tensors belong together."""
        self._pending.append(tensors)

    @property
    def calls(self) -> list[dict[str, Any]]:
        """Return the values of each call, in order."""
        self._calls += [pytree.tree_unflatten(tensors, self._structure) for tensors in self._pending]
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
        every = [_fields(value) for value in values]
        try:
            return Modulation(**{field: torch.cat([one[field] for one in every]) for field in every[0]})
        except RuntimeError as error:
            shapes = sorted({tuple(one["gamma"].shape) for one in every})
            raise ValueError(
                f"Recording: expected calls of one shape at site '{site}', got {shapes}.\n"
                f"Their values are in rec.calls, one by one."
            ) from error

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
            raise ValueError(
                "Recording: expected calls of the network, got none.\n"
                "Call it inside the block, with a condition: with record(model) as rec: model(x, cond=z)."
            )
        entry("Recording", self.calls[0], site)
        return self.calls


def modulations(model: nn.Module, cond: Any) -> Modulations:
    """Return what the generator makes of a condition, without running the network and without dropout.

    Args:
        model: a conditioned network.
        cond: as in `model(x, cond=cond)`.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> a, b, c = (modulations(model, torch.rand(2, 7)) for _ in range(3))
        >>> y = model(torch.rand(2, 3), modulation=a + (b - c))
    """
    film = conditioning(model)
    with film.predicting():
        return Modulations(film.modulations(cond))


@contextmanager
def record(model: nn.Module) -> Iterator[Recording]:
    """Record what goes to the sites in the block, in this thread; also edits made outside of this block.

    The values are detached and stay on their device. Entering `using` inside the block counts as a call.

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
def edit(model: nn.Module, changes: Mapping[str, Change]) -> Iterator[None]:
    """Change modulations in the block, in this thread: `edit(model, {r"layer4\\..*": lambda m: 0.5 * m})`.

    Args:
        model: a conditioned network.
        changes: from a regular expression that matches whole names of sites to a function of the modulation,
            or to a modulation that takes its place. Where several match, they follow one another. Each
            function of its own costs a compiled network a graph; where many are tried, change
            `modulations(model, cond)` instead and give it as `modulation=`.

    Raises:
        ValueError: for an expression that matches no site, for a change that is neither, for a function that
            returns no `Modulation`, and for one of gamma and beta where another fusion has none.

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
    names = list(film.sites)
    chosen: dict[str, list[Change]] = {name: [] for name in names}
    for pattern, change in changes.items():
        if not isinstance(change, Modulation) and not callable(change):
            raise ValueError(
                f"edit: expected a function of the modulation, or a Modulation, for {pattern!r}, "
                f"got {type(change).__name__}.\n"
                f"For a factor: lambda m: m.replace(gamma=factor * m.gamma)."
            )
        for name in matching(names, pattern):
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
    values: Iterable[float],
    call: Callable[[], T],
    *,
    change: Callable[[Modulation, Tensor], Modulation] = strength,
) -> list[T]:
    """Run the same call with a change turned through several values; return what it gave each time.

    Args:
        model: a conditioned network.
        sites: names, or a regular expression for whole names.
        values: what `change` gets, one after the other, as a tensor (so that a compiled network stays one).
        call: runs the network: `lambda: model(x, cond=z)`.
        change: what to do to the modulation; without it, its `strength`.

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
        with film.transformed(_Turn(chosen, change, torch.tensor(float(value)))):
            found.append(call())
    return found


def matching(names: Sequence[str], sites: SitePattern) -> list[str]:
    """Return the names that match: a regular expression for whole names, a list of such, or a function.

    Raises:
        ValueError: for an expression that matches nothing, with the three nearest names.

    Example:
        >>> matching(["block1", "block2", "stem"], r"block.")
        ['block1', 'block2']
    """
    if callable(sites):
        return [name for name in names if sites(name)]
    found: set[str] = set()
    for pattern in [sites] if isinstance(sites, str) else sites:
        hits = [name for name in names if re.fullmatch(pattern, name) or pattern == name]
        if not hits:
            raise ValueError(
                f"Sites: expected a name, or an expression for whole names, got {pattern!r}.\n"
                f"The nearest are {nearest(pattern, list(names))}."
            )
        found.update(hits)
    return [name for name in names if name in found]


def save_modulations(modulations: Mapping[str, Modulation], path: str | Path) -> Path:
    """Write modulations as a safetensors file, whole or not at all, and return its path: a preset to keep.

    Raises:
        ValueError: for none, for several presets at once, and for values of another fusion than FiLM.
    """
    if not modulations:
        raise ValueError(
            "save_modulations: expected at least one site, got none.\nRecord some: record(model)."
        )
    if presets := [name for name, m in modulations.items() if isinstance(m, Mapping)]:
        raise ValueError(
            f"save_modulations: expected one modulation for each site, got those of all for {presets}.\n"
            f"One file per preset: save_modulations(presets[name], folder / f'{{name}}.safetensors')."
        )
    check_modulations("save_modulations", modulations)
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"{name}.{field}": value.detach().cpu().contiguous().clone()
        for name, m in modulations.items()
        for field, value in vars(m).items()
        if value is not None
    }
    part = path.with_name(path.name + ".part")
    save_file(
        tensors, part, metadata={"format": "torchfilm.modulations", "sites": json.dumps(list(modulations))}
    )
    part.replace(path)
    return path


def load_modulations(path: str | Path, *, device: torch.device | str = "cpu") -> Modulations:
    """Read what `save_modulations` wrote.

    Raises:
        ValueError: for a file that holds something else.
    """
    try:
        opened = safe_open(path, framework="pt", device=str(device))
    except SafetensorError as error:
        raise ValueError(
            f"load_modulations: expected a file of modulations, got {path}, no safetensors: {error}.\n"
            f"Write one by save_modulations, or by rec.save(path)."
        ) from error
    with opened as file:
        about = file.metadata() or {}
        if about.get("format") != "torchfilm.modulations":
            raise ValueError(
                f"load_modulations: expected a file of modulations, got {path}: {about or 'plain'}.\n"
                f"The conditioning of a network is read by load(base, folder)."
            )
        keys = set(file.keys())
        return Modulations(
            {
                name: Modulation(
                    **{f: file.get_tensor(f"{name}.{f}") for f in _FIELDS if f"{name}.{f}" in keys}
                )
                for name in json.loads(about["sites"])
            }
        )


class _Edit:
    def __init__(self, changes: dict[str, list[Change]]) -> None:
        self.changes = changes

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        edited = dict(values)
        for name, changes in self.changes.items():
            for change in changes:
                new = (
                    change if isinstance(change, Modulation) else _changed("edit", name, edited[name], change)
                )
                if type(new) is not type(edited[name]):
                    raise ValueError(
                        f"edit: expected a {type(edited[name]).__name__} for site '{name}', "
                        f"got {type(new).__name__}.\n"
                        f"Return a new one: lambda m: m.replace(gamma=0 * m.gamma)."
                    )
                edited[name] = new
        return edited


class _Turn:
    def __init__(self, sites: list[str], change: Callable[..., Modulation], value: Tensor) -> None:
        self.sites, self.change, self.value = sites, change, value

    def __call__(self, values: dict[str, Any]) -> dict[str, Any]:
        if self.change is strength:
            check_modulations("sweep", {name: values[name] for name in self.sites})
        turned = {name: _changed("sweep", name, values[name], self.change, self.value) for name in self.sites}
        return {**values, **turned}


def _changed(function: str, site: str, value: Any, change: Callable[..., Any], *more: Tensor) -> Any:
    """What a change written by somebody else makes of a site's value; other fusions have other fields."""
    if isinstance(value, Modulation):
        return change(value, *more)
    try:
        return change(value, *more)
    except (AttributeError, TypeError) as error:
        raise ValueError(
            f"{function}: expected a change of what site '{site}' hears, a {type(value).__name__} of "
            f"{', '.join(vars(value))}, got one that fails there: {error}.\n"
            f"gamma and beta are of fusion film, scale, bias and gate; change the fields of this one by "
            f"dataclasses.replace."
        ) from error


def _fields(modulation: Modulation) -> dict[str, Tensor]:
    """Return the fields that are there, with one shape and a batch axis."""
    found = {field: value for field, value in vars(modulation).items() if value is not None}
    together = torch.broadcast_tensors(*found.values())
    return {
        field: value[None] if value.ndim == 1 else value for field, value in zip(found, together, strict=True)
    }


def _column(value: Tensor) -> np.ndarray:
    """Return a field as numbers that NumPy knows, one below the other."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.detach().to("cpu", wide).reshape(-1).numpy()


_TICKETS = itertools.count()
_OPEN: weakref.WeakValueDictionary[int, Recording] = weakref.WeakValueDictionary()


# What a compiled network leaves in a list becomes a guard, and each call a graph of its own. An operator that
# claims to change the ticket runs at every call, in order, and is nothing but a node of the graph.
@torch.library.custom_op(
    "torchfilm::note", mutates_args=("ticket",), schema="(Tensor(a!) ticket, Tensor[] tensors) -> ()"
)
def _note(ticket: Tensor, tensors: list[Tensor]) -> None:
    recording = _OPEN.get(int(ticket))
    if recording is not None:
        recording.note([tensor.clone() for tensor in tensors])
