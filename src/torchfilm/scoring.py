"""What networks score over seeds and samples, and how far other seeds and samples could be from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor, nn

from torchfilm.intervals import Numbers, student, wilson
from torchfilm.writing import in_digits, with_interval

Score = Callable[[nn.Module], float | Sequence[float] | Tensor]


@dataclass(frozen=True)
class Scored:
    """A score with its 95 % interval.

    The interval is for other seeds, by Student's t, and other samples: by Student's t too, or by Wilson where
    all scores are 0 or 1. With one seed it is for other samples alone: how far another training would be
    from this one is not in it. Samples count as independent.

    Args:
        value: the mean over seeds and samples.
        low: where its interval starts; equal to the value where there is neither a second seed nor a sample.
        high: where it ends.
        by_seed: the mean of each seed.
    """

    value: float
    low: float
    high: float
    by_seed: tuple[float, ...]

    def __str__(self) -> str:
        """Show value and interval, if there is one, and over how many seeds."""
        seeds = f", {len(self.by_seed)} seeds" if len(self.by_seed) > 1 else ""
        if self.low < self.high:
            return with_interval(self.value, self.low, self.high) + seeds
        return in_digits(self.value)[0] + seeds


def scored_by(models: Mapping[str, Sequence[nn.Module]], score: Score) -> dict[str, Numbers]:
    """Return the scores of the networks of each name as [seeds, samples].

    Raises:
        ValueError: for no scores, different numbers of them, NaN and infinity.
    """
    scores = {name: _scores(name, trained, score) for name, trained in models.items()}
    sizes = {name: numbers.shape[1] for name, numbers in scores.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"compare: expected scores of the same samples for all networks, got {sizes} of them.\n"
            f"Score every network on the same samples."
        )
    return scores


def scored_of(scores: Numbers, paired: Numbers | None = None) -> Scored:
    """Return mean and interval of scores, or of their difference to the paired ones on the same samples.

    What seeds make of the interval and what samples make of it are half widths, which add as their squares;
    of the seeds of two networks too, which is more than need be where they are few.
    """
    groups = [scores] if paired is None else [scores, paired]
    reference = 0.0 if paired is None else float(paired.mean())
    each = scores.mean(axis=0) - (0.0 if paired is None else paired.mean(axis=0))
    mean, n = float(scores.mean()) - reference, len(each)
    seeds, twice = (math.fsum(one) for one in zip(*map(_of_seeds, groups), strict=True))
    binary = all(np.isin(group, (0, 1)).all() for group in groups)
    below = above = 0.0
    if n > 1 and binary and paired is None:
        variance = np.square(each - mean).sum() / (n * (n - 1)) - twice
        below, above = _wilson(mean, scores.shape, variance)
    elif n > 1:
        agree = 1.0 if binary else 0.0  # as if half a sample more were for, and half against
        spread = (np.square(each - mean).sum() + agree) / (n * (n - 1)) - twice
        below = above = student(n - 1) * math.sqrt(max(spread, 0.0))
    low, high = mean - math.hypot(below, seeds**0.5), mean + math.hypot(above, seeds**0.5)
    if binary:
        low, high = max(low, 0.0 if paired is None else -1.0), min(high, 1.0)
    return Scored(mean, low, high, tuple(float(one) - reference for one in scores.mean(axis=1)))


def _scores(name: str, models: Sequence[nn.Module], score: Score) -> Numbers:
    """Return the scores as [seeds, samples]."""
    found = []
    for model in models:
        value = score(model)
        value = value.detach().cpu().double().numpy() if isinstance(value, Tensor) else value
        found.append(np.atleast_1d(np.asarray(value, dtype=np.float64)))
    if len({numbers.shape for numbers in found}) > 1 or found[0].ndim != 1 or not found[0].size:
        shapes = [numbers.shape for numbers in found]
        raise ValueError(
            f"compare: expected equally many scores, at least one, for each seed of '{name}', got {shapes}.\n"
            f"Score every seed on the same samples."
        )
    scores = np.stack(found)
    if not np.isfinite(scores).all():
        raise ValueError(
            f"compare: expected finite scores, got NaN or infinity in {(~np.isfinite(scores)).sum()} of "
            f"{scores.size} of '{name}'.\nLook at what `score` gives for this network."
        )
    return scores


def _of_seeds(scores: Numbers) -> tuple[float, float]:
    """Return the square of the half width that seeds make, and which variance of samples it has already."""
    (seeds, n), means = scores.shape, scores.mean(axis=1, keepdims=True)
    if seeds == 1:
        return 0.0, 0.0
    rest = np.square(scores - means - scores.mean(axis=0) + scores.mean()).sum()
    own = rest / ((seeds - 1) * (n - 1)) if n > 1 else 0.0
    return student(seeds - 1) ** 2 * float(means.var(ddof=1)) / seeds, float(own) / (seeds * n)


def _wilson(p: float, shape: tuple[int, ...], variance: float) -> tuple[float, float]:
    """Return how far below and above a share p of [seeds, samples] its interval goes.

    With several seeds the variance over samples tells for how many single ones they count, at most for all.
    """
    n: float = shape[1]
    if 0 < p < 1:
        n = min(p * (1 - p) / variance + 1 if variance > 0 else math.inf, shape[0] * n)
    low, high = wilson(p, n)
    return p - low, high - p
