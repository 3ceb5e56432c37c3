"""A layer over features and a tiled condition is the layer over the features with a shift."""

import pytest
import torch
from torch import Tensor, nn

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
    torch.testing.assert_close(tf.concat_as_shift(conv, 3)(x, z), conv(tiled(x, z)))


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


REFUSED = [
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
