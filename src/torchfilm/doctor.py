"""Can each site be heard at all? One forward and one backward pass say, before anything is trained.

A condition is ignored most often for a plain reason: the site is never called, a norm behind it takes gamma
and beta out again, something multiplies its branch by zero. At zero initialisation the output tells none of
this; the gradient with respect to gamma and beta does (4e-6 in front of an InstanceNorm, 0.2 elsewhere).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchfilm.filling import Conditioning
from torchfilm.injection import conditioning, unwrapped
from torchfilm.modulation import Modulation
from torchfilm.naming import check_choice, entry
from torchfilm.pulses import SHIFTS, Pulse, Seen, readers, take_pulses, watched
from torchfilm.restoring import fresh, same_chance, undisturbed
from torchfilm.sensitivity import Leaves, leaves, moved, probe, shaken, tensors_of
from torchfilm.sites import Site
from torchfilm.upstream import (
    START,
    active_condition,
    is_cut_off,
    reads_once,
    said_once,
    tells_one_thing,
    untouched,
)
from torchfilm.writing import in_columns, some

WEAK = 1e-3
"""A site is weak whose share in the output is this far below the median of the others,"""
FAINT = 1e-3
"""or where gammas moved by one change the output by less than this part of how far samples differ in it; or,
where they are alike, of how far they would if they were not: beside a small difference every number is large.
"""
NORMED = 10.0
"""Where a norm reads the site, this many times as much is weak: its epsilon lets a little pass."""
HIDDEN = 0.1
"""Where the condition's fields do less than this part of the constant ones, these may hide them."""

Problem = Literal["never_called", "unused", "dead", "cancelled", "weak", "nonfinite", "frozen", "same"]
Kind = Literal[Problem, "partial", "one_condition", "cut_off", "tied", "repeated"]
PROBLEMS: tuple[Kind, ...] = get_args(Problem)
"""Findings that keep a condition from being heard; the others are worth knowing."""

CALLED = (
    "The norm is a function call in a forward, so it is no site: make it a module and condition that, or "
    "condition the next module with where='input'."
)
"""The remedy where the norm that cancels a site has no name."""


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
        at_start: whether the generator says nothing of the condition yet, as before the first step.
    """

    pulses: dict[str, Pulse]
    findings: tuple[Finding, ...]
    at_start: bool = False

    @property
    def problems(self) -> tuple[Finding, ...]:
        """Return the findings that keep the condition from being heard."""
        return tuple(finding for finding in self.findings if finding.kind in PROBLEMS)

    def __bool__(self) -> bool:
        """Return whether every site can be heard."""
        return not self.problems

    def of(self, site: str) -> list[Kind]:
        """Return the kinds of all findings about a site, "" for the conditioning as a whole.

        Raises:
            UnknownNameError: for what is no site.
        """
        if site:
            entry("Diagnosis", self.pulses, site)
        return [finding.kind for finding in self.findings if finding.site == site]

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"healthy": bool(self)} | asdict(self)

    def __repr__(self) -> str:
        """Show a line for each site, then each finding with its remedy."""
        names = list(dict.fromkeys(name for pulse in self.pulses.values() for name in pulse.fields))
        kinds: dict[str, list[str]] = {}
        for finding in self.findings:
            kinds.setdefault(finding.site, []).append(finding.kind)
        rows = [("site", "calls", *names, "finding")]
        for pulse in self.pulses.values():
            cells = [pulse.cell(name) for name in names]
            rows.append((pulse.site, str(pulse.calls), *cells, ", ".join(kinds.get(pulse.site, ["ok"]))))
        start = [START] if self.at_start else []
        texts = (f"\n{text}" for text in self._grouped())
        return "\n".join([in_columns(rows), "", self._verdict(names), *start, *texts])

    def _verdict(self, names: Sequence[str]) -> str:
        """Say how many sites can be heard, and what the numbers of these fields are."""
        count = len(self.pulses)
        heard = count - len({finding.site for finding in self.problems if finding.site})
        numbers = ", ".join(f"|dy/d{name}| {'rms(x) ' if name in SHIFTS else ''}/ |y|" for name in names)
        constant = any(set(pulse.fields) - set(pulse.moved) for pulse in self.pulses.values())
        brackets = "; in brackets what the condition does not move" if constant else ""
        unit = " |y|: without the mean over samples, where these differ." if numbers else ""
        return f"{heard} of {count} sites can be heard. Numbers: {numbers or 'none'}{brackets}.{unit}"

    def _grouped(self) -> Iterator[str]:
        """Yield the text of each finding once, with all sites that it is about."""
        sites: dict[tuple[str, str], list[str]] = {}
        for finding in self.findings:
            sites.setdefault((finding.message, finding.remedy), []).append(finding.site)
        for (message, remedy), names in sites.items():
            yield f"{some(names) or 'all sites'}: {message}\n    {remedy}"


def doctor(
    model: nn.Module,
    *args: Any,
    cond: Any = None,
    modulation: Any = None,
    at: Literal["present", "identity"] = "present",
    measure: Callable[[Any], Any] | None = None,
    **kwargs: Any,
) -> Diagnosis:
    """Find sites that are dead, never called, tied, cancelled by a later norm, or far weaker than the rest.

    The network runs once, in its current mode, and gradients with respect to gamma and beta are taken. If
    constants of a fusion may hide what the condition does, as the zero start of `cross_attention`, it runs
    again with these constants randomised. In training mode it also runs without condition dropout, to see
    whether encoder and generator tell conditions apart. Norm statistics, gradients and random state are
    restored.

    Args:
        model: a conditioned network, compiled or not.
        args: what the network takes besides the condition; kwargs likewise.
        cond: the condition: a batch as in training, since what a BatchNorm does depends on it; or
        modulation: ready modulations.
        at: where gradients are taken: at what the generator gives, or at gamma = 1 and beta = 0.
        measure: from the output to what counts, with a gradient. Without it, the whole output counts but for
            masked entries, those that are -inf or torch.finfo(dtype).min, and for single numbers beside
            it, such as a loss. If your mask is another number, such as -1e9, give one of the other entries.

    Returns:
        A report: `print` it, or read `findings` and `pulses`; it is true where every site can be heard.

    Raises:
        ValueError: for a batch of no samples, and an output or a measure without a gradient; for another
            `at`, and for at="identity" with a fusion other than FiLM; inside of `unconditioned`.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> model = nn.Sequential(nn.Conv2d(3, 5, 1), nn.InstanceNorm2d(5), nn.ReLU(), nn.Conv2d(5, 2, 1))
        >>> model = condition(model, "0", Vector(7))
        >>> doctor(model, torch.rand(2, 3, 5, 5), cond=torch.rand(2, 7)).of("0")
        ['cancelled']
    """
    check_choice("doctor: at", at, ("present", "identity"))
    film = conditioning(model)
    root = unwrapped(model)
    start = _identity if at == "identity" else lambda name, value: value

    def call() -> Any:
        inputs, named, own = fresh((args, kwargs, cond))
        with same_chance():
            return model(*inputs, cond=own, modulation=modulation, **named)

    def run(start: Callable[[str, Any], Any]) -> _Pass:
        with leaves(model, start) as found, watched(root, film) as seen:
            output = call()
        total, *units = probe(output, measure, 0)
        fields = list(found.fields())
        gradients = torch.autograd.grad(total, [leaf for _, _, leaf in fields], allow_unused=True)
        return _Pass(seen, found, fields, gradients, total, *units)

    with undisturbed(model):
        one = run(start)
        told = moved(film, one.seen.condition, one.leaves.values)
        said = None if modulation is not None else active_condition(film, cond)
        same = said_once(said) or reads_once(one.seen.condition, one.leaves.given, told.fields)
        pulses = one.pulses(film, told.fields, same=same)
        hidden = {name for name, pulse in pulses.items() if pulse.strength < HIDDEN * pulse.constant}
        closed = {name for name in hidden if pulses[name].strength == 0}
        if hidden:
            other = run(lambda name, value: shaken(start(name, value), told.fields.get(name, ())))
            more = other.pulses(film, told.fields, same=same)
            pulses |= {name: pulses[name].or_more(more[name]) for name in hidden}
        at_start = closed == set(film.sites) or (told.at_start and untouched(film.generator) is not False)
        sources: Iterable[Finding] = ()
        if said is not None and not at_start:
            given = one.leaves.given
            if film.training:  # without dropout of conditions, by a call of the network itself
                with torch.no_grad(), film.predicting(), leaves(model) as found:
                    call()
                given = found.given
            alike = tells_one_thing(given, told.fields, said)
            sources = _about_sources(same=alike, cut_off=is_cut_off(film.cond, one.leaves.given))
    named = [(name, leaf) for name, _, leaf in one.fields]
    norms = readers(one.total, named, one.seen), readers(one.total, named, one.seen, mixed=True)
    faint = one.faint(film.sites) if measure is None else dict.fromkeys(film.sites, 0.0)
    case = _Case(film, film.paths(root), pulses, *norms, faint, one.leaves.given, same=same)
    findings = [finding for site in film.sites.values() for finding in case.about(site)]
    findings += [*case.overall(), *sources]
    findings.sort(key=lambda finding: finding.kind not in PROBLEMS)
    return Diagnosis(pulses, tuple(findings), at_start)


@dataclass(frozen=True)
class _Pass:
    """One forward and one backward pass, with the values of the sites as leaves."""

    seen: Seen
    leaves: Leaves
    fields: list[tuple[str, str, Tensor]]
    gradients: tuple[Tensor | None, ...]
    total: Tensor
    unit: float
    whole: float

    def faint(self, sites: Iterable[str]) -> dict[str, float]:
        """Return which number is too small at each site: more where samples are alike, there and in y."""
        differ = (self.unit / self.whole) ** 0.5
        return {name: FAINT / max(differ, self.seen.apart.get(name, 1.0)) for name in sites}

    def pulses(self, film: Conditioning, told: dict[str, tuple[str, ...]], *, same: bool) -> dict[str, Pulse]:
        """Return the numbers of each site."""
        taken = [(*one[:2], gradient) for one, gradient in zip(self.fields, self.gradients, strict=True)]
        counted = {name: told.get(name, ()) for name in film.sites}
        return take_pulses(film.sites, self.seen, taken, self.unit, counted, same=same)


@dataclass(frozen=True)
class _Case:
    film: Conditioning
    paths: Mapping[str, Sequence[str]]
    pulses: dict[str, Pulse]
    readers: dict[str, str]
    behind: dict[str, str]
    faint: dict[str, float]
    given: Mapping[str, Any]
    same: bool = field(kw_only=True)

    @cached_property
    def strengths(self) -> NDArray[np.float64]:
        """Return the strengths above zero of all sites, relative to their features, in ascending order."""
        return np.sort([pulse.relative for pulse in self.pulses.values() if pulse.relative > 0])

    def about(self, site: Site) -> Iterator[Finding]:
        """Yield what there is to say about one site."""
        pulse = self.pulses[site.name]
        present, weak = pulse.heard, self._weak(pulse)
        if not present:
            yield _silent(site, pulse)
        elif any(value != value or value == float("inf") for value in present.values()):
            yield self._nonfinite(site)
        elif weak:
            yield self._quiet(site, pulse, weak)
        elif pulse.together is not None and not self.same and pulse.together < WEAK * pulse.strength:
            fact = (
                f"with one condition for a whole batch it would not be heard: {self._norm(site)} is in "
                f"training mode and takes out what all samples share ({pulse.together:.2g} left of "
                f"{pulse.strength:.2g})."
            )
            remedy = "Mix conditions within each batch, as here; or put the site behind the norm."
            yield Finding(site.name, "one_condition", fact, remedy)
        if not weak:
            yield from self._partly(site, pulse)
        _, *others = self.paths[site.name]
        if others:
            fact = f"the same module is also {', '.join(map(repr, others))}: one modulation for all."
            remedy = "Condition the modules around it where each use should have its own."
            yield Finding(site.name, "tied", fact, remedy)
        if pulse.calls > 1:
            fact = f"called {pulse.calls} times in one forward, each time with the same modulation."
            remedy = "Condition the modules around it where each call should have its own."
            yield Finding(site.name, "repeated", fact, remedy)

    def overall(self) -> Iterator[Finding]:
        """Yield what concerns all sites."""
        parameters = list(self.film.generator.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            fact = "no parameter of the generator is trained (requires_grad is False)."
            remedy = (
                "Call conditioning(model).requires_grad_(True), after whatever froze it; freeze_base(model) "
                "freezes the base alone."
            )
            yield Finding("", "frozen", fact, remedy)

    def _weak(self, pulse: Pulse) -> str:
        """Return what a site is too weak beside, in words; "" for one that is not."""
        own = np.searchsorted(self.strengths, pulse.relative)
        others = np.delete(self.strengths, own) if pulse.relative > 0 else self.strengths
        strength = pulse.strength / (NORMED if self._reader(pulse) else 1)
        if len(others) and not strength > WEAK * float(np.median(others)):
            return "its share in the output is less than a thousandth of the other sites' median."
        if not strength > self.faint[pulse.site]:
            return (
                "what it is told, moved by one, changes the output by less than a thousandth of how far "
                "samples are from their mean (of the output itself, where they do not differ or hardly do)."
            )
        return ""

    def _nonfinite(self, site: Site) -> Finding:
        """Say whether what the site hears is finite, or what it reads is not."""
        wrong = [
            part for part, value in tensors_of(self.given[site.name]) if not bool(value.isfinite().all())
        ]
        fact, remedy = (
            "the gradient is NaN or infinite.",
            "Look for NaN in the input and in the output first.",
        )
        if wrong:
            fact = f"its {' and '.join(wrong)} {_are(wrong)} NaN or infinite."
            remedy = (
                "Look for NaN in the condition, then in the weights of encoder and generator: spectral_norm "
                "makes it of weights that start at zero, condition(..., init='default') does not."
            )
        return Finding(site.name, "nonfinite", fact, remedy)

    def _quiet(self, site: Site, pulse: Pulse, weak: str) -> Finding:
        """Say why a site is hardly heard: something is zero, a norm reads it, or no reason is known."""
        if pulse.strength == 0:
            remedy = (
                "What it modulates, or something behind it, is zero: a zero-initialised last norm or layer "
                "scale, a closed gate, a ReLU that is off for every sample. If that is trained, ask again "
                "after some steps."
            )
            return Finding(site.name, "dead", "the output depends on it, but by zero at present.", remedy)
        if not self._norm_of(pulse):
            remedy = (
                "What it modulates is small, or something behind it makes it small: a layer scale, a norm, a "
                "saturated sigmoid. Condition a later site."
            )
            return Finding(site.name, "weak", weak, remedy)
        norm, does, put = self._norm(site), "normalises again", "Put"
        if self.same and "BatchNorm" in norm:
            does = "takes out what all samples share, and there is one condition"
            put = "Mix conditions within each batch, or put"
        fact = f"{norm} reads it and {does}: {' and '.join(pulse.heard)} {_are(pulse.heard)} gone."
        behind = norm.removesuffix(" itself")
        remedy = f"{put} the site behind the norm: condition the output of {behind}."
        return Finding(site.name, "cancelled", fact, CALLED if behind == "a norm" else remedy)

    def _partly(self, site: Site, pulse: Pulse) -> Iterator[Finding]:
        """Say which fields are lost though another is heard; exactly zero is what a closed gate leaves."""
        best = max(pulse.heard, key=lambda name: pulse.heard[name], default="")
        for name in pulse.heard:
            if not 0 < pulse.relative_of([name]) <= WEAK * pulse.relative < float("inf"):
                continue
            norm = self.readers[site.name] or self.behind[site.name]
            why, where = "what is behind the site hardly depends on it", "a later site"
            if norm:
                why, where = f"{norm} takes it out again", f"the output of {norm}"
            remedy = f"Condition {where} if {name} is to be heard; {best} is, as it stands."
            fact = f"its {name} is cancelled: {why}."
            yield Finding(site.name, "partial", fact, CALLED if norm == "a norm" else remedy)

    def _norm_of(self, pulse: Pulse) -> str:
        """Return the norm that cancels a weak site; features get through it where only a shift is lost."""
        lost = pulse.relative <= WEAK * pulse.constant
        return self._reader(pulse) or (self.behind[pulse.site] if lost else "")

    def _reader(self, pulse: Pulse) -> str:
        """Return the norm that reads a site; "" if it takes out what samples share alone, and they differ."""
        apart = pulse.together is not None and not self.same and pulse.together < WEAK * pulse.strength
        return "" if apart else self.readers[pulse.site]

    def _norm(self, site: Site) -> str:
        reader = self.readers[site.name] or self._norm_of(self.pulses[site.name])
        if reader == "a norm" and site.where == "input" and "Norm" in site.type:
            return f"{site.type} '{site.name}' itself"
        return reader or "a BatchNorm"


def _about_sources(*, same: bool, cut_off: bool) -> Iterator[Finding]:
    """Yield what is the matter in front of the sites."""
    if same:
        fact = "what the sites are told is the same for all conditions of the batch, though these differ."
        remedy = (
            "Look at what the encoder gives, conditioning(model).cond(cond): if its rows differ, the weights "
            "of the generator are zero. Is the condition always dropped, is weight decay too strong?"
        )
        yield Finding("", "same", fact, remedy)
    if cut_off:
        fact = (
            "the encoder of the condition has parameters to be trained, but no gradient reaches them in this "
            "call."
        )
        remedy = (
            "Look for detach() or no_grad() in it; if it is not to be trained, set requires_grad to False."
        )
        yield Finding("", "cut_off", fact, remedy)


def _silent(site: Site, pulse: Pulse) -> Finding:
    if pulse.calls == 0:
        remedy = (
            "Its owner skips it here, or reads its weights without calling it (a fused kernel): leave it out "
            "or condition the module around it."
        )
        return Finding(site.name, "never_called", "its module never runs in this call.", remedy)
    remedy = "Its result is dropped, detached, or goes to an output that `measure` leaves out."
    return Finding(site.name, "unused", "its module runs, but the output does not depend on it.", remedy)


def _are(fields: Collection[str]) -> str:
    return "are" if len(fields) > 1 else "is"


def _identity(name: str, value: Any) -> Modulation:
    if not isinstance(value, Modulation):
        raise ValueError(
            f"doctor: expected modulations for at='identity', got {type(value).__name__}.\n"
            f"Other fusions start at their identity as they are: leave at= out."
        )
    gate = None if value.gate is None else torch.ones_like(value.gate)
    return Modulation(torch.ones_like(value.gamma), torch.zeros_like(value.beta), gate)
