"""The intervals and verdicts of `heard` are right as often as they say, by 300 data sets each."""

import json
from collections.abc import Callable

import numpy as np
import pytest
import torch

from torchfilm.heard import heard


def shares_covered(model: Callable, n: int, truths: tuple[float, float]) -> list[float]:
    """How many of 300 intervals of a swap's loss, squared, and of its output have the truth in them."""
    hits = np.zeros(2)
    for seed in range(300):
        torch.manual_seed(seed)
        x, z = torch.randn(2, n, 4)
        batch = (x, z, model(x, z))
        found = heard(model, [batch], loss=lambda y, t: (y - t).square().mean(1), seed=seed, resamples=200)
        swap = found.effects["swap"]
        pairs = zip((swap.loss, swap.output), truths, strict=True)
        hits += [one.low <= truth <= one.high for one, truth in pairs]
    return (hits / 300).tolist()


def test_the_intervals_cover_the_truth_though_each_condition_is_in_two_samples():
    assert min(shares_covered(lambda x, cond: cond, 200, (2, 1))) >= 0.92
    assert min(shares_covered(lambda x, cond: x + 0.3 * cond, 200, (0.18, (0.09 / 1.09) ** 0.5))) >= 0.92


@pytest.mark.parametrize(("n", "most"), [(2, 0.05), (8, 0.04), (32, 0.04)])
def test_a_target_that_has_nothing_to_do_with_the_condition_is_seldom_heard(n: int, most: float):
    false = 0
    for seed in range(300):
        torch.manual_seed(seed)
        x, z, target = torch.randn(3, n, 1)
        found = heard(
            lambda x, cond: x + cond,
            [(x, z, target)],
            loss=lambda y, t: (y - t).square(),
            seed=seed,
            resamples=200,
        )
        false += found.verdict == "heard"
    assert false <= most * 300


def test_the_output_is_covered_in_batches_of_two_by_an_interval_no_wider_than_need_be():
    found = []
    for seed in range(200):
        torch.manual_seed(seed)
        x, z = torch.randn(2, 60, 2)
        batches = list(zip(x.split(2), z.split(2), strict=True))
        effects = heard(lambda x, cond: x + cond, batches, seed=seed, resamples=80).effects
        outputs = [effects[change].output for change in ("swap", "blank")]
        found.append([(one.value, one.low, one.high) for one in outputs])
    value, low, high = np.moveaxis(np.array(found), -1, 0)
    truth = np.sqrt([0.5, 0.25])
    assert ((low <= truth) & (truth <= high)).mean(axis=0).min() >= 0.88
    assert (np.median(high - low, axis=0) <= 1.3 * 3.92 * value.std(axis=0)).all()


@pytest.mark.parametrize("parts", [1, 2])
def test_a_chance_that_is_next_to_nothing_makes_the_interval_no_narrower(parts: int):
    outside = np.random.default_rng(0)
    x, z = torch.randn(2, 60, 1)
    swap = heard(
        lambda x, cond: (x + cond + 1e-6 * torch.from_numpy(outside.normal(size=x.shape)),) * parts,
        list(zip(x.split(6), z.split(6), strict=True)),
        resamples=4000,
    ).effects["swap"]
    output, beyond = swap.output, swap.beyond.output
    assert beyond.value == pytest.approx(output.value, rel=1e-4)
    assert beyond.high - beyond.low == pytest.approx(output.high - output.low, rel=0.05)


def test_samples_of_one_group_are_resampled_together_in_every_form_of_it():
    x, z = torch.randn(30, 1), torch.randn(30, 1)
    number = torch.arange(30) // 5
    found = [
        heard(lambda x, cond: x + cond, [(x, z, x[:, 0], group)], loss=lambda y, t: (y[:, 0] - t).square())
        for group in (number, number.numpy(), number.tolist(), [f"scene {one}" for one in number])
    ]
    assert found[0] == found[1] == found[2] == found[3]
    assert found[0].effects["swap"].output.n == 30
    assert found[0].notes[0].startswith("n: 6 independent samples are few")
    assert heard(lambda x, cond: cond, [(x, z, None, number), (x, z)]).notes == ()


def test_a_group_is_none_of_the_samples_that_have_no_group():
    x, z = torch.randn(2, 30, 1)
    found = heard(lambda x, cond: cond, [(x[:3], z[:3]), (x, z, None, torch.arange(30) // 5)])
    assert found.notes[0].startswith("n: 9 independent samples are few")


@pytest.mark.parametrize("group", [7, torch.tensor(7), np.array("scene7"), "scene7", "x" * 30])
def test_a_batch_may_be_one_group(group: object):
    x, z = torch.randn(2, 30, 1)
    one, two = [(x, z, x * z, group)], [(x, z, x * z, group), (x, z[:1].expand(30, 1), x, "other")]
    for batches in (one, two):
        found = heard(lambda x, cond: x * cond, batches)
        assert found.notes[0].startswith("n: the swapped samples are all of one group")
        assert found.verdict == "ignored"
        assert "(one group, or one call whose chance all samples share, has no interval)" in found.words
        assert (
            json.loads(json.dumps(found.to_json(), allow_nan=False))["effects"]["swap"]["output"]["low"] == 0
        )
    assert str(found.effects["repeat"].output) == "0.000 [0.000, 0.000]"
    assert found.to_json()["effects"]["swap"]["output"]["high"] is None
    assert "n: 2 independent" in str(heard(lambda x, cond: x * cond, [*one, (x, z, None, 8)]))


def test_intervals_cover_the_truth_where_samples_come_in_groups():
    hits = np.zeros(2)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        level, change = (rng.normal(size=(2, 20, 1)) + rng.normal(size=(2, 20, 5))).reshape(2, 100)
        x, z = torch.tensor(np.stack([level, level + 1 + change], 1)), torch.arange(100)
        found = heard(
            lambda x, cond: torch.where(cond == torch.arange(100), x[:, 0], x[:, 1]),
            [(x, z, z, z // 5)],
            loss=lambda y, t: y,
            seed=seed,
            resamples=200,
        )
        swap = found.effects["swap"].loss
        hits += [found.loss.low <= 0 <= found.loss.high, swap.low <= 1 <= swap.high]
    assert hits.min() >= 0.92 * 300


def test_the_change_of_a_success_is_covered_though_hardly_any_of_few_samples_change():
    hits, own = np.zeros(2), torch.arange(8)
    for seed in range(300):
        rng = np.random.default_rng(seed)
        x = torch.tensor(np.stack([rng.random(8) < 0.99, rng.random(8) < 0.9], axis=1)).double()
        found = heard(
            lambda x, cond: torch.where(cond == own, x[:, 0], x[:, 1]),
            [(x, own, own)],
            success=lambda y, t: y,
            seed=seed,
            resamples=40,
        )
        assert found.success is not None
        swap = found.effects["swap"].success
        assert swap is not None
        hits += [found.success.low <= 0.99 <= found.success.high, swap.low <= -0.09 <= swap.high]
    assert hits.min() >= 0.88 * 300
