"""What is to change in the tensors of a network, computed in float64, and written all at once.

Plan, then apply: `Draft.apply` writes down what was there before it changes it, and `restore` puts it back.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

Undo = list[tuple[nn.Module, str, Any]]
"""What was there before: module, name, and the very object."""


class NotExactError(Exception):
    """Why an affine map cannot go into a layer, in words that complete "...: "."""


@dataclass(frozen=True, eq=False)
class Affine:
    """y = factor * x + shift over the channels: factor [C], or [C, C] where channels mix; shift [C]."""

    factor: Tensor
    shift: Tensor

    @property
    def mixes(self) -> bool:
        """Whether the factor is a matrix."""
        return self.factor.ndim == 2

    def rows(self, weight: Tensor) -> Tensor:
        """Return the factor applied to the first axis of a weight."""
        if self.mixes:
            return torch.tensordot(self.factor, weight, dims=1)
        return self.factor.view(-1, *[1] * (weight.ndim - 1)) * weight

    def columns(self, weight: Tensor) -> Tensor:
        """Return the factor applied to the second axis of a weight, as the layer's input sees it."""
        if self.mixes:
            return (weight.movedim(1, -1) @ self.factor).movedim(-1, 1)
        return self.factor.view(1, -1, *[1] * (weight.ndim - 2)) * weight


class Draft:
    """New values for the tensors of modules, written all at once.

    Args:
        root: the model that the modules belong to; it says which layers are called from one place only.
        fixed: the ids of tensors that the model's own code reads, which have to stay as they are.
        float32: modules whose first tensors are made in float32, not in the precision of the model.
        around: the modules whose code runs around each call of a layer, as far as that is known.

    Attributes:
        kept: the modules that go on applying a constant of their own.
    """

    def __init__(
        self,
        root: nn.Module,
        fixed: Collection[int] = (),
        float32: Collection[nn.Module] = (),
        around: Mapping[nn.Module, Collection[Collection[nn.Module]]] | None = None,
    ) -> None:
        self._fixed = fixed
        self._float32 = float32
        self._around = around or {}
        children = [child for module in root.modules() for child in module._modules.values()]
        self._owners = Counter(id(child) for child in children if child is not None)
        floats = [tensor for tensor in root.parameters() if tensor.is_floating_point()]
        self._first = floats[0] if floats else torch.empty(0)
        self._values: dict[nn.Module, dict[str, Any]] = {}
        self.kept: set[nn.Module] = set()

    def read(self, module: nn.Module, name: str) -> Tensor | None:
        """Return a tensor of the module as it will be, in float64; None where it has none.

        Raises:
            NotExactError: where the tensor is no plain parameter or buffer.
        """
        if name in self._values.get(module, {}):
            return self._values[module][name]
        if parametrize.is_parametrized(module, name):
            raise NotExactError(f"its {name} is parametrized; it has to be plain first")
        if name not in module._parameters and name not in module._buffers:
            raise NotExactError(
                f"its {name} is no parameter but made by a hook, as weight_norm's; remove that first"
            )
        tensor = module._parameters[name] if name in module._parameters else module._buffers[name]
        if tensor is None:
            return None
        if tensor.is_meta:
            raise NotExactError(f"its {name} is on the meta device, without values")
        if type(tensor.data) is not Tensor or not tensor.is_floating_point():
            raise NotExactError(
                f"its {name} is a {type(tensor.data).__name__} of {tensor.dtype}, not plain numbers"
            )
        return in_float64(tensor)

    def latest(self, module: nn.Module, name: str) -> Any:
        """Return a tensor or attribute as it will be, whatever it is."""
        values = self._values.get(module, {})
        return values[name] if name in values else getattr(module, name)

    def write(self, module: nn.Module, **values: Any) -> None:
        """Set tensors or attributes of a module, once the draft is applied.

        Raises:
            NotExactError: where code of the model reads the tensor itself, and for numbers that its precision
                cannot hold.
        """
        for name, value in values.items():
            if id(module._parameters.get(name)) in self._fixed:
                raise NotExactError(
                    f"code of the network reads its {name} without calling it, and would hear it"
                )
            dtype = self._like(module, name).dtype
            if type(value) is Tensor and not value.to(dtype).isfinite().all():
                wrong = "NaN" if value.isnan().any() else f"beyond the range of {dtype}"
                raise NotExactError(f"its {name} would be {wrong}")
        self._values.setdefault(module, {}).update(values)

    def trial(self) -> Draft:
        """Return a draft that starts as this one, to try something."""
        other = copy.copy(self)
        other._values = {module: dict(values) for module, values in self._values.items()}
        return other

    def without_constants(self, module: nn.Module) -> None:
        """Make sure that no module inside applies a constant, between which nothing can be folded.

        Raises:
            NotExactError: where one does.
        """
        if any(inner in self.kept for inner in module.modules()):
            raise NotExactError("a module inside of it keeps a constant")

    def alone(self, child: nn.Module, module: nn.Module | None = None) -> None:
        """Make sure that only the module which holds this child calls it, and nobody watches what it gives.

        Args:
            child: a module inside of another.
            module: around which of them all calls are to be; None for the root.

        Raises:
            NotExactError: where it has other owners, other callers as far as code can be read, or hooks.
        """
        if self._owners[id(child)] > 1:
            raise NotExactError(f"its {type(child).__name__} is used in another place too")
        if module is not None and not all(module in around for around in self._around.get(child, ())):
            raise NotExactError(f"its {type(child).__name__} is called from outside of it too")
        if child._forward_hooks or child._forward_pre_hooks:
            raise NotExactError(f"its {type(child).__name__} has hooks, which would see other numbers")

    def tensors(self, module: nn.Module) -> list[str]:
        """Return the names of the module's tensors that change."""
        return [name for name, value in self._values.get(module, {}).items() if isinstance(value, Tensor)]

    def apply(
        self, place: Callable[[nn.Module], nn.Module] = lambda module: module, undo: Undo | None = None
    ) -> None:
        """Write everything.

        Values in float64 are dropped once they are written: a second place shares the tensors of the first.

        Args:
            place: from a module that was read to the one to write into, its equal in another copy.
            undo: takes what was there, each before it is changed.
        """
        undo = [] if undo is None else undo
        for source, values in self._values.items():
            module = place(source)
            for name, value in values.items():
                undo.append((module, name, getattr(module, name)))
                if name in module._parameters and isinstance(value, Tensor):
                    values[name] = _parameter(value, self._like(source, name))
                    module._parameters[name] = values[name]
                else:
                    setattr(module, name, value)

    def _like(self, module: nn.Module, name: str) -> Tensor:
        """Return what a new value is to be like: the old one, what is beside it, or the model's first one."""
        beside = (module._parameters.get(name), *module._parameters.values(), *module._buffers.values())
        like = next((t for t in beside if t is not None and t.is_floating_point()), None)
        if like is not None or module not in self._float32:
            return self._first if like is None else like
        first = self._first
        return torch.empty(0, dtype=torch.float32, device=first.device, requires_grad=first.requires_grad)


def _parameter(value: Tensor, like: Tensor) -> nn.Parameter:
    """Round a new value to the precision of what it is to be like."""
    if type(value) is Tensor:
        value = value.to(device=like.device, dtype=like.dtype)
    return nn.Parameter(value, requires_grad=like.requires_grad)


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64, without its graph; in float32 on mps, which has no float64."""
    return tensor.detach().to(torch.float32 if tensor.device.type == "mps" else torch.float64)


def restore(undo: Undo) -> None:
    """Put the very objects back that were there."""
    for module, name, old in reversed(undo):
        if name in module._parameters:
            module._parameters[name] = old
        else:
            setattr(module, name, old)
