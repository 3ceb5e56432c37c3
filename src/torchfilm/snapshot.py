"""Whether what numbers were made of is still what it was: the same modules and tensors, as they were then."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

# What a condition can hold besides tensors that nobody can write into.
_FINAL = (bool, int, float, complex, str, bytes, type(None))


class Snapshot:
    """Modules with their parameters and buffers, and a condition, as they are now.

    What is held is compared by identity, tensors also by their version, modules by their mode. Not seen is
    what is written through `.data` or into tensors made in inference mode, and, while torch.compile looks,
    all but another condition.

    Args:
        owners: what made the numbers.
        cond: what they were made of, any pytree.
        modes: whether the modules' modes count.
    """

    def __init__(self, *owners: nn.Module, cond: Any = None, modes: bool = True) -> None:
        self.owners, self.cond, self.modes = owners, cond, modes
        self.leaves = pytree.tree_leaves(cond)
        self.tensors = [leaf for leaf in self.leaves if isinstance(leaf, Tensor)]
        self.modules = [module for owner in owners for module in owner.modules()]
        self.held, self.state = self._now()
        self.is_final = all(isinstance(leaf, (Tensor, *_FINAL)) for leaf in self.leaves)

    def __getstate__(self) -> tuple[Any, ...]:
        """Return what it is of, and whether it still holds: versions begin anew in copies."""
        return self.owners, self.cond, self.modes, self.holds()

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        """Look at the copy, which holds where what was copied did."""
        owners, cond, modes, held = state
        Snapshot.__init__(self, *owners, cond=cond, modes=modes)
        self.is_final = self.is_final and held

    def holds(self) -> bool:
        """Whether nothing has changed; never where the condition holds what can change without a sign."""
        leaves = pytree.tree_leaves(self.cond)
        same = self.is_final and _same(leaves, self.leaves)
        if torch.compiler.is_compiling() or not same:
            return same
        held, state = self._now()
        return _same(held, self.held) and state == self.state

    def _now(self) -> tuple[list[Any], list[int]]:
        """Return all that the modules hold, and what changes with it: modes and versions.

        The modules are those of the start: while each holds the same children, there are no others.
        """
        modules = self.modules
        children = [child for module in modules for child in module._modules.values()]
        named = [tensors for module in modules for tensors in (module._parameters, module._buffers)]
        tensors = [tensor for each in named for tensor in each.values() if tensor is not None]
        modes = [module.training for module in modules] if self.modes else []
        return [*children, *tensors], [*modes, *_versions(tensors), *_versions(self.tensors)]


def _same(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


def _versions(tensors: Sequence[Tensor]) -> list[int]:
    """Return a number for each tensor that changes with it; inference and traced tensors do not tell."""
    if torch.compiler.is_compiling():
        return []
    return [tensor._version for tensor in tensors if not tensor.is_inference()]
