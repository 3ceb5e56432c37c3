"""Look at modulations: histograms, gamma-beta planes, embeddings, heat maps; and charts of other numbers.

Every function takes arrays, those of gamma and beta also modulations as `record` has them, and returns a
matplotlib Figure of its own, without pyplot and its global state; `save` writes it. Categories get a colour
and a marker each, so that they can be told apart without seeing colours well. All raise ValueError: for no
site, more than 150 panels, labels or titles that are not one for each, and numbers that are not finite.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from torchfilm.canvas import (
    COLORS,
    Array,
    Axes,
    Figure,
    Normalize,
    ScalarMappable,
    as_values,
    grid,
    legend,
    shortened,
)
from torchfilm.canvas import Mark as Mark
from torchfilm.canvas import marks as marks
from torchfilm.canvas import save as save
from torchfilm.charts import bars as bars
from torchfilm.charts import curves as curves
from torchfilm.charts import dots as dots
from torchfilm.charts import grouped_bars as grouped_bars
from torchfilm.charts import over_pictures as over_pictures
from torchfilm.charts import paths_over_pictures as paths_over_pictures
from torchfilm.charts import table as table
from torchfilm.comparison import Comparison
from torchfilm.extras import needed
from torchfilm.modulation import Modulation, aligned
from torchfilm.naming import check_choice
from torchfilm.summary import Labels

Values = Mapping[str, Array | Tensor | Modulation]
Method = Literal["tsne", "pca"]


def histograms(gamma: Values, beta: Values | None = None, *, bins: int = 100) -> Figure:
    """Gamma (upper row) and beta (lower row) of each site, as counts on a log scale; the share below zero
    is written.

    gamma, beta: site -> values of any shape; or modulations by site alone. The range of a row is
    shared, so that sites can be compared (Perez et al. 2018, figures 5, 16, 17).
    """
    gamma, beta = _gamma_and_beta(gamma, beta)
    figure, axes = grid(2, len(gamma), 2.5, 2.1, sharex="row", sharey="row")
    for row, (symbol, values, neutral) in enumerate((("γ", gamma, 1.0), ("β", beta, 0.0))):
        every = np.concatenate([np.ravel(v) for v in values.values()]).astype(np.float64)
        low, high = float(every.min()), float(every.max())
        edges = np.linspace(low - 1e-6 * max(1, abs(low)), high + 1e-6 * max(1, abs(high)), bins + 1)
        for column, (site, found) in enumerate(values.items()):
            ax: Axes = axes[row, column]
            ax.stairs(*np.histogram(found, edges), fill=True, color=COLORS[row])
            ax.axvline(neutral, color="black", linewidth=0.8, linestyle=":")
            between = ": " if len(site) <= 12 else "\n"
            share = f"{np.mean(found < 0):.0%} of {symbol} below 0"
            ax.set_title(f"{shortened(site)}{between}{share}", fontsize=8)
            ax.set_xlabel(symbol)
            ax.tick_params(labelsize=7)
        axes[row, 0].set_yscale("log", nonpositive="clip")  # of the whole row
        axes[row, 0].set_ylabel("number of values")
    return figure


def planes(
    gamma: Array | Tensor | Modulation,
    beta: Array | Tensor | Modulation,
    labels: Labels,
    styles: Mapping[Any, Mark],
    titles: Sequence[str],
) -> Figure:
    """One panel per feature map: each point is a question, at its gamma and beta, marked by its label.

    gamma, beta: [points, maps], or [points, T, maps], all steps; or twice the modulation with both. labels:
    one per point, each with a style; titles: one per map (Distill's "feature-wise transformations", 2018).
    """
    both = np.broadcast_arrays(*aligned(_numbers(gamma, "gamma"), _numbers(beta, "beta")))
    (names, gamma), (_, beta) = (_by_step(labels, values) for values in both)
    maps = gamma.shape[1]
    if len(titles) != maps:
        raise ValueError(
            f"planes: expected a title for each of {maps} maps, got {len(titles)}.\n"
            f"Name all: [f'map {{i}}' for i in range({maps})]; or give gamma and beta of the maps to draw."
        )
    columns = min(4, maps)
    figure, axes = grid(-(-maps // columns), columns, 2.7, 2.5)
    for i, ax in enumerate(axes.flat):
        if i >= maps:
            ax.set_visible(False)
            continue
        ax.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        ax.axvline(0, color="0.8", linewidth=0.6, zorder=0)
        _scatter(ax, gamma[:, i], beta[:, i], names, styles, size=5)
        ax.set_title(shortened(titles[i]), fontsize=8)
        ax.set_xlabel("γ", fontsize=8, labelpad=1)
        ax.set_ylabel("β", fontsize=8, labelpad=1)
        ax.tick_params(labelsize=7)
    legend(figure, labels, styles)
    return figure


def comparison(rows: Comparison | Sequence[Mapping[str, Any]]) -> Figure:
    """One panel per number, one bar per network: parameters, FLOPs, latency, memory, and the score.

    rows: what `compare` returned, or its `to_json()["rows"]`. Latency has its middle half as a
    whisker, the score its 95 % interval; the score's panel is there where a score is.
    """
    lines: Any = rows.to_json()["rows"] if isinstance(rows, Comparison) else rows
    panels: dict[str, list[tuple[float, float, float]]] = {
        "parameters, million": [(row["parameters"] / 1e6,) * 3 for row in lines],
        "GFLOP": [(row["flops"] / 1e9,) * 3 for row in lines],
        "ms": [(row["milliseconds"], *row["quartiles"]) for row in lines],
        "MB kept for training": [(row["kept"] / 1e6,) * 3 for row in lines],
    }
    if any(row["score"] for row in lines):
        scores = [row["score"] or {"value": np.nan, "low": np.nan, "high": np.nan} for row in lines]
        panels["score"] = [(score["value"], score["low"], score["high"]) for score in scores]
    figure, axes = grid(1, len(panels), 2.4, 0.6 + 0.3 * len(lines), sharey=True)
    for ax, (title, found) in zip(axes.flat, panels.items(), strict=True):
        middle, low, high = np.array(found).T
        names = [row["name"] for row in lines]
        ax.barh(names, middle, color=COLORS[0], xerr=(middle - low, high - middle), ecolor="0.3")
        ax.set_xlabel(title, fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0, 0].invert_yaxis()
    return figure


def embeddings(points: Mapping[str, Array | Tensor], labels: Labels, styles: Mapping[Any, Mark]) -> Figure:
    """One panel per name with points [n, 2], marked by their labels; axes of an embedding have no unit.

    labels: one per point, each with a style.
    """
    _some("embeddings", points)
    columns = min(3, len(points))
    figure, axes = grid(-(-len(points) // columns), columns, 4.2, 4.0)
    for ax in axes.flat[len(points) :]:
        ax.set_visible(False)
    for ax, (name, values) in zip(axes.flat, points.items(), strict=False):
        found = _array(values)
        _scatter(ax, found[:, 0], found[:, 1], labels, styles, size=7)
        ax.set_title(shortened(name), fontsize=10)
        ax.spines[["left", "bottom"]].set_color("0.85")
        ax.set_xticks([])
        ax.set_yticks([])
    legend(figure, labels, styles)
    return figure


def embed(values: Array | Tensor, *, method: Method = "tsne", seed: int = 0) -> Array:
    """Lay points [n, d] out in two dimensions, [n, 2], by scikit-learn; all on one place where all are equal.

    values: one row per point, such as gamma and beta of a site side by side.
    method: "tsne" (van der Maaten and Hinton 2008), started from the principal components, which shows
        clusters but no distances; or "pca", the two directions of most variance.
    """
    with needed("embed needs scikit-learn", "systems"):
        from sklearn.decomposition import PCA
        from sklearn.manifold import TSNE

    if len(values) < 4:
        raise ValueError(
            f"embed: expected at least 4 points, got {len(values)}.\n"
            f"Record more samples: their places tell nothing otherwise."
        )
    check_choice("embed: method", method, get_args(Method))
    values = np.asarray(_array(values))
    if wrong := int((~np.isfinite(values)).any(axis=1).sum()):
        raise ValueError(
            f"embed: expected finite numbers, got NaN or infinity in {wrong} of {len(values)} points.\n"
            f"Leave them out: values[np.isfinite(values).all(axis=1)]."
        )
    if not np.square(
        values - values[0]
    ).any():  # t-SNE would divide by the spread of the principal components
        return np.zeros((len(values), 2), np.float32)
    if values.shape[1] == 1:
        values = np.pad(values, ((0, 0), (0, 1)))
    if method == "pca":
        return PCA(n_components=2, random_state=seed).fit_transform(values)
    perplexity = min(30.0, (len(values) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed, n_jobs=1).fit_transform(values)


def by_depth(
    gamma: Values, beta: Values | None = None, *, method: Method = "tsne", seed: int = 0
) -> dict[str, Array]:
    """Embed (gamma, beta) of each site, in order of depth, for `embeddings` (Perez et al. 2018, figure 6).

    gamma, beta: site -> [n, C], or [n, T, C], all steps as one point; or modulations by site alone. Nearby
    points of an early site are conditions that ask for the same features, of a late one those that ask for
    the same kind of answer.
    """
    gamma, beta = _gamma_and_beta(gamma, beta)
    both = {site: np.broadcast_arrays(*aligned(gamma[site], beta[site])) for site in gamma}
    flat = {site: np.stack(pair, axis=1).reshape(len(pair[0]), -1) for site, pair in both.items()}
    return {site: embed(points, method=method, seed=seed) for site, points in flat.items()}


def heat(values: Values, labels: Labels, *, neutral: float, unit: str, spread: float | None = None) -> Figure:
    """One panel per site: conditions (rows, grouped by label) by channels (columns), in colour.

    values: site -> [n, C], or [n, T, C] with a row for each step: gamma (neutral 1) or beta (neutral 0), of
    modulations the one with that neutral. labels: one for each of the n. Channels stand in the order of their
    first principal component's weights, so that those which move together stand together. `spread` is the
    distance from neutral where colours end; without it, the 99th percentile of all.
    """
    _some("heat", values)
    field = "gamma" if neutral == 1 else "beta"
    found = {site: _by_step(labels, _numbers(one, field, site)) for site, one in values.items()}
    away = np.concatenate([np.ravel(rows) for _, rows in found.values()]) - neutral
    far = spread or float(np.percentile(np.abs(away), 99))
    norm = Normalize(neutral - max(far, 1e-9), neutral + max(far, 1e-9))
    groups = _in_order(next(iter(found.values()))[0])
    texts = [shortened(name) for name in groups]
    every_nth = -(-len(texts) // 40)
    figure, axes = grid(1, len(found), 2.8, max(3.8, 1 + 0.12 * len(texts[::every_nth])))
    figure.set_figwidth(figure.get_figwidth() + 0.05 * max(0, max(map(len, texts)) - 6))
    for ax, (site, (names, rows)) in zip(axes.flat, found.items(), strict=True):
        places = np.array([groups.index(name) for name in names])
        order = np.argsort(places, kind="stable")
        starts = np.unique(places[order], return_index=True)[1]
        weights = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][0]
        shown = rows[np.ix_(order, np.argsort(weights, kind="stable"))]
        ax.imshow(shown, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        for start in starts[1:]:
            ax.axhline(start - 0.5, color="black", linewidth=0.5)
        ax.set_title(shortened(site), fontsize=9)
        ax.set_xlabel("channel, similar ones together", fontsize=8)
        ax.tick_params(labelsize=7)
        ax.set_yticks([])
        if ax is axes[0, 0]:
            ends = [*starts[1:], len(order)]
            middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
            ax.set_yticks(middles[::every_nth], texts[::every_nth], fontsize=7)
    bar = figure.colorbar(ScalarMappable(norm, "RdBu_r"), ax=axes, shrink=0.8, pad=0.01)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _scatter(ax: Axes, x: Array, y: Array, labels: Labels, styles: Mapping[Any, Mark], size: float) -> None:
    names, _ = _by_step(labels, x[:, None])
    if unknown := sorted({str(name) for name in names if name not in styles}):
        raise ValueError(
            f"plot: expected a style for each label, got none for {', '.join(unknown)}.\n"
            f"Its points would not be drawn: styles=marks(sorted(set(labels)))."
        )
    for name, mark in styles.items():
        here = np.array([one == name for one in names], bool)
        look: dict[str, Any] = {"s": size, "c": mark.color, "marker": mark.marker, "alpha": 0.65}
        ax.scatter(x[here], y[here], linewidths=0, rasterized=True, **look)


def channels(
    mean: Mapping[str, Array | Tensor], spread: Mapping[str, Array | Tensor], *, ylabel: str
) -> Figure:
    """Mean and standard deviation [channels], one panel per site, channels sorted by mean (figure 18)."""
    _same_names(mean, spread)
    figure, axes = grid(1, len(mean), 2.5, 2.4, sharey=True)
    for ax, site in zip(axes.flat, mean, strict=True):
        center, width = _array(mean[site]), _array(spread[site])
        order = np.argsort(center)
        center, width = center[order], width[order]
        rank = np.arange(len(order))
        ax.fill_between(rank, center - width, center + width, color=COLORS[5], linewidth=0, alpha=0.6)
        ax.plot(rank, center, color=COLORS[0], linewidth=1.4)
        ax.axhline(0, color="0.6", linewidth=0.6)
        ax.set_title(shortened(site), fontsize=9)
        ax.set_xlabel("channel, by mean", fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0, 0].set_ylabel(ylabel)
    return figure


def _gamma_and_beta(gamma: Values, beta: Values | None) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return both as arrays; modulations have both."""
    beta = gamma if beta is None else beta
    _same_names(gamma, beta)
    return {s: _numbers(v, "gamma", s) for s, v in gamma.items()}, {
        s: _numbers(v, "beta", s) for s, v in beta.items()
    }


def _numbers(values: Array | Tensor | Modulation, field: Literal["gamma", "beta"], site: str = "") -> Array:
    """Return rows of numbers; of a modulation in the shape that its gamma and beta have together."""
    if isinstance(values, Modulation):
        together = torch.broadcast_tensors(*aligned(values.gamma, values.beta))
        found = np.atleast_2d(_array(together[field == "beta"]))
    else:
        found = np.atleast_2d(_array(values))
    if wrong := int((~np.isfinite(found)).sum()):
        raise ValueError(
            f"plot: expected finite numbers, got NaN or infinity in {wrong} of {found.size} values of {field}"
            f"{f' at site {site!r}' if site else ''}.\n"
            f"Find the samples: (~m.{field}.isfinite()).nonzero()."
        )
    return found


def _some(who: str, values: Mapping[str, Any]) -> None:
    if not values:
        raise ValueError(f"{who}: expected at least one site, got none.\nRecord a call: record(model).")


def _by_step(labels: Labels, values: Array) -> tuple[list[Any], Array]:
    """Return [n, C] or [n, T, C] as rows of channels, and each row's label, which is its sample's."""
    if len(labels) != len(values):
        raise ValueError(
            f"plot: expected a label for each of {len(values)} samples, got {len(labels)}.\n"
            f"Labels stand in the order of the samples."
        )
    steps = math.prod(values.shape[1:-1])
    names = [name for name in as_values(labels) for _ in range(steps)]
    return names, values.reshape(-1, values.shape[-1])


def _in_order(names: Sequence[Any]) -> list[Any]:
    """Return each name once, sorted; as they come where they have no order, as words beside numbers."""
    once = list(dict.fromkeys(names))
    try:
        return sorted(once)
    except TypeError:
        return once


def _array(values: Array | Tensor) -> Array:
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else values


def _same_names(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    if not first or list(first) != list(second):
        raise ValueError(
            f"plot: expected the same sites twice, at least one, got {list(first)} and {list(second)}.\n"
            f"Take both from the same network, or choose the sites that both have."
        )
