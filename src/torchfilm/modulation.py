"""The one value that flows from a condition to a site: gamma, beta and, for residual branches, a gate.

`FiLM(x; gamma, beta) = gamma * x + beta` (Perez et al. 2018, eq. 2, arXiv 1709.07871). Stated once, for the
whole package:

- `gamma` is the final factor, not an offset from one. A generator predicts an offset and adds the one itself.
- gamma and beta are kept in float32 whatever precision the features have: 1 + 0.001 is 1 in bfloat16.
- The channel axis of a modulation is its last one: `[C]`, `[B, C]`, `[B, T, C]`. Only a full map, with an
  axis for each of the features', may follow their own layout, and then goes to `film` by hand.
- The other axes align from the left, as in `film`: beside gamma [B, T, C], beta [B, C] counts for every step.
- The order is always gamma, beta, gate.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Modulation:
    """Scale, shift and optional gate of one site: y = gamma * x + beta, or gate * y on a residual branch.

    `+`, `-` and `*` act on the final values, field by field, as the paper's zero-shot arithmetic does:
    `a + (b - c)` has gamma = gamma_a + gamma_b - gamma_c, and beta likewise (Perez et al. 2018, figure 10).
    So `b - c` is a direction and only a combination whose weights sum to one is a modulation; for those it
    makes no difference whether gamma or gamma - 1 is combined. One modulation after another is `compose`,
    never `+`.

    A Modulation is a pytree: it passes through `torch.compile`, `torch.export` and `torch.vmap`. Sizes are
    checked where it meets features, in `torchfilm.functional.film`.

    Args:
        gamma: the final factor, [C], [B, C], [B, T, C] or a full map; any real number.
        beta: the shift, shaped as gamma, or with axes of size 1 or fewer; in the units of the features.
        gate: the weight of a gated residual branch, shaped as gamma; None where there is no gate.

    Example:
        >>> a, b, c = (Modulation(torch.rand(2, 3), torch.rand(2, 3)) for _ in range(3))
        >>> moved = a + (b - c)
        >>> halfway = a.interpolate(b, 0.5)
    """

    gamma: Tensor
    beta: Tensor
    gate: Tensor | None = None

    # Without this, `gamma, beta = modulation` would walk over the rows of the batch, and fit by accident
    # where B == 2.
    __iter__ = None

    @classmethod
    def identity(cls, *shape: int, device: torch.device | str | None = None) -> Modulation:
        """Return gamma = 1, beta = 0 in float32, of the given shape: `Modulation.identity(2, 64)`."""
        gamma = torch.ones(shape, device=device, dtype=torch.float32)
        return cls(gamma, torch.zeros_like(gamma))

    def replace(self, **changes: Tensor | float | None) -> Modulation:
        """Return a copy with the named fields changed: `m.replace(gamma=0)` closes all channels.

        A number counts for every sample and channel.
        """
        like = self.gamma
        made = {
            key: torch.full_like(like, float(value)) if isinstance(value, Real) else value
            for key, value in changes.items()
        }
        return dataclasses.replace(self, **made)

    def detach(self) -> Modulation:
        """Return the same values, cut off from the graph that made them."""
        return self._map(torch.Tensor.detach)

    def to(self, *args: Any, **kwargs: Any) -> Modulation:
        """Move or convert every field; arguments as `torch.Tensor.to`."""
        return self._map(lambda field: field.to(*args, **kwargs))

    def compose(self, first: Modulation) -> Modulation:
        """Return the modulation that does `first`, then this one: self(first(x)).

        gamma = gamma_2 gate_1 gamma_1, beta = gamma_2 gate_1 beta_1 + beta_2, gate = gate_2 (a missing gate
        counts as one), since each is gate (gamma x + beta).
        """
        gamma, beta = first.gated()
        beta = paired(torch.add, paired(torch.mul, self.gamma, beta), self.beta)
        return Modulation(paired(torch.mul, self.gamma, gamma), beta, self.gate)

    def gated(self) -> tuple[Tensor, Tensor]:
        """Return gamma and beta, times the gate where there is one."""
        gate = self.gate
        if gate is None:
            return self.gamma, self.beta
        return paired(torch.mul, gate, self.gamma), paired(torch.mul, gate, self.beta)

    def inverse(self) -> Modulation:
        """Return the modulation that undoes this one, without a gate: 1 / (gate gamma) and -beta / gamma.

        Raises:
            ValueError: where gamma (or the gate) is zero: a closed channel has lost its features for good.
        """
        for name, field in (("gamma", self.gamma), ("gate", self.gate)):
            if field is not None and (closed := int((field == 0).sum())):
                raise ValueError(
                    f"Modulation.inverse: expected a {name} without zeros, "
                    f"got {closed} among {field.numel()} values.\n"
                    f"  {name}  {tuple(field.shape)}\n"
                    f"A channel multiplied by zero cannot be restored; keep the features instead."
                )
        return Modulation(1 / self.gated()[0], paired(torch.div, -self.beta, self.gamma))

    def interpolate(self, other: Modulation, weight: float | Tensor) -> Modulation:
        """Return (1 - weight) * self + weight * other; 0 is self, 1 is other, beyond is extrapolation.

        A tensor of weights broadcasts against gamma as torch does: `torch.linspace(0, 1, 5)[:, None]` on two
        modulations of shape [C] gives the five steps from one to the other, [5, C]; one for each sample is
        [B, 1], and [C] is one for each channel, also where B is C.

        Raises:
            ValueError: for weights that do not fit.
        """
        return self * (1 - weight) + other * weight

    def __add__(self, other: Modulation) -> Modulation:
        return self._zip(other, torch.add)

    def __sub__(self, other: Modulation) -> Modulation:
        return self._zip(other, torch.sub)

    def __mul__(self, weight: float | Tensor) -> Modulation:
        if isinstance(weight, Modulation | Mapping):
            raise ValueError(
                f"Modulation * {type(weight).__name__}: expected a number or a tensor of weights, got "
                f"modulations.\n"
                f"For one modulation after the other use second.compose(first), site by site."
            )
        if not isinstance(weight, Tensor) or weight.ndim == 0:
            return self._map(lambda field: field * weight)
        fields = self.present() if weight.ndim == 1 else aligned(*self.present())
        try:
            return Modulation(*(field * weight for field in fields))
        except RuntimeError:
            _check_weights(weight, fields)
            raise

    __rmul__ = __mul__

    def __getitem__(self, rows: Any) -> Modulation:
        """Return the rows of the batch picked by an integer, a slice, a list or an index tensor.

        A field that all samples share, [C] or [1, C], has as many rows as the others.

        Raises:
            ValueError: for a modulation without a batch axis.
        """
        return Modulation(*(field[rows] for field in self.of_rows()))

    def of_rows(self) -> tuple[Tensor, ...]:
        """Return the fields as `spread` does; ValueError where none has a batch axis, and so no rows."""
        fields = self.spread()
        if fields[0].ndim < 2:
            raise ValueError(
                f"Modulation[rows]: expected a batch axis in front of the channels, "
                f"got gamma {tuple(self.gamma.shape)} and beta {tuple(self.beta.shape)}.\n"
                f"This modulation is the same for every sample: there are no rows to pick."
            )
        return fields

    def spread(self) -> tuple[Tensor, ...]:
        """Return gamma, beta and the gate where there is one, aligned and expanded to one shape."""
        return torch.broadcast_tensors(*aligned(*self.present()))

    def present(self) -> list[Tensor]:
        """Return gamma, beta and the gate where there is one, as they are."""
        return [self.gamma, self.beta] if self.gate is None else [self.gamma, self.beta, self.gate]

    def _map(self, function: Callable[[Tensor], Tensor]) -> Modulation:
        return Modulation(*map(function, self.present()))

    def _zip(self, other: Modulation, function: Callable[[Tensor, Tensor], Tensor]) -> Modulation:
        if (self.gate is None) != (other.gate is None):
            raise ValueError(
                f"Modulation arithmetic: expected both sides with a gate or both without, "
                f"got {_fields(self)} and {_fields(other)}.\n"
                f"Give the one without a gate its own: m.replace(gate=torch.ones_like(m.gamma))."
            )
        both = zip(self.present(), other.present(), strict=True)
        return Modulation(*(paired(function, one, another) for one, another in both))


def _check_weights(weight: Tensor, fields: list[Tensor]) -> None:
    """Raise ValueError for weights that do not fit a field, as torch broadcasts."""
    for name, field in zip(("gamma", "beta", "gate"), fields, strict=False):
        sizes = zip(field.shape[::-1], weight.shape[::-1], strict=False)
        if any(m != n and 1 not in (m, n) for m, n in sizes):
            rows = [field.shape[0], *[1] * (field.ndim - 1)]
            raise ValueError(
                f"Modulation arithmetic: expected weights that fit {name} {tuple(field.shape)} from the "
                f"right, got {tuple(weight.shape)}.\n"
                f"One for each sample is {rows}, one for each along the last axis [{field.shape[-1]}]."
            )


def aligned(*fields: T, axes: int = 0) -> list[T]:
    """Return tensors or arrays with equally many axes, by axes of size 1 in front of the channels.

    So broadcasting, which aligns from the right, puts them together as `film` does, from the left: beside
    [B, T, C], [B, C] becomes [B, 1, C] and [C] becomes [1, 1, C]. `axes` is how many there are at least.

    Example:
        >>> [tuple(field.shape) for field in aligned(torch.rand(2, 3, 5), torch.rand(2, 5), torch.rand(5))]
        [(2, 3, 5), (2, 1, 5), (1, 1, 5)]
    """
    found: Any = fields
    axes = max(axes, *(field.ndim for field in found))
    return [
        field
        if field.ndim in (0, axes)
        else field.reshape((*field.shape[:-1], *(1,) * (axes - field.ndim), field.shape[-1]))
        for field in found
    ]


def paired(function: Callable[[Tensor, Tensor], Tensor], first: Tensor, second: Tensor) -> Tensor:
    """Return a function of two fields that are aligned from the left, as `film` aligns them."""
    return function(*aligned(first, second))


def check_modulations(who: str, values: Mapping[str, Any]) -> None:
    """Raise ValueError where the value of a site is no Modulation: other fusions have their own."""
    for site, value in values.items():
        if not isinstance(value, Modulation):
            raise ValueError(
                f"{who}: expected a Modulation for each site, got {type(value).__name__} at '{site}'.\n"
                f"Other fusions than FiLM have values of their own: conditioning(model).modulations(cond) "
                f"gives them, and model(x, modulation=...) takes them."
            )


def check_finite(who: str, site: str, **fields: Tensor) -> None:
    """Raise ValueError where numbers of a site are NaN or infinite."""
    for name, field in fields.items():
        if wrong := int((~field.isfinite()).sum()):
            raise ValueError(
                f"{who}: expected finite numbers at site '{site}', got NaN or infinity in {wrong} of "
                f"{field.numel()} values of {name}.\n"
                f"Find the samples: (~m.{name}.isfinite()).nonzero()."
            )


def _fields(modulation: Modulation) -> str:
    return "gamma, beta" if modulation.gate is None else "gamma, beta, gate"


torch.export.register_dataclass(Modulation, serialized_type_name="torchfilm.Modulation")
torch.serialization.add_safe_globals([Modulation])  # exported programs hold the inputs of their making
