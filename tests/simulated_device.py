"""A device without hardware: tensors say they are elsewhere, compute on the CPU, and every wait is noted.

As on CUDA, tensors of two devices do not mix (but for numbers without axes), and backward passes run in a
thread of their own. `Waits` notes what makes the host wait for a device: numbers that are read, masks used as
indices, copies from and to the host. Not simulated: autocast, random generators of the device, kernels.
"""

from __future__ import annotations

import traceback
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
_setup_privateuseone_for_python_backend(NAME)  # once in a process: the name is that of the process
_READS = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "is_nonzero"}
_NOTED: list[list[str]] = []
_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}


class Elsewhere(Tensor):
    """A tensor that says it is on the device, and holds one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        made = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), dtype=held.dtype, device=f"{NAME}:0"
        )
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


class Waits(TorchDispatchMode):
    """A block in which `torch.zeros(..., device=NAME)` works; its waits are in `found`, with their place."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        _NOTED[:] = [self.found]  # the block made last takes the notes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, args, kwargs or {})


def _note(name: str) -> None:
    lines = [one for one in traceback.extract_stack() if "/torchfilm/" in one.filename]
    place = f" at {lines[-1].filename.rpartition('/')[2]}:{lines[-1].lineno}" if lines else ""
    for found in _NOTED:
        found.append(name + place)


@torch.library.impl("aten::empty_strided", "PrivateUse1")
def _empty(*sizes: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Elsewhere:
    """For `torch.tensor` and `as_tensor`, which go around modes."""
    return Elsewhere(torch.empty_strided(*sizes, **options))


@torch.library.impl("aten::_copy_from", "PrivateUse1")
def _copy(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _note("as_tensor")
    getattr(to, "held", to).copy_(getattr(source, "held", source))
    return to


def computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what the tensors hold, after a look at where they say they are."""
    name, leaves = func._schema.name.removeprefix("aten::"), pytree.tree_leaves((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    there = [one for one in tensors if isinstance(one, Elsewhere)]
    here = [one for one in tensors if not isinstance(one, Elsewhere) and one.ndim]
    copies = name in ("_to_copy", "copy_", "_copy_from")
    to = kwargs.get("device")
    asked = to is not None and torch.device(to).type == NAME
    stays = bool(there) and not (copies and to is not None and not asked)
    if there and here and not copies and not (name in _INDEX and isinstance(args[0], Elsewhere)):
        raise RuntimeError(f"Expected all tensors to be on the same device, but found two ({name})")
    crosses = copies and (bool(there and here) or (bool(there) != asked and to is not None))
    masks = name in _INDEX and any(one.dtype == torch.bool for one in args[1] if one is not None)
    if (there and (name in _READS or masks)) or crosses or (there and here and name in _INDEX):
        _note(name)
    held = {id(one): one.held for one in there}
    wrapped = {id(one.held): one for one in there}
    args, kwargs = pytree.tree_map(lambda leaf: held.get(id(leaf), leaf), (args, kwargs))
    if to is not None:
        kwargs["device"] = torch.device("cpu")
    result = func(*args, **kwargs)
    if not (stays or asked):
        return result
    return pytree.tree_map_only(
        Tensor, lambda one: wrapped[id(one)] if id(one) in wrapped else Elsewhere(one), result
    )
