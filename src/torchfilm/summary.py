"""What modulations do, in a table: which channels are closed or flipped, how many directions there are.

The condition speaks through the spread of gamma and beta over samples. Where labels say what each sample's
condition was about, the share of the spread between labels tells what a site has learned to listen to, as far
as it is above what few samples of many labels have by chance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from torchfilm.modulation import Modulation, aligned, check_finite, check_modulations
from torchfilm.naming import Entries
from torchfilm.writing import in_columns, in_digits

CLOSED = 0.01
"""A channel whose |gamma| is below this is closed: what it holds does not pass."""
Numbers = NDArray[np.int64]
Labels = Sequence[Any] | NDArray[Any] | Tensor
"""What samples are about, one for each, of any kind that can be compared."""


@dataclass(frozen=True)
class SiteSummary:
    """One site over all samples.

    Args:
        site: its name.
        samples: how many samples there are, N (times T for modulations [N, T, C]).
        channels: how many channels, C.
        gamma_mean: mean of gamma.
        gamma_sd: its standard deviation, over samples and channels.
        beta_mean: mean of beta.
        beta_sd: its standard deviation, over samples and channels.
        closed: share of all gammas that are nearly zero.
        closed_always: how many channels are closed in every sample.
        flipped: share of all gammas below zero.
        rank: how many directions the samples' (gamma, beta) span around their mean, beyond what rounding may
            make, to float32 or, where they have no more digits, to half precision; 0 where all are the same.
            Where autocast rounds and the generator goes on in float32, as with learned_scale and a shared
            head, it counts rounding too, which hardly changes `directions`.
        directions: how many of them count, (sum s^2)^2 / sum s^4 of the singular values; 1 where one has all.
        between: share of the variance of (gamma, beta) that lies between labels, 0..1; None without labels.
        chance: the share that labels without a meaning would have in the mean, (K - 1) / (N - 1) for K labels
            of N samples: 0.4 for 3 of 6, and 1 where each sample has its own.
    """

    site: str
    samples: int
    channels: int
    gamma_mean: float
    gamma_sd: float
    beta_mean: float
    beta_sd: float
    closed: float
    closed_always: int
    flipped: float
    rank: int
    directions: float
    between: float | None
    chance: float | None


@dataclass(frozen=True)
class Summary(Entries[SiteSummary]):
    """A line for each site; `print` shows the table."""

    sites: tuple[SiteSummary, ...]

    def _by_name(self) -> dict[str, SiteSummary]:
        return {line.site: line for line in self.sites}

    def to_json(self) -> list[dict[str, Any]]:
        """Return plain values, one dict for each site."""
        return [asdict(line) for line in self.sites]

    def __repr__(self) -> str:
        labelled = any(line.between is not None for line in self.sites)
        head = ["site", "samples", "channels", "gamma (sd)", "beta (sd)"]
        head += ["closed", "always", "flipped", "rank", "directions"]
        rows = [head + ["between", "by chance"] * labelled]
        for line in self.sites:
            row = [line.site, str(line.samples), str(line.channels)]
            for mean, sd in ((line.gamma_mean, line.gamma_sd), (line.beta_mean, line.beta_sd)):
                row.append("{} ({})".format(*in_digits(mean, sd, apart=sd)))
            row += [f"{line.closed:.1%}", str(line.closed_always), f"{line.flipped:.1%}"]
            row += [str(line.rank), f"{line.directions:.1f}"]
            shares = (line.between, line.chance)
            rows.append(row + [f"{share:.1%}" for share in shares if share is not None])
        return in_columns(rows, right=True)


def summarise(
    modulations: Mapping[str, Modulation], labels: Labels | None = None, *, closed: float = CLOSED
) -> Summary:
    """Summarise modulations site by site.

    Args:
        modulations: gamma and beta [N, C] or [N, T, C] for each site, as a recording has them; where there
            is a gate, both are taken times the gate, as the site applies them.
        labels: what each of the N samples is about; of any kind that can be compared, a tensor or array too.
        closed: |gamma| below this counts as closed.

    Raises:
        ValueError: for modulations without a batch axis, without samples or with numbers that are not finite,
            and for labels of another number.

    Example:
        >>> import torch
        >>> m = Modulation(torch.tensor([[0.0, 2.0], [0.0, -1.0]]), torch.zeros(2, 2))
        >>> found = summarise({"here": m})["here"]
        >>> found.closed, found.closed_always, found.flipped, found.rank
        (0.5, 1, 0.25, 1)
    """
    check_modulations("summarise", modulations)
    numbers = None if labels is None else _numbered(labels)
    return Summary(tuple(_line(site, m, numbers, closed) for site, m in modulations.items()))


def explained(values: NDArray[Any], labels: Labels) -> NDArray[np.float64]:
    """Return for each channel the share of its variance that lies between labels, 0..1; 0 for a constant.

    Of noise it is (K - 1) / (N - 1) in the mean, for K labels of N samples.

    Args:
        values: [N, C].
        labels: one for each of the N.

    Raises:
        ValueError: for labels of another number.

    Example:
        >>> explained(np.array([[1.0, 5.0], [1.0, 7.0], [3.0, 5.0], [3.0, 7.0]]), "aabb").tolist()
        [1.0, 0.0]
    """
    between, total = variances(values, labels)
    return np.divide(between, total, out=np.zeros_like(total), where=total > 0)


def _line(site: str, modulation: Modulation, labels: Numbers | None, closed: float) -> SiteSummary:
    gamma, beta, steps = _arrays(site, modulation)
    if labels is not None and len(labels) * steps != len(gamma):
        raise ValueError(
            f"summarise: expected a label for each of {len(gamma) // steps} samples of site '{site}', "
            f"got {len(labels)}.\n"
            f"Labels stand in the order of the samples."
        )
    both = np.concatenate([gamma, beta], axis=1)
    spread = both - both.mean(axis=0)
    values = torch.linalg.svdvals(torch.from_numpy(spread)).numpy()  # faster than NumPy's
    # What rounding leaves of equal samples: noise, whose singular values grow as these roots.
    noise = max(np.finfo(np.float32).eps * np.abs(both).max(initial=0), _rounding(gamma), _rounding(beta))
    floor = noise * (math.sqrt(len(both)) + math.sqrt(both.shape[1]))
    powers = np.square(np.where(values > floor, values, 0))
    between = chance = None
    if labels is not None:
        chance = float(labels.max()) / max(len(labels) - 1, 1)
        parts, total = (part.sum() for part in _variances(both, labels.repeat(steps)))
        between = min(float(parts / total), 1.0) if powers.any() else 0.0
    return SiteSummary(
        site=site,
        samples=len(gamma),
        channels=gamma.shape[1],
        gamma_mean=float(gamma.mean()),
        gamma_sd=float(gamma.std()),
        beta_mean=float(beta.mean()),
        beta_sd=float(beta.std()),
        closed=float((np.abs(gamma) < closed).mean()),
        closed_always=int((np.abs(gamma) < closed).all(axis=0).sum()),
        flipped=float((gamma < 0).mean()),
        rank=int((powers > 0).sum()),
        directions=float(powers.sum() ** 2 / np.square(powers).sum()) if powers.any() else 0.0,
        between=between,
        chance=chance,
    )


def _rounding(values: NDArray[np.float64]) -> float:
    """Return how much rounding there may be in numbers of half precision; 0 for those of more.

    Autocast and half-precision networks leave gamma in float32, as 1 plus a number that was rounded. So
    numbers count as rounded, themselves or less 1, that take the few digits of bfloat16 or float16 and no
    more; those that take fewer still were not computed, and are exact, and so are integers. A channel that is
    constant shows no rounding.
    """
    values = values[:, np.ptp(values, axis=0) > 0]
    if not np.any(values % 1):
        return 0.0
    for offset in (0.0, 1.0):
        mantissa = np.frexp(values - offset)[0]
        for digits in (4, 8, 11):  # of bfloat16 and float16 the last two
            if not np.any(mantissa * 2**digits % 1):
                return 2.0 ** (1 - digits) * float(np.abs(values - offset).max()) if digits > 4 else 0.0
    return 0.0


def _arrays(site: str, modulation: Modulation) -> tuple[NDArray[np.float64], NDArray[np.float64], int]:
    """Return gamma and beta as [rows, C] of one shape, and how many rows each sample has."""
    if modulation.gamma.ndim < 2:
        raise ValueError(
            f"summarise: expected modulations [N, C] of several samples at site '{site}', "
            f"got gamma {tuple(modulation.gamma.shape)}.\n"
            f"Record several calls: record(model)."
        )
    if not modulation.gamma.shape[0]:
        raise ValueError(
            f"summarise: expected at least one sample at site '{site}', got gamma "
            f"{tuple(modulation.gamma.shape)}.\nRecord several calls: record(model)."
        )
    fields = ("gamma", "beta", "gate")
    check_finite("summarise", site, **dict(zip(fields, modulation.present(), strict=False)))
    wide = Modulation(*(field.detach().cpu().double() for field in modulation.present()))
    both = [field.numpy() for field in aligned(*wide.gated())]
    gamma, beta = np.broadcast_arrays(*both)
    channels = gamma.shape[-1]
    return gamma.reshape(-1, channels), beta.reshape(-1, channels), math.prod(gamma.shape[1:-1])


def as_values(labels: Labels) -> list[Any]:
    """Return labels as what they say, keys of a dict: tensors and NaN are equal to themselves alone."""
    given = labels.tolist() if isinstance(labels, Tensor | np.ndarray) else labels
    return [_said(label) for label in given]


def _said(label: Any) -> Any:
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.tolist()
    if isinstance(label, list | tuple):
        return tuple(map(_said, label))
    if isinstance(label, float) and math.isnan(label):
        return math.nan  # one for all, which a dict finds
    return repr(label) if isinstance(label, dict | set) else label


def variances(values: NDArray[Any], labels: Labels) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the sums of squares between labels, and all, for each channel.

    Raises:
        ValueError: for another number of labels than of samples.
    """
    if len(labels) != len(values):
        raise ValueError(
            f"explained: expected a label for each of {len(values)} samples, got {len(labels)}.\n"
            f"Labels stand in the order of the samples."
        )
    return _variances(values, _numbered(labels))


def _numbered(labels: Labels) -> Numbers:
    """Return labels as numbers from 0 on, equal ones as one number."""
    numbers: dict[Any, int] = {}
    return np.array([numbers.setdefault(one, len(numbers)) for one in as_values(labels)], dtype=np.int64)


def _variances(values: NDArray[Any], labels: Numbers) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    mean = values.mean(axis=0, dtype=np.float64)
    between = np.zeros(values.shape[1])
    ends = np.bincount(labels).cumsum()
    for rows in np.split(np.argsort(labels, kind="stable"), ends[:-1]):
        between += len(rows) * np.square(values[rows].mean(axis=0, dtype=np.float64) - mean)
    return between, np.square(values - mean).sum(axis=0)
