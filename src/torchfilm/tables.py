"""Separable tables: the part of a condition that takes few values, such as a time step, is looked up.

A generator's first matrix product is additive over a concatenation, W [h(a), h(b)] = W_a h(a) + W_b h(b).
Where `a` takes K known values, its K products are made once; what is left per step is a row and one addition.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from torchfilm.generator import Generator
from torchfilm.heads import LowRankHead, SharedHead, TableHead, like_weights, wide
from torchfilm.lookup import row
from torchfilm.modulation import Modulation, paired
from torchfilm.several import Maybe, Several
from torchfilm.snapshot import Snapshot


class SeparableTable:
    """Tabulate the part of a generator that depends on one of several conditions, for its K values; exact.

    raw = T[k] + r, with T[k] = W_time h(time_k) and r = W_rest h(rest) + b: one row and one addition per
    step, where the rest stays the same over the steps and is encoded once. It is equal to the generator but
    for rounding if and only if everything in front of the generator's first matrix product works on each
    number by itself:

    - the conditions are concatenated, and the trunk is empty or made of activations alone (SiLU, Mish, ...);
    - or they are summed, and the trunk is empty;
    - and the head is "linear", "shared" or "lowrank:R".

    Bounds, learned scales and gates come after the addition and may be there. With a linear layer in the
    trunk, or an activation after a sum, the conditions meet in a nonlinearity: that is refused.

    It holds numbers made from the weights, no parameters, and is no module: make it on the network's device,
    and again after a move. The rest is multiplied by its own columns alone: views of the generator's weights,
    no copies. For inference: no gradient flows through it.

    Args:
        conditions: `Several`, in evaluation mode: its dropout is not for a table.
        generator: the generator that reads it.
        name: the condition that is tabulated.
        values: its K values, one per row, as that condition takes them.

    Raises:
        ValueError: where it would not be exact, with the reason, for a name that there is not, and for a
            condition without others.

    Example:
        >>> from torchfilm.conditions import Scalars, Vector
        >>> both = Several({"time": Scalars(1, 64), "seen": Vector(32)}).eval()
        >>> generator = Generator(both.dim, {"block1": 8, "block2": 16}, trunk=("mish",))
        >>> table = SeparableTable(both, generator, "time", torch.arange(100)[:, None])
        >>> rest = table.encode({"seen": torch.rand(2, 32)})  # once per observation
        >>> modulations = table(99, rest)  # at each step
    """

    def __init__(self, conditions: Several, generator: Generator, name: str, values: Any) -> None:
        _check_exact(conditions, generator, name)
        _check_mode(conditions)
        self.conditions = conditions
        self.generator = generator
        self.name = name
        self._columns = _columns(conditions, name)
        self._made_of = Snapshot(conditions, generator, modes=False)
        with torch.no_grad():
            vector = conditions.parts[name](values)
            # Zeros for all others: activations keep zero, so they add nothing.
            zeros = {other: vector.new_zeros(size) for other, size in conditions.sizes.items()}
            vectors = conditions.join({**zeros, name: vector})
            # On the CPU: not every device has float64.
            exact, alone = copy.deepcopy(generator).cpu().double(), vectors.cpu().double()
            rows = exact.raw(alone) - exact.raw(torch.zeros_like(alone[:1]))
            precision = torch.promote_types(next(generator.head.parameters()).dtype, torch.float32)
            self.rows: Float[Tensor, "k rows"] = rows.to(precision).to(vectors.device)
            offsets = generator.offsets  # added once per observation
            self._start = None if offsets is None else offsets.to(vectors.device)

    def __len__(self) -> int:
        """Return K."""
        return len(self.rows)

    @torch.no_grad()
    def encode(self, rest: Mapping[str, Any]) -> Float[Tensor, "*batch rows"]:
        """Return r for the other conditions, once for all steps.

        Args:
            rest: what the other conditions take, by name; missing ones are replaced as in `Several`.

        Raises:
            ValueError: for names that are not among the conditions or the tabulated one, where the weights
                have changed since the table was made, and for conditions that would be dropped by chance.
        """
        _check_mode(self.conditions)
        if self.name in rest:
            raise ValueError(
                f"SeparableTable: expected the conditions besides '{self.name}', got it among {list(rest)}.\n"
                f"Its values are in the table: table(index, rest)."
            )
        if not self._made_of.holds():
            raise ValueError(
                "SeparableTable: expected the weights it was made from, but they have changed since.\n"
                "Build it again."
            )
        self.conditions.check_given({self.name: self.name, **rest})
        vectors = self.conditions.encode(rest)
        del vectors[self.name]
        raw = raw_of_others(self.generator, self.conditions.join(vectors), *self._columns)
        return raw if self._start is None else raw.add_(self._start)

    @torch.no_grad()
    def __call__(
        self, index: int | Int[Tensor, "*samples"], rest: Float[Tensor, "*batch rows"]
    ) -> dict[str, Modulation]:
        """Return the modulation of each site at one of the K values.

        Args:
            index: which value, for all samples; or one for each sample, aligned with `rest` from the left.
            rest: what `encode` returned.

        Raises:
            IndexError: for an index outside the table.
        """
        return self._modulations(_added(row(self.rows, index), rest))

    @torch.no_grad()
    def steps(self, rest: Float[Tensor, "*batch rows"]) -> list[dict[str, Modulation]]:
        """Return the modulations of all K values: one addition, then nothing to do per step but to look up.

        Takes K times the memory of one step.
        """
        rows = self.rows.reshape(len(self), *[1] * (rest.ndim - 1), -1) + rest
        return [self._modulations(row) for row in rows.unbind()]

    def _modulations(self, raw: Tensor) -> dict[str, Modulation]:
        return self.generator.of_raw(raw) if self._start is None else self.generator.divided(raw)


def raw_of_others(
    generator: Generator, z: Float[Tensor, "*batch others"], start: int, stop: int
) -> Float[Tensor, "*batch rows"]:
    """Return `generator.raw` of a condition with zeros from `start` to `stop`, whose other numbers are z.

    The weights of what is zero are not read; all others are read where they lie. For trunks that are empty
    or made of activations alone, which keep zero.
    """
    head: Any = generator.head
    z = generator.trunk(like_weights(z, next(head.parameters())))
    if isinstance(head, LowRankHead):
        raw = head.up(_product(z, head.down, None, start, stop))
    elif isinstance(head, SharedHead):
        raw = head.spread(_product(z, head.weight, None, start, stop))
    else:
        raw = _product(z, head.weight, head.bias, start, stop)
    return raw if generator.scale is None else raw * generator.scale


def _product(z: Tensor, weight: Tensor, bias: Tensor | None, start: int, stop: int) -> Tensor:
    """Return W z + b without the columns of W from `start` to `stop`, one product on each side of them."""
    before, _, after = weight.tensor_split((start, stop), dim=1)
    parts = z.split([before.shape[1], after.shape[1]], dim=-1)
    first, *other = [side for side in zip(parts, (before, after), strict=True) if side[1].shape[1] > 0]
    made = wide(functional.linear(*first, bias))
    for side in other:
        made += wide(functional.linear(*side))
    return made


def _columns(conditions: Several, name: str) -> tuple[int, int]:
    """Return from where to where the generator reads a condition alone: nowhere where it reads their sum."""
    if conditions.combine == "sum":
        return conditions.dim, conditions.dim
    sizes, place = list(conditions.sizes.values()), list(conditions.sizes).index(name)
    return sum(sizes[:place]), sum(sizes[: place + 1])


def _added(one: Tensor, other: Tensor) -> Tensor:
    """Return the sum of rows [*batch, rows], their batches aligned from the left."""
    fits = one.ndim == other.ndim or 1 in (one.ndim, other.ndim)
    return one + other if fits else paired(torch.add, one, other)


def _check_mode(conditions: Several) -> None:
    parts = [part for part in conditions.modules() if isinstance(part, Maybe | Several)]
    dropouts = [part.joint_dropout if isinstance(part, Several) else part.dropout for part in parts]
    if conditions.training and any(dropouts):
        raise ValueError(
            "SeparableTable: expected conditions in evaluation mode, got some that are dropped in "
            "training.\n"
            "Call conditions.eval() first: a row of the table would be that of a missing condition."
        )


def _check_exact(conditions: Several, generator: Generator, name: str) -> None:
    names = list(conditions.parts)
    if name not in names:
        raise ValueError(
            f"SeparableTable: expected a condition among {names}, got {name!r}.\n"
            f"Give the one that takes few values."
        )
    if len(names) == 1:
        raise ValueError(
            f"SeparableTable: expected other conditions besides '{name}', got none.\n"
            f"Use tabulate(model, conds=...): where there is nothing to add, a row is all."
        )
    if not isinstance(generator, Generator):
        raise ValueError(
            f"SeparableTable: expected a Generator, whose first matrix product is known, got a "
            f"{type(generator).__name__}.\n"
            f"Concatenate or sum the conditions, and read them with one Generator(conditions.dim, sites)."
        )
    layers = generator.options.trunk
    linear = [layer for layer in layers if not isinstance(layer, str)]
    if conditions.combine == "compose":
        reason = (
            "conditions that are composed have a generator each; tabulate that of one condition by itself"
        )
    elif isinstance(generator.head, TableHead):
        reason = "a generator with head='table' is a table already"
    elif linear:
        reason = (
            f"the trunk's layer of {linear[0]} mixes the conditions in front of a nonlinearity or the head"
        )
    elif conditions.combine == "sum" and layers:
        reason = f"{layers[0]!r} of a sum is not the sum of {layers[0]!r}; concatenate the conditions"
    else:
        return
    raise ValueError(
        f"SeparableTable: expected a generator whose first matrix product reads each condition by itself, "
        f"but {reason}.\n"
        f"Separable are combine='concat' with a trunk of activations alone, and combine='sum' without one."
    )
