"""Summaries of modulations against values that are known by construction."""

import numpy as np
import pytest
import torch

import oracles
import torchfilm as tf
from torchfilm.summary import explained, summarise


def test_closed_and_flipped_channels_are_counted():
    gamma = torch.tensor([[0.0, -1.0, 2.0], [0.009, 0.02, 0.0], [0.0, 1.0, 3.0], [0.001, -2.0, 1.0]])
    found = summarise({"here": tf.Modulation(gamma, torch.zeros(4, 3))})["here"]
    assert (found.samples, found.channels) == (4, 3)
    assert found.closed == 5 / 12
    assert found.closed_always == 1
    assert found.flipped == 2 / 12
    assert found.gamma_mean == pytest.approx(gamma.mean().item())
    assert found.beta_sd == 0
    assert summarise({"here": tf.Modulation(gamma, gamma)}, closed=0.002)["here"].closed_always == 0


def test_a_small_spread_is_shown_and_text_is_ascii():
    small = 1 + 0.004 * torch.randn(40, 16)
    m = {"trained": tf.Modulation(small, small - 1), "start": tf.Modulation.identity(40, 16)}
    head, trained, start = str(summarise(m)).encode("ascii").decode().splitlines()
    assert "gamma (sd)" in head
    assert "(0.004" in trained.split()[4]
    assert start.split()[3:7] == ["1.000", "(0.000)", "0.000", "(0.000)"]


def test_labels_that_are_missing_are_one_label():
    m, nan = tf.Modulation(torch.randn(6, 3), torch.zeros(3)), float("nan")
    expected = summarise({"here": m}, list("abacba"))["here"]
    for labels in ([nan, 1, nan, 2, 1, nan], torch.tensor([nan, 1, nan, 2, 1, nan])):
        assert summarise({"here": m}, labels)["here"] == expected


LABELS = [
    torch.arange(40) % 4,
    np.arange(40) % 4,
    torch.eye(4).repeat(10, 1),
    [[i % 4, "a"] for i in range(40)],
    [i % 4 for i in torch.arange(40)],
]


@pytest.mark.parametrize("labels", LABELS, ids=range(5))
def test_labels_may_be_tensors_and_arrays_which_say_what_their_numbers_say(labels):
    m = tf.Modulation(torch.randn(40, 3), torch.randn(40, 5)[:, :3])
    expected = summarise({"here": m}, [i % 4 for i in range(40)])["here"].between
    assert summarise({"here": m}, labels)["here"].between == expected
    assert 0 < expected < 0.5


def test_labels_are_gone_through_once_for_all_sites_and_steps():
    asked = []

    class Labels(list):
        def __iter__(self):
            asked.append(self)
            return super().__iter__()

    m, labels = tf.Modulation(torch.randn(6, 5, 3), torch.randn(6, 5, 3)), Labels("abcabc")
    found = summarise({"a": m, "b": m, "c": m}, labels)
    assert len(asked) == 1
    flat = tf.Modulation(m.gamma.flatten(0, 1), m.beta.flatten(0, 1))
    expected = summarise({"c": flat}, [label for label in "abcabc" for _ in range(5)])
    assert found["c"].between == expected["c"].between > 0


@pytest.mark.plain
def test_what_is_no_modulation_or_no_site_is_refused():
    found = summarise({"here": tf.Modulation.identity(2, 3)})
    with pytest.raises(
        ValueError, match=r"Summary: expected one of 1 names, got 'her'.\nThe nearest are 'here'"
    ):
        found["her"]
    assert [line.site for line in found] == ["here"]
    assert len(found) == 1
    assert "here" in found
    assert "her" not in found
    assert all(line in found for line in found)
    with pytest.raises(
        ValueError, match=r"summarise: expected a Modulation for each site, got Tensor at 'a'"
    ):
        summarise({"a": torch.zeros(2, 3)})


@pytest.mark.parametrize("rank", [0, 1, 2, 3])
def test_the_rank_is_the_number_of_directions_the_samples_span(rank: int):
    mixed = torch.randn(23, rank) @ torch.randn(rank, 10) + torch.randn(10)
    found = summarise({"here": tf.Modulation(1 + mixed[:, :5], mixed[:, 5:])})["here"]
    assert found.rank == rank
    assert found.directions <= rank + 1e-9


@pytest.mark.parametrize("beta", [0.0, 5.0])
@pytest.mark.parametrize("steps", [False, True])
def test_the_same_samples_once_more_change_nothing(beta: float, steps: bool):
    gamma, labels, times = 1 + 1e-3 * torch.randn(10, 5), torch.arange(10), 5000
    once = summarise({"here": tf.Modulation(gamma, torch.full((10, 5), beta))}, labels)["here"]
    if steps:
        many = gamma[:, None].expand(10, times, 5)
    else:
        many, labels = gamma.repeat(times, 1), labels.repeat(times)
    found = summarise({"here": tf.Modulation(many, torch.full((5,), beta))}, labels)["here"]
    assert once.rank == found.rank == 5
    assert found.directions == pytest.approx(once.directions)
    assert found.between == pytest.approx(1)
    assert found.between <= 1


def test_rounding_is_no_direction():
    gamma = (torch.rand(5, dtype=torch.float64) * 3).expand(20000, 5) + 1e-8 * torch.randn(20000, 5)
    assert summarise({"here": tf.Modulation(gamma.float(), torch.zeros(5))})["here"].rank == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("way", ["modulation", "network", "autocast"])
def test_a_condition_of_one_number_has_one_direction_in_every_precision(dtype: torch.dtype, way: str):
    x, z = torch.randn(64, 3), torch.randn(64, 1)
    found = {
        "0": tf.Modulation((1 + 0.1 * z @ torch.randn(1, 32)).to(dtype), (z @ torch.randn(1, 32)).to(dtype))
    }
    if way != "modulation":
        model = tf.condition(torch.nn.Sequential(torch.nn.Linear(3, 32)), "0", tf.Vector(1), init="default")
        lent = dtype if way == "network" else torch.float32
        half = way == "autocast" and dtype.itemsize == 2
        with (
            tf.record(model.to(lent)) as found,
            torch.autocast("cpu", dtype if half else torch.bfloat16, half),
        ):
            model(x.to(lent), cond=z.to(lent))
    assert summarise(found)["0"].rank == 1


def test_rounding_of_beta_alone_is_no_direction():
    beta = (torch.randn(64, 1) @ torch.randn(1, 32)).bfloat16()
    assert summarise({"here": tf.Modulation(torch.ones(64, 32), beta)})["here"].rank == 1


def test_numbers_of_few_digits_are_no_rounding():
    values = torch.zeros(20000, 3)
    values[0, 0] = values[1, 1] = 1.0
    assert summarise({"here": tf.Modulation(1 + values, torch.zeros(3))})["here"].rank == 2


@pytest.mark.parametrize("large", [129.0, 200.0, 200.5, 1000.5])
def test_integers_and_constants_are_no_rounding_however_large(large: float):
    gamma = torch.stack([torch.full((64,), large), torch.arange(64) % 2], dim=1)
    found = summarise({"here": tf.Modulation(gamma, torch.zeros(2))}, torch.arange(64) % 2)["here"]
    assert (found.rank, found.directions, found.between) == (1, 1, 1)
    gamma[0, 0] = 8.0  # that channel is a constant no more
    assert summarise({"here": tf.Modulation(gamma.round(), torch.zeros(2))})["here"].rank == 2


@pytest.mark.parametrize(
    "options", [{}, {"learned_scale": True}, {"head": "shared"}, {"head": "lowrank:2"}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_by_autocast_is_no_direction_that_counts(options: dict, dtype: torch.dtype):
    model = tf.condition(torch.nn.Sequential(torch.nn.Linear(3, 32)), "0", tf.Vector(1), **options)
    for weight in model.film.generator.parameters():
        torch.nn.init.normal_(weight)
    with torch.no_grad(), torch.autocast("cpu", dtype):
        found = summarise(tf.modulations(model, torch.randn(64, 1)))["0"]
    assert found.rank >= 1
    assert found.directions == pytest.approx(1, abs=0.01)


def test_labels_without_a_meaning_explain_what_is_said_to_be_chance():
    labels = [i % 3 for i in range(6)]
    found = [
        summarise({"a": tf.Modulation(torch.randn(6, 7), torch.randn(6, 7))}, labels)["a"] for _ in range(100)
    ]
    assert found[0].chance == pytest.approx(0.4)
    assert np.mean([line.between for line in found]) == pytest.approx(0.4, abs=0.03)
    single = tf.Modulation(torch.randn(6, 7), torch.randn(6, 7))
    assert summarise({"a": single}, range(6))["a"].chance == 1
    assert summarise({"a": single})["a"].chance is None


def test_equal_directions_count_in_full():
    values = torch.cat([torch.eye(3), -torch.eye(3)])
    found = summarise({"here": tf.Modulation(values, torch.zeros(6, 3))})["here"]
    assert found.directions == pytest.approx(3)


def test_the_variance_between_labels_is_what_a_loop_finds():
    gamma, beta, labels = torch.randn(11, 3).double(), torch.randn(11, 3).double(), list("aabbbcccdda")
    both = torch.cat([gamma, beta], 1).numpy()
    between, total = oracles.variance_between(both, labels)
    found = summarise({"here": tf.Modulation(gamma, beta)}, labels)["here"]
    assert found.between == pytest.approx(between.sum() / total.sum())
    np.testing.assert_allclose(explained(both, labels), between / total)


def test_labels_that_say_all_explain_all_and_a_constant_explains_nothing():
    m = tf.Modulation(torch.tensor([[1.0], [1.0], [2.0]]), torch.zeros(3, 1))
    assert summarise({"here": m}, "aab")["here"].between == 1
    assert summarise({"here": tf.Modulation.identity(3, 1)}, "aab")["here"].between == 0
    assert explained(np.ones((3, 2)), "aab").tolist() == [0, 0]


def test_each_step_of_a_sequence_is_a_row_with_its_samples_label():
    gamma = torch.tensor([1.0, 2.0])[:, None, None].expand(2, 5, 3)
    found = summarise({"here": tf.Modulation(gamma, torch.zeros(2, 1, 3))}, ["a", "b"])["here"]
    assert (found.samples, found.between, found.rank) == (10, 1, 1)


@pytest.mark.parametrize("steps", [2, 5])
def test_a_field_without_steps_is_that_of_its_sample(steps: int):
    gamma, beta = torch.ones(2, steps, 3), torch.tensor([[1.0], [2.0]]).expand(2, 3)
    assert summarise({"here": tf.Modulation(gamma, beta)}, ["a", "b"])["here"].between == 1


def test_the_table_has_a_line_for_each_site():
    sites = {name: tf.Modulation(torch.randn(4, 3), torch.randn(4, 3)) for name in ("first", "second")}
    lines = str(summarise(sites)).splitlines()
    assert [line.split()[0] for line in lines] == ["site", "first", "second"]
    assert "between" not in lines[0]
    head, *lines = str(summarise(sites, "abab")).splitlines()
    assert head.split()[-3:] == ["between", "by", "chance"]
    assert [line.split()[-1] for line in lines] == ["33.3%"] * 2
    assert [line["site"] for line in summarise(sites).to_json()] == ["first", "second"]


@pytest.mark.plain
def test_what_cannot_be_summarised_is_refused():
    with pytest.raises(ValueError, match=r"of several samples at site 'here', got gamma \(3,\)"):
        summarise({"here": tf.Modulation.identity(3)})
    with pytest.raises(ValueError, match=r"a label for each of 2 samples of site 'here', got 3"):
        summarise({"here": tf.Modulation.identity(2, 3)}, "abc")
    with pytest.raises(ValueError, match=r"at least one sample at site 'here', got gamma \(0, 3\)"):
        summarise({"here": tf.Modulation.identity(0, 3)})
    with pytest.raises(ValueError, match=r"explained: expected a label for each of 3 samples, got 2"):
        explained(np.ones((3, 2)), "ab")
    for wrong in (torch.nan, torch.inf):
        m = tf.Modulation(torch.ones(2, 3), torch.tensor([[0.0], [wrong]]).expand(2, 3))
        message = "finite numbers at site 'here', got NaN or infinity in 3 of 6 values of beta"
        with pytest.raises(ValueError, match=message):
            summarise({"here": m})


def test_gamma_and_beta_are_summarised_times_their_gate_as_they_are_applied():
    gamma, beta, gate = torch.randn(3, 4, 5).unbind()
    gated = summarise({"a": tf.Modulation(gamma, beta, gate)}, "aabb")
    wide = tf.Modulation(gate.double() * gamma.double(), gate.double() * beta.double())
    assert gated == summarise({"a": wide}, "aabb")
    assert summarise({"a": tf.Modulation(gamma, beta, torch.zeros(4, 5))})["a"].closed_always == 5
    gate[2, 3] = torch.inf
    with pytest.raises(ValueError, match="site 'a', got NaN or infinity in 1 of 20 values of gate"):
        summarise({"a": tf.Modulation(gamma, beta, gate)})


def test_products_with_a_gate_that_half_precision_cannot_hold_are_summarised():
    large = torch.full((3, 5), 300.0, dtype=torch.float16)
    found = summarise({"a": tf.Modulation(large, large, large)})["a"]
    assert found == summarise({"a": tf.Modulation(large.double(), large.double(), large.double())})["a"]
