"""Each baseline learns, sees what it should see, and nothing else."""

from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as functional

from torchfilm.systems.visual_reasoning.baselines import Baseline, BaselineConfig, Kind

KINDS = get_args(Kind)
SMALL = BaselineConfig(
    "lstm",
    vocabulary=13,
    word_dim=3,
    encoder_width=5,
    input_channels=4,
    input_height=4,
    input_width=6,
    channels=7,
    attention=8,
    pair_width=9,
    hidden=10,
    answers=11,
)
TOKENS = torch.tensor([[1, 5, 6, 2], [1, 7, 2, 0], [1, 8, 9, 2]])
LENGTHS = torch.tensor([4, 3, 4])


def network(kind: Kind, **changes) -> Baseline:
    torch.manual_seed(0)
    return Baseline(replace(SMALL, kind=kind, **changes)).double().eval()


def maps(scenes: int = 3) -> torch.Tensor:
    return torch.rand(scenes, 4, 4, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", KINDS)
def test_every_baseline_learns_three_answers(kind):
    model = network(kind).train()
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(12):
        value = functional.cross_entropy(model(maps(), TOKENS, LENGTHS), torch.tensor([3, 1, 7]))
        optimiser.zero_grad()
        value.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimiser.step()
        losses.append(value.item())
    assert losses[-1] < 0.6 * losses[0]


@pytest.mark.parametrize("kind", KINDS)
def test_all_but_the_blind_one_see_the_picture_and_all_read_the_question(kind):
    model = network(kind)
    logits = model(maps(), TOKENS, LENGTHS)
    assert torch.equal(model(maps().flip(3), TOKENS, LENGTHS), logits) == (kind == "lstm")
    assert not torch.equal(model(maps(), TOKENS.flip(0), LENGTHS), logits)


@pytest.mark.parametrize("kind", KINDS)
def test_one_scene_for_many_questions_equals_the_scene_repeated(kind):
    model, rows = network(kind), torch.tensor([1, 0, 1])
    torch.testing.assert_close(model(maps(2), TOKENS, LENGTHS, rows), model(maps(2)[rows], TOKENS, LENGTHS))


@pytest.mark.parametrize("kind", KINDS)
def test_pixels_come_in_through_the_pixel_stem(kind):
    model = network(kind, input="pixels", input_channels=3, input_height=64, input_width=96)
    assert model(torch.rand(3, 3, 64, 96).double(), TOKENS, LENGTHS).shape == (3, 11)


def test_the_relation_network_is_the_mean_over_all_pairs_of_cells():
    model = network("relation_network", pair_stride=1)
    join, z, seen = model.join, torch.rand(2, 5).double(), torch.rand(2, 7, 4, 6).double()
    x = torch.linspace(-1, 1, 6).expand(4, 6)
    y = torch.linspace(-1, 1, 4)[:, None].expand(4, 6)
    total = torch.zeros(9, dtype=torch.float64)
    cells = torch.cat([seen[1], torch.stack([x, y]).double()]).flatten(1).t()
    for a in cells:
        for b in cells:
            pair = join.first.weight @ a + join.second.weight @ b + join.ask(z[1])
            for layer in join.layers:
                pair = layer(pair.clamp(min=0))
            total += pair.clamp(min=0)
    torch.testing.assert_close(join(z, seen)[1], total / 24**2)


def test_one_look_of_stacked_attention_is_a_weighted_sum_of_cells():
    model = network("stacked_attention", hops=1)
    join, z, seen = model.join, torch.rand(2, 5).double(), torch.rand(2, 7, 4, 6).double()
    v = torch.stack([join.see.weight[:, :, 0, 0] @ cell + join.see.bias for cell in seen[1].flatten(1).t()])
    u = join.ask(z[1])
    scores = torch.stack([join.score[0](torch.tanh(join.cells[0](cell) + join.query[0](u))) for cell in v])
    weights = scores.exp() / scores.exp().sum()
    torch.testing.assert_close(join(z, seen)[1], u + (weights * v).sum(0))


def test_hops_are_as_many_as_configured():
    assert len(network("stacked_attention", hops=3).join.score) == 3
