"""What `heard` counts for each sample, with the right conditions and with changed ones, and its estimates."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchfilm.counterfactual import columns, is_words
from torchfilm.heard_report import Effect
from torchfilm.intervals import EVERYWHERE, Bounds, Estimate, Numbers, Rows, Sampled
from torchfilm.restoring import fresh

Score = Callable[[Any, Any], Any]
Flags = NDArray[np.bool_]
Found = Mapping[str, NDArray[Any]]
Scores = tuple[Estimate | None, Estimate | None]
Bootstrap = tuple[np.random.Generator, int]

RIGHT = "as it is"
_LEVELS: dict[str, Bounds] = {"loss": EVERYWHERE, "success": (0.0, 1.0)}
_CHANGES: dict[str, Bounds] = {"loss": EVERYWHERE, "success": (-1.0, 1.0)}


class Tally:
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
        # A copy: a network may write its next output into the same memory.
        self.output, self.target = _columns(fresh(output), count), target
        self.first, self.count = self.count, self.count + count
        unit = np.arange(self.first, self.count)
        if group is not None:  # numbers below zero, as batches without groups may be among the others
            ids = _ids(group, count)
            unit = np.array([self.groups.setdefault(one, -1 - len(self.groups)) for one in ids])
        apart = np.stack([_apart(column) for column in self.output], axis=1)
        found = {"unit": unit, "call": np.full(count, self.first), "apart": apart}
        self._append(RIGHT, found | self._scored(output, count))

    def add(self, name: str, output: Any, giver: Rows, kept: Flags) -> None:
        """Take in the batch's outputs with changed conditions: whose they are, and which samples count."""
        changed = _columns(output, len(kept))
        if len(changed) != len(self.output):
            raise ValueError(
                f"heard: expected as many outputs whatever the condition, got {len(self.output)} with the "
                f"right ones and {len(changed)} without.\n"
                f"Wrap the model in a function that returns what counts, always the same parts."
            )
        found = {
            "row": np.arange(self.first, self.count),
            "giver": self.first + giver,
            "moved": np.stack([*map(_distance, self.output, changed)], axis=1),
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

    def _append(self, name: str, found: Found) -> None:
        change = self.found.setdefault(name, {})
        for key, values in found.items():
            _append(change.setdefault(key, []), values)

    @property
    def units(self) -> int:
        """How many independent samples are swapped, or groups of them."""
        return len(np.unique(self._all(RIGHT)["unit"][self._all("swap")["row"]]))

    def levels(self) -> Scores:
        """Return loss and success with the right conditions."""
        right = self._all(RIGHT)
        sampled = Sampled(right["unit"], right["unit"])
        return self._scores(lambda name: sampled.level(right[name], self.bootstrap, _LEVELS[name]))

    def effect(self, name: str) -> Effect:
        """Return the estimates of one change."""
        right, again, change = self._all(RIGHT), self._all("repeat"), self._all(name)
        rows, moved = change["row"], change["moved"]
        by_chance = again["moved"].any() or any((right[one] != again[one]).any() for one in self.scores)
        if name == "repeat" and not by_chance:  # not a chance that n samples do not show, but none
            none = Estimate(0.0, 0.0, 0.0, len(rows))
            return Effect(none, *self._scores(lambda name: none))
        sampled = Sampled(right["unit"][rows], right["unit"][change["giver"]])
        apart, times = _from_others(right["apart"])[rows], _times(right, change)
        output = self._output(sampled, _relative, (moved, apart), times, (0.0, math.inf))
        found = Effect(output, *self._changes(sampled, right, change))
        if name == "repeat" or not by_chance:
            return found
        # Beside parts that differ between samples, what is the same for all has no measure.
        kept = apart.mean(axis=0) > 0
        if math.isinf(output.value) or not kept.any():
            kept, apart = np.ones_like(kept), np.ones_like(apart)
            if again["moved"].any() and (again["moved"] == again["moved"][right["call"]]).all():
                sampled = Sampled(right["call"][rows], right["call"][rows])  # all of a call share its chance
        columns = moved[:, kept], again["moved"][rows][:, kept], apart[:, kept]
        more = self._output(sampled, _more, columns, times)
        return replace(found, beyond=Effect(more, *self._changes(sampled, again, change)))

    def _output(
        self,
        sampled: Sampled,
        statistic: Callable[..., Numbers],
        columns: Sequence[Numbers],
        times: Numbers,
        bounds: Bounds = EVERYWHERE,
    ) -> Estimate:
        """Return a function of the means of [n, parts] columns, the last of which are distances to others."""
        once = np.ones((len(times), len(columns) - 1))
        return sampled.estimate(
            lambda means: statistic(*np.split(means, len(columns), axis=-1)),
            np.concatenate(columns, axis=1),
            self.bootstrap,
            bounds,
            np.repeat(np.hstack([once, times]), columns[0].shape[1], axis=1),
        )

    def _changes(self, sampled: Sampled, before: Found, change: Found) -> Scores:
        """Return by how much loss and success are more than before."""
        rows, bootstrap = change["row"], self.bootstrap
        return self._scores(
            lambda name: sampled.change(before[name][rows], change[name], bootstrap, _CHANGES[name])
        )

    def _scores(self, estimate: Callable[[str], Estimate]) -> Scores:
        """Return the estimates of loss and success, None for one that was not asked for."""
        loss, success = (estimate(name) if name in self.scores else None for name in ("loss", "success"))
        return loss, success

    def _all(self, name: str) -> Found:
        return {key: np.concatenate(arrays) for key, arrays in self.found[name].items()}


def _from_others(apart: Numbers) -> Numbers:
    """Give a sample without others the mean of all that have some, which leaves that mean as it is."""
    return np.where(np.isnan(apart), np.nanmean(apart, axis=0), apart)


def _times(right: Found, change: Found) -> Numbers:
    """Return how often each row's sample is in the mean over others: [n, 1].

    Twice, as the one and as the other; where others are few, their rows show it already.
    """
    rows, giver = change["row"][:, None], change["giver"][:, None]
    share = 1 - 1 / np.bincount(right["call"])[right["call"][rows]]
    return 2 * np.where(giver == rows, np.sqrt(share), share)


def _append(arrays: list[Any], rows: NDArray[Any]) -> None:
    """Append rows, and join arrays until each is twice as long as the next.

    Many small arrays, one for each batch, would lie between freed memory and keep it from being given back.
    """
    arrays.append(rows)
    while len(arrays) > 1 and len(arrays[-2]) < 2 * len(arrays[-1]):
        arrays[-2:] = [np.concatenate(arrays[-2:])]


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
    values = torch.as_tensor(function(*fresh((output, target))), device="cpu").detach().double()
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
