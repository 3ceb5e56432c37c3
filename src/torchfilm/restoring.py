"""Give back what a measurement changes: modes of modules, buffers, random numbers, switches of torch.

Also inputs, which a network may write into: `fresh` makes those of a single call.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

T = TypeVar("T")

# The blocks of `in_mode` that are open, in the order in which they began, with the modes from before each.
_OPEN: list[dict[nn.Module, bool]] = []
_CHANGING = threading.RLock()  # held while modes change, and not for a whole block


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
    """Return copies for one call to write into, of all that it is given: tensors, lists, caches.

    Tensors in tuples, lists and dicts are cloned, each by itself; other objects are copied by
    `copy.deepcopy`. Handed on as they are: modules and functions; tensors that require gradients, for others
    may have been computed from them; objects with a `__del__`, for a copy would close what both hold; and
    what cannot be copied, as a generator.

    Example:
        >>> past = [torch.zeros(2)]
        >>> fresh(past)[0].add_(1), past
        (tensor([1., 1.]), [tensor([0., 0.])])
    """
    memo: dict[int, Any] = {}
    return pytree.tree_map(partial(_copied, memo=memo), value)


def _copied(one: Any, memo: dict[int, Any]) -> Any:
    if isinstance(one, Tensor):
        return _cloned(one, memo)
    if callable(one) or hasattr(type(one), "__del__"):
        return one
    before = dict(memo)
    try:
        return copy.deepcopy(one, memo)
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception:  # noqa: BLE001 - of whatever class: objects of others say how they are copied
        memo.clear()  # what deepcopy noted on the way has been freed, and its ids are given anew
        memo.update(before)
        return one


def _cloned(tensor: Tensor, memo: dict[int, Any]) -> Tensor:
    """Return a copy of what a tensor shows, not of all memory behind it, which may be a whole data set."""
    if tensor.requires_grad and not tensor.is_inference():
        return tensor
    if id(tensor) not in memo:
        clone = tensor.detach().clone()
        vars(clone).update(vars(tensor))  # what others noted on it, as `mark_dynamic`
        memo[id(tensor)] = clone
    return memo[id(tensor)]


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
