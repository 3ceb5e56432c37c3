"""What all figures have: colours and markers, a legend and names that can be read, and a way to the disk."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from torchfilm.extras import needed
from torchfilm.summary import Labels
from torchfilm.writing import whole

with needed("figures need matplotlib", "systems"):
    from matplotlib.axes import Axes as Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.cm import ScalarMappable as ScalarMappable
    from matplotlib.colors import Normalize as Normalize
    from matplotlib.figure import Figure as Figure
    from matplotlib.lines import Line2D as Line2D

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's colours, which people with any kind of colour vision can tell apart; yellow is left out."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx")
MOST_PANELS = 150

Array = np.ndarray


@dataclass(frozen=True)
class Mark:
    """How a category is drawn."""

    color: str
    marker: str = "o"


def marks(names: Sequence[Any]) -> dict[Any, Mark]:
    """A mark for each name: first the colours in turn, then the next marker. Up to 56 names differ."""
    return {
        name: Mark(COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)])
        for i, name in enumerate(names)
    }


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG, whole or not at all, and return the path."""
    path = Path(path)
    FigureCanvasAgg(figure)
    with whole(path) as part:
        figure.savefig(part, format="png", dpi=150, facecolor="white")
    return path


def grid(rows: int, columns: int, width: float, height: float, **sharing: Any) -> tuple[Figure, Array]:
    """Return a figure with panels of this size in inches, and its axes [rows, columns].

    Raises:
        ValueError: for more than 150 panels: a figure of some hundreds takes minutes, if it can be written.
    """
    if rows * columns > MOST_PANELS:
        raise ValueError(
            f"Figure: expected at most {MOST_PANELS} panels, got {rows * columns} ({rows} x {columns}).\n"
            f"Draw some of the sites at a time: {{name: values[name] for name in chosen}}."
        )
    figure = Figure(figsize=(columns * width, rows * height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **sharing)
    for ax in axes.flat:
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def shortened(name: Any) -> str:
    """Return the end of a long name, where those of sites differ.

    Example:
        >>> shortened("model.layers.31.post_attention_layernorm")
        '…s.31.post_attention_layernorm'
    """
    text = str(name)
    return text if len(text) <= 30 else "…" + text[-29:]


def as_values(labels: Labels) -> list[Any]:
    """Return labels as plain values, which are equal where they say the same: those of a tensor are not."""
    told = (Tensor, np.ndarray, np.generic)
    return [label.tolist() if isinstance(label, told) else label for label in labels]


def legend(figure: Figure, labels: Labels, styles: Mapping[Any, Mark]) -> None:
    """Name the marks of the labels to the right of all panels, four to an inch; columns get room."""
    present = set(as_values(labels))
    handles = [
        Line2D(
            [], [], linestyle="", marker=mark.marker, color=mark.color, label=shortened(name), markersize=6
        )
        for name, mark in styles.items()
        if name in present
    ]
    width, height = figure.get_size_inches()
    columns = max(1, math.ceil(len(handles) / (4 * height)))
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    figure.set_figwidth(width + max(0, columns * (0.45 + 0.07 * longest) - 1.2))  # 1.2 inches of the panels'
    figure.legend(
        handles=handles,
        loc="outside right center",
        ncols=columns,
        fontsize=8,
        frameon=False,
        handletextpad=0.2,
        columnspacing=1.0,
    )


def name_bars(ax: Axes, names: Sequence[Any], room: float) -> None:
    """Write a name below each bar, or group of bars, aslant where it is wider than its room in inches."""
    texts = [shortened(name) for name in names]
    ax.set_xticks(range(len(texts)), texts, fontsize=8)
    if texts and 0.075 * max(map(len, texts)) > room:
        ax.set_xticks(range(len(texts)), texts, rotation=40, ha="right", rotation_mode="anchor")
