"""Condition a network that others wrote: in place, without touching its code, its keys or its output.

`condition` swaps the classes of the sites (torchfilm.slots says why) and of the network itself, which then
takes `cond=`, and adds one child, `film`: the condition's encoder and the generator. Until trained, the
network gives what it gave before, bit for bit. There is no silent identity: without an active condition it
raises.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any, TypeVar, Unpack

import torch
from torch import nn
from torch.fx import GraphModule
from torch.jit import ScriptModule
from torch.optim.swa_utils import AveragedModel

from torchfilm.applying import Holding, Slot
from torchfilm.channels import Where, lineage
from torchfilm.conditions import encoded_size
from torchfilm.filling import Active, Conditioning, Off, active, not_both, root_forward
from torchfilm.fusion import FUSIONS, Align, Fusion, Matched, check_reads, in_precision, resolve, takes
from torchfilm.generator_options import Options
from torchfilm.naming import check_choice
from torchfilm.presets import Told
from torchfilm.several import Maybe
from torchfilm.sharding import ONE_FLAT_TENSOR, is_flattened, joins_its_parts
from torchfilm.sites import Pattern, Repeat, Sites, check_network, find, is_patched, is_root, is_site
from torchfilm.slots import PLAIN, fall_silent, listen, slot_of, swap, swap_back

Network = TypeVar("Network", bound=nn.Module)
_SEARCH = ("field", "repeat", "batch")  # of `find`, among the options of `condition`


class ConditionOptions(Options, total=False):
    """What `condition` takes besides: options of `find`, and those of all fusions, as `takes` tells."""

    field: int | str | None
    repeat: Repeat
    batch: int | None
    align: Align | None
    match_params: int | float | nn.Module | None
    width: int | None
    heads: int


def condition(
    model: Network,
    sites: Pattern,
    cond: nn.Module,
    *,
    where: Where = "output",
    dim: Told | None = None,
    features: Told | None = None,
    fusion: str | Fusion = "film",
    generator: nn.Module | Callable[[int, Mapping[str, int]], nn.Module] | None = None,
    **options: Unpack[ConditionOptions],
) -> Network:
    """Condition a network in place: afterwards `model(x, cond=...)`; the same object, output and keys.

    FiLM at each site, y = gamma(z) * x + beta(z) (Perez et al. 2018, arXiv 1709.07871), or another fusion.
    The network gets one child, `film`; its other state-dict keys stay as they are, and so does its output,
    bit for bit, until the generator is trained; but with a gate, which starts at 0 and closes its site, give
    gate_start=1.0. Everything is checked before anything is changed.

    A generator that is made here is in float64 where weights of any site are, else in torch's default,
    float32, also for a network in half precision. An encoder or generator that is given keeps its own.

    Args:
        model: any network; wrap it into DistributedDataParallel, or shard it by fully_shard, afterwards.
        sites: which modules, as in `find`, or what `find` returned.
        cond: what the condition is: `Vector(512)`, `Classes(10, 64)`, ..., any module with `dim`.
        where: as in `find`; likewise dim and features.
        dim: the axis of the channels, or a function of name and module.
        features: the number of channels, or a function of name and module.
        fusion: "film", another name in `FUSIONS`, or a `Fusion`.
        generator: instead of the fusion's own: a module from the encoded condition to a dict of one value for
            each site, or a function of cond_dim and {site: channels} that makes one. The encoder's `dim` may
            be a tuple then.
        options: `field`, `repeat` and `batch`, as in `find`; all others go to the fusion, which for "film"
            takes `align` and the fields of `GeneratorOptions`: bound="tanh", head="shared", ...

    Returns:
        The model itself.

    Raises:
        ValueError: as `find`; for a model that is conditioned already, has a child `film`, or is wrapped; for
            an encoder that the fusion cannot read; for options that there are not.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        >>> y = condition(model, "1", Vector(7))(torch.rand(2, 3, 5, 5), cond=torch.rand(2, 7))
    """
    _check_root(model)
    if generator is None:
        _check_names(fusion, options)
    rest = dict[str, Any](options)
    search = {key: rest.pop(key) for key in _SEARCH if key in rest}
    found = find(model, sites, where=where, dim=dim, features=features, **search)
    _check_unique(found)
    given = generator is not None
    several = given and isinstance(getattr(cond, "dim", None), tuple)  # which a generator of others may read
    dimension: Any = cond.dim if several else encoded_size(cond)
    resolved = resolve(fusion, **({} if given else rest))
    widths = {site.name: site.features for site in found}
    if generator is None:
        generator = resolved.build(dimension, widths)
        if _is_double(model, found):
            generator = in_precision(generator, torch.float64)
    elif rest:
        raise ValueError(
            f"condition: expected no options beside a generator, got {', '.join(rest)}.\n"
            f"Give them to the generator when it is made."
        )
    elif not isinstance(generator, nn.Module):
        generator = generator(dimension, widths)
    check_reads(generator, cond)
    film = Conditioning(cond, generator, resolved, found)
    nulls = (part.place for part in film.modules() if isinstance(part, Maybe))
    tensors, place = (*film.parameters(), *film.buffers(), *nulls), _device(model, found)
    if any(tensor.device != place for tensor in tensors):  # else FakeTensorMode may fail to move nothing
        film.to(place)
    if not model.training:
        film.eval()
    if isinstance(fusion, str) and not given:
        size = {"match_params": resolved.target} if isinstance(resolved, Matched) else {}
        film.recipe = {"name": fusion, "options": rest | size}
    _apply(model, film)
    return model


def conditioning(model: nn.Module) -> Conditioning:
    """Return what `condition` added; wrappers (compiled, distributed, averaged) are looked through.

    Raises:
        ValueError: for a model that is not conditioned.
    """
    film = film_of(model)
    if film is None:
        root = unwrapped(model)
        inner = [name for name, module in root.named_modules() if is_root(module)]
        got = "a plain one.\nCondition it first: condition(model, sites, cond=...)."
        if len(inner) == 1:
            got = f"one that holds one.\nGive its '{inner[0]}', which is conditioned."
        elif inner:
            got = f"one that holds {len(inner)}.\nGive each by itself: {', '.join(map(repr, inner))}."
        elif any(isinstance(slot_of(module), Slot) for module in root.modules()):
            got = "a part of one.\nGive the whole, which condition() was given (PEFT: the PeftModel)."
        if is_flattened(root) and inner:
            got = f"one with {ONE_FLAT_TENSOR}"
        raise ValueError(f"{type(root).__name__}: expected a conditioned network, got {got}")
    return film


def film_of(model: Any) -> Conditioning | None:
    """Return what `condition` added, as `conditioning`; None for plain networks and for functions."""
    root = unwrapped(model) if isinstance(model, nn.Module) else None
    return root.get_submodule("film") if root is not None and is_root(root) else None  # type: ignore[return-value]


@contextmanager
def using(model: nn.Module, *, cond: Any = None, modulation: Any = None) -> Iterator[None]:
    """Make a condition active for all calls in the block, also those that others make (`model.generate`).

    With gradients disabled the generator runs once, at the start of the block. With gradients, it runs again
    at each call of the network, so that each has its own graph: in a training step `cond=` saves the first
    run. So too when the condition, the generator's parameters or its mode change, for which each call looks,
    longer at a large encoder; or when changes cannot be detected, as in arrays or where the block itself is
    compiled or exported. Writing through `.data`, or into tensors made in inference mode, is not detected,
    nor in a compiled network inside of a block any writing into tensors: give a new condition. Methods that
    call parts of the network without the network itself (`vae.encode`) get the values made at the start,
    except in reruns of a checkpoint: see `checkpoint_context`. In a network sharded by FSDP2, where only
    calls make values, they raise. A call's own `cond=` wins, also for calls of the network inside of it.

    Args:
        model: a conditioned network.
        cond: a condition, or
        modulation: a ready value for each site.

    Raises:
        ValueError: unless exactly one of the two is given.
        RuntimeError: at the end, if a block entered later is still open: Python generators run in turns
            would get each other's conditions.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> with using(model, cond=torch.rand(2, 7)):
        ...     y = model(torch.rand(2, 3))
    """
    if (cond is None) == (modulation is None):
        raise ValueError(not_both("got neither" if cond is None else "got both"))
    film = conditioning(model)
    entry = Active(film, cond, modulation)
    with active(film, entry):
        film.lend(entry.ready if modulation is None else modulation)
        yield


@contextmanager
def unconditioned(model: nn.Module) -> Iterator[None]:
    """Run the original network in the block, whatever conditions its calls are given.

    Raises:
        ValueError: for a network that is not conditioned.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> model = condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))
        >>> with unconditioned(model):
        ...     y = model(torch.rand(2, 3))
    """
    film = conditioning(model)
    with active(film, Off()):
        film.fill(PLAIN)
        yield


def remove(model: Network) -> Network:
    """Undo `condition`: remove everything that it added, in place; what the base has learned stays.

    Raises:
        ValueError: for a model that is not conditioned, or whose modules were patched since; in `folded`.
    """
    film, root = conditioning(model), unwrapped(model)
    check_forwards("remove", root)
    film.check_open("remove")
    _undo(root, film)
    return model


def check_forwards(what: str, root: nn.Module) -> None:
    """Refuse a network with another forward put on it or on a site, which cannot be taken off here."""
    for name, module in root.named_modules():
        if is_patched(module) and (module is root or is_site(module)):
            raise ValueError(
                f"{what}: expected the class's own forward at '{name}', but another was put on it.\n"
                f"Let whoever did that take it off first (accelerate: remove_hook_from_module for hooks, and "
                f"accelerator.unwrap_model(model, keep_fp32_wrapper=False) for mixed precision)."
            )


def attach(model: nn.Module, name: str, slot: Holding) -> None:
    """Make the module of that name a site, off torch's fast paths."""
    *above, module = lineage(model, name)
    listen(module, slot)
    if any(isinstance(one, nn.TransformerEncoderLayer) for one in above):
        module.register_forward_pre_hook(marker)
    for one in _nesting(model, name):
        one.use_nested_tensor = False


def _nesting(model: nn.Module, name: str) -> list[nn.TransformerEncoder]:
    """Return the encoders around a module that turn padded batches into nested tensors, a fast path."""
    above = lineage(model, name)[:-1]
    return [one for one in above if isinstance(one, nn.TransformerEncoder) and one.use_nested_tensor]


def marker(module: nn.Module, args: Any) -> None:
    """Do nothing, as a hook: torch's fast path of transformer layers, which calls no module, fears hooks."""


def _apply(model: nn.Module, film: Conditioning) -> None:
    """Make the changes, each of which was checked before; undo them should one fail all the same."""
    try:
        for name, slot in film.slots.items():
            for encoder in _nesting(model, name):
                encoder.__dict__["_film_nested"] = True
            attach(model, name, slot)
        swap(model, root_forward)
        film.takes_cond = "cond" in type(model)._film_keywords  # type: ignore[attr-defined]
        model.add_module("film", film)
        film.check(model)
    except BaseException:
        _undo(model, film)
        raise


def _undo(model: nn.Module, film: Conditioning) -> None:
    slots = {id(slot) for slot in film.slots.values()}
    for module in list(model.modules()):
        if id(slot_of(module)) in slots:
            for key in [key for key, hook in module._forward_pre_hooks.items() if hook is marker]:
                del module._forward_pre_hooks[key]
            fall_silent(module)
        if isinstance(module, nn.TransformerEncoder) and vars(module).get("_film_nested"):
            module.use_nested_tensor = True
            del module.__dict__["_film_nested"]
    film.frozen.thaw(model)
    try:
        if is_root(model):
            swap_back(model)
    finally:  # both or neither: a plain network with a child `film` could not be conditioned again
        if not is_root(model) and model._modules.get("film") is film:
            del model._modules["film"]


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the conditioned network inside of torch.compile, DistributedDataParallel, Lightning Fabric's.

    Raises:
        ValueError: for what is no network.
    """
    check_network(model)
    while not is_root(model):
        inner = (model._modules.get(name) for name in ("_orig_mod", "module", "_forward_module"))
        found = next((one for one in inner if one is not None), None)
        if found is None:
            break
        model = found
    return model


def _check_root(model: nn.Module) -> None:
    check_network(model)
    kind = type(model).__name__
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel | AveragedModel):
        fact, remedy = f"expected the network itself, got it inside of {kind}", "Condition it, then wrap it."
    elif "_orig_mod" in model._modules:
        fact = f"expected the network itself, got a compiled one ({kind})"
        remedy = "Condition the network that was compiled; the compiled one follows by itself."
    elif joins_its_parts(model) or is_flattened(model):
        by = "fully_shard" if joins_its_parts(model) else "FullyShardedDataParallel"
        fact = f"expected a network that is not sharded yet, got one after {by}"
        remedy = (
            "Condition it first, then fully_shard it: parameters that come later are not reduced between the "
            "processes."
        )
    elif is_root(model) or is_site(model):
        fact = f"expected a plain network, got a {kind} that is conditioned already"
        remedy = "Give all sites to one condition() (find(...) + find(...) joins them), or remove() first."
    elif hasattr(model, "film"):
        fact = f"expected a network without an attribute 'film', got a {kind} that has one"
        remedy = "Rename it: this name is where the conditioning lives."
    elif isinstance(model, GraphModule):
        fact = "expected a network in code, got an fx.GraphModule, whose forward is written anew"
        remedy = "Condition the network that was traced, or put the graph into one: nn.Sequential(graph)."
    elif isinstance(model, ScriptModule) or is_patched(model):
        fact = f"expected the forward of its class, got a {kind} whose forward is compiled or was replaced"
        remedy = "Condition the network first, and let whoever patches it come after."
    else:
        return
    raise ValueError(f"condition: {fact}.\n{remedy}")


def _check_names(fusion: str | Fusion, options: Mapping[str, Any]) -> None:
    """Refuse options that neither `condition` takes nor the fusion of that name."""
    if isinstance(fusion, str) and fusion in FUSIONS:
        own = [name for name, one in signature(condition).parameters.items() if one.kind is one.KEYWORD_ONLY]
        for name in options:
            check_choice(f"condition, {fusion=}: options", name, [*own, *_SEARCH, *takes(fusion)])


def _check_unique(sites: Sites) -> None:
    double = sorted(name for name, times in Counter(site.name for site in sites).items() if times > 1)
    if double:
        raise ValueError(
            f"condition: expected each module once, got {', '.join(map(repr, double))} more often.\n"
            f"One module is one site: condition its input or its output."
        )


def _is_double(model: nn.Module, sites: Sites) -> bool:
    """Tell whether the weights of any site are in double precision; without any, those of the network."""
    modules = [model.get_submodule(site.name) for site in sites]
    of_sites = {weight.dtype for module in modules for weight in module.parameters()}
    dtypes = of_sites or {weight.dtype for weight in model.parameters()}
    return not dtypes.isdisjoint((torch.float64, torch.complex128))


def _device(model: nn.Module, sites: Sites) -> torch.device:
    """Return where the first site lives, else the network."""
    modules = (*(model.get_submodule(site.name) for site in sites), model)
    tensors = (tensor for module in modules for tensor in (*module.parameters(), *module.buffers()))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
