"""Laws of coordinate maps, the convolution that sees them, and the stems."""

import pytest
import torch

from torchfilm.blocks.vision import FeatureStem, GridConv, PixelStem, coordinate_maps


def test_coordinates_run_from_left_to_right_and_from_top_to_bottom():
    x, y = coordinate_maps(3, 5)
    assert x.tolist() == [[-1, -0.5, 0, 0.5, 1]] * 3
    assert y.tolist() == [[-1] * 5, [0] * 5, [1] * 5]


@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (3, 2), (5, 3)])
def test_a_grid_convolution_is_the_convolution_of_the_concatenation(kernel_size, dilation):
    torch.manual_seed(0)
    conv = GridConv(3, 4, kernel_size, grid=(6, 7), dilation=dilation).double()
    x = torch.rand(2, 3, 6, 7, dtype=torch.float64, requires_grad=True)
    beside = torch.cat([x, coordinate_maps(6, 7).double().expand(2, -1, -1, -1)], dim=1)
    torch.testing.assert_close(conv(x), conv.conv(beside))
    weights = torch.rand(2, 4, 6, 7, dtype=torch.float64)
    inputs = (x, conv.conv.weight, conv.conv.bias)
    ours = torch.autograd.grad((conv(x) * weights).sum(), inputs)
    theirs = torch.autograd.grad((conv.conv(beside) * weights).sum(), inputs)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_of_none_goes_through():
    assert GridConv(3, 4, 3, grid=(6, 7))(torch.rand(0, 3, 6, 7)).shape == (0, 4, 6, 7)


def test_pictures_of_another_grid_are_refused():
    with pytest.raises(ValueError, match=r"of the grid \(2, 8\), got \(1, 3, 4, 4\).\nBuild it with"):
        GridConv(3, 4, 3, grid=(2, 8))(torch.rand(1, 3, 4, 4))


def test_without_a_grid_it_is_a_plain_convolution():
    conv = GridConv(3, 4, 3, grid=None)
    x = torch.rand(2, 3, 6, 7)
    assert torch.equal(conv(x), conv.conv(x))


def test_channels_last_stays_channels_last():
    conv = GridConv(3, 4, 3, grid=(6, 7)).to(memory_format=torch.channels_last)
    y = conv(torch.rand(2, 3, 6, 7).to(memory_format=torch.channels_last))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_coordinates_are_not_part_of_the_state():
    assert set(GridConv(3, 4, 3, grid=(6, 7)).state_dict()) == {"conv.weight", "conv.bias"}


def test_the_pixel_stem_gives_a_sixteenth_of_each_side():
    assert PixelStem(3, 5, batch_norm=True)(torch.rand(2, 3, 32, 48)).shape == (2, 5, 2, 3)


def test_the_feature_stem_is_convolution_then_norm_then_relu():
    torch.manual_seed(0)
    stem = FeatureStem(3, 5, 3, grid=(4, 6), batch_norm=True)
    y = stem(torch.rand(7, 3, 4, 6))
    beside = stem.norm(stem.conv(torch.rand(7, 3, 4, 6)))
    assert y.min() == 0
    assert beside.min() < 0
    torch.testing.assert_close(beside.mean((0, 2, 3)), torch.zeros(5), atol=1e-6, rtol=0)
