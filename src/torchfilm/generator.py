"""From a condition to one Modulation per site: a trunk once, one fused head for all sites.

One matrix product and views of its result, where a Linear per site would launch as many products. That pays
with many sites: 24 of 64 channels on 64 numbers at batch 1 take 0.43 of a bare Linear per site. With few it
does not: 4 sites 1.05, 8 on 512 numbers 0.89, and these make gamma, which the bare Linears leave to be done.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Unpack

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.modules import module as _module

from torchfilm import onepass
from torchfilm.affine import has_graph
from torchfilm.costs import describe
from torchfilm.generator_options import ACTIVATIONS, Emitted, Options, read_options
from torchfilm.heads import AffineHead, AnyHead, build_head, check_cond_dim, like_weights
from torchfilm.modulation import Modulation, aligned
from torchfilm.naming import check_size
from torchfilm.several import Sizes

_SMALL = 32_768
_WHOLE = ("gamma", "beta")  # a modulation has these, and may have a gate behind them
_SCALE_STD = 1e-3  # the learned scale's with init="default", as in CNAPs


class Generator(nn.Module):
    """Predict the modulation of every site: gamma = offset + f(W h(z) + b), beta = V h(z) + c, h the trunk.

    Perez et al. 2018, eq. 1 (arXiv 1709.07871). Unbounded, gamma = 1 + delta, and the network starts as if it
    were not conditioned. The bounds "sigmoid", "tanh" and "exp" are those of the paper's ablations and give
    the final gamma without the one (table 2: 95.9, 96.3 and 96.3 % against 97.4 % unbounded).

    The rows of the head are [gamma of C, beta of C, gate of C], as far as they are emitted, for each site in
    order, as in the paper's own system, so that its checkpoints convert by renaming. Modulations come out in
    float32 also under autocast, which may take the matrix product in bfloat16; the one is added after.

    Args:
        cond_dim: size of the condition's last axis; for head="table" the number of classes.
        sites: name and number of channels of each site, in order.
        device: where the parameters live.
        dtype: their precision; modulations are in float32 or wider in any case.
        options: fields of `GeneratorOptions`.

    Raises:
        ValueError: for no sites, sizes that are no whole numbers from 1 on, unknown options, or an "identity"
            that the bound makes impossible.

    Example:
        >>> generator = Generator(512, {"block1": 64, "block2": 128}, trunk=(256, "silu"))
        >>> generator(torch.rand(2, 512))["block2"].gamma.shape
        torch.Size([2, 128])
    """

    def __init__(
        self,
        cond_dim: int,
        sites: Mapping[str, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        self.options = read_options(options)
        check_size("Generator: cond_dim", cond_dim)
        _check_sites(sites)
        self.sites = dict(sites)
        self.cond_dim = cond_dim
        self.bound = self.options.bound
        self.emit = self.options.emit
        self.fields = self.options.fields(self.sites)
        self.gamma_offset = self.options.offset
        self._rows = tuple(self.sites[name] for name, fields in self.fields.items() for _ in fields)
        self.offsets = self._all_offsets()
        kinds = [(channels, self.fields[name]) for name, channels in self.sites.items()]
        # Neighbours of one width and the same fields share their operations: (width, fields, how many sites).
        self._runs = tuple((*kind, len(list(run))) for kind, run in itertools.groupby(kinds))
        widths = [channels * len(fields) for channels, fields in kinds]
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        self.trunk = _build_trunk(cond_dim, self.options.trunk, own)
        numbers = [layer for layer in self.options.trunk if not isinstance(layer, str)]
        self._trunk_learns = len(numbers) > 0
        head_dim = numbers[-1] if numbers else cond_dim
        self.head = build_head(self.options.head, head_dim, widths, self.options.start, **own, kinds=kinds)
        learned = self.options.learned_scale
        self.scale = nn.Parameter(torch.empty(sum(widths), **own)) if learned else None
        self._is_affine = self.scale is None and not self.options.trunk
        self._reset_scale()

    def reset_parameters(self) -> None:
        """Give the head its start again: the identity, or random weights with init="default"."""
        for part in self.head.modules():
            if isinstance(part, AnyHead):
                part.reset_parameters()
        self._reset_scale()

    def forward(
        self, condition: Float[Tensor, "*batch cond"] | Int[Tensor, "*batch"]
    ) -> dict[str, Modulation]:
        """Return the modulation of each site by name, in the order of `sites`; gamma, beta: [*batch, C].

        Raises:
            ValueError: where the condition's last axis is not `cond_dim`.
        """
        kernels = onepass.kernels()
        parts = None if kernels is None else self._in_one_call(kernels, condition)
        return self.of_raw(self.raw(condition)) if parts is None else self._of_parts(parts)

    def raw(
        self, condition: Float[Tensor, "*batch cond"] | Int[Tensor, "*batch"]
    ) -> Float[Tensor, "*batch rows"]:
        """Return what the head predicts, all rows of all sites, before bounds and offsets.

        Raises:
            ValueError: for a condition of another size.
        """
        trunk = self.trunk
        if len(trunk) > 0:
            check_cond_dim(condition, self.cond_dim, "Generator")
            weights = trunk if self._trunk_learns else self.head
            condition = trunk(like_weights(condition, next(weights.parameters(), None)))
        raw, scale = self.head(condition), self.scale
        return raw if scale is None else raw * scale

    def _in_one_call(self, kernels: Any, condition: Tensor) -> tuple[Tensor, ...] | None:
        """Return every field of every site by the kernels, where a head and offsets make them; or None.

        None with a graph, and for several conditions, for which torch's product reads the weights once.
        """
        offsets = self.offsets
        if offsets is None or not self._is_affine or _overridden(self):
            return None
        head: Any = self._modules["head"]  # a third of the time that the attributes take, here and below
        if type(head) is not AffineHead or _watched(head):
            return None
        weight, bias = head._parameters.get("weight"), head._parameters.get("bias")
        if weight is None or bias is None or has_graph(condition, weight, bias):
            return None
        return kernels.generated(condition, weight, bias, offsets, self._rows)  # type: ignore[no-any-return]

    def of_raw(self, raw: Float[Tensor, "*batch rows"]) -> dict[str, Modulation]:
        """Return the modulation of each site from what `raw` gives: views, bounds, offsets."""
        if self.offsets is not None and _small(raw):
            return self.divided(raw + self.offsets)
        rows = [len(fields) * width * count for width, fields, count in self._runs]
        parts, made = raw.split(rows, dim=-1) if len(rows) > 1 else (raw,), []
        for part, (width, fields, count) in zip(parts, self._runs, strict=True):
            made += self._of_one_kind(part.view(*part.shape[:-1], count, len(fields), width), fields)
        return dict(zip(self.sites, made, strict=True))

    def divided(self, rows: Float[Tensor, "*batch rows"]) -> dict[str, Modulation]:
        """Return the modulation of each site, rows being final: views of them, by one operation."""
        return self._of_parts(rows.split(self._rows, dim=-1))

    def penalty(self, modulations: Mapping[str, Modulation] | None = None) -> Tensor:
        """Return how far the modulations are from the identity, to be added to the loss with a small weight.

        With modulations: the sum over sites and channels of (gamma - 1)^2 + beta^2 + (gate - gate_start)^2,
        in the mean over samples, 0 without any. Without modulations: the sum of r^2 of the learned scale,
        which needs no condition, as the regulariser of CNAPs (Requeima et al. 2019, arXiv 1906.07697).

        Raises:
            ValueError: without modulations where there is no learned scale.
        """
        if modulations is not None:
            return _distances(modulations, self.options.gate_start)
        if self.scale is None:
            raise ValueError(
                "Generator.penalty: expected modulations, got none, and there is no learned scale either.\n"
                "Give those of the batch, generator.penalty(generator(z)), or build with learned_scale=True."
            )
        return self.scale.square().sum()

    def describe(self) -> str:
        """Return a table of what each site costs: channels, parameters of its rows, share of the generator.

        What all sites use alike, a trunk or a shared or low-rank projection, has a line of its own.
        """
        return describe(self, self.sites)

    def own_parameters(self) -> dict[str, int]:
        """Return how many parameters belong to each site alone."""
        rows = {name: channels * len(self.fields[name]) for name, channels in self.sites.items()}
        scales = 0 if self.scale is None else 1
        return {name: self.head.own_parameters(n) + n * scales for name, n in rows.items()}

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        emit = self.options.patterns or self.emit
        options = f"bound={self.bound!r}, emit={emit}, gamma_offset={self.gamma_offset}"
        return f"sites={len(self.sites)}, {options}"

    def _reset_scale(self) -> None:
        if self.scale is not None:
            nn.init.normal_(self.scale, std=_SCALE_STD if self.options.init == "default" else 0.0)

    def _of_parts(self, parts: Sequence[Tensor]) -> dict[str, Modulation]:
        """Return the modulation of each site, its fields in their order."""
        at, made = 0, {}
        for name, fields in self.fields.items():
            own = parts[at : at + len(fields)]
            made[name] = Modulation(*own if fields[:2] == _WHOLE else _completed(fields, own))
            at += len(fields)
        return made

    def _all_offsets(self) -> Float[Tensor, " rows"] | None:
        """Return what is added to each row, where that makes modulations; None where more makes them.

        A sum and a split then do what each kind of site takes five operations for. Those are faster where all
        sites lack gamma or beta, since they make the ones and zeros of a kind at once.
        """
        whole = any(fields[:2] == _WHOLE for fields in self.fields.values())
        if self.bound is not None or not whole:
            return None
        start = {"gamma": self.gamma_offset, "beta": 0.0, "gate": self.options.gate_start}
        rows = np.repeat([start[field] for fields in self.fields.values() for field in fields], self._rows)
        return torch.from_numpy(rows.astype(np.float32))  # also under another default device

    def _of_one_kind(self, raw: Tensor, fields: tuple[Emitted, ...]) -> list[Modulation]:
        """Return the modulations of sites that are alike: [*batch, sites, fields, width]."""
        given = dict(zip(fields, raw.unbind(dim=-2), strict=True))
        if "gamma" in given:
            given["gamma"] = self.options.gamma(given["gamma"])
        if "gate" in given:
            given["gate"] = given["gate"] + self.options.gate_start
        return list(map(Modulation, *(field.unbind(dim=-2) for field in _completed(fields, given.values()))))


class ComposedGenerator(nn.Module):
    """Several generators, each on its slice of the condition; their modulations are applied in order.

    gamma = gamma_2 gamma_1, beta = gamma_2 beta_1 + beta_2, and of the one branch that all conditions weigh
    gate = gate_2 gate_1, for `Several(..., combine="compose")`.

    Args:
        cond_dims: size of each slice, in order.
        sites: as of `Generator`.
        device: where the parameters live.
        dtype: their precision; modulations are in float32 or wider in any case.
        options: fields of `GeneratorOptions`, for each of them.

    Raises:
        ValueError: as `Generator`, and for no slices.

    Example:
        >>> generator = ComposedGenerator((3, 4), {"block": 64})
        >>> gamma = generator(torch.rand(2, 7))["block"].gamma
    """

    def __init__(
        self,
        cond_dims: Sequence[int],
        sites: Mapping[str, int],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[Options],
    ) -> None:
        super().__init__()
        if not cond_dims:
            raise ValueError(
                "ComposedGenerator: expected the sizes of the conditions, got none.\n"
                "Give one for each, as build_generator does for Several(..., combine='compose')."
            )
        self.cond_dims = tuple(cond_dims)
        self.sites = dict(sites)
        parts = (Generator(dim, sites, device=device, dtype=dtype, **options) for dim in cond_dims)
        self.parts: Any = nn.ModuleList(parts)

    def forward(self, condition: Float[Tensor, "*batch cond"]) -> dict[str, Modulation]:
        """Return the composed modulation of each site; ValueError where the last axis has another size."""
        if condition.ndim == 0 or condition.shape[-1] != sum(self.cond_dims):
            raise ValueError(
                f"ComposedGenerator: expected {sum(self.cond_dims)} numbers on the condition's last axis, "
                f"{self.cond_dims} of each, got shape {tuple(condition.shape)}.\n"
                f"Use Several(..., combine='compose') in front of it."
            )
        slices = condition.split(self.cond_dims, dim=-1)
        composed: dict[str, Modulation] = {}
        for part, z in zip(self.parts, slices, strict=True):
            composed = {name: _after(m, composed[name]) if composed else m for name, m in part(z).items()}
        return composed

    def penalty(self, modulations: Mapping[str, Modulation] | None = None) -> Tensor:
        """Return how far the composed modulations are from the identity, as `Generator.penalty`.

        Without modulations: the sum of the penalties of the parts, each of its learned scale.

        Raises:
            ValueError: without modulations where there is no learned scale.
        """
        if modulations is None:
            return torch.stack([part.penalty() for part in self.parts]).sum()
        return _distances(modulations, math.prod(part.options.gate_start for part in self.parts))

    def own_parameters(self) -> dict[str, int]:
        """Return how many parameters belong to each site alone, in all parts."""
        each = [part.own_parameters() for part in self.parts]
        return {name: sum(own[name] for own in each) for name in self.sites}

    def describe(self) -> str:
        """Return a table of what each site costs, as `Generator.describe`."""
        return describe(self, self.sites)


def _completed(fields: Iterable[Emitted], parts: Iterable[Tensor]) -> list[Tensor]:
    """Return gamma, beta and the gate where there is one; gamma and beta are constant if not given."""
    given = dict(zip(fields, parts, strict=True))
    like, gate = next(iter(given.values())), given.get("gate")
    gamma, beta = given.get("gamma"), given.get("beta")
    gamma = torch.ones_like(like) if gamma is None else gamma
    beta = torch.zeros_like(like) if beta is None else beta
    return [gamma, beta] if gate is None else [gamma, beta, gate]


def _after(second: Modulation, first: Modulation) -> Modulation:
    """Return one modulation after the other, with the product of their gates behind both."""
    if second.gate is None or first.gate is None:
        return second.compose(first)
    return second.compose(first.replace(gate=None)).replace(gate=second.gate * first.gate)


def _distances(modulations: Mapping[str, Modulation], gate_start: float) -> Tensor:
    """Return the squared distance from the identity: of all sites and channels, in the mean of samples."""
    if not modulations:
        raise ValueError(
            "Generator.penalty: expected modulations of at least one site, got none.\n"
            "Give those of the batch: generator.penalty(generator(z))."
        )
    found = []
    for m in modulations.values():
        gamma, beta, *gates = aligned(*m.present())
        squares = (gamma - 1).square() + beta.square()
        for gate in gates:
            squares = squares + (gate - gate_start).square()
        each = squares.sum(dim=-1)
        found.append(each.mean() if each.numel() else each.sum())
    return torch.stack(found).sum()


def build_generator(
    cond_dim: int,
    sites: Mapping[str, int],
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    **options: Unpack[Options],
) -> Generator | ComposedGenerator:
    """Return the generator for the `dim` of any condition, several that are composed included.

    Args and errors are those of `Generator`.
    """
    if isinstance(cond_dim, Sizes):
        return ComposedGenerator(cond_dim.parts, sites, device=device, dtype=dtype, **options)
    return Generator(cond_dim, sites, device=device, dtype=dtype, **options)


def _overridden(generator: Generator) -> bool:
    """Whether somebody else decides what lies between head and modulations."""
    return type(generator) is not Generator or not vars(generator).keys().isdisjoint(("raw", "of_raw"))


def _watched(head: Any) -> bool:
    """Whether the call of a head does, or tells, more than the head."""
    hooks = head._forward_hooks or head._forward_pre_hooks or "forward" in vars(head)
    return bool(hooks or _module._global_forward_hooks or _module._global_forward_pre_hooks)


def _small(raw: Tensor) -> bool:
    """Whether operations on these numbers cost more to start than to do, and may mix with the CPU's."""
    if torch.compiler.is_compiling() or type(raw) is not Tensor or raw.dtype != torch.float32:
        return False
    return raw.is_cpu and raw.numel() <= _SMALL


def _build_trunk(cond_dim: int, layers: Sequence[int | str], own: dict[str, Any]) -> nn.Sequential:
    trunk, width = nn.Sequential(), cond_dim
    for layer in layers:
        if not isinstance(layer, str):
            trunk.append(nn.Linear(width, layer, **own))
            width = layer
        else:
            trunk.append(ACTIVATIONS[layer]())
    return trunk


def _check_sites(sites: Mapping[str, int]) -> None:
    if not isinstance(sites, Mapping) or not sites:
        got = "none" if isinstance(sites, Mapping) else f"a {type(sites).__name__}"
        raise ValueError(
            f"Generator: expected at least one site, got {got}.\n"
            f"Give a mapping from name to channels: {{'block1': 64}}, or what find gave as "
            f"{{site.name: site.features for site in sites}}."
        )
    for name, features in sites.items():
        check_size(f"Generator site '{name}': channels", features)
