"""Where the modules that are sites are now: code of others puts new ones in their places.

`nn.SyncBatchNorm.convert_sync_batchnorm` does so, or a copy that a wrapper makes: these hear no condition. A
site is the module that holds its slot, so one inside of a new wrapper is still heard.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from torchfilm.applying import Slot
from torchfilm.sites import is_root
from torchfilm.slots import slot_of

Place = tuple[tuple[str, ...], Slot]
"""The keys that lead from the network to a site, and the site's slot."""


def in_place(root: Any, places: Sequence[Place]) -> bool:
    """Tell whether all sites are where they were: a microsecond each."""
    try:
        for path, slot in places:
            module = root
            for key in path:
                module = module._modules[key]
            if module.__dict__["_film_slot"] is not slot:
                return False
    except (KeyError, AttributeError):
        return False
    return bool(places)


def paths_of(root: nn.Module, slots: Mapping[str, Slot]) -> dict[str, list[str]]:
    """Return where the module of each site is, under each name that it has; the first is its own."""
    names = {id(slot): name for name, slot in slots.items()}
    found: dict[str, list[str]] = {name: [] for name in slots}
    for path, module in root.named_modules(remove_duplicate=False):
        if (name := names.get(id(slot_of(module)))) is not None:
            found[name].append(path)
    return found


def places_now(
    root: nn.Module, film: nn.Module, slots: Mapping[str, Slot], before: Sequence[Place]
) -> list[Place]:
    """Return the places of all sites.

    Raises:
        ValueError: where a site's module is in fewer places than before, and where a copy of one is beneath
            the place of another.
    """
    now, counts = paths_of(root, slots), Counter(slot.site.name for _, slot in before)
    for name, paths in now.items():
        if len(paths) < max(counts[name], 1):
            here = root._modules["film"]
            if here is not film:
                raise ValueError(
                    f"film: expected what condition() added, got a copy inside of a {type(here).__name__}, "
                    f"which no site hears.\n"
                    f"Wrap its parts instead (PEFT: modules_to_save=['film.cond', 'film.generator'])."
                )
            lost = (".".join(path) for path, slot in before if slot.site.name == name)
            path = next((path for path in lost if path not in paths), name)
            raise ValueError(_replaced(path, dict(root.named_modules(remove_duplicate=False)).get(path)))
    _check_copies(root, slots, [".".join(path) for path, _ in before])
    return [(tuple(path.split(".")), slots[name]) for name in now for path in now[name]]


def _check_copies(root: nn.Module, slots: Mapping[str, Slot], before: Sequence[str]) -> None:
    """Raise ValueError where others put a copy of a site beside it, beneath its place: it would hear nothing.

    Copies elsewhere may be kept and never be called.
    """
    beneath = tuple(f"{place}." for place in before)
    within = tuple(f"{path}." for path, module in root.named_modules() if path and is_root(module))
    for path, module in root.named_modules():
        slot = slot_of(module)
        if not isinstance(slot, Slot) or path.startswith(within):
            continue
        if path.startswith(beneath) and slot is not slots.get(slot.site.name, slot):
            raise ValueError(
                f"Site '{slot.site.name}': expected one module, got a copy of it at '{path}', which hears no "
                f"condition.\n"
                f"Leave sites out of what others copy (PEFT: modules_to_save, LNTuningConfig). Or "
                f"remove(model), let them copy, and condition the copies."
            )


def _replaced(path: str, module: nn.Module | None) -> str:
    """Return what to say where another module is in the place of a site."""
    now = "nothing" if module is None else f"another {type(module).__name__}"
    remedy = "Convert or prune the network first, then condition it; remove(model) undoes this."
    copies = module is not None and not parametrize.is_parametrized(module)  # of which torch copies all
    if copies and hasattr(type(module), "__deepcopy__"):
        remedy = (
            "Copies that its class makes of itself hear nothing: save(model, folder), then "
            "load(remove(copy.deepcopy(model)), folder)."
        )
    return f"Site '{path}': expected the module that was conditioned, got {now} in its place.\n{remedy}"
