"""Give back what a measurement changes: modes of modules, buffers, random numbers, switches of torch.

Also inputs, which a network may write into: `fresh` makes those of a single call.
"""

from __future__ import annotations

import copy
import copyreg
import io
import operator
import pickle
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

T = TypeVar("T")

# The blocks of `in_mode` that are open, in the order in which they began, with the modes from before each.
_OPEN: list[dict[nn.Module, bool]] = []
_CHANGING = threading.RLock()  # held while modes change, and not for a whole block

_FULL = MemoryError, torch.OutOfMemoryError
# What pickle writes by name, or apart from what shares it.
_FUNCTIONS = types.FunctionType, types.BuiltinFunctionType
_BESIDE = Tensor, nn.Module, type, types.ModuleType, *_FUNCTIONS


class _Place(NamedTuple):
    """Where a tensor is: device, dtype and address of its memory; its first element there, and its end."""

    memory: tuple[str, str, int]
    start: int
    end: int


@contextmanager
def in_mode(*models: nn.Module, training: bool) -> Iterator[None]:
    """Put networks into training or evaluation in the block, and each module back into its own mode.

    Into training by `train`, which others may have made to leave some modules out, and back by `train` too.
    Into evaluation module by module: the `train(False)` of others may write into weights (LoRA merges them).
    Modes are those of all threads. Where blocks overlap, the last to end gives the modes back.
    """
    compiling = torch.compiler.is_compiling()  # then no other thread sees a mode change
    lock, blocks = (nullcontext(), []) if compiling else (_CHANGING, _OPEN)
    modes: dict[nn.Module, bool] = {}
    try:
        with lock:
            modes.update((module, module.training) for model in models for module in model.modules())
            blocks.append(modes)
            if training:
                for model in models:
                    model.train()
            else:
                for module, mode in modes.items():
                    if mode:
                        module.training = False
        yield
    finally:
        with lock:
            for place, block in enumerate(blocks):
                if block is modes:
                    _give_back(models, blocks.pop(place), blocks[place:])
                    break


def _give_back(
    models: tuple[nn.Module, ...], modes: dict[nn.Module, bool], later: list[dict[nn.Module, bool]]
) -> None:
    """Put modules into these modes; leave those of a later block to it, which gives the modes back then."""
    for module in modes:
        for block in later:
            if module in block:
                block[module], modes[module] = modes[module], module.training
                break
    try:
        if any(module.training is not mode for module, mode in modes.items()):
            for model in models:
                model.train(modes[model])
    finally:
        for module, mode in modes.items():
            if module.training is not mode:
                module.training = mode


@contextmanager
def same_chance(seed: int | None = None) -> Iterator[None]:
    """Give the random numbers back as they were: after the block, those come that would have come without.

    With a seed, those of the block start from it.
    """
    device = torch.accelerator.current_accelerator()
    kind = "cuda" if device is None else device.type
    module = torch.get_device_module(kind)
    begun = getattr(module, "is_initialized", lambda: True)()  # to begin with CUDA takes half a gigabyte
    with torch.random.fork_rng(range(module.device_count()) if begun else (), device_type=kind):
        if seed is not None and device is None:  # for devices that may come torch notes stacks: 0.1 ms
            torch.default_generator.manual_seed(int(seed))
        elif seed is not None:
            torch.manual_seed(seed)
        yield


def fresh(value: T) -> T:
    """Return copies for one call to write into, of all that it is given: tensors, lists, caches, simulators.

    Objects are copied as pickle does, or by their own `__deepcopy__`. What is one object is one in the copy,
    and tensors of a dtype that overlap in memory do so there. Handed on as they are, wherever they are:
    modules, parameters and tensors that require gradients, for others were computed from them; objects with a
    `__del__` and no `__deepcopy__`, for copies would close what they share; and what cannot be copied, as
    generators.

    Example:
        >>> past = [torch.zeros(2)]
        >>> fresh(past)[0].add_(1), past
        (tensor([1., 1.]), [tensor([0., 0.])])
    """
    copied = _copied(value)
    return pytree.tree_map(_copied, value) if copied is value else copied


def _copied(value: Any) -> Any:
    """Return a copy, or the value itself where that fails."""
    try:
        taken = _Taken()
        taken.dump(value)
        return _Made(taken).load()
    except _FULL:
        raise
    except Exception:  # noqa: BLE001 - of whatever class: objects of others say how they are copied
        return value


class _Taken(pickle.Pickler):
    """A value in bytes but for what pickle is not to copy, by its `id`: it finds all, wherever it is."""

    def __init__(self) -> None:
        self.bytes = io.BytesIO()
        super().__init__(self.bytes, pickle.HIGHEST_PROTOCOL)
        self.beside: dict[int, Any] = {}

    def persistent_id(self, obj: Any) -> int | None:
        """Return the key of what is beside the bytes, None for the rest."""
        kind = type(obj)
        if isinstance(obj, _BESIDE) or hasattr(kind, "__deepcopy__") or hasattr(kind, "__del__"):
            self.beside[id(obj)] = obj
            return id(obj)
        return None

    def reducer_override(self, obj: Any) -> Any:
        """Take an object apart; where it refuses, return a function that gives it: functions lie beside."""
        try:
            reduce = copyreg.dispatch_table.get(type(obj))
            parts = obj.__reduce_ex__(4) if reduce is None else reduce(obj)
        except _FULL:
            raise
        except Exception:  # noqa: BLE001
            parts = None
        return parts if isinstance(parts, tuple) else ((lambda: obj), ())


class _Made(pickle.Unpickler):
    """The copy, with copies of what was beside the bytes where that has any."""

    def __init__(self, taken: _Taken) -> None:
        taken.bytes.seek(0)
        super().__init__(taken.bytes)
        beside = taken.beside
        tensors = [one for one in beside.values() if isinstance(one, Tensor) and not _is_handed_on(one)]
        self.made = _cloned(tensors) | {key: one for key, one in beside.items() if _is_handed_on(one)}
        for key, one in beside.items():
            if key not in self.made:
                self._deepcopy(key, one)

    def persistent_load(self, pid: int) -> Any:
        """Return what is in the place of what was beside the bytes."""
        return self.made[pid]

    def _deepcopy(self, key: int, one: Any) -> None:
        size = len(self.made)
        try:
            self.made[key] = copy.deepcopy(one, self.made)
        except _FULL:
            raise
        except Exception:  # noqa: BLE001
            while len(self.made) > size:  # ids of what was copied meanwhile, and is freed now
                self.made.popitem()
            self.made[key] = one


def _is_handed_on(one: Any) -> bool:
    """Whether this is used as it is; tensors of inference mode have no graph to keep, nor fit in one."""
    if isinstance(one, Tensor):
        return (isinstance(one, nn.Parameter) or one.requires_grad) and not one.is_inference()
    return isinstance(one, nn.Module | type) or not hasattr(type(one), "__deepcopy__")


def _cloned(tensors: Sequence[Tensor]) -> dict[int, Tensor]:
    """Return copies, by the ids of the tensors."""
    copies: dict[int, Tensor] = {}
    for group in _overlapping(tensors):
        for (_, one), clone in zip(group, _clones(group), strict=True):
            vars(clone).update(vars(one) | vars(clone))  # what others noted on it, as `mark_dynamic`
            copies[id(one)] = clone
    return copies


def _overlapping(tensors: Sequence[Tensor]) -> Iterator[list[tuple[_Place, Tensor]]]:
    """Yield groups of tensors, each with its place, of which none overlaps one of another group."""
    group: list[tuple[_Place, Tensor]] = []
    reach = 0
    for place, one in sorted(((_place(one), one) for one in tensors), key=operator.itemgetter(0)):
        if group and (place.memory != group[0][0].memory or place.start >= reach):
            yield group
            group, reach = [], 0
        group.append((place, one))
        reach = max(reach, place.end)
    if group:
        yield group


def _clones(group: Sequence[tuple[_Place, Tensor]]) -> list[Tensor]:
    """Return views of a copy of what these tensors cover; or a clone, of one without an element twice."""
    (_, start, end), first = group[0][0], group[0][1].detach()
    if len(group) == 1 and first.numel() <= end - start:  # a clone leaves out what is between its elements
        return [first.clone()]
    with torch.enable_grad():  # without, autograd would not see what is written into one of the views
        flat = first.as_strided((max(place.end for place, _ in group) - start,), (1,), start).clone()
        return [flat.as_strided(one.shape, one.stride(), place.start - start) for place, one in group]


def _place(one: Tensor) -> _Place:
    """Return where a tensor is; what has no elements in memory of its own is in one by itself."""
    plain = type(one) in (Tensor, nn.Parameter) and one.layout is torch.strided
    if not plain or one.is_meta or one.is_nested or one.is_quantized or one.is_conj() or one.is_neg():
        return _Place((type(one).__name__, "", id(one)), 0, sys.maxsize)
    memory = str(one.device), str(one.dtype), one.untyped_storage().data_ptr()
    start, sizes = int(one.storage_offset()), zip(one.shape, one.stride(), strict=True)
    return _Place(memory, start, start + 1 + sum((size - 1) * stride for size, stride in sizes))


@contextmanager
def unchanged(model: nn.Module) -> Iterator[None]:
    """Give the buffers of a network (statistics of norms) and the random numbers back as they were.

    Graphs that wait for their backward pass do not notice: buffers get their numbers back as `.data`, without
    a new version.
    """
    owners = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    kept = [(buffer, buffer.detach().clone()) for buffer in model.buffers()]
    try:
        with same_chance():
            yield
    finally:
        for buffers, before in owners:
            if isinstance(buffers, dict):  # those of TorchScript are no dict, and nobody rebinds them
                buffers.clear()
                buffers.update(before)
        with torch.no_grad():
            for buffer, values in kept:
                if not _equal(buffer, values):  # nor can those of expanded memory be written into
                    buffer.data.copy_(values)


def _equal(one: Tensor, other: Tensor) -> bool:
    try:
        return torch.equal(one, other) or torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
    except (NotImplementedError, RuntimeError):  # sparse, nested, without memory
        return False


def product_by_product() -> AbstractContextManager[None]:
    """Keep torch from computing whole layers in one operation.

    Those are the fast paths of attention and of encoder layers, the recurrences of cuDNN, and those of oneDNN
    with its packed convolutions.
    """
    return _SWITCHES.block()


def _switch_off(before: ExitStack) -> None:
    mha, c = torch.backends.mha, torch._C  # by C, for `torch.backends` may be closed: disable_global_flags
    gets = mha.get_fastpath_enabled, c._get_mkldnn_enabled, c._get_cudnn_enabled
    sets = mha.set_fastpath_enabled, c._set_mkldnn_enabled, c._set_cudnn_enabled
    for get, enable in zip(gets, sets, strict=True):
        before.callback(enable, get())
        enable(False)  # noqa: FBT003


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Run eagerly and with gradients, also in `torch.inference_mode`, and leave the network unchanged."""
    with unchanged(model), _STANCE.block(), torch.inference_mode(mode=False), torch.enable_grad():
        yield


class _Changed:
    """Something of all threads, changed by a function that says on the stack how it was before."""

    def __init__(self, change: Callable[[ExitStack], Any]) -> None:
        self.change = change
        self.lock, self.blocks, self.before = threading.Lock(), set[object](), ExitStack()

    @contextmanager
    def block(self) -> Iterator[None]:
        """Let it be changed in the block: the first to begin changes it, the last to end gives it back."""
        block = object()
        try:
            with self.lock:
                if not self.blocks:
                    self.change(self.before)
                self.blocks.add(block)
            yield
        finally:
            with self.lock:
                self.blocks.discard(block)
                if not self.blocks:
                    self.before.close()


_STANCE = _Changed(lambda before: before.enter_context(torch.compiler.set_stance("force_eager")))
_SWITCHES = _Changed(_switch_off)
