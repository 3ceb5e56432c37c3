"""What is frozen of a network while only its conditioning trains; known by the objects, not by their names.

Names change where others wrap a block afterwards: `torch.compile`, `nn.Sequential(block)`, `weight_norm`.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize


class Frozen:
    """The parameters that were trained before, and the norms whose statistics stay as they are.

    Copied and pickled with the network, it knows the modules of the copy.
    """

    def __init__(self) -> None:
        # Where they are: who replaces one frees it. None stands for the root, which has this object inside.
        self.parameters: list[tuple[nn.Module | None, str]] = []
        self.norms: dict[str, tuple[nn.Module, bool]] = {}
        self.hold = _Hold()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update({"hold": _Hold(), **state})  # pickled before 2026-11-28 it has none

    def freeze(self, root: nn.Module) -> None:
        """Freeze all but the child `film`, what is frozen already aside; that of a network inside too."""
        for name, module in root.named_modules():
            if f"{name}.".startswith("film."):  # an encoder's norms go on learning with it
                continue
            if isinstance(module, _NormBase) and module.running_mean is not None:
                self.norms.setdefault(name, (module, module.training == root.training))
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    self.parameters.append((None if module is root else module, key))
                    parameter.requires_grad = False

    def rest(self, root: nn.Module) -> None:
        """Put the norms into evaluation mode, also those that took the place of one; nor are they reset."""
        for norm, _ in self._norms(root):
            norm.eval()
            if isinstance(norm.running_mean, Tensor) and not norm.running_mean.is_meta:
                vars(norm)["reset_running_stats"] = _Reset(norm, self.hold)

    def thaw(self, root: nn.Module) -> None:
        """Let everything train again that did before, also what took its place in the same module."""
        for module, key in self.parameters:
            for one in _tensors(root if module is None else module, key):
                if one.is_floating_point() or one.is_complex():
                    one.requires_grad = True
        for norm, follows in self._norms(root):
            norm.train(root.training and follows)
            vars(norm).pop("reset_running_stats", None)
        self.parameters, self.norms = [], {}

    def _norms(self, root: nn.Module) -> Iterator[tuple[nn.Module, bool]]:
        """Return the norms and what took their places, and whether each followed the network's mode."""
        modules = dict(root.named_modules())
        for name, (norm, follows) in self.norms.items():
            yield norm, follows
            if isinstance(now := modules.get(name), _NormBase):
                yield now, follows


class _Hold:
    """What a network has for as long as its norms are frozen; a part that is copied out of it has none."""


class _Reset:
    """In place of a frozen norm's `reset_running_stats`: nothing, while it rests in its network."""

    def __init__(self, norm: Any, hold: _Hold | None = None) -> None:
        self.norm, self.hold = weakref.ref(norm), weakref.ref(hold or _Hold())

    def __call__(self) -> None:
        norm = self.norm()
        if norm is not None and (norm.training or self.hold() is None):
            type(norm).reset_running_stats(norm)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Reset, (self.norm(), self.hold())


def _tensors(module: Any, key: str) -> list[Tensor]:
    """Return the parameter of that name, or what it is computed from, where it is parametrised or pruned."""
    if parametrize.is_parametrized(module, key):
        return list(module.parametrizations[key].parameters(recurse=False))
    found = (module._parameters.get(name) for name in (key, f"{key}_orig"))
    return [one for one in found if one is not None]
