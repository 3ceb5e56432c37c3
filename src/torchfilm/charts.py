"""Charts of any numbers: curves, bars, dots, tables, and what lies over pictures.

`torchfilm.plot` has them too. Every function returns a matplotlib Figure of its own.
"""

from collections.abc import Mapping, Sequence, Sized
from typing import Any

import numpy as np
from torch import Tensor

from torchfilm.canvas import (
    COLORS,
    HATCHES,
    LEGEND,
    MARKERS,
    Array,
    Axes,
    Figure,
    Line2D,
    Normalize,
    ScalarMappable,
    as_array,
    as_drawn,
    check_some,
    grid,
    in_rows,
    name_bars,
    name_colors,
    shortened,
)

Numbers = Sequence[float] | Array | Tensor


def curves(
    x: Numbers,
    series: Mapping[str, Numbers],
    *,
    xlabel: str,
    ylabel: str,
    levels: Mapping[str, float] | None = None,
    log_x: bool = False,
    markers: bool = True,
) -> Figure:
    """Named curves over x, each with its own colour and marker; `levels` are horizontal lines with a name."""
    figure, axes = grid(1, 1, 6.0, 3.8)
    ax: Axes = axes[0, 0]
    names = shortened([*series, *(levels or {})])
    for i, values in enumerate(series.values()):
        ax.plot(
            as_array(x),
            as_array(values),
            color=COLORS[i % len(COLORS)],
            marker=MARKERS[i % len(MARKERS)] if markers else None,
            linestyle=("-", "--", "-.", ":")[i // len(COLORS) % 4] if not markers else "-",
            markersize=4,
            linewidth=1.5,
        )
    for i, value in enumerate((levels or {}).values()):
        ax.axhline(value, color="0.45", linewidth=0.9, linestyle=("--", ":", "-.")[i % 3])
    if log_x:
        ax.set_xscale("log")
    ax.set(xlabel=xlabel, ylabel=ylabel)
    ax.grid(color="0.92", linewidth=0.6)
    if len(names) > 1:
        figure.legend(ax.lines, names, loc="outside right center", **LEGEND)
    return figure


def over_pictures(
    pictures: Sequence[Array], maps: Array, titles: Sequence[str], *, unit: str, strength: float = 0.75
) -> Figure:
    """Maps [n, h, w] laid over pictures uint8 [H, W, 3] in squares of their own cells; one panel each, one
    scale.

    A cell is the more opaque the more it has; `unit` says what is counted.
    """
    _check_pictures("over_pictures", pictures, maps=maps, titles=titles)
    tallest = max(len(picture) / picture.shape[1] for picture in pictures)
    figure, axes = in_rows(len(pictures), 4, 3.0, 3.0 * tallest + 0.55)
    top = max(float(np.max(maps, initial=0)), 1e-9)
    for ax, picture, cells, title in zip(axes, pictures, maps, as_drawn(titles), strict=True):
        ax.set_axis_off()
        height, width = picture.shape[:2]
        ax.imshow(picture, extent=(0, width, height, 0))
        ax.imshow(
            cells,
            extent=(0, width, height, 0),
            cmap="inferno",
            vmin=0,
            vmax=top,
            alpha=np.clip(cells / top, 0, 1) ** 0.5 * strength,
            interpolation="nearest",
        )
        ax.set_title(title, fontsize=7)
    name_colors(figure, ScalarMappable(Normalize(0, top), "inferno"), axes, unit, shrink=0.6, pad=0.01)
    return figure


def _check_pictures(who: str, pictures: Sequence[Array], **given: Sized) -> None:
    check_some(who, "picture", pictures, "Give uint8 [H, W, 3].")
    for what, found in given.items():
        if len(found) != len(pictures):
            raise ValueError(
                f"{who}: expected {what} for each of {len(pictures)} pictures, got {len(found)}.\n"
                f"Give as many {what} as pictures, in their order."
            )


def paths_over_pictures(pictures: Sequence[Array], paths: Sequence[Array], titles: Sequence[str]) -> Figure:
    """A path [steps, 2], in pixels to the right and down, over each picture uint8 [H, W, 3], in one row.

    It goes from the open circle to the dot; points stand a fifth of a second apart at 20 steps a second, so
    that slow parts are dense.
    """
    _check_pictures("paths_over_pictures", pictures, paths=paths, titles=titles)
    figure, axes = grid(1, len(pictures), 2.9, 3.75)
    for ax, picture, path, title in zip(axes.flat, pictures, paths, as_drawn(titles), strict=True):
        height, width = picture.shape[:2]
        ax.imshow(picture, extent=(0, width, height, 0))
        ax.plot(*path.T, color=COLORS[3], linewidth=1.2)
        ax.plot(*path[::4].T, ".", color=COLORS[3], markersize=4)
        ax.plot(*path[0], "o", color="black", fillstyle="none", markersize=7)
        ax.plot(*path[-1], "o", color="black", markersize=5)
        ax.set_title(title, fontsize=7)
        ax.set_anchor("S")  # what is left of the height is the titles'
        ax.set_axis_off()
    return figure


def table(
    values: Array | Tensor,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    xlabel: str,
    ylabel: str,
    unit: str,
) -> Figure:
    """A matrix [rows, columns] of shares 0..1 as a heat map with its numbers in percent."""
    values = as_array(values)
    figure, axes = grid(1, 1, 1.6 + 0.34 * len(columns), 1.2 + 0.28 * len(rows))
    ax: Axes = axes[0, 0]
    shown = ax.imshow(values, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    for i, j in np.argwhere(values >= 0.005):
        ink = "white" if values[i, j] > 0.6 else "black"
        ax.text(j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", fontsize=6, color=ink)
    ax.set_xticks(range(len(columns)), shortened(columns), rotation=90, fontsize=7)
    ax.set_yticks(range(len(rows)), shortened(rows), fontsize=7)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    name_colors(figure, shown, [ax], unit, shrink=0.7)
    return figure


def bars(values: Mapping[Any, float], *, xlabel: str, ylabel: str) -> Figure:
    """One bar per name, in the given order."""
    width = max(4.0, 1.5 + 0.35 * len(values))
    figure, axes = grid(1, 1, width, 3.2)
    ax: Axes = axes[0, 0]
    ax.bar(range(len(values)), list(values.values()), color=COLORS[0])
    name_bars(ax, list(values), (width - 1) / max(1, len(values)))
    ax.set(xlabel=xlabel, ylabel=ylabel)
    return figure


def grouped_bars(values: Mapping[str, Sequence[float]], names: Sequence[str], *, ylabel: str) -> Figure:
    """A group of bars per entry of `values`, one bar per name, with its value written above; nan draws none.

    values: group -> one value per name.
    """
    check_some("grouped_bars", "name", names, "Name what the values of a group are of.")
    across = max(4.5, 1.5 + 0.6 * len(names) * len(values))
    figure, axes = grid(1, 1, across, 3.4)
    ax: Axes = axes[0, 0]
    width, shown = 0.8 / len(names), shortened(names)
    for i in range(len(names)):
        places = [group + (i - (len(names) - 1) / 2) * width for group in range(len(values))]
        heights = [found[i] for found in values.values()]
        drawn = ax.bar(places, heights, 0.92 * width, color=COLORS[i % len(COLORS)], edgecolor="white")
        for bar in drawn:
            bar.set_hatch(HATCHES[i // len(COLORS) % len(HATCHES)])
        texts = ["" if np.isnan(found[i]) else f"{found[i]:.1f}" for found in values.values()]
        ax.bar_label(drawn, texts, fontsize=7, padding=1, color="black")
    name_bars(ax, list(values), (across - 1) / max(1, len(values)))
    ax.set_ylabel(ylabel)
    if len(names) > 1:
        columns = min(len(names), max(1, int(across / (0.5 + 0.07 * max(map(len, shown))))))
        groups: Any = ax.containers
        figure.legend(groups, shown, loc="outside upper right", ncols=columns, **LEGEND)
    return figure


def dots(
    values: Mapping[str, Sequence[float]], references: Mapping[str, float], *, xlabel: str, reference: str
) -> Figure:
    """One line per name, from top to bottom: a dot per value, an open diamond for the name's reference."""
    figure, axes = grid(1, 1, 6.5, 0.9 + 0.26 * len(values))
    ax: Axes = axes[0, 0]
    for row, (name, found) in enumerate(values.items()):
        ax.plot(found, [row] * len(found), "o", color=COLORS[0], markersize=5, alpha=0.8)
        if name in references:
            ax.plot(references[name], row, "D", color=COLORS[1], markersize=5, fillstyle="none")
    ax.set_yticks(range(len(values)), shortened(values), fontsize=8)
    ax.set_ylim(len(values) - 0.5, -0.5)
    ax.grid(color="0.92", linewidth=0.6)
    ax.set_xlabel(xlabel)
    handles = [
        Line2D([], [], linestyle="", marker="o", color=COLORS[0], label="measured here"),
        Line2D([], [], linestyle="", marker="D", color=COLORS[1], fillstyle="none", label=reference),
    ]
    figure.legend(
        handles=handles if references else handles[:1], loc="outside upper right", ncols=2, **LEGEND
    )
    return figure
