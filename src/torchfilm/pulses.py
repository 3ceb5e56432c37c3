"""What one forward and one backward pass tell about each site: calls, share in the output, who reads it."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from torchfilm.applying import Slot
from torchfilm.filling import Conditioning
from torchfilm.fusion import Fusion
from torchfilm.sites import Site, kind_of

SHIFTS = ("beta", "shift")
"""Fields in the units of the features: their share is that of a shift as large as these,"""
SMALL = 0.1
"""but at least this large: a shift does not shrink with the features, which may be zero at the start."""


@dataclass(frozen=True)
class Pulse:
    """What the pass measured at a site.

    Args:
        site: its name.
        calls: how often its module ran in one forward of the network.
        fields: |dy/dgamma| / |y| over all samples and channels, so 0.1 says that gammas moved by one at
            random change the output by a tenth of how far samples are from their mean: |y| is without what
            they share, but where they do not differ. Likewise gate and others, and |dy/dbeta| rms(x) / |y|
            for beta, as for the shift of other fusions, where x is what the site modulates, and an rms(x) of
            less than 0.1 counts as 0.1. None where the output does not depend on it.
        together: the largest if one condition moved all samples alike; None for a single sample.
        moved: the fields that the condition moves; the others are constants, or weights of the fusion.
        size: rms(x), the first time that the site modulates; 1 where it never does.
    """

    site: str
    calls: int
    fields: dict[str, float | None]
    together: float | None
    moved: tuple[str, ...]
    size: float

    @property
    def heard(self) -> dict[str, float]:
        """Return the fields that the condition moves and the output depends on."""
        return {name: value for name in self.moved if (value := self.fields.get(name)) is not None}

    @property
    def strength(self) -> float:
        """Return the largest of the fields that the condition moves."""
        return max(self.heard.values(), default=0.0)

    @property
    def relative(self) -> float:
        """Return the same with shifts in units of the features, however small: so sites are compared."""
        return self.relative_of(self.heard)

    @property
    def constant(self) -> float:
        """Return the largest of the fields that the condition does not move, in the same units."""
        return self.relative_of(name for name in self.fields if name not in self.moved)

    def relative_of(self, names: Iterable[str]) -> float:
        """Return the largest of these fields in the same units."""
        small = min(self.size / SMALL, 1.0)
        found = [(small if name in SHIFTS else 1.0, self.fields[name]) for name in names]
        return max((unit * value for unit, value in found if value is not None), default=0.0)

    def cell(self, name: str) -> str:
        """Show a field, in brackets where the condition does not move it."""
        value = self.fields.get(name)
        text = "none" if value is None else f"{value:.2g}"
        return text if name in self.moved or name not in self.fields else f"({text})"

    def or_more(self, other: Pulse) -> Pulse:
        """Return the same with what the condition moves as another pass has it, where that is more."""
        more = {name: max(value, other.heard.get(name, 0.0)) for name, value in self.heard.items()}
        both = [value for value in (self.together, other.together) if value is not None]
        return replace(self, fields={**self.fields, **more}, together=max(both, default=None))


@dataclass
class Seen:
    """What ran in the forward pass.

    Calls of each site, root mean square of the features that it modulates and the part of it by which samples
    differ, 0..1, or 1 where they are all the same; which norm read which node, and what the generator read.
    """

    calls: dict[str, int] = field(default_factory=dict)
    size: dict[str, float] = field(default_factory=dict)
    apart: dict[str, float] = field(default_factory=dict)
    norms: dict[Any, str] = field(default_factory=dict)
    condition: Any = None


class _Measuring:
    """A fusion that notes how large features are and differ, the first time that a site modulates some."""

    def __init__(self, fusion: Fusion, seen: Seen, name: str) -> None:
        self.fusion, self.seen, self.name = fusion, seen, name

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Build what the fusion itself builds."""
        return self.fusion.build(cond_dim, sites)

    def apply(self, x: Tensor, value: Any, dim: int, site: str) -> Tensor:
        """Note how large x is and how far its rows differ, and apply the fusion itself."""
        if self.name not in self.seen.size:
            values = x.detach().cpu()  # not all devices have what follows
            size = self.seen.size[self.name] = _rms(values)
            apart = _rms(values - values.mean(dim=0)) / size if size else 0.0
            self.seen.apart[self.name] = apart if apart > 2 * torch.finfo(x.dtype).eps else 1.0
        return self.fusion.apply(x, value, dim, site)


@contextmanager
def _measured(slots: Mapping[str, Slot], seen: Seen) -> Iterator[None]:
    """Let all sites of this thread modulate by a fusion that measures, and none ahead inside of a norm."""
    before = [(slot, slot.fusion, slot.is_plain_film) for slot in slots.values()]
    try:
        for name, slot in slots.items():
            slot.fusion, slot.is_plain_film = _Measuring(slot.fusion, seen, name), False
        yield
    finally:
        for slot, fusion, is_plain_film in before:
            slot.fusion, slot.is_plain_film = fusion, is_plain_film


@contextmanager
def watched(root: nn.Module, film: Conditioning) -> Iterator[Seen]:
    """Count the calls of sites, measure their features and note what norms read, for one forward pass."""
    seen = Seen()
    sites = {path: name for name, paths in film.paths(root).items() for path in paths}
    handles = []

    def count(name: str, module: nn.Module, args: Any, output: Any) -> None:
        seen.calls[name] = seen.calls.get(name, 0) + 1

    def note(name: str, module: nn.Module, args: Any) -> None:
        if args and isinstance(args[0], Tensor) and args[0].grad_fn is not None:
            seen.norms[args[0].grad_fn] = f"{kind_of(module).__name__} '{name}'"

    def keep(module: nn.Module, args: Any) -> None:
        seen.condition = args[0]

    try:
        for name, module in root.named_modules():
            if name == "film.generator":
                handles.append(module.register_forward_pre_hook(keep))
            if name in sites:
                handles.append(module.register_forward_hook(partial(count, sites[name])))
            if _normalises(module) and not name.startswith("film."):
                handles.append(module.register_forward_pre_hook(partial(note, name)))
        with _measured(film.slots, seen):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def take_pulses(
    sites: dict[str, Site],
    seen: Seen,
    gradients: Sequence[tuple[str, str, Tensor | None]],
    unit: float,
    moved: dict[str, tuple[str, ...]],
    *,
    same: bool,
) -> dict[str, Pulse]:
    """Turn gradients into shares of the output; where there is one condition, samples move together."""
    fields: dict[str, dict[str, float | None]] = {name: {} for name in sites}
    together: dict[str, list[float]] = {name: [] for name in sites}
    for name, part, gradient in gradients:
        if gradient is None:
            fields[name][part] = None
            continue
        scale = max(seen.size.get(name, 1.0), SMALL) if part in SHIFTS else 1.0
        each, size = gradient.cpu().double() * scale, unit**0.5
        batched = gradient.ndim > 1 and len(gradient) > 1
        alone, shared = _norm(each) / size, _norm(each.sum(dim=0) if batched else each) / size
        together[name] += [shared] * (batched and part in moved[name])
        fields[name][part] = shared if same and part in moved[name] else alone
    found = {}
    for name, parts in fields.items():
        calls, size, most = (
            seen.calls.get(name, 0),
            seen.size.get(name, 1.0),
            max(together[name], default=None),
        )
        found[name] = Pulse(name, calls, parts, most, moved[name], size)
    return found


def readers(
    total: Tensor, leaves: Sequence[tuple[str, Tensor]], seen: Seen, *, mixed: bool = False
) -> dict[str, str]:
    """Return for each site which norm reads what it modulates while channels are still apart; "" for none.

    Args:
        total: the scalar whose graph is read; the graph may be spent.
        leaves: the name of the site and each tensor of its value.
        seen: what the forward pass left.
        mixed: also behind mixtures of channels, where a shift of whole channels is still one.
    """
    nodes, starts = _graph(total)
    behind = _norms_behind(nodes, seen, mixed=mixed)
    found: dict[str, list[tuple[int, str]]] = {}
    for name, leaf in leaves:
        node = starts.get(id(leaf))
        found.setdefault(name, []).extend([behind[node]] if node in behind else [])
    return {name: min(norms, default=(0, ""))[1] for name, norms in found.items()}


def _rms(values: Tensor) -> float:
    return float(torch.linalg.vector_norm(values.abs(), dtype=torch.float64)) / max(values.numel(), 1) ** 0.5


def _norm(values: Tensor) -> float:
    return float(values.square().sum().sqrt())


def _normalises(module: nn.Module) -> bool:
    """Whether a module may take a factor and a shift per channel out again, as layer norms do not.

    A block that is named after a norm inside, as Conv2dNormActivation, does not; nor one that is frozen.
    """
    name, of_torch = type(module).__name__, isinstance(module, _NormBase | nn.GroupNorm)
    if "Norm" not in name or "LayerNorm" in name or "RMSNorm" in name:
        return False
    if not of_torch and any("Norm" in type(inner).__name__ for inner in list(module.modules())[1:]):
        return False
    if getattr(module, "running_mean", None) is None:
        return True
    return module.training and (of_torch or bool(list(module.parameters())))


# Behind these a channel is a mixture, and a norm can no longer undo the modulation of each.
_MIXING = re.compile("Convolution|Addmm|MmBackward|BmmBackward|Baddbmm|Embedding|Attention|Softmax")


def _graph(total: Tensor) -> tuple[list[Any], dict[int, Any]]:
    """Return the nodes of the graph behind a result, and each leaf's node by its id."""
    known: dict[Any, None] = {}
    starts: dict[int, Any] = {}
    todo = [total.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in known:
            continue
        known[node] = None
        if (variable := getattr(node, "variable", None)) is not None:
            starts[id(variable)] = node
        todo += [below for below, _ in node.next_functions]
    return list(known), starts


def _norms_behind(nodes: list[Any], seen: Seen, *, mixed: bool) -> dict[Any, tuple[int, str]]:
    """Return for each node how far the nearest norm behind it is, and its name; `mixed` as for `readers`.

    From the norms back, breadth first, so that each node is visited once for all sites.
    """
    passed = dict.fromkeys(node for node in nodes if mixed or not _MIXING.search(node.name()))
    todo = deque(
        (below, 1, norm)
        for node in passed
        for index, (below, _) in enumerate(node.next_functions)
        if (norm := _norm_at(node, index, seen))
    )
    found: dict[Any, tuple[int, str]] = {}
    while todo:
        node, steps, norm = todo.popleft()
        if node is None or node in found:
            continue
        found[node] = steps, norm
        if node in passed:
            todo += [(below, steps + 1, norm) for below, _ in node.next_functions]
    return found


def _norm_at(node: Any, index: int, seen: Seen) -> str:
    """Return which norm reads what a node makes, or is the node as reader of this input; "" for none.

    A norm reads features as its first input. The others are its affine, which may have taken a modulation in.
    """
    if node in seen.norms:
        return seen.norms[node]
    if index == 0 and "GroupNorm" in node.name():
        return "a norm"
    if index == 0 and "BatchNorm" in node.name() and getattr(node, "_saved_training", True):
        return "a norm"  # of a function; torch's instance norm is a batch norm of more channels
    return ""
