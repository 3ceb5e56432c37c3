"""How a generator makes modulations: its options, checked as far as they can be without the sizes."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Literal, TypedDict, cast, get_args

import torch
from torch import Tensor, nn

from torchfilm.heads import Start
from torchfilm.naming import check_choice, check_size, each_match, nearest

Bound = Literal["sigmoid", "tanh", "exp"]
Emitted = Literal["gamma", "beta", "gate"]
Emit = Sequence[Emitted] | Mapping[str, Sequence[Emitted]] | Sequence[tuple[str, Sequence[Emitted]]]
Init = Literal["identity", "default"]
Activation = Literal["relu", "leaky_relu", "gelu", "silu", "mish", "tanh"]

_BOUNDS = {"sigmoid": torch.sigmoid, "tanh": torch.tanh, "exp": torch.exp}

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky_relu": partial(nn.LeakyReLU, 0.2),
    "gelu": nn.GELU,
    "silu": nn.SiLU,
    "mish": nn.Mish,
    "tanh": nn.Tanh,
}
"""What a word in `trunk` stands for."""


@dataclass(frozen=True)
class GeneratorOptions:
    """How a generator makes modulations; the keyword arguments of `Generator`, and what is saved of them.

    Args:
        head: "linear"; "shared" (adaLN-single: one projection for all sites of one width, an offset per
            site); "lowrank:R" (through R numbers); "table" (a row for each of cond_dim classes).
        trunk: layers between the condition and the head, computed once: a number is an `nn.Linear` of that
            many outputs, a word an activation. (256, "silu") is a perceptron, ("mish",) the activation of
            DenseFiLM.
        emit: what is predicted, in the order gamma, beta, gate; gamma and beta are otherwise constant (1, 0).
            Or that for each site, by patterns for names, of which the first counts that matches the whole
            name: {r".*norm": ("gamma", "beta"), r".*mlp": ("gate",)}, which is kept as a tuple of pairs.
        bound: f, applied to gamma only: "sigmoid" in (0, 1), "tanh" in (-1, 1), "exp" in (0, inf), which give
            the final gamma; or "tanh:R", which gives 1 + R tanh, in (1 - R, 1 + R). None leaves gamma free.
        init: "identity" (last layer zero) or "default" (uniform, as `nn.Linear`).
        gamma_offset: what is added to f; None for 1 without a bound and with "tanh:R", and 0 with the others.
            A start well below 1 is a choice of small training runs.
        init_std: standard deviation of the weights with init="default", biases zero; None for `nn.Linear`'s
            own start.
        gate_start: what is added to the gate: 0 starts with the branch switched off (adaLN-Zero, from
            scratch), 1 with the plain residual connection (on a branch that is trained already).
        learned_scale: multiply each predicted number by one that is learned and starts at zero, in front of a
            head with a random start: gamma = 1 + r f(z) (Requeima et al. 2019, arXiv 1906.07697, whose r
            starts at random near zero). `Generator.penalty` then is the size of r.
    """

    head: str = "linear"
    trunk: Sequence[int | str] = ()
    emit: Emit = ("gamma", "beta")
    bound: str | None = None
    init: Init = "identity"
    gamma_offset: float | None = None
    init_std: float | None = None
    gate_start: float = 0.0
    learned_scale: bool = False

    def __post_init__(self) -> None:
        """Check what can be checked without the sizes; ValueError for what cannot be meant."""
        check_choice("Generator: init", self.init, get_args(Init))
        _check_tuple("trunk", "sizes and activations", self.trunk)
        # Lists too: what is equal compares so, and has a hash.
        object.__setattr__(self, "trunk", tuple(self.trunk))
        object.__setattr__(self, "emit", _read_emit(self.emit))
        if self.spread is None:
            check_choice("Generator: bound", self.bound, (None, *get_args(Bound)), patterns=["tanh:R"])
        layers: Sequence[Any] = self.trunk
        for layer in layers:
            if isinstance(layer, Integral):
                check_size("Generator: trunk", layer)
            else:
                check_choice("Generator: trunk", layer, get_args(Activation))
        self._check_start()

    @property
    def spread(self) -> float | None:
        """R of the bound "tanh:R", or None."""
        name, _, number = str(self.bound or "").partition(":")
        try:
            return float(number) if name == "tanh" and float(number) > 0 else None
        except ValueError:
            return None

    @property
    def offset(self) -> float:
        """What is added to f(raw) to give gamma."""
        if self.gamma_offset is not None:
            return self.gamma_offset
        return 1.0 if self.bound is None or self.spread is not None else 0.0

    @property
    def start(self) -> Start:
        """How the last layer starts."""
        if self.init == "identity" and not self.learned_scale:
            return "zero"
        return "default" if self.init_std is None else self.init_std

    @property
    def patterns(self) -> dict[str, tuple[Emitted, ...]]:
        """What is predicted, by patterns for names; empty where it is the same for all sites."""
        emit: Any = self.emit
        return {} if isinstance(emit[0], str) else dict(emit)

    @property
    def emitted(self) -> set[str]:
        """What is predicted for any site."""
        alike: Any = self.emit
        return set(itertools.chain(*(self.patterns.values() or [alike])))

    def fields(self, sites: Collection[str]) -> dict[str, tuple[Emitted, ...]]:
        """Return what is predicted for each of these sites.

        Raises:
            ValueError: for a pattern that matches none of them, and a site without a pattern.
        """
        patterns, alike = self.patterns, cast("tuple[Emitted, ...]", self.emit)
        if not patterns:
            return dict.fromkeys(sites, alike)
        found: dict[str, tuple[Emitted, ...]] = {}
        matches = each_match(sites, patterns, "Generator: emit")
        for fields, names in zip(patterns.values(), matches, strict=True):
            found = dict.fromkeys(names, fields) | found
        for name in sites:
            if name not in found:
                raise ValueError(
                    f"Generator: emit expected a pattern for each site, got none for {name!r}.\n"
                    f"The nearest are {nearest(name, patterns)}.\n"
                    f"A pattern has to match a whole name; '.*' behind the others takes all that are left."
                )
        return {name: found[name] for name in sites}

    def gamma(self, raw: Tensor) -> Tensor:
        """Return the final gamma of what the head predicts for it."""
        if self.bound is None:
            return raw + self.offset
        if self.spread is not None:
            return self.spread * raw.tanh() + self.offset
        return _BOUNDS[self.bound](raw) + self.offset

    def _check_start(self) -> None:
        if self.init_std is not None and self.start == "zero":
            raise ValueError(
                f"Generator: init='identity' has zero weights, got init_std={self.init_std} beside it.\n"
                f"Use init='default' with init_std, or leave init_std out."
            )
        start = self.offset + {"sigmoid": 0.5, "exp": 1.0}.get(self.bound or "", 0.0)
        if self.init == "identity" and "gamma" in self.emitted and start != 1.0:
            raise ValueError(
                f"Generator: init='identity' needs gamma = 1 at the start, but bound={self.bound!r} with "
                f"gamma_offset={self.offset} starts at {start}.\n"
                f"Use init='default', or another gamma_offset."
            )
        if self.gate_start != 0 and "gate" not in self.emitted:
            raise ValueError(
                f"Generator: gate_start={self.gate_start} needs a gate, got emit={self.emit}.\n"
                f"Use emit=('gamma', 'beta', 'gate'), or leave gate_start out."
            )


class OptionsButEmit(TypedDict, total=False):
    """As `Options`, of fusions that say themselves what is emitted."""

    head: str
    trunk: Sequence[int | str]
    bound: str | None
    init: Init
    gamma_offset: float | None
    init_std: float | None
    gate_start: float
    learned_scale: bool


class Options(OptionsButEmit, total=False):
    """The fields of `GeneratorOptions` as keyword arguments: what editors and type checkers know of them."""

    emit: Emit


NAMES = tuple(field.name for field in dataclasses.fields(GeneratorOptions))
"""The names of all options."""


def read_options(options: Mapping[str, Any]) -> GeneratorOptions:
    """Return the options of these names; ValueError for an unknown one, with the nearest names."""
    for name in options:
        check_choice("Generator: options", name, NAMES)
    return GeneratorOptions(**options)


def _read_emit(emit: Any) -> tuple[Any, ...]:
    """Return fields, or pairs of a pattern and its fields, as tuples."""
    pairs = list(emit.items()) if isinstance(emit, Mapping) else emit
    if not isinstance(emit, Mapping) and not (emit and all(isinstance(one, list | tuple) for one in emit)):
        return _read_fields(emit)
    patterns = [one[0] for one in pairs if len(one) == 2]
    if not pairs or len(set(patterns)) < len(pairs):
        raise ValueError(
            f"Generator: emit expected patterns with their fields, each pattern once, got {pairs}.\n"
            f"Give fields by patterns for names, {{'.*norm': ('gamma', 'beta')}}, or fields for all sites."
        )
    return tuple((_pattern(pattern), _read_fields(fields)) for pattern, fields in pairs)


def _pattern(pattern: Any) -> str:
    if not isinstance(pattern, str):
        text = getattr(pattern, "pattern", None)
        remedy = (
            "Give names of sites, or regular expressions." if text is None else f"Give its text: {text!r}."
        )
        raise ValueError(f"Generator: emit expected patterns as text, got {pattern!r}.\n{remedy}")
    return pattern


def _read_fields(fields: Any) -> tuple[Emitted, ...]:
    _check_tuple("emit", "some of 'gamma', 'beta', 'gate'", fields)
    for name in fields:
        check_choice("Generator: emit", name, get_args(Emitted))
    if not fields or list(fields) != [name for name in get_args(Emitted) if name in fields]:
        raise ValueError(
            f"Generator: expected emit some of ('gamma', 'beta', 'gate'), each once, got {tuple(fields)}.\n"
            f"The order is always gamma, beta, gate."
        )
    return tuple(fields)


def _check_tuple(option: str, of: str, value: Any) -> None:
    if isinstance(value, str) or not isinstance(value, Sequence):
        single = isinstance(value, str | int)
        remedy = f"A single one is a tuple too: ({value!r},)." if single else "Give a tuple, or leave it out."
        raise ValueError(f"Generator: {option} expected a tuple of {of}, got {value!r}.\n{remedy}")
