"""Intervals: as wide as loops over pairs of rows, tables and other formulas say."""

import itertools
import math

import numpy as np
import pytest

from torchfilm.counterfactual import others
from torchfilm.intervals import NORMAL, Sampled, student, wilson

TABLE = {
    1: 12.7062,
    2: 4.3027,
    3: 3.1824,
    4: 2.7764,
    5: 2.5706,
    7: 2.3646,
    10: 2.2281,
    30: 2.0423,
    120: 1.9799,
}


def first(means: np.ndarray) -> np.ndarray:
    return means[..., 0]


def bootstrap(resamples: int = 1000) -> tuple[np.random.Generator, int]:
    return np.random.default_rng(0), resamples


def test_students_quantile_is_that_of_the_tables():
    assert {degrees: student(degrees) for degrees in TABLE} == pytest.approx(TABLE, rel=2e-3)
    assert student(0) == math.inf


@pytest.mark.parametrize("groups", [13, 5])
def test_rows_that_share_a_unit_count_as_a_loop_over_pairs_does(groups: int):
    rng = np.random.default_rng(1)
    units, givers = rng.integers(0, groups, (2, 13))
    units[:groups] = np.arange(groups)
    e, both = rng.normal(size=13), list(zip(units, givers, strict=True))
    expected = sum(
        e[i] * e[j] for i, j in itertools.product(range(13), repeat=2) if set(both[i]) & set(both[j])
    )
    assert Sampled(units, givers)._shared(e) == pytest.approx(expected)


def test_of_independent_rows_the_interval_is_students():
    values = np.random.default_rng(3).normal(size=9)
    found = Sampled(np.arange(9), np.arange(9)).level(values, bootstrap(20_000))
    half = 2.3060 * values.std(ddof=1) / 3
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.05)
    assert found.low < found.value < found.high


def test_a_ratio_is_linearised():
    rng = np.random.default_rng(4)
    columns = rng.uniform(1, 2, (400, 2))
    units = np.repeat(np.arange(200), 2)
    alone, paired = (
        Sampled(one, one).estimate(
            lambda means: np.sqrt(means[..., 0] / means[..., 1]),
            np.repeat(columns[::2], 2, axis=0),
            bootstrap(),
        )
        for one in (np.arange(400), units)
    )
    assert (paired.high - paired.low) / (alone.high - alone.low) == pytest.approx(2**0.5, rel=0.1)


@pytest.mark.parametrize("size", [2, 4, 50])
def test_a_mean_over_exchanged_samples_is_covered(size: int):
    hits, own = 0, np.arange(100)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        z = rng.normal(size=(100, 4))
        giver = np.concatenate([start + others(range(size), rng) for start in range(0, 100, size)])
        change = np.square(z - z[giver]).mean(axis=1)
        found = Sampled(own, giver).change(0 * change, change, (rng, 200))
        hits += found.low <= 2 <= found.high
    assert hits >= 0.92 * 300


@pytest.mark.parametrize(
    ("n", "right", "swapped"), [(8, 0.9, 0.5), (8, 0.99, 0.9), (32, 0.99, 0.9), (32, 0.5, 0.3)]
)
def test_successes_are_covered_though_they_are_few_or_nearly_all_alike(n: int, right: float, swapped: float):
    hits = np.zeros(2)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        before, after = (rng.random(n) < right).astype(float), (rng.random(n) < swapped).astype(float)
        sampled = Sampled(np.arange(n), others(range(n), rng))
        level = sampled.level(before, (rng, 40), (0, 1))
        change = sampled.change(before, after, (rng, 40), (-1, 1))
        hits += [level.low <= right <= level.high, change.low <= swapped - right <= change.high]
    assert hits.min() >= 0.9 * 300


def test_wilsons_interval_is_that_of_the_tables():
    own = np.arange(10)
    found = Sampled(own, own).level(np.array([1.0] * 9 + [0.0]), bootstrap())
    assert (found.value, found.low, found.high) == pytest.approx((0.9, 0.5958, 0.9821), abs=1e-3)


def test_one_unit_has_no_interval():
    values = np.random.default_rng(0).normal(size=5)
    one = Sampled(np.zeros(5, dtype=int), np.zeros(5, dtype=int))
    assert (one.level(values, bootstrap()).low, one.level(values, bootstrap()).high) == (-math.inf, math.inf)
    assert (
        one.level(np.ones(5), bootstrap(), (0, 1)).low,
        one.change(np.ones(5), np.zeros(5), bootstrap()).high,
    ) == (0, 1)


def test_ten_right_frames_of_two_episodes_are_two():
    two = np.repeat([0, 1], 5)
    found = Sampled(two, two).level(np.ones(10), bootstrap(), (0, 1))
    assert found.low < 0.05


def test_frames_of_an_episode_count_by_how_alike_they_are():
    frames = np.array([1.0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 0, 1])  # two of each of six episodes
    episodes = np.repeat(np.arange(6), 2)
    found = Sampled(episodes, episodes).level(frames, bootstrap())
    alike, known = 30 / 24, 1 - 6 * 2**2 / 12**2  # the squares of the episodes' sums, of the frames
    n = 12 * known / alike * (NORMAL / student(5)) ** 2
    assert (found.low, found.high) == pytest.approx(wilson(2 / 3, n), rel=1e-4)


def test_what_is_without_bound_has_no_narrower_interval():
    own = np.arange(7)
    endless = Sampled(own, own).estimate(
        lambda means: np.full(means.shape[:-1], math.inf), np.ones((7, 1)), bootstrap(40), (0, math.inf)
    )
    assert (endless.value, endless.low, endless.high) == (math.inf, math.inf, math.inf)


def test_of_successes_that_all_change_in_pairs_each_pair_is_one():
    hits, own = 0, np.arange(20)
    for seed in range(300):
        after = np.repeat(np.random.default_rng(seed).random(10) < 0.9, 2).astype(float)
        found = Sampled(own, own ^ 1).change(np.ones(20), after, bootstrap(40), (-1, 1))
        hits += found.low <= -0.1 <= found.high
    assert hits >= 0.92 * 300


def test_of_samples_that_swap_in_pairs_each_pair_is_one():
    rng, own = np.random.default_rng(0), np.arange(8)
    change = np.repeat(rng.normal(size=4), 2)
    pairs = Sampled(own, own ^ 1).change(0 * change, change, bootstrap())
    rows = Sampled(own, own).change(0 * change, change, bootstrap())
    wider = (pairs.high - pairs.low) / (rows.high - rows.low)
    assert wider == pytest.approx(student(3) / student(7) * (2 * (7 / 8) / (3 / 4)) ** 0.5, rel=0.01)
