"""The ways to fuse a condition into features, behind one interface: FiLM and what it competes with.

A fusion says what is generated from the condition for each site and how that meets the features there.
`FUSIONS` names the ones that come with the library; a user's own is any object with the same two methods.

| name | y | paper |
| --- | --- | --- |
| film | gamma(z) x + beta(z) | Perez et al. 2018, arXiv 1709.07871 |
| scale | gamma(z) x | FiLM's ablation beta = 0 (section 4.3 there) |
| bias | x + beta(z) | its ablation gamma = 1: what concatenating z to the features does |
| gate | 2 sigmoid(a(z)) x | channel gates, as Hu et al. 2018, arXiv 1709.01507 |
| concat | x + W [x; tile(z)] + c | concatenation and a 1x1 convolution |
| low_rank | x + P (a(z) * (U x + u)) | low-rank bilinear, Kim et al. 2017, arXiv 1610.04325 |
| cross_attention | x + O softmax(Q(x) K(z)^T / sqrt(d)) V(z) | Vaswani et al. 2017, arXiv 1706.03762 |

Each is the identity, to the bit, until it is trained.
"""

from __future__ import annotations

import bisect
import copy
import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, Protocol, Unpack, get_args, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.conditions import Classes, Tokens
from torchfilm.costs import num_parameters
from torchfilm.functional import film
from torchfilm.generator import ComposedGenerator, Generator, build_generator
from torchfilm.generator_options import NAMES, Options, OptionsButEmit
from torchfilm.heads import TableHead
from torchfilm.mixing import Attentions, Bilinears, Concat, Concatenations, CrossAttention, LowRank
from torchfilm.modulation import Modulation
from torchfilm.naming import check_choice
from torchfilm.several import Maybe, Several

Align = Literal["linear", "nearest"]


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


class Film:
    """FiLM: y = gamma(z) * x + beta(z) (Perez et al. 2018), times a gate where one is emitted.

    Args:
        align: resize modulations per step, [B, T, C], to the length that the features of a site have, where
            a condition and a strided network have other rates: "linear" between the steps, or the "nearest"
            step. Both cover the same time. Only modulations with as many axes as the features are resized,
            so [B, 1, T, C] where several rows share a condition. Of padded sequences "linear" blends the
            first step of padding into the last real one: pad by repeating the last step, or use "nearest".
            None to refuse other lengths.
        options: what `Generator` takes besides `cond_dim` and `sites`.

    Raises:
        ValueError: for another `align`.

    Example:
        >>> fusion = Film(bound="exp", align="linear")
        >>> value = fusion.build(7, {"here": 3})(torch.rand(2, 4, 7))["here"]
        >>> y = fusion.apply(torch.rand(2, 3, 12), value, 1, "here")
    """

    align: Align | None = None

    def __init__(self, *, align: Align | None = None, **options: Unpack[Options]) -> None:
        check_choice("Film: align", align, (None, *get_args(Align)))
        self.align = align
        self.options = options

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return a `Generator`; its values are Modulations."""
        return build_generator(cond_dim, sites, **self.options)

    def apply(self, x: Tensor, value: Modulation, dim: int, site: str) -> Tensor:
        """Return gate * (gamma * x + beta); ValueError for a tuple, which is no Modulation."""
        if type(value) is tuple:
            raise ValueError(
                f"Site '{site}': expected a Modulation, got a tuple of {len(value)}.\n"
                f"Give Modulation(gamma, beta), with a gate as the third where there is one."
            )
        if self.align is not None:
            value = Modulation(*(_resized(field, x, dim, self.align) for field in value.present()))
        return film(x, value.gamma, value.beta, dim, gate=value.gate, modulation_dim=-1, site=site)

    def fold(self, value: Modulation) -> Modulation:
        """Return the same map without a gate."""
        return value if value.gate is None else Modulation(*value.gated())

    def sized(self, width: int) -> Film:
        """Return the same fusion with a head of this rank; ValueError for a table, which has none."""
        if self.options.get("head") == "table":
            raise ValueError(
                "match_params: expected a head that reads vectors, whose rank can be chosen, got "
                "head='table', which has a row for each class.\nLeave one of the two out."
            )
        other = copy.copy(self)
        other.options = {**self.options, "head": f"lowrank:{width}"}
        return other


def _resized(field: Tensor, x: Tensor, dim: int, align: Align) -> Tensor:
    """Resize the axes between batch and channels to those of x; of size 1 they fit already.

    With other axes than x nothing is resized: which of them are the steps is not known.
    """
    if field.ndim != x.ndim:
        return field
    sizes = [size for i, size in enumerate(x.shape) if i != dim % x.ndim]
    for axis in range(1, field.ndim - 1):
        if field.shape[axis] not in (1, sizes[axis]):
            last = field.movedim(axis, -1)
            mode = "linear" if align == "linear" else "nearest-exact"
            resized = functional.interpolate(last.flatten(1, -2), size=sizes[axis], mode=mode)
            field = resized.unflatten(1, last.shape[1:-1]).movedim(-1, axis)
    return field


class Scale(Film):
    """FiLM without its shift: y = gamma(z) * x (Perez et al. 2018, the ablation beta = 0)."""

    def __init__(self, **options: Unpack[OptionsButEmit]) -> None:
        super().__init__(emit=("gamma",), **options)


class Bias(Film):
    """FiLM without its factor: y = x + beta(z) (Perez et al. 2018, the ablation gamma = 1).

    As concatenating the condition to the features in front of a linear layer: only a shift arrives.
    """

    def __init__(self, **options: Unpack[OptionsButEmit]) -> None:
        super().__init__(emit=("beta",), **options)


class Gate(Film):
    """A bounded factor: y = 2 sigmoid(a(z)) * x, between closed (0) and doubled (2), 1 at the start."""

    def __init__(self, **options: Unpack[OptionsButEmit]) -> None:
        super().__init__(emit=("beta",), **options)

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return a generator whose Modulations have gamma = 2 sigmoid(a(z)) and beta = 0."""
        return Gates(build_generator(cond_dim, sites, **self.options))


class Gates(nn.Module):
    """Read a generator's beta as the logits of gates: gamma = 2 sigmoid(beta), beta = 0."""

    def __init__(self, logits: Generator | ComposedGenerator) -> None:
        super().__init__()
        self.logits = logits

    def forward(
        self, condition: Float[Tensor, "*batch cond"] | Int[Tensor, "*batch"]
    ) -> dict[str, Modulation]:
        """Return the modulation of each site, in order."""
        logits: dict[str, Modulation] = self.logits(condition)
        return {
            name: Modulation(2 * torch.sigmoid(m.beta), torch.zeros_like(m.beta))
            for name, m in logits.items()
        }

    def own_parameters(self) -> dict[str, int]:
        """Return how many parameters belong to each site alone."""
        return self.logits.own_parameters()


FUSIONS: dict[str, type[Fusion]] = {
    "film": Film,
    "scale": Scale,
    "bias": Bias,
    "gate": Gate,
    "concat": Concat,
    "low_rank": LowRank,
    "cross_attention": CrossAttention,
}


def resolve(
    fusion: str | Fusion, *, match_params: int | float | nn.Module | None = None, **options: Any
) -> Fusion:
    """Return the fusion of that name, built with the options; one that is given as an object, as it is.

    Args:
        fusion: a name of `FUSIONS`, or an object.
        match_params: choose the inner width so that the fusion adds as many parameters as this number, or as
            the generator of this conditioned model has: see `Matched`.
        options: what the fusion of that name takes.

    Raises:
        ValueError: for an unknown name, for an object without `build` and `apply`, for options beside an
            object, which has its own, and for a match that is impossible.

    Example:
        >>> resolve("film", bound="tanh", init="default").options["bound"]
        'tanh'
    """
    if match_params is not None:
        return Matched(resolve(fusion, **options), match_params)
    if not isinstance(fusion, str):
        if not isinstance(fusion, Fusion) or isinstance(fusion, type):  # a class has the methods too
            raise ValueError(
                f"fusion: expected a name or an object with build() and apply(), got {fusion!r}.\n"
                f"The names are {', '.join(FUSIONS)}."
            )
        if options:
            raise ValueError(
                f"fusion: expected no options beside an object of type {type(fusion).__name__}, "
                f"got {', '.join(options)}.\nGive them to the object when it is made."
            )
        return fusion
    check_choice("fusion:", fusion, FUSIONS)
    for name in options:
        check_choice(f"fusion={fusion!r}: options", name, takes(fusion), remedy="Leave it out.")
    return FUSIONS[fusion](**options)


def takes(fusion: str) -> list[str]:
    """Return the names of the options that the fusion of that name takes."""
    kind = FUSIONS[fusion]
    if not issubclass(kind, Film):
        return ["match_params", *inspect.signature(kind).parameters]
    generated = [name for name in NAMES if name != "emit" or kind is Film]  # the others set it themselves
    return ["match_params", "align", *generated]


def in_precision(generator: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a generator of the library with its parameters in a precision; another one as it is."""
    if _reads_as(generator, *_VECTORS, Attentions):
        for part in generator.modules():  # `to` would raise in FakeTensorMode
            for name, own in part.named_parameters(recurse=False):
                part.register_parameter(name, nn.Parameter(own.detach().to(dtype)))
    return generator


def check_reads(generator: nn.Module, cond: nn.Module) -> None:
    """Refuse a generator of the library that cannot read what an encoder gives, before anything runs.

    Args:
        generator: what reads the encoded condition; with a forward of its own, it is trusted.
        cond: the encoder.

    Raises:
        ValueError: for classes without vectors in front of anything but a table, tokens without pooling in
            front of anything but attention, and conditions that are to be composed, but would not be.
    """
    if not _reads_as(generator, *_VECTORS, Attentions):
        return
    inner, kind = cond.condition if isinstance(cond, Maybe) else cond, type(generator).__name__
    if isinstance(inner, Tokens) and inner.pooling is None:
        check_reads_tokens(generator, cond)
    parts = list(generator.modules())
    table = any(isinstance(part, TableHead) for part in parts)
    if isinstance(inner, Classes) and inner.table is None and not table:
        raise ValueError(
            f"condition: expected vectors in front of {kind}, got {inner}, which returns the class itself.\n"
            f"Use Classes({inner.num_classes}, 64), or head='table' for a row of modulations per class."
        )
    composes = any(isinstance(part, ComposedGenerator) for part in parts)
    if isinstance(cond, Several) and cond.combine == "compose" and not composes:
        raise ValueError(
            f"condition: expected a fusion whose values can be composed, got {kind}, which would read a "
            f"concatenation.\n"
            f"Use combine='concat' with it, or fusion='film', 'scale', 'bias' or 'gate' with 'compose'."
        )


def check_reads_tokens(generator: nn.Module, cond: nn.Module) -> None:
    """Refuse a generator of the library that reads vectors where an encoder gave tokens and their mask."""
    if _reads_as(generator, *_VECTORS):
        encoder = cond.condition if isinstance(cond, Maybe) else cond
        raise ValueError(
            f"condition: expected one vector per sample in front of {type(generator).__name__}, got "
            f"{encoder}, which gives tokens and their mask.\n"
            f"Use pooling='mean' or 'attention' of Tokens, or fusion='cross_attention'."
        )


_VECTORS = (Generator, ComposedGenerator, Gates, Concatenations, Bilinears)


def _reads_as(generator: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Tell whether a generator has the forward of one of these; that of a subclass may read anything."""
    return any(type(generator).forward is kind.forward for kind in kinds)


@dataclass(frozen=True)
class Match:
    """What `Matched.choose` found: the fusion, its inner width (None for its own), and both numbers."""

    fusion: Fusion
    width: int | None
    parameters: int
    target: int

    def __str__(self) -> str:
        """Say in one line what was reached."""
        name, away = type(self.fusion).__name__, self.parameters / self.target - 1
        size = "its own width" if self.width is None else f"width {self.width}"
        return f"{name}: {size}, {self.parameters:,} parameters for {self.target:,} ({away:+.2%})"


class Matched:
    """A fusion that adds a given number of parameters: its inner width is chosen once the sites are known.

    Comparing fusions of different sizes compares sizes. Which number is reached, and how far it is from the
    target, is what `choose` says.

    Args:
        fusion: what is sized, a name or an object with `sized`.
        target: the number of parameters, from 1 on, or a conditioned model, as it is or wrapped: the number
            its generator has. Those of the condition itself (an embedding, a pooling) do not count: both
            models have the same.
        tolerance: how far the number reached may be from the target, as a part of it.

    Raises:
        ValueError: for a fusion that cannot be sized, a model that is not conditioned or has a generator
            without parameters, and where no width comes close enough.

    Example:
        >>> fusion = Matched("concat", 20_000)
        >>> print(fusion.choose(512, {"block1": 64, "block2": 128}))
        Concat: width 14, 19,740 parameters for 20,000 (-1.30%)
    """

    def __init__(
        self,
        fusion: str | Fusion,
        target: int | float | nn.Module,
        *,
        tolerance: float = 0.05,
        **options: Any,
    ) -> None:
        self.fusion: Any = resolve(fusion, **options)
        number = _generator_parameters(target) if isinstance(target, nn.Module) else target
        if not isinstance(number, Real) or not 1 <= number < math.inf:
            raise ValueError(
                f"match_params: expected a number of parameters from 1 on, or a conditioned model whose "
                f"generator has some (a tabulated one has none), got {number!r}.\n"
                f"Give the model before it was tabulated, or the number."
            )
        self.target = int(number)
        self.tolerance = tolerance
        if not hasattr(self.fusion, "sized"):
            raise ValueError(
                f"match_params: expected a fusion with sized(width), got {type(self.fusion).__name__}.\n"
                f"Give it a method that returns the same fusion with another inner width."
            )

    def choose(self, cond_dim: int, sites: Mapping[str, int]) -> Match:
        """Return the fusion whose number of parameters is nearest to the target.

        Raises:
            ValueError: where that is further away than the tolerance.
        """

        def built(width: int | None) -> Match:
            fusion = self.fusion if width is None else self.fusion.sized(width)
            with torch.device("meta"):
                return Match(fusion, width, num_parameters(fusion.build(cond_dim, sites)), self.target)

        high = 1
        while high < self.target and built(high).parameters < self.target:  # each width adds one at least
            high *= 2
        widths = range(max(high // 2, 1), high + 1)
        above = bisect.bisect_left(widths, self.target, key=lambda width: built(width).parameters)
        near = [built(widths[i]) for i in (above - 1, above) if 0 <= i < len(widths)]
        best = min([*near, built(None)], key=lambda match: abs(match.parameters - self.target))
        if abs(best.parameters - self.target) > self.tolerance * self.target:
            raise ValueError(
                f"match_params: expected {self.target:,} parameters within {self.tolerance:.0%}, "
                f"got no width that comes so close.\n"
                f"  {best}\n"
                f"Give another target, a wider tolerance, or other options of the fusion."
            )
        return best

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return the generator of the fusion that was chosen for these sites."""
        return self.choose(cond_dim, sites).fusion.build(cond_dim, sites)

    def apply(self, x: Tensor, value: Any, dim: int, site: str) -> Tensor:
        """Return what the fusion gives; its width is in the value."""
        return self.fusion.apply(x, value, dim, site)

    @property
    def fold(self) -> Callable[[Any], Any]:
        """The method of the fusion; missing where that has none."""
        return self.fusion.fold


def _generator_parameters(model: nn.Module) -> int:
    """Return how many a conditioned model's generator has; compiled, distributed and averaged ones too."""
    place = re.compile(r"((_orig_mod|module)\.)*film\.generator")
    generators = [module for name, module in model.named_modules() if place.fullmatch(name)]
    if not generators:
        raise ValueError(
            f"match_params: expected a number or a conditioned model, got {type(model).__name__} without a "
            f"film.generator.\nCondition it first, or give the number of parameters."
        )
    return num_parameters(generators[0])
