"""Is the condition heard? What happens to output, loss and success when conditions are exchanged.

A network that ignores its condition trains without a complaint: the loss falls, and only an exchange shows
that the instruction had no part in it. `heard` asks the counterfactual question of anything that is called as
`model(x, cond=...)`, conditioned by this library or not: a network, or a function that runs a whole episode.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from torchfilm.counterfactual import (
    Paraphrase,
    blanked,
    columns,
    is_empty,
    is_words,
    keys,
    of_samples,
    others,
    reworded,
    take,
)
from torchfilm.hearing import Effect, Hearing
from torchfilm.injection import film_of
from torchfilm.intervals import FEWEST_RESAMPLES, Estimate, Sampled
from torchfilm.several import Masked, Maybe, Several
from torchfilm.telling import START, untouched
from torchfilm.undisturbed import in_mode, same_chance

Score = Callable[[Any, Any], Any]
Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]
Rows = NDArray[np.int64]
Bootstrap = tuple[np.random.Generator, int]

_RIGHT = "as it is"
_FEW = 20


def heard(
    model: Callable[..., Any],
    batches: Iterable[Sequence[Any]],
    *,
    loss: Score | None = None,
    success: Score | None = None,
    blank: Callable[[Any], Any] | None = None,
    paraphrase: Paraphrase | None = None,
    resamples: int = 1000,
    seed: int = 0,
) -> Hearing:
    """Measure what conditions do: exchange them between samples, blank them, say them in other words.

    Every sample keeps its x and its target, and gets another sample's condition, always a different one: of
    the different ones in its batch, each with equal chance. A network that listens gives another output and a
    worse loss; one that ignores the condition does not.

        change = sqrt(mean_i |y(x_i, c_p(i)) - y(x_i, c_i)|^2 / mean_ij |y(x_i, c_i) - y(x_j, c_j)|^2)

    where j is every other sample of the batch; a batch of one sample has no part in what is below. Conditions
    too are exchanged within a batch, so shuffle the samples before they are batched: a batch of one class or
    one scene differs by less than all samples do, and one with a single condition has none to exchange. Of
    several outputs the mean is taken over those in which samples differ. The change of an output that is the
    same for all samples is without bound, and counts where no other one changes.

    Every call starts from the same random state, so dropout or sampling noise is the same on both sides; what
    is left (a simulator's own chance) is measured by the row "repeat". A module is measured as
    it predicts, in eval mode and without gradients, and gets its own modes back.

    Intervals are of 95 %, by a bootstrap over samples that is widened for what samples share (each takes part
    once with its own x and again where its condition is given away) and for small numbers of them. Zeros and
    ones (in a loss: both) have those of Wilson and, for changes, of Agresti and Min. Samples have to be
    independent: of several frames of an episode, or questions about a scene, give the group too, or a single
    one. Where few samples make most of the loss, no interval of their mean is right before there are many.

    Args:
        model: called as `model(x, cond=condition)`; any function may stand here, also one that rolls out
            episodes. It may return tensors, lists of words, or a structure of them, with one row per sample.
        batches: of (x, condition), or (x, condition, target) for loss and success to read. Of samples that
            are not independent, (x, condition, target, group): a number or text for the episode or scene
            that each is of, or one for all. Whole groups are resampled; target may be None. Several inputs
            are a tuple (data loaders make lists): ((x, t), condition) calls model(x, t, cond=condition); (x,
            t, condition) would exchange t. A condition is a tensor, a list of strings, or a structure of them
            (tokens and mask, a dict), one row per sample; a batch of none is left out. What has a single row
            in a dict, such as a time step, stays as it is. Where the network's encoder is `Several`, each
            condition is exchanged by itself too, as "swap NAME".
        loss: loss(output, target) -> [B], one number per sample (reduction="none").
        success: success(output, target) -> [B], true or false or 0..1.
        blank: condition -> an empty one. Without it, a network whose condition may be missing (`Maybe`,
            `Several`) is given none; else floating-point conditions become zero, words become "", and
            conditions of integers are not blanked.
        paraphrase: condition -> the same in other words; or a dict of texts, whose keys are the whole text of
            a sample; or a pair of conditions, row i of the second saying the same as row i of the first.
            `notes` say how many samples it has words for, where not for all.
        resamples: how many bootstrap resamples make the intervals, at least 40.
        seed: of the exchanges, the resamples, and each call.

    Raises:
        ValueError: for no batches; too few resamples; no batch with two different conditions; outputs,
            losses, successes or groups without one row per sample; what is not finite; a success beyond 0..1;
            a loss without targets.

    Example:
        >>> x, z = torch.rand(5, 3), torch.rand(5, 3)
        >>> heard(lambda x, cond: x * cond, [(x, z)]).verdict
        'heard'
    """
    if not isinstance(resamples, Integral) or resamples < FEWEST_RESAMPLES:
        raise ValueError(
            f"heard: expected at least {FEWEST_RESAMPLES} resamples, got {resamples!r}.\n"
            f"The intervals are the middle 95 % of resamples: leave resamples= out for 1000."
        )
    rng = np.random.default_rng(seed)
    tally = _Tally(loss, success, (rng, int(resamples)))
    predicting = in_mode(model, training=False) if isinstance(model, nn.Module) else nullcontext()
    with predicting, torch.no_grad():
        for number, batch in enumerate(batches):
            if not is_empty(_parts(batch)[1]):
                _measure(tally, model, batch, rng, seed + number, (blank, paraphrase))
    if "swap" not in tally.found:
        raise ValueError(_nothing_to_swap(tally.found))
    effects = {name: tally.effect(name) for name in tally.found if name != _RIGHT}
    left_out = effects["repeat"].output.n - effects["swap"].output.n
    notes = tuple(_notes(effects, tally.units, paraphrase))
    return Hearing(effects, *tally.levels(), left_out, notes, _remedy(model))


def _notes(effects: Mapping[str, Effect], units: int, paraphrase: Any) -> Iterator[str]:
    """Yield what was not measured, or not well, and why."""
    samples, swapped = effects["repeat"].output.n, effects["swap"].output.n
    if units == 1:
        yield "n: the swapped samples are all of one group; without a second one there is no interval."
    elif units < _FEW:
        yield f"n: {units} independent samples are few; a small effect cannot be seen with so few."
    if "blank" not in effects:
        yield "blank: not measured, since a class has no zero; give blank=."
    if swapped < samples:
        yield (
            f"swap: {samples - swapped} of {samples} samples are in batches with a single condition, "
            f"where there is no other one to give."
        )
    known = effects["paraphrase"].output.n if "paraphrase" in effects else 0
    if paraphrase is not None and known < samples:
        missed = "" if known else "not measured, since "
        yield (
            f"paraphrase: {missed}{known} of {samples} samples have a condition among its keys; "
            f"a key is the whole text of a sample."
        )


def _measure(
    tally: _Tally,
    model: Callable[..., Any],
    batch: Sequence[Any],
    rng: np.random.Generator,
    seed: int,
    given: tuple[Callable[[Any], Any] | None, Paraphrase | None],
) -> None:
    """Call the model with each change of a batch's conditions."""
    x, condition, target, group = _parts(batch)
    own = of_samples(condition)
    blank, paraphrase = given
    blank = blank or _nothing(model)
    rows = np.arange(len(keys(own)))
    everyone = np.ones(len(rows), dtype=bool)

    def run(with_condition: Any) -> Any:
        inputs = x if type(x) is tuple else (x,)
        with same_chance():
            torch.manual_seed(seed)
            return model(*inputs, cond=with_condition)

    def run_with(changed: Any) -> Any:
        in_part = isinstance(condition, Mapping) and changed.keys() != condition.keys()
        return run({**condition, **changed} if in_part else changed)

    tally.begin(run(condition), target, group, len(rows))
    tally.add("repeat", run(condition), rows, everyone)
    for name, part in _exchanged(model, own).items():
        giver = others(keys(part), rng)
        moved = giver != rows
        if moved.any():
            tally.add(name, run_with(take(part, giver)), giver, moved)
    if blank:
        tally.add("blank", run(blank(condition)), rows, everyone)
    elif (empty := blanked(own)) is not None:
        tally.add("blank", run_with(empty), rows, everyone)
    if callable(paraphrase):
        tally.add("paraphrase", run(paraphrase(condition)), rows, everyone)
    elif paraphrase is not None:
        other, known = reworded(own, paraphrase)
        if known.any():
            tally.add("paraphrase", run_with(other), rows, known)
    tally.end()


def _exchanged(model: Callable[..., Any], own: Any) -> dict[str, Any]:
    """Return what is exchanged, by the name of the change: all, and of `Several` each by itself.

    Not of other structures: tokens and their mask belong together.
    """
    film = film_of(model)
    if film is None or not isinstance(film.cond, Several) or len(own) < 2:
        return {"swap": own}
    given = {
        name: part for name, part in own.items() if not isinstance(part, Masked) or part.value is not None
    }
    return {"swap": own} | {f"swap {name}": {name: part} for name, part in given.items()}


def _remedy(model: Callable[..., Any]) -> str:
    """Return what to do about a condition that is ignored; nothing is known of a plain function."""
    film = film_of(model)
    if film is None:
        return ""
    if untouched(film.generator):
        return START
    return "Run tf.doctor(model, x, cond=z), which names the sites that cannot be heard."


def _nothing(model: Callable[..., Any]) -> Callable[[Any], Any] | None:
    """Return what blanks a condition for a network that knows itself what is missing; None for others."""
    film = film_of(model)
    cond = None if film is None else film.cond
    if isinstance(cond, Several):
        required = cond.required
        return None if len(required) == len(cond.parts) else lambda given: {n: given[n] for n in required}
    return (lambda condition: Masked(None)) if isinstance(cond, Maybe) else None


class _Tally:
    """Outputs, losses and successes of every sample, with the right conditions and with changed ones."""

    def __init__(self, loss: Score | None, success: Score | None, bootstrap: Bootstrap) -> None:
        self.scores = {
            name: score for name, score in (("loss", loss), ("success", success)) if score is not None
        }
        self.bootstrap = bootstrap
        self.found: dict[str, dict[str, list[Any]]] = {}
        self.groups: dict[Any, int] = {}
        self.output: list[Any] = []
        self.target: Any = None
        self.first = self.count = 0

    def begin(self, output: Any, target: Any, group: Any, count: int) -> None:
        """Take in a batch's outputs with the right conditions."""
        self.output, self.target = _columns(output, count), target
        self.first, self.count = self.count, self.count + count
        unit = np.arange(self.first, self.count)
        if group is not None:  # numbers below zero, as batches without groups may be among the others
            ids = _ids(group, count)
            unit = np.array([self.groups.setdefault(one, -1 - len(self.groups)) for one in ids])
        apart = np.stack([_apart(column) for column in self.output], axis=1)
        found = {"unit": unit, "call": np.full(count, self.first), "apart": apart}
        self._append(_RIGHT, found | self._scored(output, count))

    def add(self, name: str, output: Any, giver: Rows, kept: Flags) -> None:
        """Take in the batch's outputs with changed conditions: whose they are, and which samples count."""
        pairs = zip(self.output, _columns(output, len(kept)), strict=True)
        found = {
            "row": np.arange(self.first, self.count),
            "giver": self.first + giver,
            "moved": np.stack([_distance(a, b) for a, b in pairs], axis=1),
        } | self._scored(output, len(kept))
        self._append(name, {key: values[kept] for key, values in found.items()})

    def end(self) -> None:
        """Let go of the batch."""
        self.output, self.target = [], None

    def _scored(self, output: Any, count: int) -> dict[str, Numbers]:
        if self.scores and self.target is None:
            raise ValueError(
                f"heard: {next(iter(self.scores))} needs a target, got a batch of (x, condition).\n"
                f"Give (x, condition, target)."
            )
        return {name: _scored(name, score, output, self.target, count) for name, score in self.scores.items()}

    def _append(self, name: str, found: Mapping[str, NDArray[Any]]) -> None:
        change = self.found.setdefault(name, {})
        for key, values in found.items():
            _append(change.setdefault(key, []), values)

    @property
    def units(self) -> int:
        """How many independent samples are swapped, or groups of them."""
        return len(np.unique(self._all(_RIGHT)["unit"][self._all("swap")["row"]]))

    def levels(self) -> tuple[Estimate | None, Estimate | None]:
        """Return loss and success with the right conditions."""
        right = self._all(_RIGHT)
        sampled = Sampled(right["unit"], right["unit"])
        loss, success = (
            sampled.level(right[name], self.bootstrap, bounds) if name in self.scores else None
            for name, bounds in (("loss", (-math.inf, math.inf)), ("success", (0.0, 1.0)))
        )
        return loss, success

    def effect(self, name: str) -> Effect:
        """Return the estimates of one change."""
        right, again, change = self._all(_RIGHT), self._all("repeat"), self._all(name)
        rows, moved = change["row"], change["moved"]
        by_chance = again["moved"].any() or any((right[one] != again[one]).any() for one in self.scores)
        if name == "repeat" and not by_chance:  # not a chance that n samples do not show, but none
            none = Estimate(0.0, 0.0, 0.0, len(rows))
            scores = dict.fromkeys(self.scores, none)
            return Effect(none, scores.get("loss"), scores.get("success"))
        # A sample without others takes the mean of all that have some, which leaves that mean as it is.
        apart = np.where(np.isnan(right["apart"]), np.nanmean(right["apart"], axis=0), right["apart"])[rows]
        sampled = Sampled(right["unit"][rows], right["unit"][change["giver"]])

        def scored(score: str, before: Mapping[str, Any], least: float) -> Estimate | None:
            if score not in self.scores:
                return None
            return sampled.change(before[score][rows], change[score], self.bootstrap, (least, -least))

        # Each sample is in the means over others twice; where these are few, their rows show it already.
        share = 1 - 1 / np.bincount(right["call"])[right["call"][rows], None]
        twice = 2 * np.where(change["giver"][:, None] == rows[:, None], np.sqrt(share), share)
        output = sampled.estimate(
            lambda means: _relative(*np.split(means, 2, axis=-1)),
            np.concatenate([moved, apart], axis=1),
            self.bootstrap,
            (0.0, math.inf),
            np.repeat(np.hstack([np.ones_like(twice), twice]), moved.shape[1], axis=1),
        )
        found = Effect(output, scored("loss", right, -math.inf), scored("success", right, -1.0))
        if name == "repeat" or not by_chance:
            return found
        # Beside parts that differ between samples, what is the same for all has no measure.
        kept = apart.mean(axis=0) > 0
        if math.isinf(output.value) or not kept.any():
            kept, apart = np.ones_like(kept), np.ones_like(apart)
            if again["moved"].any() and (again["moved"] == again["moved"][right["call"]]).all():
                sampled = Sampled(right["call"][rows], right["call"][rows])  # all of a call share its chance
        more = sampled.estimate(
            lambda means: _more(*np.split(means, 3, axis=-1)),
            np.concatenate([moved[:, kept], again["moved"][rows][:, kept], apart[:, kept]], axis=1),
            self.bootstrap,
            roles=np.repeat(np.hstack([np.ones((len(rows), 2)), twice]), kept.sum(), axis=1),
        )
        beyond = Effect(more, scored("loss", again, -math.inf), scored("success", again, -1.0))
        return replace(found, beyond=beyond)

    def _all(self, name: str) -> dict[str, NDArray[Any]]:
        return {key: np.concatenate(arrays) for key, arrays in self.found[name].items()}


def _append(arrays: list[Any], rows: NDArray[Any]) -> None:
    """Append rows, and join arrays until each is twice as long as the next.

    Many small arrays, one for each batch, would lie between freed memory and keep it from being given back.
    """
    arrays.append(rows)
    while len(arrays) > 1 and len(arrays[-2]) < 2 * len(arrays[-1]):
        arrays[-2:] = [np.concatenate(arrays[-2:])]


def _parts(batch: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3, 4):
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            f"heard: expected batches of (x, condition), (x, condition, target) or "
            f"(x, condition, target, group), got a {type(batch).__name__}{size}.\n"
            f"Give a list of batches, also for a single one: [(x, condition)]."
        )
    x, condition, target, group = (*batch, None, None)[:4]
    return x, condition, target, group


def _ids(group: Any, count: int) -> list[Any]:
    """Return the group of each sample."""
    given: Any = group.tolist() if isinstance(group, Tensor | np.ndarray) else group
    found = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given] * count
    if len(found) != count or not all(isinstance(one, Integral | str) for one in found):
        raise ValueError(
            f"heard: expected as group a number or text for each of {count} samples, got {len(found)}: "
            f"{found[:3]}.\nSamples of one episode or scene have the same one."
        )
    return found


def _nothing_to_swap(found: Mapping[str, object]) -> str:
    if not found:
        return "heard: expected at least one batch, got none.\nAn iterator that was used before is empty."
    return (
        "heard: expected a batch with two different conditions, got none.\n"
        "Shuffle the samples, or make the batches larger: conditions are exchanged within a batch."
    )


def _columns(output: Any, count: int) -> list[Any]:
    """Return the parts of an output that have one row per sample."""
    found = columns(output)
    shapes = [(len(column),) if is_words(column) else tuple(column.shape) for column in found]
    if not found or any(shape[0] != count for shape in shapes):
        raise ValueError(
            f"heard: expected outputs with one row for each of {count} samples, got shapes {shapes}.\n"
            f"Wrap the model in a function that returns what counts, batch first."
        )
    return found


def _distance(first: Any, second: Any) -> Numbers:
    """Return the squared distance of each row; integers, booleans and words are equal (0) or not (1)."""
    if is_words(first):
        return np.array([float(a != b) for a, b in zip(first, second, strict=True)])
    a, b = _numbers(first), _numbers(second)
    if a.shape != b.shape:
        raise ValueError(
            f"heard: expected outputs of one shape whatever the condition, got {tuple(a.shape)} and "
            f"{tuple(b.shape)}.\nReturn texts as a list of strings, or pad to one length."
        )
    if not a.is_floating_point():
        return (a != b).reshape(len(a), -1).double().mean(dim=1).numpy()
    found = (a.double() - b.double()).square().reshape(len(a), -1).mean(dim=1).numpy()
    if not np.isfinite(found).all():
        raise ValueError(
            f"heard: expected finite outputs, got {int((~np.isfinite(found)).sum())} of {len(found)} "
            f"samples with NaN or infinity.\nFind them with torch.isfinite(output) first."
        )
    return found


def _numbers(value: Any) -> Tensor:
    """Return an output in the memory of the host, complex numbers as pairs of real ones."""
    found = torch.as_tensor(value, device="cpu").detach()
    return torch.view_as_real(found.resolve_conj()) if found.is_complex() else found


def _apart(column: Any) -> Numbers:
    """Return the mean `_distance` of each row from all others, whatever their order; NaN for a single row."""
    n = len(column)
    if n == 1:
        return np.full(1, np.nan)
    if is_words(column):
        said = Counter(column)
        return np.array([n - said[one] for one in column]) / (n - 1)
    rows = _numbers(column).reshape(n, -1)
    if not rows.is_floating_point():
        _, number = np.unique(rows.numpy(), return_inverse=True)
        entries = torch.from_numpy(number.reshape(rows.shape)).T.contiguous()
        ordered = entries.sort(dim=1).values
        equal = torch.searchsorted(ordered, entries, right=True) - torch.searchsorted(ordered, entries)
        return (n - equal.double().mean(dim=0)).numpy() / (n - 1)
    # mean_j |y_i - y_j|^2 around the mean of all rows; from the first row on, so that equal rows give 0.
    centred = rows.double() - rows[0].double()
    square = (centred - centred.mean(dim=0)).square().mean(dim=1)
    return ((n * square + square.sum()) / (n - 1)).numpy()


def _scored(name: str, function: Score, output: Any, target: Any, count: int) -> Numbers:
    values = torch.as_tensor(function(output, target), device="cpu").detach().double()
    per_sample = values.ndim > 0 and len(values) == count
    if not per_sample or not values.isfinite().all():
        raise ValueError(
            f"heard: expected {name} to give a finite number for each of {count} samples, "
            f"got {'NaN or infinity' if per_sample else f'shape {tuple(values.shape)}'}.\n"
            f'Losses of torch give one per sample with reduction="none".'
        )
    if name == "success" and (values.min() < 0 or values.max() > 1):
        raise ValueError(
            f"heard: expected success to be 0..1 for each sample, got {values.min():.3g} to "
            f"{values.max():.3g}.\nDivide percentages by 100; a reward is a loss with the other sign."
        )
    return values.reshape(count, -1).mean(dim=1).numpy()


def _ratio(moved: Numbers, apart: Numbers) -> Numbers:
    """Return sqrt(moved / apart); 0 for 0 / 0, and infinity where only what is below is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(moved == 0, 0.0, np.sqrt(moved / apart))


def _relative(moved: Numbers, apart: Numbers) -> Numbers:
    """Return the mean over the parts of an output, of means [..., parts] -> [...].

    A part that is the same for all samples gives no measure of its changes, and counts only where no other
    part changes.
    """
    ratios = _ratio(moved, apart)
    measured = np.isfinite(ratios)
    found = np.where(measured, ratios, 0.0).sum(axis=-1)
    return np.where(found > 0, found / np.maximum(measured.sum(axis=-1), 1), ratios.mean(axis=-1))


def _more(moved: Numbers, again: Numbers, apart: Numbers) -> Numbers:
    """Return by how much more a change moves the outputs than a repetition does."""
    return _relative(moved, apart) - _relative(again, apart)
