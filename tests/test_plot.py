from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

import torchfilm as tf
from torchfilm import plot

RNG = np.random.default_rng(0)
VALUES = {"first": RNG.normal(size=(11, 3)), "second": RNG.normal(size=(7, 5))}
STYLES = plot.marks(["a", "b"])
LABELS = ["a", "b", "a", "b", "b", "a", "a"]


def panels(figure: Figure) -> list:
    return [ax for ax in figure.axes if ax.get_visible()]


def test_up_to_56_categories_have_different_marks() -> None:
    found = plot.marks([str(i) for i in range(56)])
    assert len({(m.color, m.marker) for m in found.values()}) == 56


def test_histograms_count_every_value_and_state_the_share_below_zero() -> None:
    figure = plot.histograms(VALUES, {k: -v for k, v in VALUES.items()})
    assert len(panels(figure)) == 4
    for ax, values in zip(figure.axes[:2], VALUES.values(), strict=True):
        assert sum(patch.get_data().values.sum() for patch in ax.patches) == values.size
        assert f"{(values < 0).mean():.0%} of γ below 0" in ax.get_title()


def test_gamma_and_beta_are_drawn_times_their_gate() -> None:
    gamma, beta, gate = torch.randn(3, 4, 5).unbind()
    given = ({"a": tf.Modulation(gamma, beta, gate)}, {"a": tf.Modulation(gate * gamma, gate * beta)})
    gated, product = (
        [patch.get_data() for ax in plot.histograms(m).axes for patch in ax.patches] for m in given
    )
    assert len(gated) == 2
    for one, other in zip(gated, product, strict=True):
        assert np.array_equal(one.values, other.values)
        assert np.array_equal(one.edges, other.edges)


def test_planes_put_each_question_at_its_gamma_and_beta() -> None:
    gamma, beta = VALUES["second"], VALUES["second"] + 1
    figure = plot.planes(gamma, beta, LABELS, STYLES, [f"map {i}" for i in range(5)])
    assert len(panels(figure)) == 5
    points = np.concatenate([np.asarray(c.get_offsets()) for c in figure.axes[3].collections])
    expected = np.stack([gamma[:, 3], beta[:, 3]], axis=1)
    assert np.array_equal(points[np.lexsort(points.T)], expected[np.lexsort(expected.T)])
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["a", "b"]


def test_the_legend_names_only_what_is_drawn() -> None:
    figure = plot.embeddings({"block": RNG.normal(size=(3, 2))}, ["b"] * 3, STYLES)
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["b"]


def test_curves_pass_through_the_given_points() -> None:
    figure = plot.curves(
        [1, 2, 4], {"u": [3, 2, 1]}, xlabel="x", ylabel="y", levels={"blind": 2.5}, log_x=True
    )
    line, level = figure.axes[0].lines
    assert np.asarray(line.get_xydata()).tolist() == [[1, 3], [2, 2], [4, 1]]
    assert set(np.asarray(level.get_ydata()).tolist()) == {2.5}
    assert figure.axes[0].get_xscale() == "log"


def test_channels_are_sorted_by_mean() -> None:
    figure = plot.channels({"s": np.array([3.0, 1.0, 2.0])}, {"s": np.ones(3)}, ylabel="γ")
    assert np.asarray(figure.axes[0].lines[0].get_ydata()).tolist() == [1.0, 2.0, 3.0]
    mean, spread = torch.tensor([3.0, 1.0, 2.0], requires_grad=True), torch.ones(3, dtype=torch.bfloat16)
    figure = plot.channels({"s": mean}, {"s": spread}, ylabel="γ")
    assert np.asarray(figure.axes[0].lines[0].get_ydata()).tolist() == [1.0, 2.0, 3.0]


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_an_embedding_keeps_far_groups_apart_and_is_the_same_for_the_same_seed(method: plot.Method) -> None:
    values = np.random.default_rng(0).normal(size=(20, 6)).astype(np.float32)
    values[10:] += 30
    found = plot.embed(values, method=method, seed=2)
    assert found.shape == (20, 2)
    assert np.array_equal(found, plot.embed(values, method=method, seed=2))
    apart = np.linalg.norm(found[:10].mean(0) - found[10:].mean(0))
    assert apart > 3 * found[:10].std(), "two far groups stay two groups"
    with pytest.raises(ValueError, match="at least 4 points, got 3"):
        plot.embed(values[:3], method=method)


@pytest.mark.plain
def test_another_way_of_embedding_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embed: method expected one of \['tsne', 'pca'\], got 'umap'"):
        plot.embed(np.zeros((5, 2), np.float32), method="umap")  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["tsne", "pca"])
@pytest.mark.parametrize("values", [np.ones((5, 3)), np.full((5, 3), 1e-30, np.float32) * np.eye(5, 3)])
def test_samples_that_are_equal_are_one_point(method: plot.Method, values: np.ndarray) -> None:
    found = plot.embed(values.astype(np.float32), method=method)
    assert (found.shape, found.dtype) == ((5, 2), np.float32)
    assert not found.any()
    start = tf.Modulation.identity(5, 3)
    assert not plot.by_depth({"s": start}, method=method)["s"].any()


@pytest.mark.parametrize("method", ["tsne", "pca"])
def test_points_on_a_line_are_embedded(method: plot.Method) -> None:
    assert plot.embed(torch.randn(7, 1), method=method).shape == (7, 2)


def test_each_site_is_embedded_by_its_gamma_and_beta() -> None:
    gamma = {name: values[:7] for name, values in VALUES.items()}
    beta = {name: 1 + values[:7, ::-1] for name, values in VALUES.items()}
    found = plot.by_depth(gamma, beta, method="pca")
    assert list(found) == ["first", "second"]
    both = np.concatenate([gamma["second"], beta["second"]], axis=1)
    assert np.array_equal(found["second"], plot.embed(both, method="pca"))


def test_a_heat_map_groups_conditions_by_label_and_channels_that_move_together() -> None:
    labels = ["b", "a", "b", "a"]
    push = np.array([1.0, -1.0, 1.0, -1.0])[:, None]
    values = {"here": 1 + push * np.array([[1.0, -1.0, 0.9, -0.9, 0.0]])}
    figure = plot.heat(values, labels, neutral=1, unit="γ")
    (image,) = figure.axes[0].images
    shown = np.asarray(image.get_array())
    assert np.array_equal(shown[0], shown[1])
    assert np.allclose(shown[2], 2 - shown[0])
    signs = np.sign(shown[0] - 1)
    assert (np.diff(signs) >= 0).all() or (np.diff(signs) <= 0).all(), "one sign beside the same"
    assert [text.get_text() for text in figure.axes[0].get_yticklabels()] == ["a", "b"]
    assert image.norm.vmin == pytest.approx(2 - image.norm.vmax)
    assert plot.heat(values, labels, neutral=1, unit="γ", spread=3).axes[0].images[0].norm.vmax == 4


def test_a_channel_has_its_own_number_below_it() -> None:
    gamma = torch.ones(6, 4)
    gamma[:3, 2], gamma[3:, 2], gamma[:, 1] = 4.0, -2.0, 0.5
    ax = plot.heat({"s": gamma.numpy()}, list("aaabbb"), neutral=1, unit="γ").axes[0]
    shown = np.asarray(ax.images[0].get_array())
    for place, text in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True):
        assert np.array_equal(shown[:, int(place)], gamma[:, int(text.get_text())])
    ax = plot.channels({"s": np.array([3.0, 1.0, 2.0])}, {"s": np.ones(3)}, ylabel="γ").axes[0]
    assert [text.get_text() for text in ax.get_xticklabels()] == ["1", "2", "0"]
    assert not len(plot.heat({"s": np.eye(6, 99)}, list("aaabbb"), neutral=1, unit="").axes[0].get_xticks())


def test_colours_of_a_heat_map_do_not_end_at_what_rounding_leaves() -> None:
    gamma = 1 + 1.2e-7 * torch.randint(0, 2, (100, 512))
    gamma[:, 7] = torch.linspace(-3, 5, 100)
    figure = plot.heat({"s": gamma.numpy()}, ["a"] * 100, neutral=1, unit="γ")
    assert figure.axes[0].images[0].norm.vmax == pytest.approx(1.04)
    assert figure.axes[1]._colorbar.extend == "both"
    figure = plot.heat({"s": torch.ones(3, 5).half().numpy()}, "aab", neutral=1, unit="γ")
    assert figure.axes[1]._colorbar.extend == "neither"


def test_a_heat_map_of_many_labels_is_in_colour(tmp_path) -> None:
    m, labels = tf.Modulation(torch.randn(1000, 16), torch.zeros(16)), [f"question {i}" for i in range(1000)]
    path = plot.save(plot.heat({"s": m}, labels, neutral=1, unit="γ"), tmp_path / "heat.png")
    with Image.open(path) as image:
        assert (np.asarray(image.convert("RGB")).max(axis=-1) < 60).mean() < 0.1


def test_every_figure_is_written_without_a_global_state(tmp_path) -> None:
    pictures = [np.full((10, 15, 3), 120, np.uint8)] * 3
    figures = {
        "histograms": plot.histograms(VALUES, VALUES),
        "channels": plot.channels({"s": np.ones(3)}, {"s": np.ones(3)}, ylabel="γ"),
        "over": plot.over_pictures(pictures, RNG.random((3, 2, 3)), ["p", "q", "r"], unit="channels"),
        "table": plot.table(np.eye(3), list("abc"), list("def"), xlabel="x", ylabel="y", unit="share"),
        "dots": plot.dots({"u": [1.0, 2.0], "v": [3.0]}, {"v": 2.5}, xlabel="x", reference="paper"),
        "heat": plot.heat({"s": RNG.normal(size=(7, 3))}, LABELS, neutral=0, unit="β"),
        "bars": plot.bars({-1: 2.0, 0: 5.0}, xlabel="x", ylabel="y"),
        "groups": plot.grouped_bars({"u": [1, 2], "v": [3, np.nan]}, ["here", "there"], ylabel="%"),
        "empty": plot.over_pictures(pictures[:1], np.zeros((1, 2, 3)), ["p"], unit="channels"),
    }
    for name, figure in figures.items():
        path = plot.save(figure, tmp_path / "new" / f"{name}.png")
        with Image.open(path) as image:
            assert min(image.size) > 100
            assert len(np.unique(np.asarray(image.convert("L")))) > 5, "something is drawn"
    assert len(list((tmp_path / "new").iterdir())) == len(figures)


def test_a_path_may_be_a_text(tmp_path) -> None:
    path = plot.save(plot.bars({0: 1.0}, xlabel="x", ylabel="y"), str(tmp_path / "bars.png"))
    assert path == tmp_path / "bars.png"
    assert path.exists()


@pytest.mark.parametrize("count", [2, 7])
def test_planes_have_a_title_each(count: int) -> None:
    values = VALUES["second"]
    with pytest.raises(ValueError, match=rf"planes: expected a title for each of 5 maps, got {count}"):
        plot.planes(values, values, LABELS, STYLES, ["map"] * count)


def test_sites_that_do_not_match_are_refused() -> None:
    with pytest.raises(
        ValueError, match="same sites twice, at least one, got 2 and 1, not in both: 'second'"
    ):
        plot.histograms(VALUES, {"first": VALUES["first"]})
    assert plot.histograms(VALUES, dict(reversed(VALUES.items()))).axes[2].get_title().startswith("first")
    with pytest.raises(ValueError, match="at least one"):
        plot.channels({}, {}, ylabel="γ")


def test_modulations_are_drawn_like_the_arrays_of_their_numbers() -> None:
    gamma, beta = torch.randn(7, 5), torch.randn(7, 5, requires_grad=True)
    m = tf.Modulation(gamma, beta)
    for figure in (plot.histograms({"s": m}), plot.histograms({"s": m}, {"s": m})):
        titles = [ax.get_title() for ax in figure.axes]
        assert titles == [
            f"s: {(gamma < 0).double().mean():.0%} of γ below 0",
            f"s: {(beta < 0).double().mean():.0%} of β below 0",
        ]
    points = plot.planes(m, m, LABELS, STYLES, [""] * 5).axes[3].collections
    drawn = np.concatenate([np.asarray(c.get_offsets()) for c in points])
    assert sorted(drawn[:, 1]) == pytest.approx(sorted(beta[:, 3].tolist()))
    for neutral, values in ((1, gamma), (0, beta)):
        (image,) = plot.heat({"s": m}, LABELS, neutral=neutral, unit="").axes[0].images
        assert np.array_equal(np.sort(image.get_array(), axis=None), np.sort(values.detach(), axis=None))
    assert plot.by_depth({"s": m}, method="pca")["s"].shape == (7, 2)


def drawn(ax) -> np.ndarray:
    """All points of a panel, in an order of their own."""
    points = np.concatenate([np.asarray(c.get_offsets()) for c in ax.collections])
    return points[np.lexsort(points.T)]


def test_one_beta_for_all_samples_is_drawn_for_each() -> None:
    gamma, beta = torch.randn(7, 5), torch.randn(5)
    one, each = tf.Modulation(gamma, beta), tf.Modulation(gamma, beta.expand(7, 5).clone())
    titles = [""] * 5
    same = [plot.planes(m, m, LABELS, STYLES, titles) for m in (one, each)]
    same.append(plot.planes(gamma.numpy(), beta.numpy(), LABELS, STYLES, titles))
    assert all(np.array_equal(drawn(figure.axes[3]), drawn(same[1].axes[3])) for figure in same)
    first, second = (plot.by_depth({"s": m}, method="pca")["s"] for m in (one, each))
    assert np.array_equal(first, second)
    images = [plot.heat({"s": m}, LABELS, neutral=0, unit="").axes[0].images[0] for m in (one, each)]
    assert np.array_equal(images[0].get_array(), images[1].get_array())
    assert images[0].get_array().shape == (7, 5)


def test_each_step_of_a_sample_is_drawn_with_its_label_and_all_are_one_point_of_an_embedding() -> None:
    m = tf.Modulation(torch.randn(7, 2, 5), torch.randn(5))
    (image,) = plot.heat({"s": m}, LABELS, neutral=1, unit="").axes[0].images
    of_a = m.gamma[[i for i, label in enumerate(LABELS) if label == "a"]].reshape(-1, 5)
    assert image.get_array().shape == (14, 5)
    assert np.array_equal(np.sort(image.get_array()[: len(of_a)], axis=1), np.sort(of_a, axis=1))
    panel = plot.planes(m, m, LABELS, STYLES, [""] * 5).axes[3]
    assert sorted(drawn(panel)[:, 0]) == pytest.approx(sorted(m.gamma[..., 3].flatten().tolist()))
    assert len(panel.collections[0].get_offsets()) == len(of_a)
    assert plot.by_depth({"s": m}, method="pca")["s"].shape == (7, 2)


@pytest.mark.parametrize("steps", [2, 7])
@pytest.mark.parametrize("kind", ["modulation", "arrays"])
def test_a_beta_without_steps_is_that_of_its_sample(steps: int, kind: str) -> None:
    gamma, beta = torch.randn(7, steps, 5), torch.randn(7, 5)
    one, each = tf.Modulation(gamma, beta), tf.Modulation(gamma, beta[:, None].expand(7, steps, 5))
    pairs = [(one, one) if kind == "modulation" else (gamma.numpy(), beta.numpy()), (each, each)]
    panels_ = [plot.planes(*pair, LABELS, STYLES, [""] * 5).axes[3] for pair in pairs]
    assert np.array_equal(drawn(panels_[0]), drawn(panels_[1]))
    found = [plot.by_depth({"s": g}, {"s": b}, method="pca")["s"] for g, b in pairs]
    np.testing.assert_allclose(found[0], found[1])
    if kind == "modulation":
        images = [plot.heat({"s": m}, LABELS, neutral=0, unit="").axes[0].images[0] for m in (one, each)]
        assert np.array_equal(images[0].get_array(), images[1].get_array())


@pytest.mark.parametrize("value", [100.0, -1e8, 0.0])
def test_a_constant_is_drawn(value: float) -> None:
    m = tf.Modulation(torch.full((3, 5), value), torch.full((3, 5), value))
    for ax in plot.histograms({"s": m}).axes:
        ((counts, edges, _),) = [patch.get_data() for patch in ax.patches]
        assert counts.sum() == 15
        (left, _), (right, _) = ax.transData.transform([(edge, 1) for edge in edges[:2]])
        assert right - left > 1, "a bar that is seen"
        assert ax.get_ylim()[0] < 1 < ax.get_ylim()[1]


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(wrong: float) -> None:
    m = tf.Modulation(torch.randn(7, 5), torch.zeros(7, 5))
    m.gamma[2, 3] = wrong
    for draw in (plot.histograms, plot.by_depth, lambda m: plot.heat(m, LABELS, neutral=1, unit="")):
        with pytest.raises(ValueError, match=r"in 1 of 35 values of gamma at site 's', first at \[2, 3\]."):
            draw({"s": m})
    with pytest.raises(ValueError, match=r"in 1 of 35 values of gamma, first at \[2, 3\].\nLeave these sam"):
        plot.planes(m, m, LABELS, STYLES, [""] * 5)
    with pytest.raises(ValueError, match=r"in 1 of 5 values of spread at site 's', first at \[3\]."):
        plot.channels({"s": torch.ones(5)}, {"s": m.gamma[2]}, ylabel="γ")
    with pytest.raises(ValueError, match=r"in 1 of 14 values of points at site 's'"):
        plot.embeddings({"s": m.gamma[:, 3:].numpy()}, LABELS, STYLES)
    with pytest.raises(
        ValueError, match="embed: expected finite numbers, got NaN or infinity in 1 of 7 points"
    ):
        plot.embed(m.gamma)
    for values in (m.gamma.to(torch.bfloat16).requires_grad_(), m.gamma.numpy()):  # as the message says
        with pytest.raises(ValueError, match="Leave them out") as raised:
            plot.embed(values)
        left = eval(str(raised.value).split("Leave them out: ")[1][:-1], {"values": values, "np": np})
        assert plot.embed(left, method="pca").shape == (6, 2)


def test_figures_of_nothing_are_refused() -> None:
    for who, draw in {
        "heat": lambda: plot.heat({}, [], neutral=1, unit=""),
        "embeddings": lambda: plot.embeddings({}, [], {}),
        "comparison": lambda: plot.comparison([]),
        "over_pictures": lambda: plot.over_pictures([], np.zeros((0, 2, 3)), [], unit=""),
        "paths_over_pictures": lambda: plot.paths_over_pictures([], [], []),
        "grouped_bars": lambda: plot.grouped_bars({}, [], ylabel=""),
    }.items():
        with pytest.raises(
            ValueError, match=rf"{who}: expected at least one (site|network|picture|name), got"
        ):
            draw()
    none = {"s": tf.Modulation(torch.zeros(0, 3), torch.zeros(0, 3))}
    for draw in (plot.histograms, plot.by_depth, lambda m: plot.heat(m, [], neutral=1, unit="")):
        with pytest.raises(ValueError, match=r"expected numbers, got \(0, 3\) of gamma at site 's'.\nRecord"):
            draw(none)


def test_channels_of_many_samples_are_refused():
    one, many = torch.rand(5), torch.rand(7, 5)
    for mean, spread, what in ((many, one, "mean"), (one, many, "spread")):
        with pytest.raises(ValueError, match=rf"per channel, got \(7, 5\) of {what} at site 's'.*\nTake bot"):
            plot.channels({"s": mean}, {"s": spread}, ylabel="")


@pytest.mark.parametrize("count", [1, 3])
def test_each_picture_has_a_title_and_what_lies_over_it(count: int):
    two, maps = [np.zeros((4, 4, 3), np.uint8)] * 2, np.ones((2, 2, 2))
    draws = {
        "over_pictures: expected titles": lambda: plot.over_pictures(two, maps, ["t"] * count, unit=""),
        "over_pictures: expected maps": lambda: plot.over_pictures(
            two, np.ones((count, 2, 2)), "tt", unit=""
        ),
        "paths_over_pictures: expected paths": lambda: plot.paths_over_pictures(two, [maps[0]] * count, "tt"),
    }
    for message, draw in draws.items():
        with pytest.raises(ValueError, match=rf"^{message} for each of 2 pictures, got {count}.\nGive as ma"):
            draw()


def test_curves_and_tables_take_tensors_of_any_kind() -> None:
    kinds: list[dict[str, Any]] = [{"dtype": torch.bfloat16}, {"requires_grad": True}]
    for kind in kinds:
        values = torch.tensor([[0.5, 0.25], [1.0, 0.0]], **kind)
        (line,) = plot.curves(values[0], {"u": values[1]}, xlabel="x", ylabel="y").axes[0].lines
        assert np.asarray(line.get_xydata()).tolist() == [[0.5, 1.0], [0.25, 0.0]]
        (image,) = plot.table(values, "ab", "cd", xlabel="x", ylabel="y", unit="").axes[0].images
        assert np.asarray(image.get_array()).tolist() == [[0.5, 0.25], [1.0, 0.0]]


def test_gamma_and_beta_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"same samples and channels, got \(7, 5\) and \(7, 3\).\nTake both"):
        plot.planes(np.ones((7, 5)), np.ones((7, 3)), LABELS, STYLES, [""] * 5)
    with pytest.raises(ValueError, match="same samples and channels at site 's'"):
        plot.by_depth({"s": np.ones((7, 5))}, {"s": np.ones((7, 3))})


def test_figures_of_hundreds_of_sites_are_refused() -> None:
    m = tf.Modulations({f"site{i}": tf.Modulation.identity(2, 3) for i in range(151)})
    with pytest.raises(ValueError, match=r"at most 150 panels, got 155 \(31 x 5\).\nDraw some at a"):
        plot.heat(m, ["a", "b"], neutral=1, unit="γ")
    with pytest.raises(ValueError, match=r"at most 150 panels, got 310 \(62 x 5\)"):
        plot.histograms(m)
    with pytest.raises(ValueError, match=r"gamma\[:, :16\] of maps"):
        plot.planes(np.ones((2, 512)), np.ones((2, 512)), "ab", STYLES, [""] * 512)


def test_sites_stand_in_rows_of_five():
    m = tf.Modulations({f"site{i}": tf.Modulation(torch.randn(2, 3), torch.randn(2, 3)) for i in range(7)})
    mean = {name: one.gamma[0] for name, one in m.items()}
    heat, channels = plot.heat(m, "ab", neutral=1, unit="γ"), plot.channels(mean, mean, ylabel="γ")
    for figure in (heat, channels, plot.histograms(m)):
        assert figure.get_figwidth() < 5 * 2.9
    assert [ax.get_title() for ax in heat.axes[:7]] == list(m)
    assert [ax.get_title() for ax in channels.axes] == list(m)
    titles = [ax.get_title() for ax in plot.histograms(m).axes]
    sites = [f"site{i}" for i in [*range(5)] * 2 + [5, 6] * 2]
    assert [title.split(":")[0] for title in titles] == sites
    assert ["γ" in title for title in titles] == [True] * 5 + [False] * 5 + [True] * 2 + [False] * 2


def test_labels_without_a_style_or_of_another_number_are_refused() -> None:
    m = tf.Modulation(torch.randn(7, 5), torch.randn(7, 5))
    labels = ["a", "c", "a", "d", "c", "a", "a"]
    draws = {
        r"got none for c, d.\nIts points would not be drawn: styles=plot.marks\(labels\).": labels,
        "a label for each of 7 samples, got 6.": labels[:6],
    }
    for message, given in draws.items():
        with pytest.raises(ValueError, match=message):
            plot.planes(m, m, given, STYLES, [""] * 5)
        with pytest.raises(ValueError, match=message):
            plot.embeddings({"s": RNG.normal(size=(7, 2))}, given, STYLES)
    with pytest.raises(ValueError, match="a label for each of 7 samples, got 6"):
        plot.heat({"s": m}, labels[:6], neutral=1, unit="")


def test_a_comparison_is_drawn_as_it_comes() -> None:
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7))
    found = tf.compare({"film": model}, (torch.rand(2, 3), torch.rand(2, 7)), rounds=1)
    names = [label.get_text() for label in plot.comparison(found).axes[0].get_yticklabels()]
    assert names == ["unconditioned", "film"]
