"""A layer over features and a tiled condition is the layer over the features with a shift."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

import oracles
import torchfilm as tf


def tiled(x: Tensor, z: Tensor) -> Tensor:
    """[x, z] along axis 1, the condition at every position."""
    positions = x.shape[2:]
    maps = z.reshape(*z.shape, *[1] * len(positions)).expand(*z.shape, *positions)
    return torch.cat([x, maps], dim=1)


CONVS = [
    nn.Conv1d(3 + 11, 5, 3),
    nn.Conv2d(3 + 11, 5, 1),
    nn.Conv2d(3 + 11, 5, 1, padding="same", bias=False),
    nn.Conv2d(3 + 11, 5, 3, stride=2, dilation=2),
    nn.Conv2d(3 + 11, 5, 3, padding=1, padding_mode="replicate"),
    nn.Conv3d(3 + 11, 5, 2, padding="valid"),
]


@pytest.mark.parametrize("conv", CONVS, ids=str)
def test_a_convolution_over_a_tiled_condition_is_a_shift(conv: nn.Module):
    conv = conv.double()
    x = torch.randn(2, 3, *[7] * (conv.weight.ndim - 2)).double()
    z = torch.randn(2, 11).double()
    shifted = tf.concat_as_shift(conv, 3)
    torch.testing.assert_close(shifted(x, z), conv(tiled(x, z)))
    assert shifted(x[:0], z[:0]).shape == conv(tiled(x, z))[:0].shape


def test_a_convolution_takes_one_sample_without_a_batch_too():
    conv, x, z = nn.Conv2d(3 + 11, 5, 1).double(), torch.randn(3, 7, 2).double(), torch.randn(11).double()
    torch.testing.assert_close(tf.concat_as_shift(conv, 3)(x, z), conv(tiled(x[None], z[None])[0]))


def test_a_linear_layer_over_a_condition_at_each_token_is_a_shift():
    layer = nn.Linear(3 + 11, 5).double()
    x, z = torch.randn(2, 7, 3).double(), torch.randn(2, 11).double()
    rows = torch.cat([x, z[:, None].expand(2, 7, 11)], dim=-1).reshape(14, 14)
    weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()
    expected = torch.from_numpy(oracles.linear(rows.numpy(), weight, bias)).view(2, 7, 5)
    shifted = tf.concat_as_shift(layer, 3)
    torch.testing.assert_close(shifted(x, z), expected)
    torch.testing.assert_close(shifted(x, z[:, None].expand(2, 7, 11)), expected)


def test_the_weights_are_those_of_the_layer_and_the_layer_stays():
    layer = nn.Conv2d(3 + 11, 5, 1)
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    shifted = tf.concat_as_shift(layer, 3)
    assert sum(p.numel() for p in shifted.parameters()) == sum(p.numel() for p in layer.parameters())
    with torch.no_grad():
        shifted.head.weight.zero_()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


def test_what_is_frozen_stays_frozen_and_the_precision_is_kept():
    layer = nn.Linear(3 + 11, 5).to(torch.bfloat16)
    layer.weight.requires_grad_(False)
    shifted = tf.concat_as_shift(layer, 3)
    trained = {name: value.requires_grad for name, value in shifted.named_parameters()}
    assert trained == {"layer.weight": False, "head.weight": False, "head.bias": True}
    assert {value.dtype for value in shifted.parameters()} == {torch.bfloat16}


class Sized(nn.Conv2d):
    """A subclass that takes other arguments and computes the same."""

    def __init__(self) -> None:
        super().__init__(3 + 11, 5, 1)


def test_a_subclass_that_computes_the_same_becomes_the_layer_of_torch():
    conv, x, z = Sized(), torch.randn(2, 3, 5, 7), torch.randn(2, 11)
    shifted = tf.concat_as_shift(conv, 3)
    assert type(shifted.layer) is nn.Conv2d
    torch.testing.assert_close(shifted(x, z), conv(tiled(x, z)))


class LowRank(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x[..., :1]


class Standardised(nn.Conv2d):
    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return super()._conv_forward(x, weight - weight.mean(), bias)


def patched() -> nn.Module:
    layer = nn.Linear(14, 6)
    layer.forward = lambda x: x
    return layer


def hooked(register: str) -> nn.Module:
    layer = nn.Linear(14, 6)
    getattr(layer, register)(lambda *_: None)
    return layer


def site() -> nn.Module:
    return tf.condition(nn.Sequential(nn.Linear(14, 6)), "0", tf.Vector(7)).get_submodule("0")


REFUSED = [
    (LowRank(14, 6), 3, "LowRank: LowRank computes something of its own on top of Linear"),
    (Standardised(14, 6, 1), 3, "of its own on top of Conv2d"),
    (patched(), 3, "of its own on top of Linear"),
    (hooked("register_forward_hook"), 3, "it has hooks, which would not run"),
    (hooked("register_forward_pre_hook"), 3, "it has hooks"),
    (hooked("register_full_backward_hook"), 3, "it has hooks"),
    (weight_norm(nn.Conv2d(14, 6, 1)), 3, "its weight is parametrized; it has to be plain first"),
    (site(), 3, r"it is conditioned, and would not be heard; remove\(\) that first"),
    (nn.ReLU(), 3, "it is none of these"),
    (nn.Linear(3, 5), 3, "it has 3 inputs, of which features=3 leaves no condition"),
    (nn.Conv2d(4, 6, 1, groups=2), 2, "it has 2 inputs, of which"),
    (nn.Conv2d(14, 6, 3, padding=1), 3, "pads with zeros, where the condition is missing"),
    (nn.Conv2d(14, 6, 3, padding="same"), 3, "pads with zeros"),
    (nn.Conv2d(14, 6, 1, padding=1), 3, "pads with zeros"),
]


@pytest.mark.parametrize(("layer", "features", "reason"), REFUSED, ids=str)
def test_what_is_no_shift_is_refused(layer: nn.Module, features: int, reason: str):
    with pytest.raises(ValueError, match=reason):
        tf.concat_as_shift(layer, features)


def test_a_condition_of_another_batch_is_refused():
    shifted = tf.concat_as_shift(nn.Conv2d(3 + 11, 5, 1), 3)
    with pytest.raises(ValueError, match=r"expected a condition for each of 2 samples, got \(3,\)"):
        shifted(torch.randn(2, 3, 5, 7), torch.randn(3, 11))
