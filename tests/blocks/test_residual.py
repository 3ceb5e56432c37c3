"""The residual block against its equations, for each of the five places of FiLM."""

import pytest
import torch
from torch import nn

from torchfilm import Modulation
from torchfilm.blocks.residual import PLACEMENTS, ListeningBlock


def build(**options) -> tuple[ListeningBlock, torch.Tensor, Modulation]:
    torch.manual_seed(0)
    block = ListeningBlock(3, **options).double().eval()
    if isinstance(block.norm, nn.BatchNorm2d):
        block.norm.running_mean = torch.randn(3).double()
        block.norm.running_var = torch.rand(3).double() + 0.5
    x = torch.randn(2, 3, 5, 7, dtype=torch.float64)
    return block, x, Modulation(torch.randn(2, 3).double(), torch.randn(2, 3).double())


def by_hand(block, x, m, place, *, residual=True):
    """The block's equations, one line per step, as in figure 3 of the paper."""

    def film_if(here, value):
        return m.gamma[:, :, None, None] * value + m.beta[:, :, None, None] if here == place else value

    x = film_if("before_conv1", x)
    x = block.project.conv(x).clamp(min=0)
    h = film_if("after_conv2", block.conv.conv(x))
    h = film_if("after_batchnorm", block.norm(h))
    h = film_if("after_relu2", h.clamp(min=0))
    return film_if("after_residual", x + h if residual else h)


@pytest.mark.parametrize("place", PLACEMENTS)
@pytest.mark.parametrize("residual", [True, False])
def test_film_acts_where_the_placement_says(place, residual):
    block, x, m = build(placement=place, residual=residual)
    y = block(x, m)
    torch.testing.assert_close(y, by_hand(block, x, m, place, residual=residual))
    if residual:  # without it, after_relu2 and after_residual are the same place
        others = [by_hand(block, x, m, other) for other in PLACEMENTS if other != place]
        assert min((y - other).abs().max() for other in others) > 1e-3


def test_a_block_that_does_not_listen_normalises_with_its_own_affine():
    block, x, m = build(placement=None)
    assert block.norm.affine
    torch.testing.assert_close(block(x), by_hand(block, x, m, None))
    assert not build()[0].norm.affine


@pytest.mark.parametrize("place", PLACEMENTS)
def test_a_gate_weighs_the_whole_modulation(place):
    block, x, m = build(placement=place)
    gate = torch.randn(2, 3).double()
    torch.testing.assert_close(
        block(x, m.replace(gate=gate)), block(x, Modulation(gate * m.gamma, gate * m.beta))
    )


@pytest.mark.parametrize("place", PLACEMENTS)
def test_rows_repeat_the_input(place):
    block, x, _ = build(placement=place)
    rows = torch.tensor([1, 0, 1, 1])
    m = Modulation(torch.randn(4, 3).double(), torch.randn(4, 3).double())
    torch.testing.assert_close(block(x, m, rows), block(x[rows], m))


def test_without_batch_norm_the_branch_is_not_normalised():
    block, x, m = build(batch_norm=False)
    assert isinstance(block.norm, nn.Identity)
    torch.testing.assert_close(block(x, m), by_hand(block, x, m, "after_batchnorm"))


def test_silence_is_an_error():
    block, x, _ = build()
    with pytest.raises(ValueError, match="expected a Modulation, got None"):
        block(x)


def test_an_unknown_placement_is_named():
    with pytest.raises(ValueError, match="got 'after_dinner'"):
        ListeningBlock(3, placement="after_dinner")  # type: ignore[arg-type]
