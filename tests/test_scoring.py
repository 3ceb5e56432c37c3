"""Intervals of scores: their coverage, what is known of them in closed form, and what is refused."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from torchfilm.comparison import compare
from torchfilm.conditions import Vector
from torchfilm.injection import condition
from torchfilm.scoring import Scored, scored_by, scored_of


def network() -> nn.Module:
    return condition(nn.Sequential(nn.Linear(3, 5)), "0", Vector(7))


def batch() -> tuple[Tensor, Tensor]:
    return torch.randn(2, 3), torch.randn(2, 7)


def draw(rng: np.random.Generator, seeds: int, samples: int, *, p: float, between: float) -> np.ndarray:
    chance = p + rng.normal(0, between, (seeds, 1))
    return (rng.random((seeds, samples)) < chance.clip(0, 1)).astype(float)


@pytest.mark.parametrize(
    ("seeds", "samples", "p", "between"),
    [
        (2, 200, 0.7, 0.05),
        (3, 200, 0.9, 0.02),
        (5, 200, 0.7, 0),
        (1, 8, 0.9, 0),
        (1, 32, 0.95, 0),
        (2, 50, 0.95, 0),
    ],
)
def test_nineteen_intervals_of_twenty_have_the_true_score(seeds: int, samples: int, p: float, between: float):
    rng, hits, sets = np.random.default_rng(0), 0, 400
    for _ in range(sets):
        found = scored_of(draw(rng, seeds, samples, p=p, between=between))
        hits += found.low <= p <= found.high
    assert 0.92 <= hits / sets <= 0.998


@pytest.mark.parametrize("seeds", [1, 3])
def test_nineteen_intervals_of_twenty_have_the_true_gain(seeds: int):
    rng, hits, sets = np.random.default_rng(0), 0, 400
    for _ in range(sets):
        hard = rng.normal(size=50)  # samples that are hard for both networks
        one, two = (
            hard + rng.normal(0, 0.1, (seeds, 1)) * (seeds > 1) + rng.normal(size=(seeds, 50)) for _ in "ab"
        )
        found = scored_of(one, two)
        hits += found.low <= 0 <= found.high
    assert hits / sets >= 0.92


@pytest.mark.parametrize(
    ("seeds", "quantile"), [(2, 12.7062), (3, 4.3027), (4, 3.1824), (6, 2.5706), (31, 2.0423)]
)
def test_numbers_of_several_seeds_have_students_interval(seeds: int, quantile: float):
    numbers = np.arange(1.0, seeds + 1)[:, None]
    found = scored_of(numbers)
    half = quantile * numbers.std(ddof=1) / seeds**0.5
    assert (found.value - found.low, found.high - found.value) == pytest.approx((half, half), rel=2e-3)


def test_numbers_of_two_samples_have_students_interval():
    found = scored_of(np.array([[1.0, 4.0]]))
    assert (found.value, found.high - found.value) == pytest.approx((2.5, 12.7062 * 1.5), rel=1e-4)
    found = scored_of(np.array([[1.0, 4.0], [2.0, 3.0]]))  # a quarter is by what seeds make of each sample
    assert (found.value, found.high - found.value) == pytest.approx((2.5, 12.7062 * 0.75**0.5), rel=1e-4)


def test_samples_that_are_right_or_wrong_have_wilsons_interval():
    found = scored_of(np.ones((1, 20)))
    assert (found.value, found.low, found.high) == pytest.approx((1, 0.8389, 1), abs=1e-4)
    found = scored_of(np.array([[1.0, 1, 1, 0, 0, 0, 0, 0]]))
    assert (found.value, found.low, found.high) == pytest.approx((0.375, 0.1368, 0.6943), abs=1e-4)
    assert scored_of(np.ones((3, 20))).low == pytest.approx(0.8389, abs=1e-4), (
        "seeds that agree are no samples"
    )
    gain = scored_of(np.ones((1, 20)), np.ones((1, 20)))
    assert gain.low < -0.05 < gain.value == 0 < 0.05 < gain.high


@pytest.mark.parametrize("n", [1, 2, 20])
def test_scores_and_gains_of_zeros_and_ones_stay_within_what_is_possible(n: int):
    assert scored_of(np.ones((1, n)), np.zeros((1, n))).high == 1
    assert scored_of(np.zeros((1, n)), np.ones((1, n))).low == -1
    found = scored_of(np.array([[1.0], [0.0], [1.0]]).repeat(n, axis=1))
    assert 0 <= found.low < 2 / 3 < found.high <= 1


def test_seeds_that_err_on_other_samples_have_the_interval_of_all_of_them():
    scores = np.ones((2, 50))
    scores[0, 3] = scores[1, 7] = 0
    found, one = scored_of(scores), scored_of(scores.reshape(1, 100))
    assert (found.low, found.high) == pytest.approx((one.low, one.high))


def test_seeds_that_agree_on_most_samples_count_for_more_than_one_and_for_less_than_all_of_them():
    found = scored_of(np.array([[1.0, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 1, 0, 0, 0]]))
    half = 0.97998 / (15 + 3.84146) ** 0.5  # Wilson's of a half of 15: the variance over samples is 1 / 56
    assert (found.low, found.high) == pytest.approx((0.5 - half, 0.5 + half), abs=1e-5)


def test_a_gain_of_numbers_over_zeros_and_ones_is_not_held_within_one():
    found = scored_of(np.array([[0.0, 1.0, 1.0]]), np.array([[5.0, 7.0, 9.0]]))
    assert found.low < found.value < found.high < -1


def test_seeds_are_scored_apart_and_gains_are_on_the_same_samples():
    samples = torch.arange(20.0) % 2

    def score(model: nn.Module) -> Tensor:
        return samples + model.film.bonus

    given: dict[str, list[nn.Module]] = {}
    for name, bonuses in {"film": (0.0, 0.1), "bias": (0.3, 0.5)}.items():
        given[name] = [network() for _ in bonuses]
        for model, bonus in zip(given[name], bonuses, strict=True):
            model.film.bonus = bonus
    found = compare(given, batch(), rounds=1, score=score)
    assert found["unconditioned"].score is None
    film, bias, gain = found["film"].score, found["bias"].score, found["bias"].gain
    assert (film.value, film.by_seed) == (pytest.approx(0.55), pytest.approx((0.5, 0.6)))
    assert (bias.value, gain.value, gain.by_seed) == (
        pytest.approx(0.9),
        pytest.approx(0.35),
        pytest.approx((0.25, 0.45)),
    )
    t, coins = 12.7062, 2.0930 * (0.25 / 19) ** 0.5  # Student's of two seeds, and of 20 samples of a coin
    assert film.high - film.value == pytest.approx(math.hypot(t * 0.05, coins), rel=1e-4)
    assert gain.high - gain.value == pytest.approx(t * math.hypot(0.05, 0.1), rel=1e-4)  # the coins cancel
    assert found["film"].gain is None
    assert str(film).endswith(", 2 seeds")


def test_a_single_number_of_a_single_seed_has_no_interval():
    found = compare({"film": network()}, batch(), rounds=1, score=lambda model: 0.25)
    assert found["film"].score == Scored(0.25, 0.25, 0.25, (0.25,))
    assert str(found["film"].score) == "0.250"


def test_a_score_may_be_a_tensor_that_numpy_does_not_read():
    scores = torch.tensor([0.25, 0.5], dtype=torch.bfloat16, requires_grad=True)
    assert scored_by({"film": [network()]}, lambda model: scores)["film"].tolist() == [[0.25, 0.5]]


def test_scores_of_other_samples_and_numbers_that_are_none_are_refused():
    with pytest.raises(ValueError, match=r"for each seed of 'film', got \[\(0,\)\]"):
        scored_by({"film": [network()]}, lambda model: [])
    counts = iter([3, 4])
    with pytest.raises(ValueError, match=r"of the same samples for all networks, got {'film': 3, 'bias': 4}"):
        scored_by({"film": [network()], "bias": [network()]}, lambda model: [1.0] * next(counts))
    counts = iter([3, 4])
    with pytest.raises(ValueError, match=r"at least one, for each seed of 'film', got \[\(3,\), \(4,\)\]"):
        scored_by({"film": [network(), network()]}, lambda model: [1.0] * next(counts))
    with pytest.raises(ValueError, match=r"finite scores, got NaN or infinity in 1 of 2 of 'film'"):
        compare({"film": network()}, batch(), rounds=1, score=lambda model: [0.5, math.nan])
