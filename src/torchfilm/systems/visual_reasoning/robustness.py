"""What gamma and beta are worth at test time: replaced by their means or the identity, or blurred by noise.

Perez et al. 2018, section 4.3 and figure 7: beta by its training mean costs 1.0 points, gamma 65.4.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from torchfilm import Modulation, plot
from torchfilm.data.clevr.encoding import EncodedQuestions
from torchfilm.training.checkpoint import write_csv, write_json

from .exam import Exam, Looked, Progress, Reasoner, conclude, look, modulate, silent

Part = Literal["gamma", "beta"]
Modulations = Mapping[str, Modulation]
CHANGES = 6
"""How many accuracies there are besides those under noise."""
_BEST = 97.84
PAPER = {"accuracy": _BEST, "gamma_mean": _BEST - 65.4, "beta_mean": _BEST - 1.0}
"""Percent on CLEVR's validation split: of the best network (section 7.2), and less what it loses (4.3)."""
NOISE = (0.0, 0.1, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 5.0)


@dataclass(frozen=True)
class Robustness:
    """Accuracies 0..1 under each change of gamma and beta; `noise_gamma[i]` belongs to the SD `noise[i]`."""

    n: int
    seed: int
    accuracy: float
    gamma_mean: float
    beta_mean: float
    both_mean: float
    gamma_one: float
    beta_zero: float
    noise: tuple[float, ...]
    noise_gamma: tuple[float, ...]
    noise_beta: tuple[float, ...]
    noise_both: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def robustness(
    model: Reasoner,
    exam: Exam,
    train: EncodedQuestions,
    out: Path,
    *,
    noise: Sequence[float] = NOISE,
    seed: int = 0,
    progress: Progress = silent,
) -> Robustness:
    """Accuracy on the exam with gamma and beta replaced and blurred; drawn and written to `out`.

    train: training questions, over which the means are taken. noise: standard deviations of what is added to
    every value, in the values' own unit; one draw per value, made longer from step to step, so that the
    curves are smooth. SD 0 is the unchanged network. progress: hears how many answers are given, of all.
    """
    means = mean_modulations(modulate(model, train))
    seen, own = look(model, exam), modulate(model, exam.questions)
    noisy = drawn_noise(own, seed)
    right = _Grader(model, exam, seen, progress, (CHANGES + 3 * len(noise)) * len(exam))

    def blurred(parts: Sequence[Part]) -> tuple[float, ...]:
        return tuple(right(add_noise(own, noisy, sd, parts)) for sd in noise)

    found = Robustness(
        n=len(exam),
        seed=seed,
        accuracy=right(own),
        gamma_mean=right(with_parts(own, means, ["gamma"])),
        beta_mean=right(with_parts(own, means, ["beta"])),
        both_mean=right(with_parts(own, means, ["gamma", "beta"])),
        gamma_one=right(with_parts(own, identity(own), ["gamma"])),
        beta_zero=right(with_parts(own, identity(own), ["beta"])),
        noise=tuple(noise),
        noise_gamma=blurred(["gamma"]),
        noise_beta=blurred(["beta"]),
        noise_both=blurred(["gamma", "beta"]),
    )
    write(found, out)
    return found


@dataclass
class _Grader:
    """Accuracy of given gamma and beta on one exam, again and again."""

    model: Reasoner
    exam: Exam
    seen: Looked
    progress: Progress
    total: int
    done: int = 0

    def __call__(self, modulations: Modulations) -> float:
        before = self.done

        def heard(done: int, _: int) -> None:
            self.done = before + done
            self.progress(self.done, self.total)

        answers = conclude(self.model, self.seen, modulations, heard)
        return float((answers == self.exam.questions.answers).mean())


def mean_modulations(modulations: Modulations) -> dict[str, Modulation]:
    """The mean over questions of each channel's gamma and beta, [1, C]."""
    return {
        site: Modulation(m.gamma.mean(0, keepdim=True), m.beta.mean(0, keepdim=True))
        for site, m in modulations.items()
    }


def identity(modulations: Modulations) -> dict[str, Modulation]:
    """Gamma = 1 and beta = 0 at each site, [1, C]."""
    return {site: Modulation.identity(1, m.gamma.shape[1]) for site, m in modulations.items()}


def with_parts(modulations: Modulations, other: Modulations, parts: Sequence[Part]) -> dict[str, Modulation]:
    """The modulations with the named parts taken from `other`, whose rows are repeated as needed."""
    return {
        site: m.replace(**{part: getattr(other[site], part).expand_as(m.gamma) for part in parts})
        for site, m in modulations.items()
    }


def drawn_noise(modulations: Modulations, seed: int) -> dict[str, Modulation]:
    """One standard normal number for each value, the same for the same seed and shapes."""
    source = torch.Generator().manual_seed(seed)

    def draw(like: torch.Tensor) -> torch.Tensor:
        return torch.randn(like.shape, generator=source)

    return {site: Modulation(draw(m.gamma), draw(m.beta)) for site, m in modulations.items()}


def add_noise(
    modulations: Modulations, noise: Modulations, sd: float, parts: Sequence[Part]
) -> dict[str, Modulation]:
    """The named parts plus sd times the noise."""
    return {
        site: m.replace(**{part: getattr(m, part) + sd * getattr(noise[site], part) for part in parts})
        for site, m in modulations.items()
    }


def write(found: Robustness, out: Path) -> list[Path]:
    """Write robustness.json and means.png, and where there is noise the curves of figure 7 as noise.png and
    noise.csv."""
    out.mkdir(parents=True, exist_ok=True)
    files = [write_json(out / "robustness.json", found.to_json()), _draw_means(found, out / "means.png")]
    if len(found.noise) == 1:
        return files
    columns = zip(found.noise, found.noise_gamma, found.noise_beta, found.noise_both, strict=True)
    files.append(write_csv(out / "noise.csv", ("sd", "gamma", "beta", "both"), columns))
    figure = plot.curves(
        found.noise,
        {
            "noise on γ": (100 * np.array(found.noise_gamma)).tolist(),
            "noise on β": (100 * np.array(found.noise_beta)).tolist(),
            "noise on both": (100 * np.array(found.noise_both)).tolist(),
        },
        xlabel="standard deviation of the noise",
        ylabel="accuracy, %",
        levels={"γ by its mean": 100 * found.gamma_mean, "β by its mean": 100 * found.beta_mean},
    )
    return [*files, plot.save(figure, out / "noise.png")]


def _draw_means(found: Robustness, path: Path) -> Path:
    names = {
        "accuracy": "unchanged",
        "gamma_mean": "γ by\nits mean",
        "beta_mean": "β by\nits mean",
        "both_mean": "both by\ntheir means",
        "gamma_one": "γ = 1",
        "beta_zero": "β = 0",
    }
    values = {name: (100 * getattr(found, key), PAPER.get(key, math.nan)) for key, name in names.items()}
    return plot.save(plot.grouped_bars(values, ("here", "the paper"), ylabel="accuracy, %"), path)
