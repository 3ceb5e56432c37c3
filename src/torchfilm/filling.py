"""What `condition` adds to a network, and how a call of the network fills the slots of its sites.

The condition goes from the root to the sites through slots that are full only while a call lasts, whatever
happens in it: no condition stays behind for a later call to hear by accident.
"""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import Proxy

from torchfilm.absorption import ahead
from torchfilm.applying import Slot, backward_pass
from torchfilm.costs import describe, num_parameters
from torchfilm.freezing import Frozen
from torchfilm.fusion import Fusion, check_reads_tokens
from torchfilm.placement import Place, in_place, paths_of, places_now
from torchfilm.restoring import in_mode
from torchfilm.several import Maybe, Several
from torchfilm.sharding import check_apart, in_parts
from torchfilm.sites import Site, Sites
from torchfilm.slots import PLAIN, make_ready, no_condition
from torchfilm.snapshot import Snapshot

Transform = Callable[[dict[str, Any]], dict[str, Any]]


class Onlooker:
    """A transform that looks at what calls of the network give to the sites, and hands it on as it is."""


class Active:
    """What a block made active: a condition, with the values made of it at the start, or a modulation.

    Nothing is made at the start by parameters that FSDP2 holds in parts: only a call of the network makes
    them whole.

    Args:
        film: what makes the values.
        cond: the condition, or None.
        modulation: a ready value for each site, or None.
    """

    ended = False

    def __init__(self, film: Conditioning, cond: Any, modulation: Any) -> None:
        self.cond, self.modulation = cond, modulation
        late = any(map(in_parts, film.parameters()))
        self.ready = film(cond) if modulation is None and not late else None
        self.training, self.made_of = film.training, Snapshot(film, cond=cond)
        self.is_traced = torch.compiler.is_compiling()

    def is_ready(self, film: Conditioning) -> bool:
        """Whether the values of the start are still right; with gradients, each call has values of its own.

        A compiled call sees another condition, but not what is written into one, or into parameters: so it
        has values of its own where the block is compiled with it.
        """
        if self.ready is None or self.is_traced:
            return False
        if torch.is_grad_enabled() or film.training is not self.training:
            return False
        return self.made_of.holds()


class Off:
    """What a block of `unconditioned` made active."""

    ended = False


class Lent(NamedTuple):
    """What all sites apply where a part of the network is called without the network.

    In one pass alone, forward or backward: what a checkpoint runs again in the backward pass may have heard
    something else, or by another call.

    unedited: a value for each site.
    values: these after edits.
    backward: the backward pass, or -1.
    """

    unedited: dict[str, Any]
    values: dict[str, Any]
    backward: int


class _Fixed:
    """What a block of `fixed` lets the slots hold, and what was there before it; `ended` where it is over."""

    ended = False

    def __init__(self, values: Any, local: _Local) -> None:
        self.values, self.before, self.held = values, local.fixed, local.values


class _Frame:
    """A block, and what was active and in the slots before it."""

    def __init__(self, film: Conditioning) -> None:
        local = film.local
        self.active, self.values, self.lent, self.edits = local.active, local.values, local.lent, film.edits


class _Local(threading.local):
    """What is active in this thread: see `Conditioning`."""

    def __init__(self) -> None:
        self.active: Active | Off | None = None
        self.values: Any = None  # what the slots hold: a value for each site, PLAIN, or None outside of calls
        self.ready = False  # whether slots hold norms made ready for these values
        self.fixed: _Fixed | None = None
        self.lent: Lent | None = None
        self.applied = 0  # how many transforms the call that runs has had
        self.frames: list[_Frame] = []
        self.transforms: list[Transform] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return _Local, ()


class Conditioning(nn.Module):
    """What `condition` adds to a network, as its child `film`: condition -> z -> one value for each site.

    Attributes:
        cond: the module that encodes the condition.
        generator: from the encoded condition to a dict of one value for each site.
        fusion: how a value meets the features of its site.
        sites: each `Site` by its name, in the order of the network.
    """

    folded: object = False  # also of networks that were pickled before
    """The block of `folded` in which the weights hold a condition now, an object for each; or False."""

    def __init__(self, cond: nn.Module, generator: nn.Module, fusion: Fusion, sites: Sites) -> None:
        super().__init__()
        self.cond = cond
        self.generator = generator
        self.fusion = fusion
        self.sites: dict[str, Site] = {site.name: site for site in sites}
        self.slots = {site.name: Slot(site, fusion) for site in sites}
        self.places: list[Place] = []
        self.local = _Local()
        self.folded = False  # on the instance from the start, or the first block would cost all graphs
        self.takes_cond = True
        self.recipe: dict[str, Any] | None = None
        self.frozen = Frozen()

    @property
    def transforms(self) -> list[Transform]:
        """This thread's functions from the values of all sites to other ones, applied in order."""
        return self.local.transforms

    @property
    def edits(self) -> list[Transform]:
        """Those of the transforms that change something."""
        return [one for one in self.transforms if not isinstance(one, Onlooker)]

    @property
    def active(self) -> Active | Off | None:
        """What a block made active in this thread, where that block is not over."""
        entry = self.local.active
        return None if entry is None or entry.ended else entry

    def forward(self, cond: Any) -> dict[str, Any]:
        """Return the value of each site for a condition: a tensor, or a tuple of the encoder's arguments."""
        parts: Any = self._modules  # a third of the time that the attributes take
        encode, generate = parts["cond"], parts["generator"]
        z = encode(*cond) if type(cond) is tuple else encode(cond)
        if type(z) is tuple:
            check_reads_tokens(generate, encode)
        return generate(z)

    def modulations(self, cond: Any) -> dict[str, Any]:
        """Return the value of each site for a condition, a `Modulation` for FiLM; without dropout of it.

        The network is not run. In training a call of this module gives what a call of the network hears.

        Args:
            cond: what the encoder takes; a tuple holds several arguments, as (tokens, mask).

        Raises:
            ValueError: where FSDP2 holds the parameters in parts that only a call of the network joins, and
                where it holds a part of this module by itself and the network was not called yet.
        """
        check_apart(self)
        with self.predicting():
            return self(cond)

    def predicting(self) -> AbstractContextManager[None]:
        """Make values without dropout of conditions in the block: encoder and generator in evaluation."""
        return in_mode(self, training=False)

    @contextmanager
    def transformed(self, transform: Transform) -> Iterator[None]:
        """Apply a function to the values of all sites between generator and sites, in this thread.

        Also to those that are lent to the sites, for parts that are called by themselves; an `Onlooker` sees
        none of these, for they are no call.
        """
        self.check_open("edit or record")
        local = self.local  # of this thread, in whichever the block ends
        transforms, before, edits = local.transforms, local.lent, self.edits
        try:
            transforms.append(transform)
            runs = local.values is not None  # then parts hear what the call does
            if before is not None and not runs and not isinstance(transform, Onlooker):
                self.relend(before._replace(values=self._through([transform], before.values)), self.edits)
            yield
        finally:
            for place, one in enumerate(transforms):
                if one is transform:  # each block has one of its own
                    del transforms[place]
                    break
            now = self.local.lent  # of another condition, where a block of `using` began or ended in between
            same = before is not None and now is not None and now.unedited is before.unedited
            self.relend(*(before, edits) if same else (now, None))

    @contextmanager
    def fixed(self, values: Any) -> Iterator[None]:
        """Let the slots hold these values or PLAIN in the block, as they are, whatever else is active."""
        fixed = _Fixed(values, self.local)
        try:
            self.local.fixed = fixed
            self.fill(values)
            yield
        finally:
            fixed.ended = True
            self._fixed()

    def _fixed(self) -> _Fixed | None:
        """Return what is fixed in this thread; give back what was there before what is over."""
        local = self.local
        while local.fixed is not None and local.fixed.ended:
            self.fill(local.fixed.held)
            local.fixed = local.fixed.before
        return local.fixed

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Any], prefix: str, local_metadata: Mapping[str, Any], *more: Any
    ) -> None:
        """Load as modules do; where tensors are assigned, as to meta, nulls of zero go where these are."""
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *more)
        given = next((one for key, one in state_dict.items() if key.startswith(prefix)), None)
        if isinstance(given, Tensor) and local_metadata.get("assign_to_params_buffers"):
            for part in self.modules():
                if isinstance(part, Maybe):
                    part.place = part.place.new_empty(0, device=given.device)

    def check_open(self, got: str) -> None:
        """Raise ValueError where the values are fixed: what comes now would not be heard at all sites."""
        if self.folded or self._fixed() is not None:
            raise ValueError(
                f"folded: expected nothing inside the block but calls without a condition, in the same "
                f"thread: the weights hold one, got {got}.\n"
                f"Leave the block first; fold(...) gives a plain copy, and what is to change the folded "
                f"values goes around it: with edit(...), folded(...)."
            )

    def __getstate__(self) -> dict[str, Any]:
        self.check_open("a copy or a pickle")
        return vars(self)

    def values(self, cond: Any, modulation: Any) -> Any:
        """Return what the slots get for these arguments: a value for each site, or PLAIN."""
        if self.folded or self.local.fixed is not None:
            fixed = self._fixed()
            if fixed is not None and cond is None and modulation is None:
                return fixed.values
            self.check_open("a call in another thread" if fixed is None else "a condition of a call's own")
        active = self.active
        if isinstance(active, Off):
            return PLAIN
        if cond is None and modulation is None:
            running = self.local.values
            if running is not None and running is not PLAIN:  # a call inside of one hears what that one does
                return self._through(self.transforms[self.local.applied :], running)
            if not isinstance(active, Active):
                raise ValueError(no_condition("Conditioned network", takes=self.takes_cond) + self._none())
            cond, modulation = active.cond, active.modulation
            if active.is_ready(self):
                modulation = active.ready
        elif cond is not None and modulation is not None:
            raise ValueError(_TRACED if isinstance(cond, Proxy) else not_both("got both"))
        return self._through(self.transforms, self(cond) if modulation is None else modulation)

    def _through(self, transforms: list[Transform], values: Any) -> dict[str, Any]:
        """Return what transforms make of the values; one for each site, before and after each."""
        values = self._checked(values)
        for transform in transforms:
            values = self._checked(transform(values))
        return values

    def fill(self, values: Any) -> None:
        """Put its value into the slot of each site; PLAIN or None into all."""
        local, slots = self.local, self.slots
        local.values = values
        for name, slot in slots.items():
            slot.value = values if values is None or values is PLAIN else values[name]
        if local.ready:
            local.ready = False
            for slot in slots.values():
                slot.ready = None

    def lend(self, values: dict[str, Any] | None) -> None:
        """Let each site apply its value, edited, where no call of the network runs; None for none."""
        self.fill(None)
        self.relend(None)
        if values is not None:
            self.relend(Lent(values, values, backward_pass()))

    def relend(self, lent: Lent | None, edits: list[Transform] | None = None) -> None:
        """Let the sites have what was lent to them by these edits; by those of now, where they are others."""
        if lent is not None and edits != self.edits:
            lent = lent._replace(values=self._through(self.edits, lent.unedited))
        self.local.lent = lent
        for name, slot in self.slots.items():
            slot.lent, slot.backward = (None, -1) if lent is None else (lent.values[name], lent.backward)

    def check(self, root: nn.Module) -> None:
        """Raise ValueError where a site's module is in the network no more: the condition would not be heard.

        Done at every call that is not compiled, and whenever the mode is set.
        """
        if not in_place(root, self.places):
            self.places = places_now(root, self, self.slots, self.places)

    def paths(self, root: nn.Module) -> dict[str, list[str]]:
        """Return where the module of each site is now, under each name that it has; the first is its own."""
        return paths_of(root, self.slots)

    def make_ready(self, root: nn.Module) -> None:
        """Make the affines of norms that take one modulation for all rows, of all sites in a row.

        Not where a module around a norm has hooks that may put its weights in place.
        """
        self.local.ready = True
        for path, _ in self.places:
            module: Any = root
            hooked = False
            for key in path:
                hooked = hooked or (bool(module._forward_pre_hooks) and module is not root)
                module = module._modules[key]
            if not hooked:
                make_ready(module)

    def _none(self) -> str:
        """Say how to give no condition to an encoder that knows what is missing."""
        if isinstance(self.cond, Several):
            needed = ", ".join(f"{name!r}: ..." for name in self.cond.required)
            return f"\nConditions that may be missing are left out: cond={{{needed}}}."
        if isinstance(self.cond, Maybe):
            return "\nWhere no sample has its condition, give cond=Masked(None)."
        return ""

    def describe(self) -> str:
        """Return a table of the parameters of each site, of what all sites share, and of the condition."""
        encoder = num_parameters(self.cond)
        table = describe(self.generator, {name: site.features for name, site in self.sites.items()})
        return f"{table}\n{type(self.cond).__name__}, the condition: {encoder:,} parameters"

    def _checked(self, values: Mapping[str, Any]) -> dict[str, Any]:
        if type(values) is dict and values.keys() == self.slots.keys():
            return values
        if not isinstance(values, Mapping):
            raise ValueError(
                f"Modulations: expected a mapping from the names of sites, got {type(values).__name__}.\n"
                f"Give {{{next(iter(self.slots))!r}: modulation, ...}}."
            )
        missing = [name for name in self.slots if name not in values]
        unknown = [name for name in values if name not in self.slots]
        if missing or unknown:
            raise ValueError(
                f"Modulations: expected one for each of the {len(self.slots)} sites, got none for {missing} "
                f"and some for {unknown}.\n"
                f"Start from conditioning(model).modulations(cond) and replace what you want to change."
            )
        return {name: values[name] for name in self.slots}

    def extra_repr(self) -> str:
        """Show fusion and sites in `repr`."""
        return f"{type(self.fusion).__name__}, sites={list(self.sites)}"


@contextmanager
def active(film: Conditioning, entry: Active | Off | None) -> Iterator[None]:
    """Make something active in this thread; then what was before, also where blocks do not end in turn."""
    film.check_open("using or unconditioned")
    with again_active(film, entry):
        yield


@contextmanager
def again_active(film: Conditioning, entry: Active | Off | None) -> Iterator[None]:
    """Make active what was active before, whatever holds the values now."""
    frame = _Frame(film)
    try:
        film.local.frames.append(frame)
        film.local.active = entry
        yield
    finally:
        in_turn = _left(film, frame)
        if not in_turn and entry is not None:
            entry.ended = True
        if not in_turn and sys.exc_info()[0] in (None, GeneratorExit):
            raise RuntimeError(
                "using: expected the block that was entered last to end first, and in its thread.\n"
                "Python generators that run in turns hear each other's conditions; give cond=... to their "
                "calls instead."
            )


def _left(film: Conditioning, frame: _Frame) -> bool:
    """Leave a block; return whether it is the one that was entered last in this thread."""
    frames, local = film.local.frames, film.local
    if frame not in frames:
        return False
    later = frames[frames.index(frame) + 1 :]
    frames.remove(frame)
    if later:
        vars(later[0]).update(vars(frame))
        return False
    local.active = frame.active
    film.fill(frame.values)
    film.relend(frame.lent, frame.edits)
    return True


def root_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Fill the slots from `cond` or `modulation`, run the original forward, and leave the slots as before."""
    keys = self._film_keywords
    film = self._modules.get("film")
    if film is None:
        raise ValueError(
            f"{type(self).__name__}: expected the conditioned network, got a fresh one of its class, which "
            f"is not conditioned.\n"
            f"Copy the network, copy.deepcopy(model), or make one from its original class."
        )
    self._film_check()
    cond = kwargs.pop("cond", None) if "cond" in keys else None
    modulation = kwargs.pop("modulation", None) if "modulation" in keys else None
    values = film.values(cond, modulation)
    local = film.local
    held, applied = local.values, local.applied
    local.applied = len(local.transforms)
    try:
        film.fill(values)
        if values is not PLAIN and ahead():
            film.make_ready(self)
        output = self._film_base.forward(self, *args, **kwargs)
    finally:
        film.fill(held)
        local.applied = applied
    if type(output) in _LATER and values is not PLAIN and not (cond is None and modulation is None):
        raise ValueError(_runs_later(self, output))
    return output


# What a forward with a yield or an await returns: the rest of it runs when the call is over.
_LATER = frozenset((types.GeneratorType, types.CoroutineType, types.AsyncGeneratorType))


def _runs_later(root: nn.Module, output: Any) -> str:
    """Return what to say where a call with a condition of its own ends before the forward has run."""
    if isinstance(output, types.CoroutineType):
        output.close()  # or it would warn that nobody awaits it
    return (
        f"{type(root).__name__}: expected a forward that has run when the call returns, got a "
        f"{type(output).__name__}, which would run without the condition of this call.\n"
        f"Wrap the call and all of its steps in `with using(model, cond=...):`."
    )


_TRACED = (
    "Conditioned network: expected a call with a condition, got torch.fx tracing it.\n"
    "Fold it first, fold(model, cond=z), and trace what that gives; or trace the network before it is "
    "conditioned, and condition a module that holds the graph."
)


def not_both(got: str) -> str:
    """Return what to say where not exactly one of the two is given."""
    return f"expected a condition or a modulation, {got}.\nGive cond=... or modulation=..., not both."
