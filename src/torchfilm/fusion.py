"""The ways to fuse a condition into features, behind one interface: FiLM and what it competes with.

A fusion says what is generated from the condition for each site and how that meets the features there.
`FUSIONS` names the ones that come with the library; a user's own is any object with the same two methods.

| name | y | paper |
| --- | --- | --- |
| film | gamma(z) x + beta(z) | Perez et al. 2018, arXiv 1709.07871 |
| scale | gamma(z) x | FiLM's ablation beta = 0 (section 5.2 there) |
| bias | x + beta(z) | its ablation gamma = 1: what concatenating z to the features does |
| gate | 2 sigmoid(a(z)) x | channel gates, as Hu et al. 2018, arXiv 1709.01507 |
| concat | x + W [x; tile(z)] + c | concatenation and a 1x1 convolution |
| low_rank | x + P (a(z) * (U x + u)) | low-rank bilinear, Kim et al. 2017, arXiv 1610.04325 |
| cross_attention | x + O softmax(Q(x) K(z)^T / sqrt(d)) V(z) | Vaswani et al. 2017, arXiv 1706.03762 |

Each is the identity, to the bit, until it is trained.
"""

from __future__ import annotations

import copy
import difflib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.functional import film
from torchfilm.generator import Generator
from torchfilm.mixing import Concat, CrossAttention, LowRank
from torchfilm.modulation import Modulation


@runtime_checkable
class Fusion(Protocol):
    """What `condition(..., fusion=)` takes: how values are generated, and how they are applied.

    A third method is optional. `fold(value) -> Modulation | Mixing` gives the affine map of the channels that
    does the same as `value`; with it, `fold(model)` writes a fixed condition into plain weights. A fourth,
    `sized(width) -> Fusion`, gives the same fusion with another inner width, and lets `match_params` choose.
    """

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return the generator: called with the condition, it gives a dict of one value for each site.

        Args:
            cond_dim: size of the condition's last axis.
            sites: name and number of channels of each site, in order.
        """
        ...

    def apply(self, x: Tensor, value: Any, dim: int, site: str) -> Tensor:
        """Return the fused features, with the shape and dtype of x.

        Pure: whatever weights it needs travel inside the value, so that one slot carries everything.

        Args:
            x: features with their channels on axis `dim`.
            value: what the generator made for this site, any pytree of tensors.
            dim: the channel axis of x.
            site: the name of the site, for messages.
        """
        ...


class Narrow(nn.Module):
    """Make the condition small before it is read: generator(P z), with P of `width` rows.

    With a linear generator behind it this is a head of rank `width`, and costs
    width * (cond_dim + outputs) parameters instead of cond_dim * outputs.
    """

    def __init__(self, cond_dim: int, width: int, generator: nn.Module) -> None:
        super().__init__()
        self.project = nn.Linear(cond_dim, width, bias=False)
        self.generator = generator

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> dict[str, Any]:
        """Return what the generator makes of the smaller condition."""
        return self.generator(self.project(condition))


class Film:
    """FiLM: y = gamma(z) * x + beta(z) (Perez et al. 2018), times a gate where one is emitted.

    Args:
        width: make the condition this small first; None for the generator on the condition itself.
        options: what `Generator` takes besides `cond_dim` and `sites`.

    Example:
        >>> fusion = Film(bound="exp")
        >>> value = fusion.build(7, {"here": 3})(torch.rand(2, 7))["here"]
        >>> y = fusion.apply(torch.rand(2, 3, 5), value, 1, "here")
    """

    def __init__(self, width: int | None = None, **options: Any) -> None:
        self.width = width
        self.options = options

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return a `Generator`; its values are Modulations."""
        if self.width is None:
            return Generator(cond_dim, sites, **self.options)
        return Narrow(cond_dim, self.width, Generator(self.width, sites, **self.options))

    def apply(self, x: Tensor, value: Modulation, dim: int, site: str) -> Tensor:
        """Return gate * (gamma * x + beta)."""
        folded = self.fold(value)
        return film(x, folded.gamma, folded.beta, dim, modulation_dim=-1, site=site)

    def fold(self, value: Modulation) -> Modulation:
        """Return the same map without a gate."""
        if value.gate is None:
            return value
        return Modulation(value.gate * value.gamma, value.gate * value.beta)

    def sized(self, width: int) -> Film:
        """Return the same fusion behind a condition made `width` numbers small."""
        other = copy.copy(self)
        other.width = width
        return other


class Scale(Film):
    """FiLM without its shift: y = gamma(z) * x (Perez et al. 2018, the ablation beta = 0)."""

    def __init__(self, width: int | None = None, **options: Any) -> None:
        super().__init__(width, emit=("gamma",), **options)


class Bias(Film):
    """FiLM without its factor: y = x + beta(z) (Perez et al. 2018, the ablation gamma = 1).

    As concatenating the condition to the features in front of a linear layer: only a shift arrives.
    """

    def __init__(self, width: int | None = None, **options: Any) -> None:
        super().__init__(width, emit=("beta",), **options)


class Gate(Film):
    """A bounded factor: y = 2 sigmoid(a(z)) * x, between closed (0) and doubled (2), 1 at the start."""

    def __init__(self, width: int | None = None, **options: Any) -> None:
        super().__init__(width, emit=("beta",), **options)

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return a generator whose Modulations have gamma = 2 sigmoid(a(z)) and beta = 0."""
        return Gates(super().build(cond_dim, sites))


class Gates(nn.Module):
    """Read a generator's beta as the logits of gates: gamma = 2 sigmoid(beta), beta = 0."""

    def __init__(self, logits: nn.Module) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> dict[str, Modulation]:
        """Return the modulation of each site, in order."""
        logits: dict[str, Modulation] = self.logits(condition)
        return {
            name: Modulation(2 * torch.sigmoid(m.beta), torch.zeros_like(m.beta))
            for name, m in logits.items()
        }


FUSIONS: dict[str, type[Fusion]] = {
    "film": Film,
    "scale": Scale,
    "bias": Bias,
    "gate": Gate,
    "concat": Concat,
    "low_rank": LowRank,
    "cross_attention": CrossAttention,
}


def resolve(fusion: str | Fusion, **options: Any) -> Fusion:
    """Return the fusion of that name, built with the options; one that is given as an object, as it is.

    Raises:
        ValueError: for an unknown name, for an object without `build` and `apply`, and for options beside an
            object, which has its own.

    Example:
        >>> resolve("film", bound="tanh", init="default").options["bound"]
        'tanh'
    """
    if not isinstance(fusion, str):
        if not isinstance(fusion, Fusion):
            raise ValueError(
                f"fusion: expected a name or an object with build() and apply(), got {fusion!r}.\n"
                f"The names are {_listed(FUSIONS)}."
            )
        if options:
            raise ValueError(
                f"fusion: expected no options beside an object of type {type(fusion).__name__}, "
                f"got {_listed(options)}.\nGive them to the object when it is made."
            )
        return fusion
    if fusion not in FUSIONS:
        near = difflib.get_close_matches(fusion, list(FUSIONS), n=3, cutoff=0.4)
        hint = (
            f"Did you mean {' or '.join(map(repr, near))}?" if near else f"Choose one of {_listed(FUSIONS)}."
        )
        raise ValueError(f"fusion: expected one of {_listed(FUSIONS)}, got {fusion!r}.\n{hint}")
    return FUSIONS[fusion](**options)


def _listed(names: Mapping[str, object] | Sequence[str]) -> str:
    return ", ".join(names)
