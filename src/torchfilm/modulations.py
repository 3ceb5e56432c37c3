"""The modulations of all sites as one value: arithmetic, a long table, presets on disk."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchfilm.injection import conditioning
from torchfilm.modulation import Modulation, check_modulations
from torchfilm.naming import each_match, entry
from torchfilm.reading import intact
from torchfilm.sites import Site
from torchfilm.version import WRITER, check_format, from_entries, in_one_entry
from torchfilm.writing import in_columns, whole

SitePattern = str | re.Pattern[str] | Sequence[str | re.Pattern[str]] | Callable[[str], bool]

_FIELDS = ("gamma", "beta", "gate")
_KIND, _NUMBER, _FORMAT = "torchfilm.modulations", "format_number", 1  # in a file's metadata


class Modulations(dict[str, Modulation]):
    """The modulation of every site by name, as one value: `a + (b - c)`, `a.interpolate(b, 0.5)`.

    Arithmetic acts site by site and field by field, as in `Modulation`; a network takes the result:
    `model(x, modulation=a + (b - c))` (Perez et al. 2018, section 4.5). A pytree, as `Modulation`. Prints as
    a table of names and shapes.

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

    def detach(self) -> Modulations:
        """Return the same values, cut off from the graph that made them."""
        return self.map(Modulation.detach)

    def to(self, *args: Any, **kwargs: Any) -> Modulations:
        """Move or convert every field of every site; arguments as `torch.Tensor.to`."""
        return self.map(lambda m: m.to(*args, **kwargs))

    def __missing__(self, name: str) -> Modulation:
        return entry("Modulations", self, name)

    def swap(self, other: Mapping[str, Modulation], sites: SitePattern) -> Modulations:
        """Return these with the matching sites of the other: `a.swap(b, r"layer4\\..*")`.

        Sites are names, or a regular expression for whole names; a list of such; or a function of the name.

        Raises:
            ValueError: for a pattern that matches no site, and for a site that the other has not.
        """
        chosen = matching(list(self), sites)
        theirs = {name: entry("Modulations.swap, of the other", other, name) for name in chosen}
        return Modulations({**self, **theirs})

    def copy(self) -> Modulations:
        """Return the same sites in a mapping of their own."""
        return Modulations(self)

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle as torch.load reads it, which fills no mappings of others."""
        return type(self), (dict(self),)

    def __or__(self, other: Mapping[str, Any]) -> Modulations:  # type: ignore[override]
        return Modulations({**self, **other})

    def rows(self, rows: Any) -> Modulations:
        """Return the rows of the batch picked by an integer, a slice, a list or an index tensor."""
        return self.map(lambda m: m[rows])

    def mean(self) -> Modulations:
        """Return one row, the mean of all: what a class of styles has in common, for any batch.

        A modulation without rows, [C], is one for any batch already.
        """
        return self.map(_mean)

    def map(self, function: Callable[[Modulation], Modulation]) -> Modulations:
        """Return the function's result for every site."""
        return Modulations({name: function(m) for name, m in self.items()})

    def frame(self) -> dict[str, Any]:
        """Return a long table, one line per site, row and channel: `pandas.DataFrame(a.frame())`.

        Its columns are site, row, step (for modulations [N, T, C]; else 0), channel, gamma, beta and, where
        a site has one, gate (NaN elsewhere). The sites are Python strings (dtype object): before
        `np.savez` convert them by `frame["site"].astype(str)`.

        Raises:
            ValueError: for no site.
        """
        if not self:
            raise ValueError(
                "Modulations.frame: expected at least one site, got none.\nRecord a call: record(model)."
            )
        parts: list[dict[str, Any]] = []
        gated = any(m.gate is not None for m in self.values())
        for name, m in self.items():
            fields = fields_of(m)
            rows, *steps, channels = fields["gamma"].shape
            gamma = fields["gamma"].reshape(rows, math.prod(steps), channels)
            row, step, channel = (axis.ravel() for axis in np.indices(gamma.shape))
            part = {"site": np.full(gamma.numel(), name, dtype=object)}
            part |= {"row": row, "step": step, "channel": channel}
            part |= {field: _column(value) for field, value in fields.items()}
            if gated and m.gate is None:
                part["gate"] = np.full(gamma.numel(), np.nan)
            parts.append(part)
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def __repr__(self) -> str:
        shown = _FIELDS[: 2 + any(getattr(m, "gate", None) is not None for m in self.values())]
        rows = [(name, *(_shape(getattr(m, field, m)) for field in shown)) for name, m in self.items()]
        return in_columns([("site", *shown), *rows])

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


def _mean(modulation: Modulation) -> Modulation:
    fields = modulation.spread()
    if fields[0].ndim < 2:
        return modulation
    return Modulation(*(field.mean(dim=0, keepdim=True) for field in fields))


def _of_leaves(values: Iterable[Any], names: Sequence[str]) -> Modulations:
    """Put them together again, whatever stands for the modulations."""
    made = Modulations()
    made.update(zip(names, values, strict=True))
    return made


def _with_paths(values: Modulations) -> tuple[list[tuple[Any, Any]], list[str]]:
    return [(pytree.MappingKey(name), m) for name, m in values.items()], list(values)


pytree.register_pytree_node(
    Modulations,
    lambda values: (list(values.values()), list(values)),
    _of_leaves,
    serialized_type_name="torchfilm.Modulations",
    flatten_with_keys_fn=_with_paths,
)
torch.serialization.add_safe_globals([Modulations])  # exported programs hold the inputs of their making


def modulations(model: nn.Module, cond: Any) -> Modulations:
    """Return what the generator makes of a condition, without running the network and without dropout.

    A network in training drops no condition meanwhile, in other threads that call it neither.

    Args:
        model: a conditioned network.
        cond: as in `model(x, cond=cond)`.

    Raises:
        ValueError: for a network that is not conditioned.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> a, b, c = (modulations(model, torch.rand(2, 7)) for _ in range(3))
        >>> y = model(torch.rand(2, 3), modulation=a + (b - c))
    """
    return Modulations(conditioning(model).modulations(cond))


def matching(names: Sequence[str], sites: SitePattern) -> list[str]:
    """Return the names that match: a regular expression for whole names, a list of such, or a function.

    Raises:
        ValueError: for an expression that matches nothing, with the three nearest names, or is none; for an
            empty list, and for a function that is true for no name.

    Example:
        >>> matching(["block1", "block2", "stem"], r"block.")
        ['block1', 'block2']
    """
    found: set[str] = set()
    if callable(sites):
        found.update(name for name in names if sites(name))
    else:
        patterns = [sites] if isinstance(sites, str | re.Pattern | Site) else list(sites)
        found.update(*each_match(names, patterns))
    if not found:
        raise ValueError(
            f"Sites: expected at least one of {len(names)} to be chosen, got none by {sites!r}.\n"
            f"There are {', '.join(map(repr, names[:10]))}{', ...' if len(names) > 10 else ''}."
        )
    return [name for name in names if name in found]


def save_modulations(modulations: Mapping[str, Modulation], path: str | Path) -> Path:
    """Write modulations as a safetensors file, whole or not at all, and return its path: a preset to keep.

    Raises:
        ValueError: for none, for several presets at once, and for values of another fusion than FiLM.
    """
    if not isinstance(modulations, Mapping):
        raise ValueError(
            f"save_modulations: expected a modulation for each site by name, got a "
            f"{type(modulations).__name__}.\n"
            f"They come first, then the path: save_modulations(modulations(model, z), path)."
        )
    if not modulations:
        raise ValueError(
            "save_modulations: expected at least one site, got none.\nRecord some: record(model)."
        )
    if presets := [name for name, m in modulations.items() if isinstance(m, Mapping)]:
        raise ValueError(
            f"save_modulations: expected one modulation for each site, got several presets: {presets}.\n"
            f"One file per preset: save_modulations(presets[name], folder / f'{{name}}.safetensors')."
        )
    check_modulations("save_modulations", modulations)
    path = Path(path)
    tensors = {
        f"{name}.{field}": value.detach().cpu().contiguous().clone()
        for name, m in modulations.items()
        for field, value in vars(m).items()
        if value is not None
    }
    about = {"format": _KIND, _NUMBER: str(_FORMAT), **WRITER, "sites": json.dumps(list(modulations))}
    with whole(path) as part:
        save_file(tensors, part, in_one_entry(about))
    return path


def load_modulations(path: str | Path, *, device: torch.device | str = "cpu") -> Modulations:
    """Read what `save_modulations` wrote.

    Raises:
        ValueError: for a file that holds something else, is damaged, or of another format.
        FileNotFoundError: for none.
    """
    if Path(path).is_dir():
        raise ValueError(
            f"load_modulations: expected a file of modulations, got the folder {path}.\n"
            f"Give the file in it; the conditioning of a network is read by load(base, folder)."
        )
    try:
        opened = safe_open(path, framework="pt")
    except SafetensorError as error:
        raise ValueError(
            f"load_modulations: expected a file of modulations, got {path}, no safetensors: {error}.\n"
            f"Write one by save_modulations, or by rec.save(path)."
        ) from error
    with intact(path, "what save_modulations wrote", "Write it again."), opened as file:
        about = from_entries(file.metadata())
        if about.get("format") != _KIND:
            raise ValueError(
                f"load_modulations: expected a file of modulations, got {path}: {about or 'plain'}.\n"
                f"The conditioning of a network is read by load(base, folder)."
            )
        check_format("load_modulations", Path(path), about.get(_NUMBER, "1"), str(_FORMAT), about)
        keys, found = set(file.keys()), {}
        for name in json.loads(about["sites"]):
            own = {field: key for field in _FIELDS if (key := f"{name}.{field}") in keys}
            # A copy: on the CPU the tensors are a map of the file, and change with it.
            values = {field: file.get_tensor(key).to(device, copy=True) for field, key in own.items()}
            found[name] = Modulation(**values)
            keys.difference_update(own.values())
        if keys:
            raise ValueError(
                f"load_modulations: expected the fields of the sites that {path} names, got {sorted(keys)} "
                f"beside them.\nWrite it again by save_modulations."
            )
        return Modulations(found)


def fields_of(modulation: Modulation) -> dict[str, Tensor]:
    """Return the fields that are there, with one shape and a batch axis."""
    values = modulation.spread()
    return {
        field: value[None] if value.ndim == 1 else value
        for field, value in zip(_FIELDS[: len(values)], values, strict=True)
    }


def _shape(field: Any) -> str:
    """Show the shape of a field; what stands for it where tree functions put something else there."""
    if isinstance(field, Tensor):
        return str(tuple(field.shape))
    return "" if field is None else repr(field)


def _column(value: Tensor) -> np.ndarray:
    """Return a field as numbers that NumPy knows, one below the other."""
    wide = torch.promote_types(value.dtype, torch.float32)
    return value.detach().to("cpu", wide).reshape(-1).numpy()
