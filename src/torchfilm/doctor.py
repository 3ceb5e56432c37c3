"""Can each site be heard at all? One forward and one backward pass say, before anything is trained.

A condition is ignored most often for a plain reason: the site is never called, a norm behind it takes gamma
and beta out again, something multiplies its branch by zero. At zero initialisation the output tells none of
this; the gradient with respect to gamma and beta does (4e-6 in front of an InstanceNorm, 0.2 elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchfilm.counterfactual import keys
from torchfilm.injection import Conditioning, conditioning
from torchfilm.modulation import Modulation
from torchfilm.pulses import Pulse, readers, take_pulses, watched
from torchfilm.sensitivity import leaves, probe, recordable, undisturbed
from torchfilm.sites import Site, aliases

WEAK = 1e-3
"""A site is weak whose share in the output is this far below the median of the others,"""
FAINT = 1e-3
"""or where gammas moved by one change the output by less than this."""
NORMED = 10.0
"""Where a norm reads the site, this many times as much is weak: its epsilon lets a little pass."""

Kind = Literal[
    "never_called",
    "unused",
    "dead",
    "cancelled",
    "one_condition",
    "weak",
    "nonfinite",
    "frozen",
    "tied",
    "repeated",
]
PROBLEMS: tuple[Kind, ...] = (
    "never_called",
    "unused",
    "dead",
    "cancelled",
    "weak",
    "nonfinite",
    "frozen",
)
"""Findings that keep a condition from being heard; the others are worth knowing."""


@dataclass(frozen=True)
class Finding:
    """What is the matter with a site, and what to do.

    Args:
        site: its name; "" for the conditioning as a whole.
        kind: one of `Kind`.
        message: what was found, in words.
        remedy: what to do about it.
    """

    site: str
    kind: Kind
    message: str
    remedy: str

    def __str__(self) -> str:
        """Show all of it."""
        return f"{self.site or 'all sites'}: {self.message}\n    {self.remedy}"


@dataclass(frozen=True)
class Diagnosis:
    """What `doctor` found; prints as a table and in words, and is false where there is a problem.

    Args:
        pulses: the numbers of each site, by name.
        findings: problems first.
    """

    pulses: dict[str, Pulse]
    findings: tuple[Finding, ...]

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Return the findings that keep the condition from being heard."""
        return tuple(finding for finding in self.findings if finding.kind in PROBLEMS)

    def __bool__(self) -> bool:
        """Return whether every site can be heard."""
        return not self.problems

    def of(self, site: str) -> list[Kind]:
        """Return the kinds of all findings about a site."""
        return [finding.kind for finding in self.findings if finding.site == site]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"healthy": bool(self)} | asdict(self)

    def __str__(self) -> str:
        """Show a line for each site, then each finding with its remedy."""
        names = list(dict.fromkeys(name for pulse in self.pulses.values() for name in pulse.fields))
        rows = [("site", "calls", *names, "finding")]
        for pulse in self.pulses.values():
            cells = [_number(pulse.fields.get(name)) for name in names]
            rows.append((pulse.site, str(pulse.calls), *cells, ", ".join(self.of(pulse.site)) or "ok"))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [
            "  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows
        ]
        count = len(self.pulses)
        heard = count - len({finding.site for finding in self.problems if finding.site})
        verdict = (
            f"{heard} of {count} sites can be heard. Numbers: |dy/dgamma| / |y|, |dy/dbeta| rms(x) / |y|."
        )
        return "\n".join([*lines, "", verdict, *(f"\n{finding}" for finding in self.findings)])


def doctor(
    model: nn.Module,
    *args: Any,
    cond: Any = None,
    modulation: Any = None,
    at: Literal["present", "identity"] = "present",
    score: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> Diagnosis:
    """Find sites that are dead, never called, tied, cancelled by a later norm, or far weaker than the rest.

    The network runs once as it is called in its present mode, gamma and beta standing in as leaves, and the
    gradient of its output is taken. It is left as it was: statistics of norms, gradients, random state.

    Args:
        model: a conditioned network, compiled or not.
        args: what the network takes besides the condition; kwargs likewise.
        cond: the condition: a batch as in training, since what a BatchNorm does depends on it; or
        modulation: ready modulations.
        at: where gradients are taken: at what the generator gives, or at gamma = 1 and beta = 0.
        score: from the output to what counts, with a gradient; without it, the whole output.

    Returns:
        A report: `print` it, or read `findings` and `pulses`; it is true where every site can be heard.

    Raises:
        ValueError: for an output or a score without a gradient; for at="identity" with a fusion other than
            FiLM.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.InstanceNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
        >>> model = condition(model, "0", Vector(7))
        >>> doctor(model, torch.rand(2, 3, 5, 5), cond=torch.rand(2, 7)).of("0")
        ['cancelled']
    """
    film = conditioning(model)
    root = _root(model, film)
    start = _identity if at == "identity" else lambda value: value
    with undisturbed(model):
        args, kwargs, cond = recordable((args, kwargs, cond))
        with leaves(model, start) as found, watched(root, film.sites) as seen:
            output = model(*args, cond=cond, modulation=modulation, **kwargs)
        total, unit = probe(output, score, 0)
        fields = list(found.fields())
        gradients = torch.autograd.grad(total, [leaf for _, _, leaf in fields], allow_unused=True)
    same = _same(cond, modulation)
    pulses = take_pulses(
        film.sites, seen, [(*one[:2], g) for one, g in zip(fields, gradients, strict=True)], unit, same=same
    )
    names = readers(total, [(name, leaf) for name, _, leaf in fields], seen)
    case = _Case(root, film, pulses, names, FAINT if score is None else 0.0, same=same)
    findings = [finding for site in film.sites.values() for finding in case.about(site)]
    findings += case.overall()
    findings.sort(key=lambda finding: finding.kind not in PROBLEMS)
    return Diagnosis(pulses, tuple(findings))


@dataclass(frozen=True)
class _Case:
    root: nn.Module
    film: Conditioning
    pulses: dict[str, Pulse]
    readers: dict[str, str]
    faint: float
    same: bool = field(kw_only=True)

    def about(self, site: Site) -> Iterator[Finding]:
        """Yield what there is to say about one site."""
        pulse = self.pulses[site.name]
        present = [value for value in pulse.fields.values() if value is not None]
        if not present:
            yield _silent(site, pulse)
        elif any(value != value or value == float("inf") for value in present):
            yield Finding(
                site.name,
                "nonfinite",
                "the gradient is NaN or infinite.",
                "Look for NaN in the output first.",
            )
        elif self._weak(pulse):
            yield self._quiet(site, pulse)
        elif pulse.together is not None and not self.same and pulse.together < WEAK * pulse.strength:
            yield Finding(
                site.name,
                "one_condition",
                f"with one condition for a whole batch it would not be heard: {self._norm(site)} is in "
                f"training mode and takes out what all samples share ({_number(pulse.together)} left of "
                f"{_number(pulse.strength)}).",
                "Mix conditions within each batch, as here; or put the site behind the norm.",
            )
        others = aliases(self.root)[site.name]
        if others:
            yield Finding(
                site.name,
                "tied",
                f"the same module is also {', '.join(map(repr, others))}: one modulation for all.",
                "Condition the modules around it where each use should have its own.",
            )
        if pulse.calls > 1:
            yield Finding(
                site.name,
                "repeated",
                f"called {pulse.calls} times in one forward, each time with the same modulation.",
                "Condition the modules around it where each call should have its own.",
            )

    def overall(self) -> Iterator[Finding]:
        """Yield what concerns all sites."""
        parameters = list(self.film.generator.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            yield Finding(
                "",
                "frozen",
                "no parameter of the generator is trained (requires_grad is False).",
                "Freeze the base with freeze_base(model), which leaves the conditioning trainable.",
            )

    def _weak(self, pulse: Pulse) -> bool:
        others = [one.strength for one in self.pulses.values() if one is not pulse and one.strength > 0]
        floor = max(self.faint, WEAK * float(np.median(others))) if others else self.faint
        return not pulse.strength > floor * (NORMED if self.readers[pulse.site] else 1)

    def _quiet(self, site: Site, pulse: Pulse) -> Finding:
        """Say why a site is hardly heard: something is zero, a norm reads it, or no reason is known."""
        level = f"its share in the output is {_number(pulse.strength)}"
        if pulse.strength == 0:
            return Finding(
                site.name,
                "dead",
                "the output depends on it, but by zero at present.",
                "Something behind it is zero: a zero-initialised last norm or layer scale, a closed gate, a "
                "ReLU that is off for every sample. If that is trained, ask again after some steps.",
            )
        if not self.readers[site.name]:
            return Finding(
                site.name,
                "weak",
                f"{level}, thousands of times less than usual.",
                "Something behind it makes it small: a layer scale, a norm, a saturated sigmoid. Condition a "
                "later site.",
            )
        fact, remedy, behind = "normalises again", "Put", self._norm(site).removesuffix(" itself")
        if self.same and "BatchNorm" in self._norm(site):
            fact = "takes out what all samples share, and there is one condition"
            remedy = "Mix conditions within each batch, or put"
        return Finding(
            site.name,
            "cancelled",
            f"{self._norm(site)} reads it and {fact}: gamma and beta are gone ({level}).",
            f"{remedy} the site behind the norm: condition the output of {behind}.",
        )

    def _norm(self, site: Site) -> str:
        reader = self.readers[site.name]
        if reader == "a norm" and site.where == "input" and "Norm" in site.type:
            return f"{site.type} '{site.name}' itself"
        return reader or "a BatchNorm"


def _silent(site: Site, pulse: Pulse) -> Finding:
    if pulse.calls == 0:
        return Finding(
            site.name,
            "never_called",
            "its module never runs in this call.",
            "Its owner skips it here, or reads its weights without calling it (a fused kernel): leave it out "
            "or condition the module around it.",
        )
    return Finding(
        site.name,
        "unused",
        "its module runs, but the output does not depend on it.",
        "Its result is dropped, detached, or goes to an output that `score` leaves out.",
    )


def _same(condition: Any, modulation: Any) -> bool:
    """Whether all samples have one condition."""
    if condition is None and modulation is not None:
        fields = [tensor for m in modulation.values() for tensor in pytree.tree_leaves(m)]
        condition = [tensor for tensor in fields if isinstance(tensor, Tensor) and tensor.ndim > 1]
    try:
        return len(set(keys(condition))) == 1
    except ValueError:  # a condition of a kind of its own: nothing is known about its rows
        return False


def _identity(value: Any) -> Modulation:
    if not isinstance(value, Modulation):
        raise ValueError(
            f"doctor: expected modulations for at='identity', got {type(value).__name__}.\n"
            f"Other fusions start at their identity as they are: leave at= out."
        )
    gate = None if value.gate is None else torch.ones_like(value.gate)
    return Modulation(torch.ones_like(value.gamma), torch.zeros_like(value.beta), gate)


def _root(model: nn.Module, film: Conditioning) -> nn.Module:
    """Return the network itself, inside of what compiles or distributes it."""
    return next(module for module in model.modules() if module._modules.get("film") is film)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.2g}"
