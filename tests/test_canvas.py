"""What is drawn can be read: nothing is cut off, and no two names lie over each other."""

import importlib
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.style
import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox
from PIL import Image

import torchfilm as tf
from torchfilm import plot
from torchfilm.canvas import shortened
from torchfilm.summary import as_values

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
    "bars": lambda: plot.bars(dict.fromkeys("abc", 1.0), xlabel="x", ylabel="y"),
    "table": lambda: plot.table(np.eye(3), "abc", "def", xlabel="x", ylabel="y", unit="share"),
    "curves": lambda: plot.curves([1, 2], {"u": [1, 2], "v": [2, 1]}, xlabel="x", ylabel="y", log_x=True),
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
        [[1, 2], [2, 1], [1, 2], []],
        [float("nan"), 1.0, float("nan"), 2.0],
        [torch.tensor(2), torch.tensor(0), torch.tensor(2), torch.tensor(1)],
        [np.int64(2), np.int64(0), np.int64(2), np.int64(1)],
        "abac",
    ],
    ids=["tuples", "mixed", "lists", "missing", "tensors", "numbers", "letters"],
)
def test_labels_of_any_kind_are_told_apart_by_what_they_say(given):
    m = tf.Modulation(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), torch.zeros(1))
    styles = plot.marks(given)
    assert list(styles) == list(dict.fromkeys(as_values(given)))
    points = {"s": np.zeros((4, 2))}
    for figure in (plot.planes(m, m, given, styles, ["map"]), plot.embeddings(points, given, styles)):
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [str(name) for name in styles]
        assert [len(drawn.get_offsets()) for drawn in figure.axes[0].collections] == [2, 1, 1]
    ax = plot.heat({"s": m}, given, neutral=1, unit="γ").axes[0]
    rows = ax.images[0].get_array()[:, 0].tolist()
    assert abs(rows.index(1.0) - rows.index(3.0)) == 1, "equal labels stand together"
    assert len(ax.get_yticklabels()) == 3


def test_a_style_is_found_by_what_its_name_says():
    one, nan = torch.tensor(1.0), torch.tensor(float("nan"))
    styles = dict(zip((nan, one), plot.marks("ab").values(), strict=True))
    figure = plot.planes(rows(4), rows(4), [1.0, float("nan"), 1.0, 1.0], styles, SITES)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["nan", "1.0"]
    assert [len(drawn.get_offsets()) for drawn in figure.axes[0].collections] == [1, 3]


def test_of_a_long_name_the_end_is_kept():
    assert shortened(["short", SITES[1]]) == ["short", "…rs.1.post_attention_layernorm"]
    assert len(shortened(SITES)[1]) == 30


LONG = {
    "start": [f"{a}.attentions.0.transformer_blocks.0.norm3" for a in ("down_blocks.0", "up_blocks.3")],
    "middle": [
        f"is there {a} red cube to the left of {b} metal thing" for a in ("a", "no") for b in ("a", "the")
    ],
    "far": [f"{30 * 'a'}{what}{30 * 'a'}" for what in "bcd"],
    "twice": [40 * "a", 40 * "a", 41 * "a"],
}


@pytest.mark.parametrize("names", LONG.values(), ids=LONG)
def test_names_that_differ_stay_so_where_they_are_shortened(names: list[str]):
    found = shortened(names)
    assert len(set(found)) == len(set(names))
    assert [found.index(one) for one in found] == [names.index(name) for name in names]
    assert max(map(len, found)) <= 60


@pytest.mark.parametrize("name", ["$5 to $6", r"$\foo$", "_base", "50 %"])
def test_names_are_drawn_as_they_are(name: str, tmp_path: Path):
    m, names = rows(4), [name, "film", name, "film"]
    look = {"xlabel": "x", "ylabel": "y"}
    figures = [
        plot.planes(m, m, names, plot.marks(names), [name] * 4),
        plot.curves([1, 2], {name: [1, 2], "film": [3, 4]}, **look, levels={f"{name}2": 1.0}),
        plot.grouped_bars({name: [1, 2]}, [name, "film"], ylabel="%"),
        plot.table(np.eye(2), [name, "film"], [name, "film"], **look, unit="share"),
    ]
    for figure in figures:
        plot.save(figure, tmp_path / "figure.png")
        drawn = [text._preprocess_math(text.get_text()) for text in figure.findobj(Text)]
        assert (name, False) in drawn
        assert all(formula is False for _, formula in drawn)
    for figure in figures[:3]:
        assert name.replace("$", r"\$") in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN)
def test_a_dark_style_that_is_set_changes_nothing(draw, tmp_path: Path):
    path = tmp_path / "figure.png"

    def drawn(write: Callable[[Figure], object]) -> np.ndarray:
        torch.manual_seed(0)
        write(draw())
        with Image.open(path) as image:
            return np.asarray(image.convert("L"))

    expected = drawn(lambda figure: plot.save(figure, path))
    own = {"axes.grid": True, "axes.grid.which": "both", "savefig.facecolor": "black"}
    with matplotlib.style.context(["dark_background", own]):
        assert np.array_equal(drawn(lambda figure: plot.save(figure, path)), expected)
        assert np.array_equal(drawn(lambda figure: figure.savefig(path, dpi=150)), expected)


def test_settings_are_read_and_never_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """They are those of the whole process, and its other threads."""
    with matplotlib.style.context({"font.family": "DejaVu Serif", "font.size": 20, "pdf.fonttype": 42}):
        monkeypatch.setattr(matplotlib.RcParams, "__setitem__", lambda *_: pytest.fail("set"))
        for draw in DRAWN.values():
            figure = draw()
            assert figure.axes[0].title.get_fontname() == "DejaVu Serif"
        plot.save(figure, tmp_path / "figure.pdf")
        monkeypatch.undo()
    assert b"/CIDFontType2" in (tmp_path / "figure.pdf").read_bytes()


def test_a_figure_can_be_written_without_a_background(tmp_path: Path):
    planes(labels(3)).savefig(tmp_path / "figure.png", transparent=True)
    with Image.open(tmp_path / "figure.png") as image:
        assert image.getpixel((0, 0))[3] == 0


@pytest.mark.parametrize(("name", "start"), [("a.png", b"\x89PNG"), ("a.PDF", b"%PDF"), ("a.svg", b"<?xml")])
def test_the_end_of_a_name_tells_the_format(name: str, start: bytes, tmp_path: Path):
    figure = plot.bars({0: 1.0}, xlabel="x", ylabel="y")
    assert plot.save(figure, tmp_path / name).read_bytes().startswith(start)
    canvas = figure.canvas
    plot.save(figure, tmp_path / name)
    assert figure.canvas is canvas
    with pytest.raises(
        ValueError, match=r"one of .png, .svg, .pdf, got 'a.jpg'.\nFor others call figure.savef"
    ):
        plot.save(figure, tmp_path / "a.jpg")


def test_a_figure_that_cannot_be_written_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(ValueError, match=r"expected a file, or none yet, got .*folder.png, a folder"):
        plot.save(plot.bars({0: 1.0}, xlabel="x", ylabel="y"), tmp_path / "folder.png")
    assert [file.name for file in tmp_path.iterdir()] == ["folder.png"]


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
