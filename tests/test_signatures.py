"""Signatures of networks whose annotations name what exists for type checkers only."""

from __future__ import annotations

import sys

import pytest
import torch

import torchfilm as tf
from torchfilm.signatures import signature_of

OTHERS = """
class Picture:
    ...

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 5, 1)

    def forward(self, x: {name}, twice: {name} = None) -> {name}:
        return self.conv(x)

class Encoder(nn.Module):
    dim = 7

    def forward(self, z: {name}, mask: {name}) -> {name}:
        return z * mask

del Picture
"""

# Before Python 3.14 such a name has to stand in quotes.
lazy = pytest.mark.skipif(sys.version_info < (3, 14), reason="annotations are evaluated at once")
names = pytest.mark.parametrize("name", ["'Picture'", pytest.param("Picture", marks=lazy)])


def written(name: str, class_name: str) -> torch.nn.Module:
    found = {"nn": torch.nn, "__name__": __name__}
    exec(compile(OTHERS.format(name=name), __file__, "exec", dont_inherit=True), found)
    return found[class_name]()


@names
def test_a_name_that_does_not_exist_stays_a_name(name: str):
    parameters = signature_of(written(name, "Block").forward).parameters
    assert list(parameters) == ["x", "twice"]
    assert parameters["twice"].default is None
    assert "Picture" in str(parameters["x"].annotation)


@names
def test_a_network_with_such_names_is_conditioned_and_folded(name: str):
    x, z = torch.randn(2, 3, 4, 4), torch.randn(1, 7)
    net = tf.condition(written(name, "Block"), "conv", tf.Vector(7), init="default")
    y = net(x, cond=z)
    plain, _ = tf.fold(net, cond=z)
    torch.testing.assert_close(plain(x), y)


@names
def test_an_encoder_with_such_names_may_be_missing(name: str):
    z, mask = torch.randn(2, 7), torch.ones(2, 7)
    assert tf.Maybe(written(name, "Encoder"))((z, mask)).equal(z)


@names
def test_a_batch_that_does_not_fit_a_network_with_such_names_is_said(name: str):
    net = written(name, "Block")
    with pytest.raises(ValueError, match=r"compare: expected a batch \(\*inputs, cond\) that fits 'own'"):
        tf.compare({"own": net}, (*torch.randn(4, 2, 3, 4, 4), torch.randn(2, 7)), rounds=1)
