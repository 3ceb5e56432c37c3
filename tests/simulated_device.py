"""A device without hardware: its tensors compute on the CPU, and note what would make the host wait for it.

As on CUDA, tensors of two devices do not mix, but for those without axes, and backward passes run in a thread
of autograd's own; as on MPS there is no float64. Not simulated: autocast, random numbers, times.

Autograd counts devices at the first backward pass: import this before, as pytest does where it collects. The
device then is there, beside the CPU, for the life of the process.
"""

from __future__ import annotations

import traceback
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode

NAME = "simulated"
_register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
IS_THERE = _register is not None

_READ = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "bincount", "is_nonzero"}
_INDEX = {"index", "index_put", "index_put_", "_index_put_impl_"}
_COPY = {"_to_copy", "copy_"}


class Elsewhere(Tensor):
    """A tensor that says it is on the device, and holds one of the CPU."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> Elsewhere:
        if held.dtype == torch.float64:
            raise TypeError(f"Cannot make a tensor of float64 on {NAME}, which has none.")
        options = {"strides": held.stride(), "dtype": held.dtype, "device": f"{NAME}:0"}
        made = Tensor._make_wrapper_subclass(cls, held.shape, **options)
        made.held = held
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class Simulated(TorchDispatchMode):
    """A block in which `device=NAME` works; none begins inside of another.

    `ran` has the names of the operations on the device, `waits` what the host would wait for, and numbers of
    the CPU among the arguments, each with the line of the library.
    """

    open: Simulated | None = None

    def __enter__(self) -> Simulated:
        self.ran: list[str] = []
        self.waits: list[str] = []
        Simulated.open = self
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        Simulated.open = None
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _note(name: str, *, waits: bool) -> None:
    if Simulated.open is not None:
        Simulated.open.ran.append(name)
        if waits:
            lines = [one for one in traceback.extract_stack() if "/torchfilm/" in one.filename]
            where = [f" at {Path(one.filename).name}:{one.lineno}" for one in lines[-1:]]
            Simulated.open.waits.append("".join([name, *where]))


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation on what the tensors hold, after a look at where they say they are."""
    name, tensors = func._schema.name.removeprefix("aten::"), _tensors((args, kwargs))
    there = [one for one in tensors if isinstance(one, Elsewhere)]
    here, to = len(there) < len(tensors), kwargs.get("device")
    goes_there = to is not None and torch.device(to).type == NAME
    stays = goes_there or (bool(there) and to is None)
    mixed = bool(there) and any(one.ndim and not isinstance(one, Elsewhere) for one in tensors)
    if mixed and name not in _COPY | _INDEX:
        raise RuntimeError(f"Expected all tensors to be on the same device, found {NAME} and cpu ({name}).")
    by_mask = name in _INDEX and any(one.dtype == torch.bool for one in _tensors(args[1]))
    if there:
        _note(name, waits=here or by_mask or name in _READ or not stays)
    elif name in _COPY and goes_there:
        _note(name, waits=True)
    made = {id(one.held): one for one in there}
    args, kwargs = pytree.tree_map_only(Elsewhere, lambda one: one.held, (args, kwargs))
    result = func(*args, **(kwargs if to is None else {**kwargs, "device": torch.device("cpu")}))
    if not stays:
        return result
    again = lambda one: made[id(one)] if id(one) in made else Elsewhere(one)  # noqa: E731
    return pytree.tree_map_only(Tensor, again, result)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]


def _empty(*sizes: Any, device: Any = None, pin_memory: Any = None, **options: Any) -> Elsewhere:
    """Return memory for `torch.tensor` and `torch.as_tensor`, which go around modes; `_copy` fills it."""
    return Elsewhere(torch.empty_strided(*sizes, **options))


def _copy(source: Tensor, to: Tensor, non_blocking: bool = False) -> Tensor:
    _note("as_tensor", waits=True)
    getattr(to, "held", to).copy_(getattr(source, "held", source))
    return to


_STATE = [torch.zeros(1)]  # of its random numbers
_YES = dict.fromkeys(("is_initialized", "is_available"), True)
_ANSWERS = {**_YES, "_is_in_bad_fork": False, "device_count": 1, "current_device": 0}
_MODULE = SimpleNamespace(**{name: lambda answer=answer: answer for name, answer in _ANSWERS.items()})
_MODULE.get_amp_supported_dtype = lambda: [torch.bfloat16]
_MODULE.manual_seed_all = lambda seed: None
_MODULE.get_rng_state = lambda device: _STATE[0]
_MODULE.set_rng_state = lambda state, device: _STATE.__setitem__(0, state)
if _register is not None and torch._C._get_privateuse1_backend_name() != NAME:
    _register(NAME, backend_module=_MODULE)
    torch.library.impl("aten::empty_strided", "PrivateUse1", _empty)
    torch.library.impl("aten::_copy_from", "PrivateUse1", _copy)
