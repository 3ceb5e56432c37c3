"""What folding leaves as it was: the conditioned network, its other copies, and what an earlier fold kept."""

import copy

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import torchfilm as tf
from catalogue import randomise


def conditioned(model: nn.Module, sites: str, **options) -> nn.Module:
    """Condition a network of five channels in evaluation on a vector, with a generator that was trained."""
    around = {"dim": -1, "features": 5} | options
    model = tf.condition(model.eval(), tf.find(model, sites, **around), tf.Vector(7))
    randomise(tf.conditioning(model))
    return model


def z() -> Tensor:
    return torch.randn(1, 7)


def normed() -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(5, 5))


def test_a_parametrized_layer_inside_of_a_site_stays_one_in_the_original_and_its_copies():
    layer, x, cond = normed(), torch.randn(2, 5), z()
    model = conditioned(nn.Sequential(nn.Sequential(copy.deepcopy(layer), copy.deepcopy(layer))), "0")
    average, expected, alone = copy.deepcopy(model), model(x, cond=cond), layer(x)
    plain, _ = tf.fold(model, cond=cond)
    torch.testing.assert_close(plain(x), expected)
    assert [type(layer) for layer in plain[0]] == [nn.Linear, nn.Linear]
    assert torch.equal(model(x, cond=cond), expected)
    assert torch.equal(average(x, cond=cond), expected)
    assert torch.equal(layer(x), alone)
