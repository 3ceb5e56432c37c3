"""Train and ship the conditioning of a network apart from the network.

`save` writes a folder with what `condition` added (film.safetensors) and how to add it again (film.json, no
pickle); `load` puts it on a fresh copy of the same base.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchfilm.conditions import Classes, Scalars, Tokens, Vector, encoded_size
from torchfilm.filling import Conditioning
from torchfilm.fusion import Film, Fusion, resolve
from torchfilm.generator_options import GeneratorOptions
from torchfilm.injection import Network, condition, conditioning, film_of, remove, unwrapped
from torchfilm.lookup import Row, Table
from torchfilm.reading import DAMAGED, intact, sketched
from torchfilm.several import Maybe, Several
from torchfilm.sharding import ONE_FLAT_TENSOR, is_first, is_flattened, is_sharded
from torchfilm.sites import Site, Sites, check_network
from torchfilm.version import WRITER, check_format, from_entries, in_one_entry
from torchfilm.writing import whole

TENSORS, DESCRIPTION, FORMAT = "film.safetensors", "film.json", 1
_DESCRIBED = "sha256 of the description"

# A base that was converted to bfloat16 (8 bits of mantissa) and back still counts as the same.
_SAME = 2.0**-7
_SAMPLED_TENSORS, _SAMPLED_VALUES = 16, 8

_TRANSPARENT = ("_orig_mod", "_checkpoint_wrapped_module")


def freeze_base(model: Network) -> Network:
    """Freeze all but the conditioning, and keep the running statistics of the base's norms as they are.

    What is frozen in the conditioning stays so: `conditioning(model).requires_grad_(True)` lets it train. The
    norms that have such statistics stay in evaluation mode, also after `model.train()`, and torch's
    `update_bn` leaves them alone. `unfreeze_base`, as `remove`, lets everything train again that did before.
    A conditioned network inside of this one is part of the base: its own conditioning is frozen too,
    whichever was frozen first.

    Raises:
        ValueError: for a model that is not conditioned, and inside of `folded`.

    Example:
        >>> model = condition(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "1", Vector(7))
        >>> [name for name, p in freeze_base(model).named_parameters() if p.requires_grad]
        ['film.generator.head.weight', 'film.generator.head.bias']
    """
    film, root = conditioning(model), unwrapped(model)
    film.check_open("freeze_base")
    film.frozen.freeze(root)
    root.train(root.training)
    return model


def unfreeze_base(model: Network) -> Network:
    """Undo `freeze_base`: what trained before trains again, and the norms follow the network's mode.

    An optimiser made meanwhile has the conditioning alone: give it the base's parameters too, or make
    another. A network that is not frozen stays as it is. Of frozen networks inside of each other free the
    outer one first, and freeze again what is to stay frozen.

    Raises:
        ValueError: for a model that is not conditioned, and inside of `folded`.

    Example:
        >>> model = condition(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)), "1", Vector(7))
        >>> all(p.requires_grad for p in unfreeze_base(freeze_base(model)).parameters())
        True
    """
    film = conditioning(model)
    film.check_open("unfreeze_base")
    film.frozen.thaw(unwrapped(model))
    return model


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write the conditioning of a network, and how to add it again, into a folder; return the folder.

    The base is not written.

    Of a network that FSDP2 has sharded, whole tensors are written: all processes that have a part of it have
    to call this, and the first of them writes.

    Args:
        model: a conditioned network.
        folder: is made where it does not exist; earlier files of the same names are replaced.

    Raises:
        ValueError: for a model that is not conditioned, inside of `folded`, inside of
            FullyShardedDataParallel, and for state of an encoder or a generator that is no tensor.
    """
    film, root, path = conditioning(model), unwrapped(model), Path(folder)
    film.check(root)
    film.check_open("save")
    if is_flattened(root):
        raise ValueError(f"save: expected a network with its own parameters, got one with {ONE_FLAT_TENSOR}")
    names = {name: _unwrapped_name(paths[0]) for name, paths in film.paths(root).items()}
    state = film.state_dict()
    _check_tensors(state)
    tensors = {key: _whole(value).detach().cpu().clone().contiguous() for key, value in state.items()}
    description = {
        "format": FORMAT,
        **WRITER,
        "sites": [dataclasses.asdict(site) | {"name": names[site.name]} for site in film.sites.values()],
        "cond": _describe(film.cond),
        "fusion": _by_site(film.recipe or _recipe_of_table(film), names),
        "table": _renamed(film.generator.layout, names) if type(film.generator) is Table else None,
        "base": _fingerprint(root),
    }
    if not all(map(is_first, state.values())):
        return path
    text = json.dumps(description, indent=1, default=_number)
    with whole(path / DESCRIPTION) as described, whole(path / TENSORS) as numbers:
        save_file(tensors, numbers, in_one_entry({_DESCRIBED: _hashed(text), **WRITER}))
        described.write_text(text, encoding="utf-8")
    return path


def _recipe_of_table(film: Conditioning) -> dict[str, Any] | None:
    """Return the recipe of a table that FiLM applies, whatever it was made with; else None."""
    if type(film.generator) is not Table or type(film.fusion) is not Film:
        return None
    return {"name": "film", "options": {"align": film.fusion.align}}


def load(
    base: Network,
    folder: str | Path,
    *,
    cond: nn.Module | None = None,
    fusion: str | Fusion | None = None,
    generator: nn.Module | Callable[[int, Mapping[str, int]], nn.Module] | None = None,
    any_base: bool = False,
) -> Network:
    """Condition a fresh base, in place, as `save` found it; strictly: everything has to fit.

    Args:
        base: a network like the one that was conditioned, with the same weights, not conditioned yet.
        folder: what `save` wrote.
        cond: an encoder like the one that was saved, where it is of a class of your own.
        fusion: likewise the fusion, where it was given as an object.
        generator: likewise the generator, where one was given; none for a tabulated network.
        any_base: accept a base with other weights or other modules beside the sites.

    Returns:
        The base itself, now conditioned.

    Raises:
        ValueError: where the folder lacks something, a file is broken, the base is another one, or something
            does not fit; the base is then as it was.
    """
    check_network(base)
    path = Path(folder)
    size = None if cond is None else encoded_size(cond)  # its own errors are none of the folder's
    with intact(path, f"{DESCRIPTION} as save wrote it", "Save again, or copy the folder again."):
        description = _here(_read(path), base)
        if not any_base:
            _check_base(base, description["base"], path)
        sketch = nn.ModuleDict()
        if cond is not None:
            _check_cond(cond, description["cond"], path)
        else:
            with sketched():
                sketch["cond"] = _build(description["cond"])
        tensors = load_file(path / TENSORS)
        how = _how(description, tensors, path, fusion, generator)
        sites = Sites(Site(**site) for site in description["sites"])
        if "generator" not in how and isinstance(how["fusion"], str):
            size = encoded_size(sketch["cond"]) if size is None else size
            widths = {site.name: site.features for site in sites}
            with sketched():
                sketch["generator"] = resolve(**how).build(size, widths)
        known = {key: value for key, value in tensors.items() if key.partition(".")[0] in sketch}
        _check_fit(sketch.state_dict(), known, path)
        if cond is None:
            cond = _build(description["cond"])
            _widen(cond, tensors)
    before = film_of(base)
    try:
        film = conditioning(condition(base, sites, cond, **how))
        if description.get("table"):
            film.recipe = description["fusion"]
        _fill(film, tensors, path)
    except BaseException:
        if film_of(base) is not before:
            remove(base)
        raise
    return base


def _how(
    description: dict[str, Any],
    tensors: Mapping[str, Tensor],
    path: Path,
    fusion: str | Fusion | None,
    generator: Any,
) -> dict[str, Any]:
    """Return the arguments of `condition` that say how the condition meets the features."""
    recipe, table = description["fusion"], description.get("table")
    if table and generator is not None:
        raise ValueError(
            f"load: expected no generator=, for {path} is of a tabulated network, got one.\n"
            f"Leave it out: the table is in its place."
        )
    if recipe is not None and isinstance(fusion, str) and fusion != recipe["name"]:
        raise ValueError(
            f"load: expected fusion={recipe['name']!r}, with which {path} was saved, got {fusion!r}.\n"
            f"Leave it out."
        )
    if recipe is not None and (fusion is None or isinstance(fusion, str)):
        align = recipe["options"].get("align") if table else None  # all that a table is applied by
        fusion = recipe["name"] if align is None else Film(align=align)
    if table:
        if fusion is None:
            raise ValueError(
                f"load: expected fusion=, for the table in {path} was made with objects, got none.\n"
                f"Give the fusion with which the network was conditioned: fusion='film', or the object."
            )
        layout = {name: (channels, fields) for name, (channels, fields) in table.items()}
        return {"fusion": fusion, "generator": Table(torch.empty_like(tensors["generator.table"]), layout)}
    if generator is not None:
        return {"generator": generator} | ({} if fusion is None else {"fusion": fusion})
    if fusion is not None and not isinstance(fusion, str):
        return {"fusion": fusion}
    if recipe is None:
        raise ValueError(
            f"load: expected fusion= or generator= with an object, for {path} was saved with one of its own, "
            f"got {fusion!r}.\n"
            f"Give one that is made in the same way."
        )
    tupled = {key: tuple(one) if isinstance(one, list) else one for key, one in recipe["options"].items()}
    tupled.pop("device", None)  # once an option, which said nothing: all is where the first site is
    return {"fusion": fusion} | tupled


def _read(path: Path) -> dict[str, Any]:
    for name in (TENSORS, DESCRIPTION):
        if not (path / name).is_file():
            raise ValueError(
                f"load: expected a folder with {TENSORS} and {DESCRIPTION}, got {path} without {name}.\n"
                f"Give the folder that save(model, folder) wrote."
            )
    try:
        text = (path / DESCRIPTION).read_text(encoding="utf-8")
        description = json.loads(text)
        if not isinstance(description, dict):
            raise TypeError(f"{DESCRIPTION} holds no mapping")
        with safe_open(path / TENSORS, "pt") as file:
            described = from_entries(file.metadata()).get(_DESCRIBED)
    except (*DAMAGED, ValueError, SafetensorError) as error:
        raise ValueError(
            f"load: expected {TENSORS} and {DESCRIPTION} as save wrote them, got a broken one in {path}: "
            f"{error}.\nSave again, or copy the folder again."
        ) from error
    check_format("load", path / DESCRIPTION, description.get("format"), FORMAT, description)
    if described not in (None, _hashed(text)):
        raise ValueError(
            f"load: expected the {DESCRIPTION} that was saved with {TENSORS}, got another one in {path}.\n"
            f"Save again: one of the two was changed, or is of an earlier save and this one was interrupted."
        )
    return description


def _here(description: dict[str, Any], base: nn.Module) -> dict[str, Any]:
    """Return the description with the names of the sites in this base, where blocks may be wrapped."""
    names = {_unwrapped_name(name): name for name, _ in base.named_modules()}
    sites = [site | {"name": names.get(site["name"], site["name"])} for site in description["sites"]]
    table, recipe = description.get("table"), description["fusion"]
    if recipe is not None and isinstance(emit := recipe["options"].get("emit"), dict):
        recipe = recipe | {"options": recipe["options"] | {"emit": _renamed(emit, names)}}
    return description | {
        "sites": sites,
        "table": _renamed(table, names) if table else None,
        "fusion": recipe,
    }


def _renamed(layout: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(name, name): value for name, value in layout.items()}


def _by_site(recipe: dict[str, Any] | None, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Return a recipe with what each site emits by its name here, where it is given by patterns."""
    emit = None if recipe is None else recipe["options"].get("emit")
    if recipe is None or emit is None or not (options := GeneratorOptions(emit=emit)).patterns:
        return recipe
    return recipe | {"options": recipe["options"] | {"emit": _renamed(options.fields(names), names)}}


def _unwrapped_name(name: str) -> str:
    """Return a name without those of wrappers that compute the same: compiled and checkpointed modules."""
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def _hashed(text: str) -> str:
    """Return a hash of what JSON says, however it is laid out."""
    return hashlib.sha256(json.dumps(json.loads(text), sort_keys=True).encode()).hexdigest()


def _number(value: Any) -> Any:
    """Return a number of numpy's as one of Python's; TypeError for what is none, as JSON asks for."""
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"save: expected options that JSON can hold, got a {type(value).__name__}.")


def _check_tensors(state: Mapping[str, Any]) -> None:
    for key, value in state.items():
        if not isinstance(value, Tensor):
            raise ValueError(
                f"save: expected a state of tensors, got '{key}' {type(value).__name__}.\n"
                f"Keep it in a buffer, or give it to the encoder or generator when it is made, and load by "
                f"cond= or generator=."
            )
        if value.is_meta:
            raise ValueError(
                f"save: expected a state with numbers, got '{key}' on the meta device, where it has none.\n"
                f"Let whoever keeps it elsewhere put it back first (accelerate: "
                f"remove_hook_from_module(model, recurse=True))."
            )


def _check_fit(state: Mapping[str, Any], tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors of other names or sizes than those of the state, and numbers of another kind."""
    expected = {key: _kind(value) for key, value in state.items()}
    got = {key: _kind(value) for key, value in tensors.items()}
    if expected != got:
        differing = sorted(key for key in expected | got if expected.get(key) != got.get(key))
        lines = "\n".join(
            f"  {key}  {expected.get(key, 'none')}  {got.get(key, 'none')}" for key in differing
        )
        raise ValueError(
            f"load: expected the tensors of this conditioning, got others in {path} "
            f"(name, expected, got).\n{lines}\n"
            f"Give the cond=, fusion= or generator= with the sizes that were saved."
        )


def _kind(value: Tensor) -> str:
    kind = "complex" if value.is_complex() else "bool" if value.dtype == torch.bool else "integer"
    return f"{tuple(value.shape)}" if value.is_floating_point() else f"{tuple(value.shape)} {kind}"


def _fill(film: Conditioning, tensors: dict[str, Tensor], path: Path) -> None:
    state = film.state_dict()
    _check_fit(state, tensors, path)
    if any(value.is_meta for value in state.values()):
        raise ValueError(
            "load: expected a base with numbers, got one on the meta device, where nothing can be loaded.\n"
            "Load its checkpoint first, or base.to_empty(device=...)."
        )
    film.load_state_dict(tensors)


def _widen(cond: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Make the parameters of an encoder double that were saved as such, so that no digit is lost."""
    for name, parameter in cond.named_parameters():
        if tensors[f"cond.{name}"].dtype == torch.float64:
            parameter.data = parameter.double()


_OPTIONS: dict[type[nn.Module], tuple[str, ...]] = {
    Vector: ("dim",),
    Classes: ("num_classes",),
    Scalars: ("n", "dim", "min_period", "max_period"),
    Tokens: ("dim", "pooling", "heads"),
    Row: ("dim",),
    Maybe: ("dropout",),
    Several: ("combine", "joint_dropout"),
}
"""What the library's encoders are made with and keep by the same names; the rest is in `_describe`."""


def _describe(cond: nn.Module) -> dict[str, Any] | None:
    """Return how to make an encoder of the library again; None for one that holds a class of others."""
    if type(cond) not in _OPTIONS:
        return None
    options: dict[str, Any] = {key: getattr(cond, key) for key in _OPTIONS[type(cond)]}
    if isinstance(cond, Classes):
        options["dim"] = None if cond.table is None else cond.dim
    elif isinstance(cond, Scalars):
        options["learned"] = cond.frequencies is not None
    elif isinstance(cond, Maybe):
        null = "zero" if cond.null is None else "learned"
        options = {"condition": _describe(cond.condition), **options, "null": null}
    elif isinstance(cond, Several):
        parts = {  # a Maybe for each that is not optional is made again
            name: _describe(part if name in cond.optional or not isinstance(part, Maybe) else part.condition)
            for name, part in cond.parts.items()
        }
        options = {"conditions": parts, **options, "joint": list(cond.joint)}
    inner = [options.get("condition", {}), *options.get("conditions", {}).values()]
    return None if None in inner else {"type": type(cond).__name__, "options": options}


def _check_cond(cond: nn.Module, saved: dict[str, Any] | None, path: Path) -> None:
    """Refuse an encoder of the library's that is made in another way than the one that was saved."""
    described = _describe(cond)
    if saved is None or described is None:
        return
    now = json.loads(json.dumps(described, default=_number))
    if _compared(now) != _compared(saved):
        raise ValueError(
            f"load: expected the condition that {path} was trained with, got another.\n"
            f"  expected  {_build(saved)}\n"
            f"  got       {cond}\n"
            f"Leave cond= out: the encoder is made as it was."
        )


def _compared(description: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what of a description has to be the same: all but dropout, joint or not, which is for training.

    Each part of `Several` is one that may be missing, as older folders have it.
    """
    if description is None:
        return None
    training = ("dropout", "joint_dropout", "joint")
    options = {key: value for key, value in description["options"].items() if key not in training}
    if "condition" in options:
        options["condition"] = _compared(options["condition"])
    if "conditions" in options:
        parts = {name: _compared(part) for name, part in options["conditions"].items()}
        options["conditions"] = {
            name: {"type": "Maybe", "options": {"condition": part, "null": "learned"}}
            if part is not None and part["type"] != "Maybe"
            else part
            for name, part in parts.items()
        }
    return description | {"options": options}


def _build(description: dict[str, Any] | None) -> nn.Module:
    if description is None:
        raise ValueError(
            "load: expected cond=, for the conditioning was saved with an encoder of a class of its own.\n"
            "Give an encoder that is made in the same way."
        )
    options = dict(description["options"])
    if description["type"] == "Maybe":
        options["condition"] = _build(options["condition"])
    if description["type"] == "Several":
        options["conditions"] = {name: _build(part) for name, part in options["conditions"].items()}
    kinds: dict[str, Callable[..., nn.Module]] = {kind.__name__: kind for kind in _OPTIONS}
    return kinds[description["type"]](**options)


def _fingerprint(root: nn.Module, named: Callable[[str], str] = _unwrapped_name) -> dict[str, Any]:
    """Tell one base from another: a hash of all names and shapes, and some values of some of its tensors."""
    state = {named(key): v for key, v in root.state_dict().items() if not key.startswith("film.")}
    shapes = "\n".join(f"{key} {tuple(value.shape)}" for key, value in state.items() if _plain(value))
    floats = [key for key, value in state.items() if _plain(value) and value.is_floating_point()]
    step = max(1, len(floats) // _SAMPLED_TENSORS)
    sampled = {key: _whole(state[key]).flatten()[:_SAMPLED_VALUES].float().tolist() for key in floats[::step]}
    return {"names": hashlib.sha256(shapes.encode()).hexdigest(), "values": sampled}


def _plain(value: Any) -> bool:
    """Leave out what has no values to read: quantised subclasses, the meta device, extra state."""
    return (type(value) is Tensor or is_sharded(value)) and value.device.type != "meta"


def _whole(value: Any) -> Tensor:
    """Return a tensor whole, which all processes that have a part of it have to ask for."""
    return value.full_tensor() if is_sharded(value) else value


def _check_base(base: nn.Module, saved: dict[str, Any], path: Path) -> None:
    # Older folders have the names with those of wrappers.
    both = (_fingerprint(base, named) for named in (_unwrapped_name, str))
    now = next((one for one in both if one["names"] == saved["names"]), None)
    if now is None:
        fact = "has modules or sizes that the one behind it did not have"
    else:
        differing = [key for key, values in saved["values"].items() if not _close(now["values"][key], values)]
        if not differing:
            return
        fact = f"has other weights than the one behind it, the first in '{differing[0]}'"
    raise ValueError(
        f"load: expected the base that {path} was trained on, got a {type(base).__name__} that {fact}.\n"
        f"Load its checkpoint first; to use this base all the same give any_base=True."
    )


def _close(one: list[float], other: list[float]) -> bool:
    return len(one) == len(other) and np.allclose(one, other, rtol=_SAME, atol=1e-6, equal_nan=True)
