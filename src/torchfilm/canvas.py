"""What all figures have: one style, colours and markers, names that can be read, and a way to the disk."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from torchfilm.extras import needed
from torchfilm.summary import Labels, as_values
from torchfilm.writing import whole

with needed("figures need matplotlib", "systems"):
    from matplotlib.axes import Axes as Axes
    from matplotlib.cm import ScalarMappable as ScalarMappable
    from matplotlib.colors import Normalize as Normalize
    from matplotlib.figure import Figure as Figure
    from matplotlib.lines import Line2D as Line2D

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""Okabe and Ito's colours, which people with any kind of colour vision can tell apart; yellow is left out."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
HATCHES = ("", "//", "..", "xx")
FORMATS = (".png", ".svg", ".pdf")
MOST_PANELS = 150
LEGEND: dict[str, Any] = {"fontsize": 8, "frameon": False, "labelcolor": "black"}

Array = np.ndarray


@dataclass(frozen=True)
class Mark:
    """How a category is drawn."""

    color: str
    marker: str = "o"


def marks(names: Labels) -> dict[Any, Mark]:
    """A mark for each name or label: first the colours in turn, then the next marker. Up to 56 differ."""
    return {
        name: Mark(COLORS[i % len(COLORS)], MARKERS[i // len(COLORS) % len(MARKERS)])
        for i, name in enumerate(dict.fromkeys(as_values(names)))
    }


def by_value(styles: Mapping[Any, Mark]) -> dict[Any, Mark]:
    """Return the marks by what their names say, as labels are compared."""
    return dict(zip(as_values(list(styles)), styles.values(), strict=True))


def as_array(values: Array | Tensor | Sequence[float]) -> Array:
    """Return the numbers as an array; of a Tensor of any dtype, with or without a gradient, as float32."""
    return values.detach().float().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def save(figure: Figure, path: str | Path) -> Path:
    """Write the figure as PNG, SVG or PDF, by the end of the name, whole or not at all; return the path.

    Raises:
        ValueError: for a name with another end.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise ValueError(
            f"save: expected a name that ends with one of {', '.join(FORMATS)}, got '{path.name}'.\n"
            f"For others call figure.savefig(path)."
        )
    with whole(path) as part:
        figure.savefig(part, format=path.suffix[1:].lower(), dpi=150, facecolor="auto")
    return path


class PlainFigure(Figure):
    """A figure that is written with its own background, whatever style is set."""

    def savefig(self, *args: Any, **options: Any) -> None:
        """Write it as any figure, on white unless another `facecolor` or `transparent` is given."""
        if not options.get("transparent"):
            options.setdefault("facecolor", "auto")
        super().savefig(*args, **options)


def black_on_white(ax: Axes) -> None:
    """Give the panel these colours and no grid, whatever style is set; fonts stay those that are set."""
    ax.set_facecolor("white")
    ax.grid(visible=False, which="both")
    ax.tick_params(which="both", colors="black")
    ax.spines[:].set_color("black")
    for text in (ax.title, ax.xaxis.label, ax.yaxis.label):
        text.set_color("black")


def grid(rows: int, columns: int, width: float, height: float, **sharing: Any) -> tuple[Figure, Array]:
    """Return a figure with panels of this size in inches, and its axes [rows, columns].

    Raises:
        ValueError: for more than 150 panels: a figure of some hundreds takes minutes, if it can be written.
    """
    if rows * columns > MOST_PANELS:
        raise ValueError(
            f"Figure: expected at most {MOST_PANELS} panels, got {rows * columns} ({rows} x {columns}).\n"
            f"Draw some at a time: {{name: values[name] for name in chosen}} of sites, gamma[:, :16] of maps."
        )
    figure = PlainFigure(figsize=(columns * width, rows * height), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, **sharing)
    for ax in axes.flat:
        black_on_white(ax)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def in_rows(count: int, columns: int, width: float, height: float, **sharing: Any) -> tuple[Figure, Array]:
    """Return a figure with so many panels of this size in inches, in rows of a few, and its axes [count]."""
    columns = min(columns, count)
    figure, axes = grid(-(-count // columns), columns, width, height, **sharing)
    for ax in axes.flat[count:]:
        ax.remove()
    return figure, axes.flat[:count]


def name_colors(figure: Figure, colors: ScalarMappable, axes: Iterable[Axes], unit: str, **look: Any) -> None:
    """Draw a bar of the colours beside the axes, with its unit."""
    bar = figure.colorbar(colors, ax=list(axes), **look)
    bar.set_label(unit, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    black_on_white(bar.ax)


def check_some(who: str, what: str, given: Sized, remedy: str) -> None:
    """Refuse a figure of nothing."""
    if not len(given):
        raise ValueError(f"{who}: expected at least one {what}, got none.\n{remedy}")


def as_drawn(texts: Iterable[Any]) -> list[str]:
    """Return texts that matplotlib draws as they are, without a formula between two dollars."""
    return [str(text).replace("$", r"\$") for text in texts]


def shortened(names: Iterable[Any], most: int = 30) -> list[str]:
    """Return names as they are drawn: of long ones the end, and what tells it from the others.

    Example:
        >>> shortened(["model.layers.31.post_attention_layernorm"])
        ['…s.31.post_attention_layernorm']
        >>> shortened([f"is there {what} left of the big metal thing?" for what in ("a cube", "no cube")])
        ['is there a…he big metal thing?', 'is there n…he big metal thing?']
    """
    texts = [str(name) for name in names]
    longest, different = max(map(len, texts), default=0), len(set(texts))
    rooms = itertools.takewhile(lambda room: room < longest, (most * 2**i for i in itertools.count()))
    cuts = ([_cut(text, head, room) for text in texts] for room in rooms for head in range(room))
    return as_drawn(next((cut for cut in cuts if len(set(cut)) == different), texts))


def _cut(text: str, head: int, most: int) -> str:
    return text if len(text) <= most else f"{text[:head]}…{text[len(text) - most + head + 1 :]}"


def legend(figure: Figure, labels: Labels, styles: Mapping[Any, Mark]) -> None:
    """Name the marks of the labels to the right of all panels, four to an inch; columns get room."""
    present = set(as_values(labels))
    shown = {name: mark for name, mark in by_value(styles).items() if name in present}
    handles = [
        Line2D([], [], linestyle="", marker=mark.marker, color=mark.color, label=text, markersize=6)
        for mark, text in zip(shown.values(), shortened(shown), strict=True)
    ]
    width, height = figure.get_size_inches()
    columns = max(1, math.ceil(len(handles) / (4 * height)))
    longest = max((len(str(handle.get_label())) for handle in handles), default=0)
    figure.set_figwidth(width + max(0, columns * (0.45 + 0.07 * longest) - 1.2))  # 1.2 inches of the panels'
    figure.legend(
        handles=handles,
        loc="outside right center",
        ncols=columns,
        **LEGEND,
        handletextpad=0.2,
        columnspacing=1.0,
    )


def name_bars(ax: Axes, names: Sequence[Any], room: float) -> None:
    """Write a name below each bar, or group of bars, aslant where it is wider than its room in inches."""
    texts = shortened(names)
    ax.set_xticks(range(len(texts)), texts, fontsize=8)
    if texts and 0.075 * max(map(len, texts)) > room:
        ax.set_xticks(range(len(texts)), texts, rotation=40, ha="right", rotation_mode="anchor")
