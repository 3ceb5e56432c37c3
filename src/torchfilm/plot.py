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
    as_array,
    by_value,
    check_some,
    grid,
    in_rows,
    legend,
    name_colors,
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
from torchfilm.summary import Labels, as_values
from torchfilm.writing import some

Values = Mapping[str, Array | Tensor | Modulation]
Method = Literal["tsne", "pca"]
ABREAST = 5
"""How many sites stand beside each other."""
NUMBERED, NAMED = 12, 40
"""Up to so many channels have their numbers below them, and up to so many labels all their names."""
RECORD = "Record a call: record(model)."


def histograms(gamma: Values, beta: Values | None = None, *, bins: int = 100) -> Figure:
    """Gamma (upper row) and beta (lower row) of each site, as counts on a log scale; the share below zero
    is written.

    gamma, beta: site -> values of any shape; or modulations by site alone. The range of a row is
    shared, so that sites can be compared (Perez et al. 2018, figures 5, 16, 17), and has the dotted line of
    what changes nothing in it. Sites stand five beside each other.
    """
    gamma, beta = _gamma_and_beta(gamma, beta)
    names, columns = shortened(gamma), min(ABREAST, len(gamma))
    figure, axes = grid(2 * -(-len(gamma) // columns), columns, 2.5, 2.1, sharex="row", sharey="row")
    axes = axes.reshape(-1, 2, columns).swapaxes(0, 1).reshape(2, -1)
    for ax in axes[:, len(gamma) :].flat:
        ax.remove()
    for row, (symbol, values, neutral) in enumerate((("γ", gamma, 1.0), ("β", beta, 0.0))):
        every = np.concatenate([np.ravel(v) for v in values.values()]).astype(np.float64)
        low, high = min(every.min(), neutral), max(every.max(), neutral)
        half = (high - low) / bins / 2 or 0.5
        edges = np.linspace(low - half, high + half, bins + 1)
        counts = [np.histogram(found, edges)[0] for found in values.values()]
        for i, (name, found) in enumerate(zip(names, values.values(), strict=True)):
            ax: Axes = axes[row, i]
            ax.stairs(counts[i], edges, fill=True, color=COLORS[row])
            ax.axvline(neutral, color="black", linewidth=0.8, linestyle=":")
            between = ": " if len(name) <= 12 else "\n"
            share = f"{np.mean(found < 0):.0%} of {symbol} below 0"
            ax.set_title(f"{name}{between}{share}", fontsize=8)
            ax.set_xlabel(symbol)
            ax.tick_params(labelsize=7)
            ax.set_yscale("log", nonpositive="clip")
            ax.set_ylim(0.5, 2 * np.max(counts))
            if i % columns == 0:
                ax.set_ylabel("number of values")
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
    both = _together(_numbers(gamma, "gamma"), _numbers(beta, "beta"))
    (names, gamma), (_, beta) = (_by_step(labels, values) for values in both)
    maps = gamma.shape[1]
    if len(titles) != maps:
        raise ValueError(
            f"planes: expected a title for each of {maps} maps, got {len(titles)}.\n"
            f"Name all: [f'map {{i}}' for i in range({maps})]; or give gamma and beta of the maps to draw."
        )
    figure, axes = in_rows(maps, 4, 2.7, 2.5)
    for i, (ax, title) in enumerate(zip(axes, shortened(titles), strict=True)):
        ax.axhline(0, color="0.8", linewidth=0.6, zorder=0)
        ax.axvline(0, color="0.8", linewidth=0.6, zorder=0)
        _scatter(ax, gamma[:, i], beta[:, i], names, styles, size=5)
        ax.set_title(title, fontsize=8)
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
    check_some("comparison", "network", lines, "Give what compare() returned.")
    names = shortened(row["name"] for row in lines)
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
        ax.barh(range(len(names)), middle, color=COLORS[0], xerr=(middle - low, high - middle), ecolor="0.3")
        ax.locator_params(axis="x", nbins=4)
        ax.set_xlabel(title, fontsize=8)
        ax.tick_params(labelsize=7)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return figure


def embeddings(points: Mapping[str, Array | Tensor], labels: Labels, styles: Mapping[Any, Mark]) -> Figure:
    """One panel per name with points [n, 2], marked by their labels; axes of an embedding have no unit.

    labels: one per point, each with a style.
    """
    check_some("embeddings", "site", points, RECORD)
    found = [_numbers(one, "points", site) for site, one in points.items()]
    figure, axes = in_rows(len(points), 3, 4.2, 4.0)
    for ax, name, places in zip(axes, shortened(points), found, strict=True):
        _scatter(ax, places[:, 0], places[:, 1], labels, styles, size=7)
        ax.set_title(name, fontsize=10)
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
    finite = "values.isfinite().all(1)" if isinstance(values, Tensor) else "np.isfinite(values).all(axis=1)"
    values = as_array(values)
    if wrong := int((~np.isfinite(values)).any(axis=1).sum()):
        raise ValueError(
            f"embed: expected finite numbers, got NaN or infinity in {wrong} of {len(values)} points.\n"
            f"Leave them out: values[{finite}]."
        )
    if not np.square(values - values[0]).any():  # t-SNE would divide by the spread
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
    both = {site: _together(gamma[site], beta[site], site) for site in gamma}
    flat = {site: np.stack(pair, axis=1).reshape(len(pair[0]), -1) for site, pair in both.items()}
    return {site: embed(points, method=method, seed=seed) for site, points in flat.items()}


def heat(values: Values, labels: Labels, *, neutral: float, unit: str, spread: float | None = None) -> Figure:
    """One panel per site: conditions (rows, grouped by label) by channels (columns), in colour.

    values: site -> [n, C], or [n, T, C] with a row for each step: gamma (neutral 1) or beta (neutral 0), of
    modulations the one with that neutral. labels: one for each of the n; of more than 40 some are named, and
    no lines are between them. Channels stand in the order of their first principal component's weights, so
    that those which move together stand together; up to 12 have their numbers. `spread` is the distance from
    neutral where colours end; without it, the 99th percentile of all, or a hundredth of the largest.
    """
    check_some("heat", "site", values, RECORD)
    field = "gamma" if neutral == 1 else "beta"
    found = {site: _by_step(labels, _numbers(one, field, site)) for site, one in values.items()}
    away = np.abs(np.concatenate([np.ravel(rows) for _, rows in found.values()]) - neutral)
    far = max(spread or max(float(np.percentile(away, 99)), 0.01 * float(away.max())), 1e-9)
    norm = Normalize(neutral - far, neutral + far)
    groups = _in_order(next(iter(found.values()))[0])
    texts = shortened(groups)
    every_nth = -(-len(texts) // NAMED)
    figure, axes = in_rows(len(found), ABREAST, 2.8, max(3.8, 1 + 0.12 * len(texts[::every_nth])))
    figure.set_figwidth(figure.get_figwidth() + 0.05 * max(0, max(map(len, texts)) - 6))
    numbers = {name: i for i, name in enumerate(groups)}
    for i, (title, (names, rows)) in enumerate(zip(shortened(found), found.values(), strict=True)):
        ax, places = axes[i], np.array([numbers[name] for name in names])
        order = np.argsort(places, kind="stable")
        starts = np.unique(places[order], return_index=True)[1]
        weights = np.linalg.svd(rows - rows.mean(axis=0), full_matrices=False)[2][0]
        columns = np.argsort(weights, kind="stable")
        shown = rows[np.ix_(order, columns)]
        ax.imshow(shown, cmap="RdBu_r", norm=norm, aspect="auto", interpolation="nearest")
        for start in starts[1:] if every_nth == 1 else ():
            ax.axhline(start - 0.5, color="black", linewidth=0.5)
        _name_channels(ax, columns, title, "channel, similar ones together")
        ax.set_yticks([])
        if i % ABREAST == 0:
            ends = [*starts[1:], len(order)]
            middles = [(a + b - 1) / 2 for a, b in zip(starts, ends, strict=True)]
            ax.set_yticks(middles[::every_nth], texts[::every_nth], fontsize=7)
    beyond = "both" if away.max() > far else "neither"
    name_colors(figure, ScalarMappable(norm, "RdBu_r"), axes, unit, shrink=0.8, pad=0.01, extend=beyond)
    return figure


def _scatter(ax: Axes, x: Array, y: Array, labels: Labels, styles: Mapping[Any, Mark], size: float) -> None:
    names, _ = _by_step(labels, x[:, None])
    styles = by_value(styles)
    rows: dict[Any, list[int]] = {name: [] for name in styles}
    if unknown := sorted({str(name) for name in names if name not in rows}):
        raise ValueError(
            f"plot: expected a style for each label, got none for {some(unknown)}.\n"
            f"Its points would not be drawn: styles=plot.marks(labels)."
        )
    for row, name in enumerate(names):
        rows[name].append(row)
    for here, mark in zip(rows.values(), styles.values(), strict=True):
        look: dict[str, Any] = {"s": size, "c": mark.color, "marker": mark.marker, "alpha": 0.65}
        ax.scatter(x[here], y[here], linewidths=0, rasterized=True, **look)


def channels(
    mean: Mapping[str, Array | Tensor], spread: Mapping[str, Array | Tensor], *, ylabel: str
) -> Figure:
    """Mean and standard deviation [channels], one panel per site, channels sorted by mean (figure 18); up to
    12 have their numbers.
    """
    _same_names(mean, spread)
    both = [(_row(mean[site], "mean", site), _row(spread[site], "spread", site)) for site in mean]
    figure, axes = in_rows(len(mean), ABREAST, 2.5, 2.4, sharey=True)
    for i, (title, (center, width)) in enumerate(zip(shortened(mean), both, strict=True)):
        ax, order = axes[i], np.argsort(center)
        center, width = center[order], width[order]
        rank = np.arange(len(order))
        ax.fill_between(rank, center - width, center + width, color=COLORS[5], linewidth=0, alpha=0.6)
        ax.plot(rank, center, color=COLORS[0], linewidth=1.4)
        ax.axhline(0, color="0.6", linewidth=0.6)
        _name_channels(ax, order, title, "channel, by mean")
        if i % ABREAST == 0:
            ax.set_ylabel(ylabel)
    return figure


def _name_channels(ax: Axes, channels: Array, title: str, xlabel: str) -> None:
    """Name a panel of channels, which have their numbers below them where there is room."""
    ax.set_title(title, fontsize=9)
    ax.set_xlabel(xlabel, fontsize=8)
    ax.tick_params(labelsize=7)
    few = len(channels) <= NUMBERED
    ax.set_xticks(range(len(channels)) if few else (), channels if few else ())


def _gamma_and_beta(gamma: Values, beta: Values | None) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return both as arrays; modulations have both."""
    beta = gamma if beta is None else beta
    _same_names(gamma, beta)
    found = {site: _numbers(values, "gamma", site) for site, values in gamma.items()}
    return found, {site: _numbers(beta[site], "beta", site) for site in gamma}


def _numbers(values: Array | Tensor | Modulation, field: str, site: str = "") -> Array:
    """Return rows of numbers; of a modulation, times its gate, in the shape of gamma and beta together."""
    one: Any = values
    if isinstance(values, Modulation):
        one = torch.broadcast_tensors(*aligned(*values.gated()))[field == "beta"]
    found = as_array(one)
    where = f"{field} at site {site!r}" if site else field
    if not found.size:
        raise ValueError(f"plot: expected numbers, got {found.shape} of {where}.\n{RECORD}")
    if len(wrong := np.argwhere(~np.isfinite(found))):
        raise ValueError(
            f"plot: expected finite numbers, got NaN or infinity in {len(wrong)} of {found.size} values of "
            f"{where}, first at {wrong[0].tolist()}.\n"
            f"Leave these samples out, or look for NaN in their conditions, then in the weights."
        )
    return np.atleast_2d(found.astype(np.result_type(found, np.float32)))  # float16 has no linear algebra


def _row(values: Array | Tensor, field: str, site: str) -> Array:
    """Return one number for each channel."""
    found = _numbers(values, field, site)
    if found.ndim != 2 or len(found) != 1:
        raise ValueError(
            f"channels: expected one number per channel, got {found.shape} of {field} at site {site!r}.\n"
            f"Take both over the samples: gamma.mean(0), gamma.std(0)."
        )
    return found[0]


def _together(gamma: Array, beta: Array, site: str = "") -> Sequence[Array]:
    """Return both in the shape that they have together."""
    try:
        return np.broadcast_arrays(*aligned(gamma, beta))
    except ValueError as error:
        raise ValueError(
            f"plot: expected gamma and beta of the same samples and channels"
            f"{f' at site {site!r}' if site else ''}, got {gamma.shape} and {beta.shape}.\n"
            f"Take both from the same recording."
        ) from error


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
        return sorted(once, key=lambda name: (name != name, name))  # NaN last
    except TypeError:
        return once


def _same_names(first: Mapping[str, Any], second: Mapping[str, Any]) -> None:
    if not first or first.keys() != second.keys():
        alone = some([repr(site) for site in (*first, *second) if site not in first or site not in second])
        raise ValueError(
            f"plot: expected the same sites twice, at least one, got {len(first)} and {len(second)}, "
            f"not in both: {alone or 'none'}.\n"
            f"Take both from the same network, or choose the sites that both have."
        )
