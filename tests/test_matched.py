"""Fusions of a given number of parameters: what is reached, and what is refused."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

import torchfilm as tf
from torchfilm.fusion import FUSIONS, Matched, resolve


@pytest.mark.parametrize("name", FUSIONS)
@pytest.mark.parametrize("target", [2_000, 30_000])
def test_a_match_reaches_the_target_within_its_tolerance_and_says_so(name: str, target: int):
    sites, fusion = {"a": 13, "b.c": 29}, resolve(name, match_params=target)
    assert isinstance(fusion, Matched)
    match, generator = fusion.choose(41, sites), fusion.build(41, sites)
    reached = sum(parameter.numel() for parameter in generator.parameters())
    assert match.parameters == reached
    assert abs(reached - target) <= 0.05 * target
    assert f"{reached:,} parameters for {target:,}" in str(match)
    x = torch.randn(2, 13, 5)
    assert torch.equal(fusion.apply(x, generator(torch.randn(2, 41))["a"], 1, "a"), x)


def test_no_other_width_is_nearer_to_the_target():
    sites, fusion = {"a": 13, "b.c": 29}, Matched("low_rank", 5_000)
    match = fusion.choose(41, sites)
    distances = {
        width: abs(
            sum(p.numel() for p in resolve("low_rank", width=width).build(41, sites).parameters()) - 5_000
        )
        for width in range(1, 64)
    }
    assert match.width == min(distances, key=lambda width: distances[width])


def test_a_conditioned_model_is_a_target():
    model = nn.Linear(3, 3)
    model.film = nn.Module()
    model.film.generator = resolve("film").build(41, {"a": 13})
    assert Matched("low_rank", model).choose(41, {"a": 13}).target == 26 * 42
    with pytest.raises(ValueError, match=r"expected a number or a conditioned model, got Linear without"):
        Matched("low_rank", nn.Linear(3, 3))


@pytest.mark.parametrize(
    "wrap", [partial(torch.compile, backend="eager"), AveragedModel], ids=["compiled", "averaged"]
)
def test_a_wrapped_model_is_a_target(wrap):
    model = wrap(tf.condition(nn.Sequential(nn.Linear(3, 13)), "0", tf.Vector(41)))
    assert Matched("low_rank", model).target == 26 * 42


@pytest.mark.plain
@pytest.mark.parametrize("target", [np.int64(5_000), 5e3])
def test_any_kind_of_number_is_a_target(target):
    assert Matched("low_rank", target).choose(41, {"a": 13}).target == 5_000


@pytest.mark.plain
@pytest.mark.parametrize("target", [0, -5, float("nan"), float("inf"), "many"])
def test_a_target_that_is_no_number_of_parameters_is_refused(target):
    with pytest.raises(ValueError, match=rf"a number of parameters from 1 on, .* got {target!r}.\nGive"):
        Matched("low_rank", target)


def test_a_tabulated_model_has_no_parameters_to_match():
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7))
    tf.tabulate(model, torch.randn(4, 7))
    with pytest.raises(ValueError, match=r"\(a tabulated one has none\), got 0"):
        Matched("concat", model)


def test_a_table_is_not_exchanged_for_another_head():
    with pytest.raises(ValueError, match=r"expected a head that reads vectors.*got head='table'"):
        resolve("film", head="table", match_params=500).build(10, {"a": 8})


def test_a_match_that_no_width_reaches_says_what_is_nearest():
    with pytest.raises(
        ValueError, match=r"expected 40 parameters within 5%.*\n  LowRank: width 1, \d+ param"
    ):
        Matched("low_rank", 40).build(41, {"a": 13})


def test_a_matched_fusion_folds_where_its_own_does():
    assert [hasattr(Matched(name, 2_000), "fold") for name in ("film", "cross_attention")] == [True, False]


class Plain:
    """A fusion that has no width."""

    def build(self, cond_dim: int, sites: dict[str, int]) -> nn.Module:
        return nn.Linear(cond_dim, sum(sites.values()))

    def apply(self, x: torch.Tensor, value: object, dim: int, site: str) -> torch.Tensor:
        return x


class Fixed(Plain):
    """A fusion whose width is no width."""

    def sized(self, width: int) -> "Fixed":
        return self


class Lazy(Plain):
    """A fusion whose generator has no sizes before it runs."""

    def build(self, cond_dim: int, sites: dict[str, int]) -> nn.Module:
        return nn.LazyLinear(sum(sites.values()))

    def sized(self, width: int) -> "Lazy":
        return self


def test_a_fusion_that_does_not_grow_with_its_width_matches_nothing():
    with pytest.raises(
        ValueError, match=r"expected 100 parameters within 5%.*\n  Fixed: width \d+, 24 param"
    ):
        Matched(Fixed(), 100).build(7, {"a": 3})


@pytest.mark.plain
def test_a_fusion_without_sizes_matches_nothing():
    with pytest.raises(ValueError, match=r"LazyLinear: expected parameters with sizes, got 'weight'"):
        Matched(Lazy(), 100).build(7, {"a": 3})
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7), generator=nn.LazyLinear(5))
    with pytest.raises(ValueError, match=r"LazyLinear: expected parameters with sizes, got 'weight'"):
        Matched("film", model)


def test_a_fusion_that_cannot_be_sized_is_refused():
    with pytest.raises(ValueError, match=r"expected a fusion with sized\(width\), got Plain"):
        resolve(Plain(), match_params=100)


def test_networks_are_conditioned_with_as_many_parameters_as_another_has():
    film = tf.condition(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)), r"[01]", tf.Vector(41))
    other = tf.condition(
        nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 5)),
        r"[01]",
        tf.Vector(41),
        fusion="scale",
        match_params=film,
    )
    counts = [sum(p.numel() for p in model.film.generator.parameters()) for model in (film, other)]
    assert counts[0] == 16 * 42
    assert abs(counts[1] - counts[0]) <= 0.05 * counts[0]
