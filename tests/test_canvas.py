"""What is drawn can be read: nothing is cut off, and no two names lie over each other."""

import importlib
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox

import torchfilm as tf
from torchfilm import plot
from torchfilm.canvas import as_values, shortened

SITES = [f"model.layers.{i}.post_attention_layernorm" for i in range(4)]
FUSIONS = ["cross_attention", "low_rank", "concat", "film", "scale", "bias", "gate", "unconditioned"]


def labels(count: int, prefix: str = "material ") -> list[str]:
    return [f"{prefix}{i}" for i in range(count)]


def rows(count: int, channels: int = 4) -> tf.Modulation:
    return tf.Modulation(torch.randn(count, channels), torch.randn(count, channels))


def planes(names: list) -> Figure:
    m = rows(len(names))
    return plot.planes(m, m, names, plot.marks(names), SITES)


def embeddings(names: list) -> Figure:
    return plot.embeddings({SITES[0]: torch.randn(len(names), 2).numpy()}, names, plot.marks(names))


def heat(names: list) -> Figure:
    m = rows(len(names))
    return plot.heat(dict.fromkeys(SITES, m), names, neutral=1, unit="γ")


def texts(figure: Figure) -> dict[str, list[Bbox]]:
    """The places in pixels of titles, of names at axes and of those in legends."""
    FigureCanvasAgg(figure).draw()
    axes = [ax for ax in figure.axes if ax.get_visible()]
    found = {f"title {i}": [ax.title] for i, ax in enumerate(axes)}
    for i, ax in enumerate(axes):
        for axis in (ax.xaxis, ax.yaxis):
            low, high = sorted(axis.get_view_interval())
            ticks = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
            found[f"{axis.axis_name} {i}"] = [tick.label1 for tick in ticks]
    found["titles"] = [ax.title for ax in axes]
    found["legend"] = [text for legend in figure.legends for text in legend.get_texts()]
    return {key: [t.get_window_extent() for t in every if t.get_text()] for key, every in found.items()}


DRAWN = {
    "planes of 16": lambda: planes(labels(16)),
    "embeddings of 40": lambda: embeddings(labels(40, "c")),
    "embeddings of 150": lambda: embeddings(labels(150)),
    "long labels": lambda: embeddings(labels(16, "a very long description of what this is about: ")),
    "histograms": lambda: plot.histograms({name: rows(5) for name in SITES}),
    "channels": lambda: plot.channels(*[{n: torch.rand(5) for n in SITES}] * 2, ylabel="γ"),
    "heat of 5": lambda: heat(labels(5)),
    "heat of 150": lambda: heat(labels(150)),
    "groups": lambda: plot.grouped_bars(dict.fromkeys(FUSIONS[:5], range(2)), ["a", "b"], ylabel="%"),
    "nine": lambda: plot.grouped_bars({"u": range(9), "v": range(9)}, [*FUSIONS, "more"], ylabel="%"),
}


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_all_names_are_inside_of_the_figure_and_none_lies_over_another(draw):
    figure = draw()
    for key, places in texts(figure).items():
        for place in places:
            assert figure.bbox.x0 - 1 <= place.x0, key
            assert place.x1 <= figure.bbox.x1 + 1, key
            assert figure.bbox.y0 - 1 <= place.y0, key
            assert place.y1 <= figure.bbox.y1 + 1, key
        for first, second in itertools.pairwise(places):
            both = Bbox.intersection(first, second)
            assert both is None or min(both.width, both.height) < 2, key


def test_names_of_bars_stand_aslant_where_they_are_longer_than_the_bars_are_wide():
    ax = plot.bars(dict.fromkeys(FUSIONS, 1.0), xlabel="", ylabel="").axes[0]
    assert {text.get_rotation() for text in ax.get_xticklabels()} == {40}
    ax = plot.bars(dict.fromkeys("abc", 1.0), xlabel="", ylabel="").axes[0]
    assert {text.get_rotation() for text in ax.get_xticklabels()} == {0}


def test_nine_bars_of_a_group_can_be_told_apart():
    figure = plot.grouped_bars({"u": range(9)}, labels(9), ylabel="%")
    assert len({(bar.get_facecolor(), bar.get_hatch()) for bar in figure.axes[0].patches}) == 9


@pytest.mark.parametrize("given", [torch.tensor([2, 0, 2, 1]), torch.tensor([2, 0, 2, 1]).numpy()])
def test_labels_of_a_tensor_are_named(given):
    figure = plot.planes(rows(4), rows(4), given, plot.marks(range(4)), SITES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["0", "1", "2"]


@pytest.mark.parametrize(
    "given",
    [
        [("red", "cube"), ("blue", "cube"), ("red", "cube"), ("red", "ball")],
        [1, "a", 1, None],
        [torch.tensor(2), torch.tensor(0), torch.tensor(2), torch.tensor(1)],
        [np.int64(2), np.int64(0), np.int64(2), np.int64(1)],
        "abac",
    ],
    ids=["tuples", "mixed", "tensors", "numbers", "letters"],
)
def test_labels_of_any_kind_are_told_apart_by_what_they_say(given):
    m = tf.Modulation(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.zeros(1))
    said = as_values(given)
    styles = plot.marks(list(dict.fromkeys(said)))
    points = {"s": np.zeros((4, 2))}
    for figure in (plot.planes(m, m, given, styles, ["map"]), plot.embeddings(points, given, styles)):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(name) for name in styles]
        assert [len(drawn.get_offsets()) for drawn in figure.axes[0].collections] == [2, 1, 1]
    ax = plot.heat({"s": m}, given, neutral=1, unit="γ").axes[0]
    rows = ax.images[0].get_array()[:, 0].tolist()
    assert abs(rows.index(1.0) - rows.index(3.0)) == 1, "equal labels stand together"
    assert len(ax.get_yticklabels()) == 3


def test_of_a_long_name_the_end_is_kept():
    assert shortened("short") == "short"
    assert shortened(SITES[1]) == "…rs.1.post_attention_layernorm"
    assert len(shortened(SITES[1])) == 30


def test_a_figure_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        plot.save(plot.bars({0: 1.0}, xlabel="x", ylabel="y"), tmp_path / "folder")
    assert [file.name for file in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("hidden", "line", "use"),
    [
        ("matplotlib.axes", "figures need matplotlib", lambda: importlib.import_module("torchfilm.canvas")),
        ("sklearn.manifold", "embed needs scikit-learn", lambda: plot.embed(np.eye(4))),
    ],
)
def test_a_missing_package_is_named_with_its_extra(hidden, line, use, monkeypatch):
    monkeypatch.setitem(sys.modules, hidden, None)
    monkeypatch.delitem(sys.modules, "torchfilm.canvas")
    with pytest.raises(
        ModuleNotFoundError, match=rf"^{line}: pip install 'torchfilm\[systems\]' \(.*{hidden}"
    ):
        use()
