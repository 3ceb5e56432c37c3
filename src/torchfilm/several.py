"""Conditions that may be missing, and several conditions at once.

What is missing is replaced by a learned null through `torch.where`, never by another path through the code:
so every sample of a batch may miss something else, every process of a DDP group too, and gradients agree.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, get_args

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.jit._trace import is_tracing
from torch.nn.parameter import UninitializedParameter
from torch.utils import _pytree as pytree

from torchfilm.conditions import Classes, Tokens, encoded_size
from torchfilm.masks import as_mask, check_present, cleared, drawn, each_row, viewed
from torchfilm.modulation import aligned
from torchfilm.naming import check_choice
from torchfilm.sharding import in_parts
from torchfilm.signatures import signature_of

Null = Literal["learned", "zero"]
Combine = Literal["sum", "concat", "compose"]
Encoded = Tensor | tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Masked:
    """A condition that only some samples have: `Masked(labels, present)`; `Masked(None)` where none has it.

    Where `present` is False the value is not heard: any numbers, NaN included, which counts as 0 there, and
    any class of `Classes`, also one that there is not, as -1. An explicit mask is final: no dropout is drawn
    on top of it. A pytree, as `Modulation`.

    Args:
        value: what the condition takes, or None.
        present: booleans, one per sample, or one for all; None for all. A tensor, or what makes one: True,
            a list, an array. On a device best a tensor that is there: for copies of lists the host waits.
    """

    value: Any
    present: Bool[Tensor, "*batch"] | Sequence[bool] | np.ndarray | bool | None = None


torch.export.register_dataclass(Masked, serialized_type_name="torchfilm.Masked")
torch.serialization.add_safe_globals([Masked])  # exported programs hold the inputs of their making


class Sizes(int):
    """The size of a concatenation, that remembers the sizes of its parts: Sizes((3, 4)) == 7.

    What a generator that composes takes its input apart by; to all others it is a number.
    """

    parts: tuple[int, ...]

    def __new__(cls, parts: Sequence[int]) -> Sizes:
        """Return the sum of the sizes."""
        size = super().__new__(cls, sum(parts))
        size.parts = tuple(parts)
        return size

    def __getnewargs__(self) -> tuple[tuple[int, ...]]:  # type: ignore[override]
        """Copy and pickle by the parts."""
        return (self.parts,)


class Maybe(nn.Module):
    """A condition that may be missing: z = c(v) where it is present, and a null vector where it is not.

    Missing for a whole batch is None; for some samples, `Masked(v, present)`. In training a share of the
    samples loses it by chance, so that the network learns to do without, as classifier-free guidance needs
    (Ho and Salimans 2022, section 3.2, arXiv 2207.12598; `torchfilm.guide`). A conditioned network, which
    takes None for no condition at all and raises, is given `cond=Masked(None)`; masks that can be drawn again
    are `Masked(v, torch.rand(batch, generator=...) >= 0.1)`.

    None on one process of a DDP group and not on another is safe: with gradients all parameters take part in
    any case, with a gradient of zero where they had nothing to say.

    Args:
        condition: the condition; with Tokens(pooling=None) the null is one learned token.
        dropout: probability per sample to lose it in training, 0 to 1.
        null: "learned" (zero at the start) or "zero".
        device: where the null lives.
        dtype: its precision, if it is learned.

    Raises:
        ValueError: for a probability outside 0 to 1, an unknown null, or Classes without vectors.

    Example:
        >>> labels = Maybe(Classes(10, 64), dropout=0.1)
        >>> z = labels(torch.tensor([3, 0]))
        >>> z = labels(Masked(torch.tensor([3, 0]), torch.tensor([True, False])))
        >>> z = labels(None)
    """

    place = torch.empty(0)  # also of networks that were pickled before

    def __init__(
        self,
        condition: nn.Module,
        dropout: float = 0.0,
        *,
        null: Null = "learned",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if isinstance(condition, Classes) and condition.table is None:
            raise ValueError(
                f"Maybe: expected a condition that gives vectors, got {condition}, which gives classes.\n"
                f"Use Classes({condition.num_classes}, dim), or count 'missing' as a class of its own: "
                f"Classes({condition.num_classes + 1})."
            )
        _check_probability("Maybe: dropout", dropout)
        check_choice("Maybe: null", null, get_args(Null))
        self.condition = condition
        self.dim = encoded_size(condition)
        self._takes_several = _takes_several(condition)
        self.dropout = dropout
        start = torch.zeros(self.dim, device=device, dtype=dtype)
        self.null = nn.Parameter(start) if null == "learned" else None
        self.place = torch.empty(0, device=device)  # where this is; a buffer would make DDP send it round

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Maybe:  # noqa: FBT001, FBT002
        """Move and convert as modules do, and note where to."""
        super()._apply(fn, recurse)
        self.place = fn(self.place)
        return self

    def reset_parameters(self) -> None:
        """Set a learned null to zero."""
        if self.null is not None:
            nn.init.zeros_(self.null)

    def forward(self, value: Any, *more: Any, generator: torch.Generator | None = None) -> Encoded:
        """Return z, [*batch, dim], or [dim] for None, which is the same for every sample.

        Args:
            value: what the condition takes, None, or `Masked`.
            more: further arguments of the condition, as the mask of tokens.
            generator: where dropout draws from; only in training, and never where an explicit mask is given.

        Raises:
            ValueError: where the mask is not boolean, or has other sizes than the batch.
        """
        z, present = self.encode((value, *more) if more else value, generator=generator)
        if present is None and z is not None and self.training and self.dropout > 0:
            present = drawn(z[0] if isinstance(z, tuple) else z, self.dropout, generator)
        return self.choose(z, present)

    def encode(
        self, value: Any, *, generator: torch.Generator | None = None
    ) -> tuple[Encoded | None, Tensor | None]:
        """Return c(v), or None where it is missing for the batch, and the mask that was given, if any.

        A tuple holds several arguments where the condition takes several by position: the second is required
        or None by default, as a mask; before any other option it is one argument.
        """
        value, present = (value.value, value.present) if isinstance(value, Masked) else (value, None)
        if value is None:
            return None, None
        draws = generator is not None and isinstance(self.condition, Maybe | Several)
        options = {"generator": generator} if draws else {}
        arguments = value if self._takes_several and type(value) is tuple else (value,)
        if present is not None:
            first, others = arguments[:1], arguments[1:]
            first = pytree.tree_map(lambda leaf: cleared(leaf, present, self._is_good), first)
            # Infinity beside a condition may be a mask.
            others = pytree.tree_map(lambda leaf: cleared(leaf, present, lambda one: ~one.isnan()), others)
            arguments = (*first, *others)
        z = self.condition(*arguments, **options)
        if present is not None and not isinstance(present, Tensor):
            present = as_mask(present, (z[0] if isinstance(z, tuple) else z).device)
        return z, present

    def choose(self, z: Encoded | None, present: Tensor | None) -> Encoded:
        """Return z where it is present and the null elsewhere.

        Raises:
            ValueError: for a mask that is no boolean for each sample.
        """
        if z is None:
            return self._missing()
        tokens = z[0] if isinstance(z, tuple) else z
        null = tokens.new_zeros(self.dim) if self.null is None else self.null.to(tokens.dtype)
        if present is None:
            present = torch.ones((), dtype=torch.bool, device=tokens.device)
        check_present(present, tokens, 2 if isinstance(z, tuple) else 1)
        chosen = torch.where(viewed(present, tokens.ndim), tokens, null)
        if not isinstance(z, tuple):
            return chosen
        first = torch.zeros_like(z[1])
        first[..., :1] = True
        return chosen, torch.where(viewed(present, z[1].ndim), z[1], first)

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        return f"dropout={self.dropout:g}, null={'zero' if self.null is None else 'learned'!r}"

    def _is_good(self, value: Tensor) -> Tensor:
        """Say which numbers an encoder can read, of whole ones which may number rows of a table."""
        if value.is_floating_point():
            return value.isfinite()
        rows = self.condition.num_classes if isinstance(self.condition, Classes) else math.inf
        return (value >= 0) & (value < rows)

    def _missing(self) -> Encoded:
        """Return the null alone, with a gradient of zero to everything that is not read."""
        null = self.null
        if null is None:
            some = next(self.condition.parameters(), self.place)
            null = torch.zeros(self.dim, device=some.device)
        if torch.is_grad_enabled() and not is_tracing():
            for name, parameter in self.condition.named_parameters():
                lazy = isinstance(parameter, UninitializedParameter)
                if not parameter.requires_grad or (lazy and not self.training):
                    continue
                if lazy:
                    raise ValueError(
                        f"Maybe: expected a condition whose parameters have sizes where it is missing in "
                        f"training, got '{name}', which is lazy.\n"
                        f"Give the condition once before it is missing."
                    )
                if in_parts(parameter):
                    raise ValueError(
                        f"Maybe: expected a condition whose parameters are whole where it is missing in "
                        f"training, got '{name}', of which FSDP2 holds a part, for its encoder is sharded by "
                        f"itself.\n"
                        f"Give Masked(value, present) with False for each sample, which calls the encoder."
                    )
                null = null + torch.where(torch.zeros_like(null, dtype=torch.bool), parameter.sum().real, 0)
        if isinstance(self.condition, Tokens) and self.condition.pooling is None:
            return null.view(1, 1, -1), torch.ones(1, 1, dtype=torch.bool, device=null.device)
        return null


class Several(nn.Module):
    """Several conditions at once, by name: {"time": t, "text": (tokens, mask)}.

    - "concat": z = [z_1, z_2, ...]. With a linear head, the deltas of the conditions are added.
    - "sum": z = z_1 + z_2 + ..., all of one size: one head for all of them.
    - "compose": each condition has a generator of its own, and its modulations are applied one after the
      other, in order. z is the concatenation, which `build_generator(both.dim, sites)` takes apart again.

    A `Maybe` that is None or absent is replaced by its null; any other condition then is an error, for a null
    that training never met says nothing. Samples without theirs are `Masked`, which every condition may be.
    Conditions [B, d] and [B, T, d] go together, aligned from the left.

    Args:
        conditions: the conditions by name, in the order of their concatenation or application.
        combine: as above.
        joint_dropout: probability per sample to lose the `joint` ones at once in training, on top of their
            own. Training then meets the null of each, so they may be missing.
        joint: the names of those that are lost together, but for `Masked` ones; None for all that are
            `Maybe`, or for all if none is. Best without a diffusion's time step: joint=("text", "goal").

    Raises:
        ValueError: for no conditions, unpooled tokens, sizes that do not sum, a probability outside 0 to 1,
            or names in `joint` that are none of the conditions', or none at all.

    Example:
        >>> from torchfilm.conditions import Scalars, Vector
        >>> both = Several({"time": Scalars(1, 64), "text": Maybe(Vector(512), dropout=0.1)}, "concat")
        >>> z = both({"time": torch.rand(2, 1), "text": torch.rand(2, 512)})
        >>> z = both({"time": torch.rand(2, 1)})
    """

    def __init__(
        self,
        conditions: Mapping[str, nn.Module],
        combine: Combine = "concat",
        *,
        joint_dropout: float = 0.0,
        joint: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        check_choice("Several: combine", combine, get_args(Combine))
        _check_probability("Several: joint_dropout", joint_dropout)
        if not isinstance(conditions, Mapping | nn.ModuleDict):
            raise ValueError(
                f"Several: expected conditions by name, got a {type(conditions).__name__}.\n"
                f"Give {{'text': Vector(512), ...}}; in the call the values go by these names."
            )
        parts = {name: c if isinstance(c, Maybe) else Maybe(c) for name, c in conditions.items()}
        _check_parts(parts, combine)
        maybe = [name for name, c in conditions.items() if isinstance(c, Maybe)]
        joint = (maybe or list(parts)) if joint is None else joint
        self.joint = (joint,) if isinstance(joint, str) else tuple(joint)
        if joint_dropout > 0 and not self.joint:
            raise ValueError(
                "Several: joint expected the names of those that are lost together, got none.\n"
                "Leave joint= out for all that may be missing, or joint_dropout= out to lose none."
            )
        for name in self.joint:
            check_choice("Several: joint", name, list(parts))
        self.optional = tuple(maybe)
        self.combine = combine
        self.joint_dropout = joint_dropout
        self.parts: Any = nn.ModuleDict(parts)
        self.sizes = {name: part.dim for name, part in parts.items()}
        sizes = tuple(self.sizes.values())
        self.dim = {"sum": sizes[0], "concat": sum(sizes), "compose": Sizes(sizes)}[combine]

    @property
    def required(self) -> tuple[str, ...]:
        """Return the names of those that may not be missing, since training never meets their nulls."""
        missing = self.optional + (self.joint if self.joint_dropout > 0 else ())
        return tuple(name for name in self.parts if name not in missing)

    def forward(
        self, conditions: Mapping[str, Any], *, generator: torch.Generator | None = None
    ) -> Float[Tensor, "*batch dim"]:
        """Return z.

        Args:
            conditions: what each takes, None, or `Masked`, by name.
            generator: where dropout draws from, in training.

        Raises:
            ValueError: for names that are not among the conditions, for one that is missing and no `Maybe`,
                and for batches of different sizes.
        """
        self.check_given(conditions)
        return self.join(self.encode(conditions, generator=generator))

    def encode(
        self, conditions: Mapping[str, Any], *, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Return the vector of each condition by name, nulls in place, before they are combined."""
        self._check_names(conditions)
        encoded: dict[str, tuple[Tensor | None, Tensor | None]] = {}
        for name, part in self.parts.items():
            z, present = part.encode(conditions.get(name), generator=generator)
            if isinstance(z, tuple):
                raise ValueError(_not_vectors(name, part.condition))
            encoded[name] = z, present
        kept = self._kept(encoded, generator)
        chosen = {}
        for name, part in self.parts.items():
            z, present = encoded[name]
            if present is None and z is not None and self.training:
                present = kept if name in self.joint else None
                if part.dropout > 0:
                    own = drawn(z, part.dropout, generator)
                    present = own if present is None else own & present
                z = each_row(z, present)
            chosen[name] = part.choose(z, present)
        return chosen

    def join(self, vectors: Mapping[str, Tensor]) -> Tensor:
        """Return the sum or the concatenation of the vectors, [*batch, d] each, aligned from the left.

        Raises:
            ValueError: for vectors whose axes do not align.
        """
        each = aligned(*vectors.values())
        try:
            batch = torch.broadcast_shapes(*(z.shape[:-1] for z in each))
        except RuntimeError as error:
            raise ValueError(_unequal(vectors)) from error
        if self.combine != "sum":
            return torch.cat([z.expand(*batch, -1) for z in each], dim=-1)
        return sum(each[1:], start=each[0])

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        joint = f" of {', '.join(self.joint)}" if self.joint_dropout > 0 else ""
        return f"combine={self.combine!r}, joint_dropout={self.joint_dropout:g}{joint}"

    def _kept(
        self, encoded: Mapping[str, tuple[Any, Tensor | None]], generator: torch.Generator | None
    ) -> Tensor | None:
        """Draw which samples keep the joint conditions, or return None where nothing is dropped jointly."""
        if not self.training or self.joint_dropout == 0:
            return None
        given = {name: z for name, (z, _) in encoded.items() if z is not None}
        batches = {len(z) for z in given.values() if z.ndim > 1} - {1}
        if len(batches) > 1:
            raise ValueError(_unequal(given))
        batched = max(given.values(), key=lambda z: len(z) if z.ndim > 1 else 0, default=None)
        return None if batched is None else drawn(batched, self.joint_dropout, generator)

    def check_given(self, conditions: Mapping[str, Any]) -> None:
        """Raise ValueError where a condition that may not be missing is."""
        self._check_names(conditions)
        missing = [name for name in self.required if conditions.get(name) is None]
        if missing:
            raise ValueError(
                f"Several: expected all of {list(self.required)}, got none for {missing}.\n"
                f"What may be missing is said when it is made: Maybe({self.parts[missing[0]].condition}, "
                f"dropout=0.1); for single samples give Masked(value, present)."
            )

    def _check_names(self, conditions: Mapping[str, Any]) -> None:
        expected = list(self.parts)
        if not isinstance(conditions, Mapping):
            raise ValueError(
                f"Several: expected a mapping from names to conditions, got {type(conditions).__name__}.\n"
                f"Give {{{', '.join(f'{name!r}: ...' for name in expected)}}}."
            )
        for name in conditions:
            check_choice("Several:", name, expected, remedy="Leave it out.")


def _not_vectors(name: str, condition: object) -> str:
    return (
        f"Several: expected conditions that give vectors, got '{name}' {condition}, which gives tokens and "
        f"their mask.\n"
        f"Pool it, as Tokens does by 'mean' or 'attention'; unpooled tokens go alone, to cross-attention."
    )


def _unequal(vectors: Mapping[str, Tensor]) -> str:
    lines = "\n".join(f"  {name}  {tuple(z.shape)}" for name, z in vectors.items())
    return (
        f"Several: expected conditions of one batch, got different sizes.\n{lines}\n"
        f"Give every condition one row per sample; repeat_interleave what several samples share."
    )


def _check_parts(parts: Mapping[str, Maybe], combine: str) -> None:
    if not parts:
        raise ValueError("Several: expected conditions by name, got none.\nGive {'text': Vector(512), ...}.")
    for name, part in parts.items():
        if not name or "." in name or hasattr(nn.ModuleDict, name):
            raise ValueError(
                f"Several: expected names that modules may have, got {name!r}: it has a dot, or is a method "
                f"of nn.ModuleDict.\n"
                f"Use another, such as 'the_{name.replace('.', '_')}'."
            )
        if isinstance(part.condition, Tokens) and part.condition.pooling is None:
            raise ValueError(_not_vectors(name, part.condition))
        if isinstance(part.dim, Sizes):
            raise ValueError(
                f"Several: expected conditions that one generator reads, got '{name}' with "
                f"combine='compose', whose parts have a generator each.\n"
                f"Compose at the outermost: Several(..., combine='compose')."
            )
    sizes = {name: part.dim for name, part in parts.items()}
    if combine == "sum" and len(set(sizes.values())) > 1:
        raise ValueError(
            f"Several: expected conditions of one size to sum, got {sizes}.\n"
            f"Use combine='concat', or give all of them the same dim."
        )


def _takes_several(condition: nn.Module) -> bool:
    """Whether a tuple holds several arguments of a condition: the second is required, or None as of masks."""
    try:
        parameters = signature_of(condition.forward).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    defaults = [one.default for one in parameters if one.kind in positional]
    return len(defaults) > 1 and (defaults[1] is None or defaults[1] is inspect.Parameter.empty)


def _check_probability(option: str, value: float) -> None:
    if not isinstance(value, Real) or not 0 <= value <= 1:
        raise ValueError(
            f"{option} expected a probability from 0 to 1, got {value!r}.\nFor 10 % of the samples give 0.1."
        )
