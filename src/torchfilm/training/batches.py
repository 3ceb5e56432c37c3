"""Which items belong to which step: a pure function of (seed, step), so that resuming replays nothing."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


@dataclass(frozen=True)
class Draw:
    """The request for one batch: all that a batch may depend on.

    `step` counts from 0; `progress` in [0, 1] is the spent share of the budget (for a curriculum);
    `batch_size` is the size of the global batch, of which this process takes the part `share()`.
    """

    step: int
    seed: int
    progress: float
    batch_size: int
    rank: int = 0
    world_size: int = 1

    def share(self, num_items: int | None = None) -> slice:
        """This process's slice of `num_items` (default: batch_size): disjoint, complete, even to one item."""
        n = self.batch_size if num_items is None else num_items
        return slice(self.rank * n // self.world_size, (self.rank + 1) * n // self.world_size)

    def rng(self) -> np.random.Generator:
        """Random numbers of this step, equal on all processes: draw the global batch, then `share()` it."""
        return np.random.default_rng([self.seed, self.step])


@runtime_checkable
class Batches(Protocol):
    """Batches by index: equal draws give equal batches, whatever was asked before."""

    def __call__(self, draw: Draw, /) -> Any:
        """The batch of this draw; under several processes, this process's share of it."""
        ...


@dataclass
class EpochOrder:
    """Indices of each step's items, every item once per epoch, in a new random order each epoch.

    Step s takes the positions s * batch_size ... (s + 1) * batch_size - 1 of the endless concatenation of
    permutations of range(num_items); permutation e depends on (seed, e) alone.
    """

    num_items: int
    _cached: dict[tuple[int, int], np.ndarray] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.num_items < 1:
            raise ValueError(
                f"EpochOrder: expected at least one item, got {self.num_items}. Is the data empty?"
            )

    def indices(self, draw: Draw) -> np.ndarray:
        """This process's indices for the draw, int64 [<= batch_size]."""
        part = draw.share()
        first = draw.step * draw.batch_size
        positions = np.arange(first + part.start, first + part.stop)
        epochs = positions // self.num_items
        found = np.empty(len(positions), np.int64)
        for epoch in np.unique(epochs):
            chosen = epochs == epoch
            found[chosen] = self._permutation(draw.seed, int(epoch))[positions[chosen] % self.num_items]
        return found

    def _permutation(self, seed: int, epoch: int) -> np.ndarray:
        """Return the order of an epoch; two are kept, since a batch may end one and begin the next."""
        key = (seed, epoch)
        if key not in self._cached:
            while len(self._cached) >= 2:
                self._cached.pop(next(iter(self._cached)))
            self._cached[key] = np.random.default_rng([seed, epoch, 1]).permutation(self.num_items)
        return self._cached[key]


def seed_everything(seed: int, step: int, rank: int) -> None:
    """Set the global generators (python, numpy, torch) to the state that belongs to (seed, step, rank).

    Called before every step, so the random state of a run is never stored: it is a function of the step.
    """
    words = np.random.SeedSequence([seed, step, rank, 2]).generate_state(4)
    torch.manual_seed(int(words[0]) << 31 ^ int(words[1]))
    np.random.seed(words[2])
    random.seed(int(words[3]))


class GlobalRandomState:
    """Context that puts the global generators (python, numpy, torch on the CPU) back as they were."""

    def __enter__(self) -> GlobalRandomState:
        self._before = (random.getstate(), np.random.get_state(), torch.get_rng_state())
        return self

    def __exit__(self, *_: object) -> None:
        random.setstate(self._before[0])
        np.random.set_state(self._before[1])
        torch.set_rng_state(self._before[2])


def to_device(batch: Any, device: torch.device) -> Any:
    """The same batch with every tensor on `device`: tensors, dicts, lists, tuples and dataclasses, nested.

    What a dataclass or named tuple names in its `on_cpu` stays where it is: ("lengths",), read by packing.
    """
    if isinstance(batch, PackedSequence):  # whose sizes stay on the CPU
        return cast(Any, batch).to(device, non_blocking=True)
    if isinstance(batch, Tensor):
        if device.type == "cuda" and batch.is_cpu:  # only such a copy is not waited for
            batch = batch.pin_memory()
        return batch.to(device, non_blocking=True)
    if isinstance(batch, dict):
        return {key: to_device(value, device) for key, value in batch.items()}

    def moved(names: Sequence[str]) -> dict[str, Any]:
        stay = getattr(type(batch), "on_cpu", ()) if "on_cpu" not in names else ()
        return {name: to_device(getattr(batch, name), device) for name in names if name not in stay}

    if hasattr(batch, "_fields"):  # a named tuple
        return batch._replace(**moved(batch._fields))
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        return dataclasses.replace(batch, **moved([f.name for f in dataclasses.fields(batch) if f.init]))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch
