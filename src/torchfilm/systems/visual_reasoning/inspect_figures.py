"""Look inside a trained network as the paper does: gamma and beta over questions, and where the pool looks.

Each figure is a PNG with the numbers behind it in a file of the same name (.csv or .json).
"""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

from torchfilm import Modulation, plot
from torchfilm.data.clevr.question_types import TYPES
from torchfilm.training.checkpoint import write_csv, write_json

from .answering import looked as pooled_cells
from .exam import Exam, Looked, Progress, Reasoner, conclude, look, modulate, reasoned_batches, silent

_ATTRIBUTE_MARKERS = {"color": "o", "shape": "^", "size": "s", "material": "D"}

TYPE_MARKS: dict[str, plot.Mark] = {
    "exist": plot.Mark("#E69F00", "P"),
    "count": plot.Mark("#000000", "X"),
    "equal_integer": plot.Mark("#009E73", "o"),
    "less_than": plot.Mark("#009E73", "v"),
    "greater_than": plot.Mark("#009E73", "^"),
    **{f"query_{name}": plot.Mark("#0072B2", marker) for name, marker in _ATTRIBUTE_MARKERS.items()},
    **{f"equal_{name}": plot.Mark("#D55E00", marker) for name, marker in _ATTRIBUTE_MARKERS.items()},
}
"""The colour tells the kind of question, the marker the attribute: query_color and equal_color share a
marker."""


def inspect(
    model: Reasoner,
    exam: Exam,
    out: Path,
    *,
    images: Sequence[UInt8[np.ndarray, "H W 3"]] | None = None,
    points: int = 3000,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Path]:
    """Draw all figures into `out` from `points` random questions of the exam (the paper takes 3,000);
    return the files.

    images: what people see of the scenes, row = image_index; without them the map of the pool is not drawn.
    progress: hears how many blocks' t-SNE, which takes most of the time, is laid out.
    """
    drawn = exam.sample(points, seed)
    modulations = modulate(model, drawn.questions)
    if not modulations:
        raise ValueError("inspect: expected a network with FiLM, got one without a block that listens.")
    types = question_types(drawn)
    files = histogram_figure(modulations, out)
    files += channel_figures(modulations, out)
    for site, modulation in modulations.items():
        files += plane_figure(site, modulation, types, out)
    files += embedding_figure(modulations, types, drawn, out, seed=seed, progress=progress)
    if images is not None:
        files += pool_figure(model, exam.sample(12, seed), images, out)
    return files


def question_types(exam: Exam) -> list[str]:
    """The type of each question; "" where the file does not say."""
    return [TYPES[number] if number >= 0 else "" for number in exam.questions.types]


def histogram_figure(modulations: Mapping[str, Modulation], out: Path) -> list[Path]:
    """Histograms of gamma and beta of each block over all questions and channels (figures 5, 16, 17)."""
    gamma, beta = _arrays(modulations)
    numbers = {site: {"gamma": _summary(gamma[site]), "beta": _summary(beta[site])} for site in modulations}
    numbers["all"] = {
        name: _summary(np.concatenate([v.ravel() for v in values.values()]))
        for name, values in (("gamma", gamma), ("beta", beta))
    }
    path = plot.save(plot.histograms(gamma, beta), out / "histograms.png")
    return [path, write_json(out / "histograms.json", numbers)]


def _summary(values: np.ndarray) -> dict[str, Any]:
    counts, edges = np.histogram(values, 100)
    return {
        "n": values.size,
        "below_zero": float((values < 0).mean()),
        "mean": float(values.mean()),
        "sd": float(values.std()),
        "min": float(values.min()),
        "max": float(values.max()),
        "counts": counts.tolist(),
        "first_edge": float(edges[0]),
        "bin_width": float(edges[1] - edges[0]),
    }


def channel_figures(modulations: Mapping[str, Modulation], out: Path) -> list[Path]:
    """Mean and standard deviation over questions of each channel's gamma and beta (figure 18)."""
    files: list[Path] = []
    rows: list[tuple[Any, ...]] = []
    for symbol, name, values in zip("γβ", ("gamma", "beta"), _arrays(modulations), strict=True):
        mean = {site: v.mean(0) for site, v in values.items()}
        spread = {site: v.std(0) for site, v in values.items()}
        figure = plot.channels(mean, spread, ylabel=f"{symbol}: mean ± SD")
        files.append(plot.save(figure, out / f"channels_{name}.png"))
        for site in values:
            pairs = zip(mean[site].tolist(), spread[site].tolist(), strict=True)
            rows += [(site, name, channel, m, s) for channel, (m, s) in enumerate(pairs)]
    return [*files, write_csv(out / "channels.csv", ("site", "parameter", "channel", "mean", "sd"), rows)]


def plane_figure(
    site: str, modulation: Modulation, types: Sequence[str], out: Path, *, maps: int = 12
) -> list[Path]:
    """The gamma-beta planes of a block's `maps` feature maps that vary most with the question, marked by
    type."""
    gamma, beta = modulation.gamma.numpy(), modulation.beta.numpy()
    chosen = np.sort(np.argsort(-(gamma.var(0) + beta.var(0)), kind="stable")[:maps])
    titles = [f"{site}, map {channel}" for channel in chosen]
    figure = plot.planes(gamma[:, chosen], beta[:, chosen], types, TYPE_MARKS, titles)
    rows = (
        (channel, types[i], float(gamma[i, channel]), float(beta[i, channel]))
        for channel in chosen.tolist()
        for i in range(len(types))
    )
    path = plot.save(figure, out / f"planes_{site}.png")
    return [path, write_csv(out / f"planes_{site}.csv", ("map", "type", "gamma", "beta"), rows)]


def embedding_figure(
    modulations: Mapping[str, Modulation],
    types: Sequence[str],
    exam: Exam,
    out: Path,
    *,
    seed: int,
    progress: Progress = silent,
) -> list[Path]:
    """t-SNE of (gamma, beta) of each block by type of question (figure 6 shows the first and the last)."""
    gamma, beta = _arrays(modulations)
    points: dict[str, np.ndarray] = {}
    for done, site in enumerate(modulations):
        progress(done, len(modulations))
        points |= plot.by_depth({site: gamma[site]}, {site: beta[site]}, seed=seed)
    progress(len(modulations), len(modulations))
    path = plot.save(plot.embeddings(points, types, TYPE_MARKS), out / "embedding.png")
    texts = [exam.vocabulary.decode(tokens) for tokens in exam.questions.tokens]
    rows = (
        (site, float(x), float(y), types[i], texts[i])
        for site, found in points.items()
        for i, (x, y) in enumerate(found)
    )
    return [path, write_csv(out / "embedding.csv", ("site", "x", "y", "type", "question"), rows)]


def pool_figure(
    model: Reasoner, exam: Exam, images: Sequence[UInt8[np.ndarray, "H W 3"]], out: Path
) -> list[Path]:
    """Where the global max-pool picks its features, counted per cell and laid over the pictures (figure 4).

    Above each picture: the question and the network's answer.
    """
    seen, modulations = look(model, exam), modulate(model, exam.questions)
    counts = pool_counts(model, seen, modulations)
    words = exam.vocabulary.answer_words
    texts = [
        f"{exam.vocabulary.decode(tokens)}? {words[answer]}"
        for tokens, answer in zip(exam.questions.tokens, conclude(model, seen, modulations), strict=True)
    ]
    index = exam.questions.image_index
    figure = plot.over_pictures(
        [images[i] for i in index],
        counts,
        [textwrap.fill(text, 50) for text in texts],
        unit="channels picked here",
    )
    rows = (
        (int(index[q]), texts[q], row, column, int(counts[q, row, column]))
        for q, row, column in np.argwhere(counts > 0).tolist()
    )
    path = plot.save(figure, out / "pool.png")
    return [
        path,
        write_csv(
            out / "pool.csv", ("image_index", "question_and_answer", "row", "column", "channels"), rows
        ),
    ]


def pool_counts(model: Reasoner, looked: Looked, modulations: Mapping[str, Modulation]) -> np.ndarray:
    """For each question, how many channels have their largest positive value in each cell, int [N, h, w]."""
    found: dict[int, list[list[int]]] = {}
    for rows, reasoned in reasoned_batches(model, looked, modulations):
        for row, maps in zip(rows.tolist(), reasoned.pooled_from.cpu(), strict=True):
            found[row] = pooled_cells(maps)
    return np.array([found[row] for row in sorted(found)])


def _arrays(modulations: Mapping[str, Modulation]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    def taken(values: torch.Tensor) -> np.ndarray:
        return values.detach().float().numpy()

    gamma = {site: taken(m.gamma) for site, m in modulations.items()}
    return gamma, {site: taken(m.beta) for site, m in modulations.items()}
