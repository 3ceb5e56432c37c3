"""A network with a wider classifier goes on where the smaller one was."""

from dataclasses import replace

import pytest
import torch

from torchfilm.systems.visual_reasoning.growth import can_grow, grown
from torchfilm.systems.visual_reasoning.model import VisualReasoner
from torchfilm.systems.visual_reasoning.recipe import RECIPES, TINY

LARGE = replace(TINY, projection=24, hidden=20, vocabulary=5, answers=3)


@pytest.mark.parametrize("pooling", ["max", "max_and_mean"])
def test_a_grown_network_answers_as_the_small_one_and_all_that_is_new_learns(pooling):
    torch.manual_seed(0)
    small = VisualReasoner(replace(TINY, pooling=pooling))
    with torch.no_grad():
        for value in small.state_dict().values():
            if value.is_floating_point():
                value.add_(0.1 * torch.rand_like(value))
    large = grown(small, replace(LARGE, pooling=pooling))
    assert (large.config.projection, large.config.hidden, large.config.answers) == (24, 20, TINY.answers)
    images = torch.rand(3, TINY.input_channels, TINY.input_height, TINY.input_width)
    questions, lengths = torch.randint(1, 90, (3, 6)), torch.tensor([6, 4, 2])
    small.eval()
    large.eval()
    torch.testing.assert_close(large(images, questions, lengths), small(images, questions, lengths))
    large.train()
    large(images, questions, lengths).square().sum().backward()
    new = large.classifier.answer.weight.grad
    assert new is not None
    assert (new[:, 16:].abs().sum(0) > 0).any()


def test_only_a_wider_classifier_is_growth():
    assert can_grow(RECIPES["laptop"].config, RECIPES["laptop_large"].config)
    assert not can_grow(RECIPES["laptop_large"].config, RECIPES["laptop"].config)
    assert not can_grow(TINY, TINY)
    assert not can_grow(TINY, RECIPES["laptop_lstm"].config)
    with pytest.raises(ValueError, match="expected the network's config with a wider projection or hidden"):
        grown(VisualReasoner(TINY), replace(LARGE, blocks=3))
