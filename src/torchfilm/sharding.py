"""Tensors that lie in several processes: which these are, without loading what knows them."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree


def is_sharded(value: Any) -> bool:
    """Tell whether a tensor lies in several processes, each of which has a part of it or all."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(value, known.DTensor)


def in_parts(value: Any) -> bool:
    """Tell whether no process has all of a tensor, as after `fully_shard`."""
    return is_sharded(value) and not all(placement.is_replicate() for placement in value.placements)


def is_first(value: Any) -> bool:
    """Tell whether this process is the first of those in which a tensor lies; of a plain one each is."""
    return not is_sharded(value) or distributed.get_rank() == int(value.device_mesh.mesh.flatten()[0])


def beside(x: Tensor, value: Any) -> Any:
    """Return a value whose tensors, equal in all processes, go together with features that lie in several."""
    if not is_sharded(x):
        return value
    known, mesh = sys.modules["torch.distributed.tensor"], x.device_mesh  # type: ignore[attr-defined]

    def replicated(one: Tensor) -> Tensor:
        if is_sharded(one):
            return one
        return known.DTensor.from_local(one, mesh, [known.Replicate()] * mesh.ndim, run_check=False)

    return pytree.tree_map_only(Tensor, replicated, value)


def joins_its_parts(module: nn.Module) -> bool:
    """Tell whether a module joins its own parameters when it is called, as after `fully_shard`."""
    return _is_a(module, "FSDPModule")


def is_flattened(module: nn.Module) -> bool:
    """Tell whether torch's older wrapper has made one tensor of all parameters, in a module or around it."""
    if any(_is_a(one, "FullyShardedDataParallel") for one in module.modules()):  # their state is everybody's
        return True
    managed = vars(module).get("_is_fsdp_managed_module", False)  # by the second one too
    return managed and not any(map(is_sharded, module.state_dict().values()))


def check_whole(doing: str, model: nn.Module) -> None:
    """Raise ValueError for a network that lies in several processes, for what is done with all of it."""
    if any(map(in_parts, model.parameters())) or any(map(joins_its_parts, model.modules())):
        raise ValueError(
            f"{doing}: expected a network that this process has whole, got one that lies in several.\n"
            f"Let all of them save(model, folder), load that onto a plain base, and {doing} this."
        )


ONE_FLAT_TENSOR = (
    "its parameters in one flat tensor, by FullyShardedDataParallel.\n"
    "Shard the conditioned network by fully_shard instead. Of one that is trained already, load the whole "
    "state dict into a network that is conditioned alike."
)
"""What to say of a network that `is_flattened`."""


def _is_a(module: nn.Module, kind: str) -> bool:
    return any(one.__name__ == kind for one in type(module).__mro__)


def check_apart(module: nn.Module) -> None:
    """Refuse to call a part of a network by itself whose parameters a call of the network has to join.

    Raises:
        ValueError: where FSDP2 holds them in parts, and where it has not met its root: the first module that
            is called is that for good, which a part of the network may not be.
    """
    joining: list[Any] = [one for one in module.modules() if joins_its_parts(one)]
    if any(one._get_fsdp_state()._is_root is None for one in joining):
        fact = "of which FSDP2 has a part by itself, and that was not called since"
        remedy = "Run the network once first, model(x, cond=z): its parts may not be called before it."
    elif not joining and any(map(in_parts, module.parameters())):
        fact = "that FSDP2 has sharded"
        remedy = "Call model.unshard() first, or look at a call of the network: record(model)."
    else:
        return
    raise ValueError(
        f"Modulations: expected parameters that are whole, got those of a network {fact}.\n{remedy}"
    )
