"""Fusions that mix channels or positions, so that their weights travel with their values.

Each is the identity at the start, to the bit: what is added to the features has a factor that is zero.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.affine import rounded
from torchfilm.functional import film
from torchfilm.heads import AffineHead, like_weights
from torchfilm.naming import check_size


@dataclass(frozen=True, eq=False)
class Mixing:
    """The value of `Concat`: y = x + up (weight x + shift) for each position.

    Args:
        weight: [C, C], or [W, C] where there is an `up`.
        shift: what the condition adds, [*batch, C] or [*batch, W].
        up: [C, W]; None for the identity.
    """

    weight: Tensor
    shift: Tensor
    up: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Bilinear:
    """The value of `LowRank`: y = x + up (factor * (down x + offset)) for each position.

    Args:
        down: [R, C].
        offset: [R].
        factor: what the condition generates, [*batch, R].
        up: [C, R].
    """

    down: Tensor
    offset: Tensor
    factor: Tensor
    up: Tensor


@dataclass(frozen=True, eq=False)
class Attending:
    """The value of `CrossAttention`: y = x + output softmax((query x) keys^T / sqrt(d)) values.

    Args:
        query: [W, C].
        keys: [B, heads, T, W / heads].
        values: as keys.
        output: [C, W].
        mask: [B, T], True where a token is real; None where all are.
    """

    query: Tensor
    keys: Tensor
    values: Tensor
    output: Tensor
    mask: Tensor | None = None


for _value in (Mixing, Bilinear, Attending):
    torch.export.register_dataclass(_value, serialized_type_name=f"torchfilm.{_value.__name__}")


class Concat:
    """Concatenate the tiled condition to the channels, project back: y = x + W [x; tile(z)] + c.

    Written as what it is: the half of W that meets the tiled condition makes the same shift at every
    position, so y = x + W_x x + (W_z z + c), and nothing is tiled. Behind FiLM's eyes: a shift (beta) and an
    unconditioned 1x1 convolution. W and c are zero at the start.

    Args:
        width: go through an inner layer of this many channels, y = x + A (B [x; tile(z)] + c), with A zero at
            the start; None for W itself.

    Raises:
        ValueError: for a width below 1.

    Example:
        >>> fusion = Concat()
        >>> value = fusion.build(7, {"here": 3})(torch.rand(2, 7))["here"]
        >>> y = fusion.apply(torch.rand(2, 3, 5), value, 1, "here")
    """

    def __init__(self, width: int | None = None) -> None:
        if width is not None:
            check_size("Concat: width", width)
        self.width = width

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return a generator of `Mixing` values."""
        return Concatenations(cond_dim, sites, self.width)

    def apply(self, x: Tensor, value: Mixing, dim: int, site: str) -> Tensor:
        """Return the sum of the features, their mixture and the shift.

        Raises:
            ValueError: for features of another number of channels.
        """
        mixed = _project(x, value.weight, dim, site)
        if value.up is None:
            return rounded(_shifted(x + mixed, value.shift, dim, site), x)
        return rounded(x + _project(_shifted(mixed, value.shift, dim, site), value.up, dim, site), x)

    def fold(self, value: Mixing) -> Mixing:
        """Return the same map without an inner layer."""
        if value.up is None:
            return value
        return Mixing(value.up @ value.weight, value.shift @ value.up.T.to(value.shift.dtype))

    def sized(self, width: int) -> Concat:
        """Return the same fusion with an inner layer of `width` channels."""
        return Concat(width)


class Concatenations(nn.Module):
    """The weights of `Concat` at each site, and the shifts of all from one product."""

    def __init__(self, cond_dim: int, sites: Mapping[str, int], width: int | None) -> None:
        super().__init__()
        self.sites = dict(sites)
        self.widths = [width or channels for channels in self.sites.values()]
        pairs = list(zip(self.widths, self.sites.values(), strict=True))
        self.shift = (AffineHead if width is None else nn.Linear)(cond_dim, sum(self.widths))
        self.weights = nn.ParameterList(torch.empty(w, c) for w, c in pairs)
        self.ups = None if width is None else nn.ParameterList(torch.empty(c, w) for w, c in pairs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the weights of the sites their start; those of the shifts are `shift`'s own."""
        for weight in self.weights:
            nn.init.zeros_(weight) if self.ups is None else _uniform(weight)
        for up in self.ups or ():
            nn.init.zeros_(up)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> dict[str, Mixing]:
        """Return the value of each site, in order."""
        condition = like_weights(condition, next(self.shift.parameters(), None))
        shifts = self.shift(condition).split(self.widths, dim=-1)
        ups = [None] * len(self.widths) if self.ups is None else _lasting(self, self.ups)
        parts = zip(self.sites, _lasting(self, self.weights), shifts, ups, strict=True)
        return {name: Mixing(weight, shift, up) for name, weight, shift, up in parts}

    def own_parameters(self) -> dict[str, int]:
        """Return how many parameters belong to each site alone."""
        layers = 1 if self.ups is None else 2
        rows = self.shift.weight.shape[1] + 1
        pairs = zip(self.widths, self.sites.items(), strict=True)
        return {name: width * (layers * channels + rows) for width, (name, channels) in pairs}


class LowRank:
    """A few mixtures of channels, each weighted by the condition: y = x + P (a(z) * (U x + u)).

    Low-rank bilinear pooling (Kim et al. 2017, arXiv 1610.04325, eq. 4) as a residual: the condition chooses
    among `width` rank-one maps, so it can move one channel into another, which FiLM cannot. a is zero at the
    start.

    Args:
        width: the rank, how many maps there are.

    Raises:
        ValueError: for a width below 1.

    Example:
        >>> fusion = LowRank(4)
        >>> value = fusion.build(7, {"here": 3})(torch.rand(2, 7))["here"]
        >>> y = fusion.apply(torch.rand(2, 3, 5), value, 1, "here")
    """

    def __init__(self, width: int = 16) -> None:
        check_size("LowRank: width", width)
        self.width = width

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return a generator of `Bilinear` values."""
        return Bilinears(cond_dim, sites, self.width)

    def apply(self, x: Tensor, value: Bilinear, dim: int, site: str) -> Tensor:
        """Return the sum of the features and their weighted mixtures.

        Raises:
            ValueError: for features of another number of channels.
        """
        inner = _project(x, value.down, dim, site)
        factor = value.factor
        chosen = film(inner, factor, factor * value.offset, dim, modulation_dim=-1, site=site)
        return rounded(x + _project(chosen, value.up, dim, site), x)

    def fold(self, value: Bilinear) -> Mixing:
        """Return the same map as one matrix per sample and a shift: weight [*batch, C, C]."""
        up = value.up.to(value.factor.dtype)
        chosen = up * value.factor[..., None, :]
        return Mixing(chosen @ value.down.to(up.dtype), (chosen @ value.offset.to(up.dtype)))

    def sized(self, width: int) -> LowRank:
        """Return the same fusion with another rank."""
        return LowRank(width)


class Bilinears(nn.Module):
    """The rank-one maps of `LowRank` at each site, and the factors of all from one product."""

    def __init__(self, cond_dim: int, sites: Mapping[str, int], rank: int) -> None:
        super().__init__()
        self.sites = dict(sites)
        self.rank = rank
        self.factor = AffineHead(cond_dim, rank * len(self.sites))
        self.downs = nn.ParameterList(torch.empty(rank, c) for c in self.sites.values())
        self.offsets = nn.ParameterList(torch.empty(rank) for _ in self.sites)
        self.ups = nn.ParameterList(torch.empty(c, rank) for c in self.sites.values())
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give the maps their start; the factors are those of `factor`."""
        for parts, start in ((self.downs, _uniform), (self.offsets, nn.init.normal_), (self.ups, _uniform)):
            for weight in parts:
                start(weight)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> dict[str, Bilinear]:
        """Return the value of each site, in order."""
        factors = self.factor(condition).split(self.rank, dim=-1)
        downs, offsets, ups = (_lasting(self, one) for one in (self.downs, self.offsets, self.ups))
        parts = zip(self.sites, downs, offsets, factors, ups, strict=True)
        return {name: Bilinear(*values) for name, *values in parts}

    def own_parameters(self) -> dict[str, int]:
        """Return how many parameters belong to each site alone."""
        rows = self.factor.weight.shape[1] + 2
        return {name: self.rank * (2 * channels + rows) for name, channels in self.sites.items()}


class CrossAttention:
    """Let every position look at the condition's tokens: y = x + O softmax(Q x (K z)^T / sqrt(d)) V z.

    Vaswani et al. 2017 (arXiv 1706.03762, eq. 1), without a norm of its own. It reads tokens and which of
    them are real, ([B, T, D], mask [B, T]), as `Tokens(dim, pooling=None)` gives them; a vector [B, D]
    counts as a single token, and then every position gets the same, as in `Bias`. What padding holds does
    not matter; a sequence without a real token adds nothing. O is zero at the start.

    On a CPU, second derivatives and forward-mode differentiation work only within
    `torch.nn.attention.sdpa_kernel(SDPBackend.MATH)`: torch's fused attention has none there.

    Args:
        width: size of queries, keys and values of all heads together; None for the channels of each site.
        heads: number of heads; the width is divisible by it.

    Raises:
        ValueError: for a width or heads below 1, and where a width is not divisible by the heads.

    Example:
        >>> fusion = CrossAttention(heads=3)
        >>> tokens, mask = torch.rand(2, 5, 7), torch.ones(2, 5, dtype=torch.bool)
        >>> value = fusion.build(7, {"here": 3})((tokens, mask))["here"]
        >>> y = fusion.apply(torch.rand(2, 3, 11), value, 1, "here")
    """

    def __init__(self, width: int | None = None, heads: int = 1) -> None:
        if width is not None:
            check_size("CrossAttention: width", width)
        check_size("CrossAttention: heads", heads)
        self.width = width
        self.heads = heads

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        """Return a generator of `Attending` values.

        Raises:
            ValueError: for a width that the heads do not share evenly.
        """
        for name, channels in sites.items():
            width = self.width or channels
            if width % self.heads:
                raise ValueError(
                    f"CrossAttention site '{name}': expected a width divisible by heads={self.heads}, "
                    f"got {width}.\nGive a width that all heads share evenly."
                )
        return Attentions(cond_dim, sites, self.width, self.heads)

    def apply(self, x: Tensor, value: Attending, dim: int, site: str) -> Tensor:
        """Return the sum of the features and what each position has read.

        Raises:
            ValueError: for features of another number of channels.
        """
        rows = x.movedim(dim, -1)
        flat = rows.reshape(rows.shape[0], math.prod(rows.shape[1:-1]), rows.shape[-1])
        _check_channels(x, value.query, dim, site)
        query = functional.linear(flat, value.query.to(x.dtype))
        heads, size = value.keys.shape[1], value.keys.shape[-1]
        split = query.unflatten(-1, (heads, size)).transpose(1, 2)
        keep = None if value.mask is None else value.mask[:, None, None, :]
        read = _attended(split, value.keys.to(split.dtype), value.values.to(split.dtype), keep)
        added = functional.linear(read.transpose(1, 2).flatten(2), value.output.to(read.dtype))
        return x + added.reshape(rows.shape).movedim(-1, dim).to(x.dtype)

    def sized(self, width: int) -> CrossAttention:
        """Return the same fusion with `width` numbers a head."""
        return CrossAttention(width * self.heads, self.heads)


class Attentions(nn.Module):
    """The projections of `CrossAttention` at each site; keys and values of all sites from one product."""

    def __init__(self, cond_dim: int, sites: Mapping[str, int], width: int | None, heads: int) -> None:
        super().__init__()
        self.sites = dict(sites)
        self.heads = heads
        self.cond_dim = cond_dim
        self.widths = [width or channels for channels in self.sites.values()]
        self.read = nn.Linear(cond_dim, 2 * sum(self.widths))
        pairs = list(zip(self.widths, self.sites.values(), strict=True))
        self.queries = nn.ParameterList(torch.empty(w, c) for w, c in pairs)
        self.outputs = nn.ParameterList(torch.empty(c, w) for w, c in pairs)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give queries and outputs their start; keys and values are those of `read`."""
        for query, output in zip(self.queries, self.outputs, strict=True):
            _uniform(query)
            nn.init.zeros_(output)

    def forward(
        self,
        condition: Float[Tensor, "*batch cond"]
        | tuple[Float[Tensor, "batch time cond"], Bool[Tensor, "batch time"] | None],
    ) -> dict[str, Attending]:
        """Return the value of each site, in order.

        Raises:
            ValueError: where the tokens are not [B, T, cond_dim], or the mask is not boolean.
        """
        tokens, mask = condition if isinstance(condition, tuple) else (condition, None)
        if tokens.ndim <= 2 and mask is None:
            tokens = tokens.reshape(-1, 1, tokens.shape[-1])
        if tokens.ndim != 3 or tokens.shape[-1] != self.cond_dim:
            raise ValueError(
                f"CrossAttention: expected tokens [B, T, {self.cond_dim}], got {tuple(tokens.shape)}.\n"
                f"Give tokens without pooling, as Tokens({self.cond_dim}, pooling=None) does."
            )
        if mask is not None and mask.dtype != torch.bool:
            raise ValueError(
                f"CrossAttention: expected a boolean mask, True where a token is real, got {mask.dtype}.\n"
                f"For 0 and 1 with 1 for real tokens use mask.bool()."
            )
        if mask is not None:
            tokens = torch.where(mask[..., None], tokens, 0)
        read = self.read(like_weights(tokens, next(self.read.parameters(), None)))
        both = read.split([2 * width for width in self.widths], dim=-1)
        pairs = [one.unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind() for one in both]
        queries, outputs = _lasting(self, self.queries), _lasting(self, self.outputs)
        parts = zip(self.sites, queries, pairs, outputs, strict=True)
        return {
            name: Attending(query, keys, values, output, mask)
            for name, query, (keys, values), output in parts
        }

    def own_parameters(self) -> dict[str, int]:
        """Return how many parameters belong to each site alone."""
        pairs = zip(self.widths, self.sites.items(), strict=True)
        return {name: 2 * width * (channels + self.cond_dim + 1) for width, (name, channels) in pairs}


def _lasting(module: nn.Module, parameters: Iterable[Tensor]) -> Iterable[Tensor]:
    """Return parameters that leave a module: where FSDP2 frees its own once it was called, copies."""
    return [one.clone() for one in parameters] if "_is_fsdp_managed_module" in vars(module) else parameters


def _attended(query: Tensor, keys: Tensor, values: Tensor, keep: Tensor | None) -> Tensor:
    """Return softmax(query keys^T / sqrt(d)) values, zero where no token is real.

    With a mask a compiler gets it written out: for torch's own, Inductor (PyTorch 2.13) keeps the strides of
    the first mask whose length it took as variable, and the backward pass stops at another length.
    """
    if keep is None or not torch.compiler.is_compiling():
        return functional.scaled_dot_product_attention(query, keys, values, attn_mask=keep)
    scores = query @ keys.transpose(-1, -2) * query.shape[-1] ** -0.5
    weights = scores.masked_fill(~keep, torch.finfo(scores.dtype).min).softmax(dim=-1)
    return weights.masked_fill(~keep, 0).to(values.dtype) @ values


def _uniform(weight: Tensor) -> None:
    """Start weights [out, in] as `nn.Linear` does."""
    nn.init.uniform_(weight, -(weight.shape[1] ** -0.5), weight.shape[1] ** -0.5)


def _project(x: Tensor, weight: Tensor, dim: int, site: str) -> Tensor:
    """Apply [out, in] weights to the channels of each position."""
    _check_channels(x, weight, dim, site)
    weight = weight.to(x.dtype)
    axis = dim % x.ndim
    if axis == 1 and x.ndim == 4:
        return functional.conv2d(x, weight[:, :, None, None])
    return functional.linear(x.movedim(axis, -1), weight).movedim(-1, axis)


def _shifted(x: Tensor, shift: Tensor, dim: int, site: str) -> Tensor:
    return film(x, shift.new_ones(1).expand_as(shift), shift, dim, modulation_dim=-1, site=site)


def _check_channels(x: Tensor, weight: Tensor, dim: int, site: str) -> None:
    if x.shape[dim] != weight.shape[1]:
        raise ValueError(
            f"site '{site}': the weights are for {weight.shape[1]} channels, but x has size {x.shape[dim]} "
            f"on its channel axis (dim={dim}).\n  x  {tuple(x.shape)}\n"
            f"Build the fusion with the site's channels, or give the axis that holds them."
        )
