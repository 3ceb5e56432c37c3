"""Intervals of 95 %: bootstrap, wide enough for few samples and for rows that depend on one another.

Rows depend on one another where they share a unit: the sample (or the group of samples) that a row is of, or
the one that gave it its condition. A bootstrap over rows sees none of the latter. Each end of its interval is
therefore moved away from the value, in proportion to

    sqrt(max(1, V / W) / (1 - N / n^2)) t / 1.96,    V = sum of e_i e_j over N pairs (i, j) that share a unit,

where e are the deviations of n rows (of a ratio of means, in first order), W is the sum of squares that the
bootstrap sees, and t is Student's quantile for the number of units less one. V is the variance of Cameron,
Gelbach and Miller 2011 (doi 10.1198/jbes.2010.07136) and of Aronow, Samii and Assenova 2015 (arXiv
1312.3398); the divisor makes up for deviations from the rows' own mean: (n - 1) / n for independent rows.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from torchfilm.writing import with_interval

Numbers = NDArray[np.float64]
Rows = NDArray[np.int64]
Bounds = tuple[float, float]

FEWEST_RESAMPLES = 40
"""With fewer, no resample lies outside of the middle 95 %."""

NORMAL = 1.959963984540054
"""The quantile 0.975 of the normal distribution."""
_STUDENT = (2.372271230298562, 2.8224986157396112, 2.555849679507722, 1.5895340533938225)
EVERYWHERE = (-math.inf, math.inf)


@dataclass(frozen=True)
class Estimate:
    """A number over samples with its interval of 95 %.

    Args:
        value: the number.
        low: where its interval starts.
        high: where it ends.
        n: how many samples it is over.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Show the number and its interval."""
        return with_interval(self.value, self.low, self.high)


def student(degrees: int) -> float:
    """Return the quantile 0.975 of Student's distribution, to 0.2 %: Cornish and Fisher's expansion.

    Example:
        >>> [round(student(degrees), 2) for degrees in (1, 2, 10, 1000)]
        [12.71, 4.3, 2.23, 1.96]
    """
    if degrees < 3:
        return (math.inf, 12.706204736174698, 4.302652729749464)[max(degrees, 0)]
    return NORMAL + sum(term / degrees**power for power, term in enumerate(_STUDENT, start=1))


def wilson(share: float, n: float) -> Bounds:
    """Return the interval of Wilson 1927 for a share of n samples; all of 0..1 for none.

    Example:
        >>> [round(end, 3) for end in wilson(1.0, 20)]
        [0.839, 1.0]
    """
    if n == 0:
        return 0.0, 1.0
    wide = NORMAL**2 / n
    half = math.sqrt(wide * (share * (1 - share) + wide / 4))
    low, high = ((share + wide / 2 + side) / (1 + wide) for side in (-half, half))
    return min(low, share), max(high, share)


class Sampled:
    """The rows that estimates are over, and which of them depend on one another.

    Args:
        units: [n] the sample or group that each row is of, as a number.
        givers: [n] the one that gave the row its condition; the row's own where it was not exchanged.
    """

    def __init__(self, units: Rows, givers: Rows) -> None:
        both = np.unique(np.concatenate([units, givers]), return_inverse=True)[1]
        self.units, self.givers = both[: len(units)], both[len(units) :]
        self.own = np.unique(units, return_inverse=True)[1]
        self.n, self.count, self.most = len(units), int(self.own.max()) + 1, int(both.max()) + 1

    def estimate(
        self,
        statistic: Callable[[Numbers], Numbers],
        columns: Numbers,
        bootstrap: tuple[np.random.Generator, int],
        bounds: Bounds = EVERYWHERE,
        roles: Numbers | float = 1.0,
    ) -> Estimate:
        """Return a function of means with its interval.

        Args:
            statistic: [anything, columns] means -> [anything].
            columns: [n, columns] of which the means are taken.
            bootstrap: random numbers, and how many resamples.
            bounds: what the statistic cannot be beyond.
            roles: [n, columns] how often each row's unit takes part in a mean, as the one and as another.
        """
        mean = columns.mean(axis=0)
        value = float(statistic(mean[None])[0])
        if self.count < 2:
            return Estimate(value, *bounds, self.n)
        drawn = statistic(self._resampled(columns, *bootstrap))
        low, high = np.percentile(drawn, [2.5, 97.5], method="nearest").tolist()
        if math.isfinite(value):
            slopes = _gradient(statistic, columns)
            deviations = columns - mean
            wider = self._wider(deviations @ slopes, (deviations * roles) @ slopes)
            low, high = (value + (end - value) * wider for end in (low, high))
        return Estimate(value, max(low, bounds[0]), min(high, bounds[1]), self.n)

    def level(
        self, values: Numbers, bootstrap: tuple[np.random.Generator, int], bounds: Bounds = EVERYWHERE
    ) -> Estimate:
        """Return the mean of [n] values; of zeros and ones with the interval of Wilson 1927."""
        if not _binary(values, bounds):
            return self.estimate(_first, values[:, None], bootstrap, bounds)
        mean = float(values.mean())
        return Estimate(mean, *wilson(mean, self.n / self._spread(values - mean) ** 2), self.n)

    def change(
        self,
        before: Numbers,
        after: Numbers,
        bootstrap: tuple[np.random.Generator, int],
        bounds: Bounds = EVERYWHERE,
    ) -> Estimate:
        """Return the mean of after - before, both [n].

        Of zeros and ones, the interval is that of Agresti and Min 2005 (doi 10.1002/sim.1781): half a sample
        is added to each of the four outcomes.
        """
        change = after - before
        if not _binary(np.concatenate([before, after]), bounds):
            return self.estimate(_first, change[:, None], bootstrap, bounds)
        value, more = float(change.mean()), self.n + 2
        middle = float(change.sum()) / more
        variance = (float(np.abs(change).sum()) + 1) / more - middle**2
        half = NORMAL * self._spread(change - value) * math.sqrt(variance / more)
        return Estimate(value, max(middle - half, -1.0), min(middle + half, 1.0), self.n)

    def _resampled(self, columns: Numbers, rng: np.random.Generator, resamples: int) -> Numbers:
        """Return [resamples, columns]: means over units drawn with replacement, each with all of its rows."""
        sums = [np.bincount(self.own, column) for column in (*columns.T, np.ones(self.n))]
        totals = np.stack(sums, axis=1)
        at_once, found = max(1, 1_000_000 // self.count), []
        for start in range(0, resamples, at_once):
            size = min(at_once, resamples - start)
            drawn = rng.integers(0, self.count, (size, self.count))
            drawn += self.count * np.arange(size)[:, None]
            times = np.bincount(drawn.ravel(), minlength=drawn.size).reshape(drawn.shape)
            found.append(times.astype(np.float64) @ totals)
        means = np.concatenate(found)
        return means[:, :-1] / means[:, -1:]

    def _wider(self, drawn: Numbers, deviations: Numbers) -> float:
        """Return by how much to widen the bootstrap's interval, which sees only what it draws."""
        seen = _squares(self.own, drawn)
        more = max(1.0, self._shared(deviations) / seen) if seen > 0 else 1.0
        return self._student / NORMAL * math.sqrt(more / self._known)

    def _spread(self, deviations: Numbers) -> float:
        """Return by how much to widen an interval that takes rows as independent."""
        seen = float(np.square(deviations).sum())
        more = max(1.0, self._shared(deviations) / seen) if seen > 0 else self.n / self._distinct
        if self.count == self.n:
            return math.sqrt(more)
        return self._student / NORMAL * math.sqrt(more / self._known)

    @cached_property
    def _known(self) -> float:
        """How much of a variance is left in deviations from the rows' own mean; no less than of two rows."""
        return max(0.5, 1 - self._shared(np.ones(self.n)) / self.n**2)

    @cached_property
    def _student(self) -> float:
        """Student's quantile."""
        return student(max(1, self._distinct - 1)) if self.count > 1 else math.inf

    @cached_property
    def _distinct(self) -> int:
        """How many units there are: where two swap with one another, their rows may be one number twice."""
        far, pairs = self._exchanged
        return min(self.count, len(np.unique(pairs)) + len(np.unique(self.units[~far])))

    def _shared(self, deviations: Numbers) -> float:
        """Return the sum of products over all pairs of rows that share a unit."""
        far, pairs = self._exchanged
        of_units = np.bincount(self.units, deviations, minlength=self.most)
        of_units += np.bincount(self.givers[far], deviations[far], minlength=self.most)
        # Rows that share both of their units are in there twice.
        return float(np.square(of_units).sum()) - _squares(pairs, deviations[far])

    @cached_property
    def _exchanged(self) -> tuple[NDArray[np.bool_], Rows]:
        """Which rows have a condition of another unit; and a number for the pair of both units."""
        far = self.units != self.givers
        units, givers = self.units[far], self.givers[far]
        pairs = np.minimum(units, givers) * self.most + np.maximum(units, givers)
        return far, np.unique(pairs, return_inverse=True)[1]


def _squares(labels: Rows, deviations: Numbers) -> float:
    """Return the sum over labels of the square of what stands under each."""
    return float(np.square(np.bincount(labels, deviations)).sum())


def _binary(values: Numbers, bounds: Bounds) -> bool:
    """Whether values are zeros and ones; without bounds only if both occur: a loss may be 0 by its size."""
    return bool(np.isin(values, (0.0, 1.0)).all() and (math.isfinite(bounds[1]) or np.ptp(values) > 0))


def _first(means: Numbers) -> Numbers:
    return means[..., 0]


def _gradient(statistic: Callable[[Numbers], Numbers], columns: Numbers) -> Numbers:
    """Return how fast a statistic changes with each mean, by a step both ways; 0 for a constant column."""
    mean = columns.mean(axis=0)
    steps = 1e-4 * np.maximum(columns.std(axis=0), 1e-3 * np.abs(mean))
    with np.errstate(invalid="ignore", divide="ignore"):
        slopes = (statistic(mean + np.diag(steps)) - statistic(mean - np.diag(steps))) / (2 * steps)
    return np.where(np.isfinite(slopes), slopes, 0.0)
