"""Is the condition heard? What happens to output, loss and success when conditions are exchanged.

A network that ignores its condition trains without a complaint: the loss falls, and only an exchange shows
that the instruction had no part in it. `heard` asks the counterfactual question of anything that is called as
`model(x, cond=...)`, conditioned by this library or not: a network, or a function that runs a whole episode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
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
    derange,
    is_empty,
    is_words,
    keys,
    of_samples,
    reworded,
    take,
)
from torchfilm.hearing import Effect, Estimate, Hearing
from torchfilm.injection import film_of
from torchfilm.several import Masked, Maybe, Several
from torchfilm.telling import START, untouched
from torchfilm.undisturbed import in_mode, same_chance

Score = Callable[[Any, Any], Any]
Numbers = NDArray[np.float64]
Flags = NDArray[np.bool_]
Rows = NDArray[np.int64]


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

    Every sample keeps its x and its target, and gets another sample's condition, always a different one. A
    network that listens gives another output and a worse loss; one that ignores the condition does not.

        change = sqrt(mean_i |y(x_i, c_p(i)) - y(x_i, c_i)|^2 / mean_ij |y(x_i, c_i) - y(x_j, c_j)|^2)

    where j is every other sample of the batch; a batch of one sample has no part in what is below. Conditions
    too are exchanged within a batch, so shuffle the samples before they are batched: a batch of one class or
    one scene differs by less than all samples do. Of several outputs the mean is taken over those in which
    samples differ. The change of an output that is the same for all samples is without bound, and counts
    where no other one changes.

    Every call starts from the same random state, so dropout or sampling noise is the same on both sides; what
    is left (a simulator's own chance) is measured by the row "repeat". A module is measured as
    it predicts, in eval mode and without gradients, and gets its own modes back.

    Args:
        model: called as `model(x, cond=condition)`; any function may stand here, also one that rolls out
            episodes. It may return tensors, lists of words, or a structure of them, with one row per sample.
        batches: of (x, condition), or (x, condition, target) for loss and success to read. Several inputs are
            a tuple (data loaders make lists of them): ((x, t), condition) calls model(x, t, cond=condition);
            (x, t, condition) would exchange t. A condition is a tensor, a list of strings, or any structure
            of them (tokens and mask, a dict), one row per sample; a batch of none is left out. What has a
            single row in a dict, such as a time step, stays as it is. Where the network's encoder is
            `Several`, each condition is exchanged by itself too, as "swap NAME".
        loss: loss(output, target) -> [B], one number per sample (reduction="none").
        success: success(output, target) -> [B], true or false or 0..1.
        blank: condition -> an empty one. Without it, a network whose condition may be missing (`Maybe`,
            `Several`) is given none; else floating-point conditions become zero, words become "", and
            conditions of integers are not blanked.
        paraphrase: condition -> the same in other words; or a dict of texts, whose keys are the whole text of
            a sample; or a pair of conditions, row i of the second saying the same as row i of the first.
            `notes` say how many samples it has words for, where not for all.
        resamples: how many bootstrap resamples make the intervals, at least 1.
        seed: of the exchanges, the resamples, and each call.

    Raises:
        ValueError: for no batches; no resamples; no batch with two different conditions; outputs, losses or
            successes without one row per sample, or not finite; a loss without targets.

    Example:
        >>> x, z = torch.rand(5, 3), torch.rand(5, 3)
        >>> heard(lambda x, cond: x * cond, [(x, z)]).verdict
        'heard'
    """
    if not isinstance(resamples, Integral) or resamples < 1:
        raise ValueError(
            f"heard: expected at least 1 resample, got {resamples!r}.\n"
            f"The intervals are percentiles over resamples: leave resamples= out for 1000."
        )
    rng = np.random.default_rng(seed)
    tally = _Tally(loss, success)
    predicting = in_mode(model, training=False) if isinstance(model, nn.Module) else nullcontext()
    with predicting, torch.no_grad():
        for number, batch in enumerate(batches):
            if is_empty(_parts(batch)[1]):
                continue
            for change in _changes(model, batch, rng, seed + number, (blank, paraphrase)):
                tally.add(*change)
    if "swap" not in tally.found:
        raise ValueError(_nothing_to_swap(tally.found))
    effects = {name: tally.effect(name, rng, resamples) for name in tally.found}
    samples, swapped = effects["repeat"].output.n, effects["swap"].output.n
    notes = []
    if "blank" not in effects:
        notes.append("blank: not measured, since a class has no zero; give blank=.")
    if swapped < samples:
        notes.append(f"swap: {samples - swapped} of {samples} samples had no different condition to go to.")
    known = effects["paraphrase"].output.n if "paraphrase" in effects else 0
    if paraphrase is not None and known < samples:
        missed = "" if known else "not measured, since "
        notes.append(
            f"paraphrase: {missed}{known} of {samples} samples have a condition among its keys; "
            f"a key is the whole text of a sample."
        )
    before = [tally.before(name, rng, resamples) for name in ("loss", "success")]
    return Hearing(effects, before[0], before[1], samples - swapped, tuple(notes), _remedy(model))


def _changes(
    model: Callable[..., Any],
    batch: Sequence[Any],
    rng: np.random.Generator,
    seed: int,
    given: tuple[Callable[[Any], Any] | None, Paraphrase | None],
) -> Iterator[tuple[str, Any, Any, Any, Flags]]:
    """Yield (name, output, changed output, target, which samples count) for each change of a batch."""
    x, condition, target = _parts(batch)
    own = of_samples(condition)
    blank, paraphrase = given
    said = keys(own)
    blank = blank or _nothing(model)
    everyone = np.ones(len(said), dtype=bool)

    def run(with_condition: Any) -> Any:
        inputs = x if type(x) is tuple else (x,)
        with same_chance():
            torch.manual_seed(seed)
            return model(*inputs, cond=with_condition)

    def run_with(changed: Any) -> Any:
        in_part = isinstance(condition, Mapping) and changed.keys() != condition.keys()
        return run({**condition, **changed} if in_part else changed)

    right = run(condition)
    yield "repeat", right, run(condition), target, everyone
    for name, part in _exchanged(model, own).items():
        order = derange(keys(part), rng)
        moved = order != np.arange(len(order))
        if moved.any():
            yield name, right, run_with(take(part, order)), target, moved
    if blank:
        yield "blank", right, run(blank(condition)), target, everyone
    elif (empty := blanked(own)) is not None:
        yield "blank", right, run_with(empty), target, everyone
    if callable(paraphrase):
        yield "paraphrase", right, run(paraphrase(condition)), target, everyone
    elif paraphrase is not None:
        pair = isinstance(paraphrase, tuple)
        other, known = reworded(
            own, (of_samples(paraphrase[0]), of_samples(paraphrase[1])) if pair else paraphrase
        )
        if known.any():
            yield "paraphrase", right, run_with(other), target, known


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
    """Distances, losses and successes of every sample, for each change of the conditions."""

    def __init__(self, loss: Score | None, success: Score | None) -> None:
        self.scores = {
            name: score for name, score in (("loss", loss), ("success", success)) if score is not None
        }
        self.found: dict[str, dict[str, list[Numbers]]] = {}

    def add(self, name: str, right: Any, changed: Any, target: Any, kept: Flags) -> None:
        """Take in one batch's outputs, with the right and with the changed conditions."""
        first, second = _columns(right, len(kept)), _columns(changed, len(kept))
        found = {
            "moved": np.stack([_distance(a, b) for a, b in zip(first, second, strict=True)], axis=1),
            "apart": np.stack([_apart(a) for a in first], axis=1),
        }
        for score, function in self.scores.items():
            if target is None:
                raise ValueError(
                    f"heard: {score} needs a target, got a batch of (x, condition).\n"
                    f"Give (x, condition, target)."
                )
            before, after = (_scored(score, function, y, target, len(kept)) for y in (right, changed))
            found |= {f"{score} before": before, score: after - before}
        change = self.found.setdefault(name, {})
        for key, values in found.items():
            _append(change.setdefault(key, []), values[kept])

    def effect(self, name: str, rng: np.random.Generator, resamples: int) -> Effect:
        """Return the estimates of one change."""
        moved, apart = self._all(name, "moved"), self._all(name, "apart")
        # A sample without others takes the mean of all that have some, which leaves that mean as it is.
        apart = np.where(np.isnan(apart), np.nanmean(self._all("repeat", "apart"), axis=0), apart)

        def change(rows: Rows) -> Numbers:
            return _over_parts(_ratio(moved[rows].mean(axis=1), apart[rows].mean(axis=1)))

        means = [self._mean(name, score, rng, resamples) for score in ("loss", "success")]
        return Effect(_estimate(change, len(moved), rng, resamples), means[0], means[1])

    def before(self, score: str, rng: np.random.Generator, resamples: int) -> Estimate | None:
        """Return the mean of a score with the right conditions."""
        return self._mean("repeat", f"{score} before", rng, resamples)

    def _mean(self, name: str, key: str, rng: np.random.Generator, resamples: int) -> Estimate | None:
        if key not in self.found[name]:
            return None
        values = self._all(name, key)
        return _estimate(lambda rows: values[rows].mean(axis=1), len(values), rng, resamples)

    def _all(self, name: str, key: str) -> Numbers:
        return np.concatenate(self.found[name][key])


def _append(arrays: list[Numbers], rows: Numbers) -> None:
    """Append rows, and join arrays until each is twice as long as the next.

    Many small arrays, one for each batch, would lie between freed memory and keep it from being given back.
    """
    arrays.append(rows)
    while len(arrays) > 1 and len(arrays[-2]) < 2 * len(arrays[-1]):
        arrays[-2:] = [np.concatenate(arrays[-2:])]


def _parts(batch: Sequence[Any]) -> tuple[Any, Any, Any]:
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
        raise ValueError(
            f"heard: expected batches of (x, condition) or (x, condition, target), "
            f"got a {type(batch).__name__}{size}.\n"
            f"Give a list of batches, also for a single one: [(x, condition)]."
        )
    return batch[0], batch[1], batch[2] if len(batch) == 3 else None


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
    return values.reshape(count, -1).mean(dim=1).numpy()


def _ratio(moved: Numbers, apart: Numbers) -> Numbers:
    """Return sqrt(moved / apart); 0 for 0 / 0, and infinity where only what is below is 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(moved == 0, 0.0, np.sqrt(moved / apart))


def _over_parts(ratios: Numbers) -> Numbers:
    """Return the mean over the parts of an output, [resamples, parts] -> [resamples].

    A part that is the same for all samples gives no measure of its changes, and counts only where no other
    part changes.
    """
    measured = np.isfinite(ratios)
    found = np.where(measured, ratios, 0.0).sum(axis=1)
    return np.where(found > 0, found / np.maximum(measured.sum(axis=1), 1), ratios.mean(axis=1))


def _estimate(
    statistic: Callable[[Rows], Numbers], n: int, rng: np.random.Generator, resamples: int
) -> Estimate:
    at_once = max(1, 1_000_000 // n)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    drawn = np.concatenate([statistic(rng.integers(0, n, (size, n))) for size in sizes])
    low, high = np.percentile(drawn, [2.5, 97.5], method="nearest").tolist()
    return Estimate(float(statistic(np.arange(n)[None])[0]), low, high, n)
