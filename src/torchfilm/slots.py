"""How a module of somebody else's network comes to listen: its class is swapped.

The class of the module becomes a subclass made on the fly, as `torch.nn.utils.parametrize` does it: same
name, same attributes, same state-dict keys, still an instance of the original class. Forward hooks, wrappers
and patched forwards each fail silently somewhere: after `torch.compile`, in deep copies, in state dicts.
"""

from __future__ import annotations

import abc
import copyreg
import enum
import inspect
import sys
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import Any, Generic
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling
from torch.nn.utils import parametrize

from torchfilm import native
from torchfilm.absorption import NORMS, absorbed, prepared
from torchfilm.applying import Holding, Slot, with_input_modulated, with_output_modulated
from torchfilm.applying import Kept as Kept  # by this name in networks that were pickled before
from torchfilm.functional import film_
from torchfilm.modulation import Modulation
from torchfilm.onepass import BATCH_NORMS
from torchfilm.signatures import signature_of


class Plain(enum.Enum):
    """What slots hold where the original network is asked for: `PLAIN`, one object also after a pickle."""

    PLAIN = "plain"


PLAIN = Plain.PLAIN

FRESH = frozenset(
    (
        *(nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d),
        *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
        *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.GroupNorm, nn.LayerNorm),
    )
)
"""Torch's layers whose output is new memory that nobody else has: it may be modulated in place."""


def listen(module: nn.Module, slot: Holding) -> None:
    """Make a module a site; from now on it applies what the slot holds."""
    if hasattr(type(module), "_film_slot"):  # made by the class of another site: its forward is ours already
        swap_back(module)
    module.__dict__["_film_slot"] = slot  # by which `remove` finds the module, also where the swap fails
    swap(module, site_forward)


def fall_silent(module: nn.Module) -> None:
    """Make a site a plain module again."""
    swap_back(module)
    del module.__dict__["_film_slot"]


def slot_of(module: nn.Module) -> Holding | None:
    """Return what tells a site what to apply; None for other modules."""
    return vars(module).get("_film_slot")


def swap(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Put a subclass with another forward in the place of a module's class.

    Beneath the class of a parametrised module, not on top of it: removing the last parametrisation
    takes the topmost class off.
    """
    kind = type(module)
    vars(module).pop("forward", None)  # the old class's own, where somebody put it back on the instance
    if parametrize.is_parametrized(module):
        module.__class__ = rebased(kind, (subclass(kind.__bases__[0], forward),))
    else:
        module.__class__ = subclass(kind, forward)


def swap_back(module: nn.Module) -> None:
    """Give a module its original class again, and keep what others put on top of ours since."""
    vars(module).pop("forward", None)
    module.__class__ = _original(type(module))


def subclass(base: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    """Return the subclass of a module class with that forward; one per pair, so graphs are shared."""
    made = _SUBCLASSES.get((base, forward))
    if made is None:
        signature = signature_of(base.forward)
        own = _copied(forward, base)
        own.__doc__ = base.forward.__doc__
        keywords = tuple(key for key in ROOT_KEYWORDS if key not in signature.parameters)
        is_root = forward is not site_forward
        own.__dict__["__signature__"] = _with_keywords(signature, keywords) if is_root else signature
        namespace = {
            "forward": own,
            "_film_base": base,
            "_film_root": is_root,
            "_film_forward": staticmethod(forward),
            "_film_keywords": keywords,
            "_film_inputs": tuple(signature.parameters)[1:],
            "__reduce_ex__": _reduce_ex,
            # Dynamo takes sizes behind torch.nn.modules for constants; fx takes torch.nn for leaves.
            "__module__": "torch.nn" if base.__module__.startswith("torch.nn.modules.") else base.__module__,
            "__qualname__": base.__qualname__,
            "__doc__": base.__doc__,
        }
        if is_root:
            namespace |= {"train": _train, "_film_check": _film_check, **_as_container(base)}
        else:
            namespace |= {"_apply": _apply, "_film_slot": None}
        made = _SUBCLASSES.setdefault((base, forward), _made(base, namespace))
        if getattr(sys.modules.get(base.__module__), base.__qualname__, None) is base:
            _KEPT[base.__module__, base.__qualname__, forward] = made
    return made


def _made(base: type[nn.Module], namespace: dict[str, Any]) -> type[nn.Module]:
    """Make a subclass of which the base hears nothing, where it may register what it hears of.

    Metaclasses of others, and bases with another layout in memory, hear of it all the same.
    """
    metaclass: Any = type(base)
    hears = any("__init_subclass__" in vars(kind) for kind in base.__mro__[:-1] if kind is not Generic)
    if hears and metaclass in (type, abc.ABCMeta):
        made = metaclass(base.__name__, (nn.Module,), namespace)
        try:
            made.__bases__ = (base,)
        except TypeError:
            pass
        else:
            return made
    return type(base.__name__, (base,), namespace)


def _copied(function: Any, base: type[nn.Module]) -> types.FunctionType:
    """Return a function that does the same, to carry a signature, and graphs, of its own.

    Dynamo counts graphs by code, and knows it by its name and place: with one for all classes, the ninth
    network of a process would not be compiled.
    """
    name = f"{function.__name__} of {base.__module__}.{base.__qualname__}"
    code = function.__code__.replace(co_name=name)
    copied = types.FunctionType(
        code, function.__globals__, "forward", function.__defaults__, function.__closure__
    )
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


# Each as long as its modules; of a class that can be imported, as what is compiled for it, until its module
# has another one of that name.
_SUBCLASSES: MutableMapping[Any, type[nn.Module]] = WeakValueDictionary()
_KEPT: dict[tuple[str, str, Any], type[nn.Module]] = {}

ROOT_KEYWORDS = ("cond", "modulation")


def site_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the original forward with its input, or its output, modulated by what the slot holds."""
    slot = self._film_slot
    if slot is None:  # a fresh module that others made by type(site)(...)
        return self._film_base.forward(self, *args, **kwargs)
    base, value = self._film_base, slot.value
    plain = type(value) is Modulation and slot.is_plain_film
    if plain and base in NORMS and len(args) == 1 and not kwargs and not is_compiling():
        y, by, axes = None, native.kernels, BATCH_NORMS.get(base)
        if by is not None and axes is not None:
            y = by.batch_norm(self, args[0], value, axes, slot.site.dim)
        if y is None and (ready := slot.ready) is not None:
            y = ready.applied(self, args[0])
        if y is None:
            y = absorbed(base, self, args[0], value, slot.site.dim, bare=False)
        if y is not None:
            return y
    site = slot.site
    if value is None:
        return _with_lent(self, slot, args, kwargs)
    if value is PLAIN:
        return base.forward(self, *args, **kwargs)
    if site.where == "input":
        args, kwargs = with_input_modulated(slot, self._film_inputs, args, kwargs)
        return base.forward(self, *args, **kwargs)
    output = base.forward(self, *args, **kwargs)
    if plain and base in FRESH and type(output) is Tensor and not is_compiling():
        return film_(output, value.gamma, value.beta, site.dim, gate=value.gate, site=site.name)
    return with_output_modulated(slot, output)


def _with_lent(self: nn.Module, slot: Slot, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run the forward of a site with what is lent to it; ValueError where that is nothing."""
    if slot.lent is None or not slot.in_its_pass():
        raise ValueError(no_condition(f"Site '{slot.site.name}'"))
    slot.value = slot.lent
    try:
        return site_forward(self, *args, **kwargs)
    finally:
        slot.value = None


def make_ready(module: Any) -> None:
    """Make the affine of a norm that is a site, where it takes what its slot holds for all rows alike."""
    slot = module._film_slot
    if slot.is_plain_film and type(slot.value) is Modulation:
        slot.ready = prepared(module._film_base, module, slot.value, slot.site.dim)


def no_condition(where: str, *, takes: bool = True) -> str:
    """Return what to say where that runs without a condition; whether a call takes one by cond=."""
    remedy = "Call model(x, cond=...), or wrap calls that others make" if takes else "Wrap the call"
    return (
        f"{where}: expected an active condition, got none.\n"
        f"{remedy} in `with using(model, cond=...):`. For the "
        f"original network use `with unconditioned(model):`. Under activation checkpointing give checkpoint "
        f"use_reentrant=False and context_fn=checkpoint_context(model)."
    )


def _train(self: Any, mode: bool = True, *args: Any, **kwargs: Any) -> Any:  # noqa: FBT001, FBT002
    """Set the mode as the original class does, but for frozen norms; check that the sites are in place."""
    self._film_base.train(self, mode, *args, **kwargs)
    if (film := self._modules.get("film")) is not None:  # a fresh network of this class has none
        film.check(self)
        film.frozen.rest(self)
    return self


def _film_check(self: Any) -> None:
    """Check the sites of a root; a compiled network does so while it is compiled, as after each change."""
    self._modules["film"].check(self)


_film_check._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:  # noqa: FBT001, FBT002
    """Move and convert as the original class does; constants of a fold stay in float32 or wider."""
    kept = {name: buffer for name, buffer in self._buffers.items() if name.startswith("kept_")}
    self._film_base._apply(self, fn, recurse)
    for name, before in kept.items():
        now = self._buffers[name]
        if before is None or not now.is_floating_point():  # a mask
            continue
        if torch.finfo(now.dtype).eps > torch.finfo(torch.float32).eps:
            self._buffers[name] = before.to(now.device)
    return self


def _as_container(base: type[nn.Module]) -> dict[str, Any]:
    """Keep our child out of what a container runs: a Sequential calls whatever it iterates over."""
    if issubclass(base, nn.Sequential | nn.ModuleList):
        fixed = {"__delitem__": _refuse_change, "insert": _refuse_change}
        return {"__iter__": _layers, "__len__": _num_layers, "__getitem__": _layer, **fixed}
    if issubclass(base, nn.ModuleDict):
        views = {"keys": _keys, "items": _items, "values": _layers}
        return {"__iter__": _keys, "__len__": _num_layers, **views}
    return {}


def _refuse_change(self: nn.Module, *args: Any) -> None:
    """Refuse what renames the layers, of which the sites know the names."""
    raise ValueError(
        f"{type(self).__name__}: expected the layers that were conditioned to keep their names, got others.\n"
        f"Change the network first, then condition it; remove(model) undoes this."
    )


def _keys(self: nn.Module) -> Iterator[str]:
    return iter([name for name in self._modules if name != "film"])


def _items(self: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    return iter([(name, module) for name, module in self._modules.items() if name != "film"])


def _layers(self: nn.Module) -> Iterator[nn.Module | None]:
    return iter([module for name, module in self._modules.items() if name != "film"])


def _num_layers(self: nn.Module) -> int:
    return len(self._modules) - ("film" in self._modules)


def _layer(self: Any, index: int | slice) -> Any:
    """Index as the original class does; a slice is a container of that class, without a condition."""
    container: Any = self._film_base
    if isinstance(index, slice) and issubclass(self._film_base, nn.Sequential):
        return container(OrderedDict(list(_items(self))[index]))
    layers = list(_layers(self))[index]
    return container(layers) if isinstance(index, slice) else layers


def _with_keywords(signature: inspect.Signature, keywords: Sequence[str]) -> inspect.Signature:
    """Add our keywords to a signature: trainers and exporters read it."""
    ours = [inspect.Parameter(key, inspect.Parameter.KEYWORD_ONLY, default=None) for key in keywords]
    theirs = list(signature.parameters.values())
    last = bool(theirs) and theirs[-1].kind is inspect.Parameter.VAR_KEYWORD
    return signature.replace(parameters=[*theirs[: len(theirs) - last], *ours, *theirs[len(theirs) - last :]])


def _reduce_ex(self: nn.Module, protocol: int) -> Any:
    """Pickle by the original class and our forward: a class made on the fly has no name to be found by."""
    kind = type(self)
    ours = next(one for one in kind.__mro__ if "_film_base" in vars(one))
    function, arguments, *rest = super(ours, self).__reduce_ex__(protocol)
    if function is copyreg.__newobj__ and arguments == (ours,):  # type: ignore[attr-defined]
        return _empty, (ours._film_base, ours._film_forward, slot_of(self)), *rest
    return function, arguments, *rest


def _empty(base: type[nn.Module], forward: Callable[..., Any], slot: Holding | None = None) -> nn.Module:
    """Return a module with no state but its slot, which a `__setstate__` of others would leave out."""
    kind = subclass(base, forward)
    made = kind.__new__(kind)
    if slot is not None:
        made.__dict__["_film_slot"] = slot
    return made


def _original(kind: type) -> type:
    if "_film_base" in vars(kind):
        return kind._film_base
    if not hasattr(kind, "_film_base"):
        return kind
    return rebased(kind, tuple(_original(base) for base in kind.__bases__))


def rebased(kind: type, bases: tuple[type, ...]) -> type:
    """Return the same class, one made on the fly by others, upon other bases."""
    own = {key: value for key, value in vars(kind).items() if key not in ("__dict__", "__weakref__")}
    return type(kind.__name__, bases, own)
