"""The U-Net over sequences: the original's size, separable conditions, placements, injection."""

from typing import get_args

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from torchfilm import Modulation
from torchfilm.blocks.unet1d import ConditionalUnet1d, Convolution, Placement
from torchfilm.fusion import resolve

SITES = ["down0_0", "down0_1", "down1_0", "down1_1", "mid_0", "mid_1", "up0_0", "up0_1"]


def small(**options):
    torch.manual_seed(5)
    unet = ConditionalUnet1d(3, 7, widths=(8, 16), step_dim=6, convolution=Convolution(3, 4), **options)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return unet.double()


def batch():
    torch.manual_seed(6)
    x = torch.randn(5, 4, 3, dtype=torch.float64)
    return x, torch.tensor([0, 99, 3, 50, 7]), torch.randn(5, 7, dtype=torch.float64)


@pytest.mark.parametrize(("emit", "expected"), [(("gamma", "beta"), 65_783_298), (("beta",), 63_654_402)])
def test_at_the_papers_sizes_it_has_as_many_parameters_as_the_original(emit: tuple, expected: int):
    with torch.device("meta"):
        unet = ConditionalUnet1d(2, 40, emit=emit)
    assert sum(parameter.numel() for parameter in unet.parameters()) == expected
    assert len(unet.sites) == 12
    assert sum(unet.sites.values()) == 7_168


@pytest.mark.parametrize("start", ["original", "identity"])
def test_step_and_condition_are_separable_exactly(start: str):
    unet = small(start=start)
    x, step, condition = batch()
    rows = unet.step_rows(step) + unet.condition_rows(condition)
    y = unet.denoise(x, unet.generator.of_raw(rows))
    torch.testing.assert_close(y, unet(x, step, condition), rtol=1e-10, atol=1e-10)


@pytest.mark.plain
def test_a_condition_is_multiplied_by_its_own_columns_alone():
    unet, (*_, condition) = small(), batch()
    with FlopCounterMode(display=False) as counted:
        rows = unet.condition_rows(condition)
    assert counted.get_total_flops() == 2 * 5 * 7 * rows.shape[-1]


def test_row_i_depends_on_condition_and_step_i_alone():
    unet = small()
    x, step, condition = batch()
    y = unet(x, step, condition)
    condition[2] += 1
    step[4] = 60
    changed = (unet(x, step, condition) - y).abs().amax(dim=(1, 2)) > 1e-6
    assert changed.tolist() == [False, False, True, False, True]


def test_an_identity_start_hears_nothing_yet_and_an_original_one_does():
    x, step, condition = batch()
    for start, heard in (("identity", False), ("original", True)):
        torch.manual_seed(0)
        unet = ConditionalUnet1d(
            3, 7, widths=(8,), step_dim=6, convolution=Convolution(groups=4), start=start
        ).double()
        assert torch.equal(unet(x, step, condition), unet(x, step, condition + 1)) is not heard


def test_between_norm_and_activation_the_norm_absorbs_what_a_product_and_a_sum_give():
    unet = small(placement="before_activation")
    block = unet.blocks["mid_0"]
    x = batch()[0].new_ones(2, 16, 5).cumsum(dim=2) * torch.randn(2, 16, 1, dtype=torch.float64)
    m = Modulation(torch.randn(2, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64))
    normed = block.first.norm(block.first.conv(x))
    y = torch.nn.functional.mish(m.gamma[:, :, None] * normed + m.beta[:, :, None])
    torch.testing.assert_close(block(x, m), block.second(y) + x)


@pytest.mark.parametrize("placement", get_args(Placement))
@pytest.mark.parametrize("sizes", [(2, 16), (2, 5, 16)], ids=["a sample", "a step"])
def test_a_gate_weighs_the_whole_modulation(placement: str, sizes: tuple):
    block = small(placement=placement).blocks["mid_0"]
    x = torch.randn(2, 16, 5, dtype=torch.float64)
    gamma, beta, gate = torch.randn(3, *sizes, dtype=torch.float64)
    weighed = block(x, Modulation(gate * gamma, gate * beta))
    torch.testing.assert_close(block(x, Modulation(gamma, beta, gate)), weighed)


def test_behind_the_activation_is_where_the_original_modulates():
    unet = small()
    block = unet.blocks["mid_0"]
    x = torch.randn(2, 16, 5, dtype=torch.float64)
    m = Modulation(torch.randn(2, 16, dtype=torch.float64), torch.randn(2, 16, dtype=torch.float64))
    y = m.gamma[:, :, None] * block.first(x) + m.beta[:, :, None]
    torch.testing.assert_close(block(x, m), block.second(y) + x)


@pytest.mark.parametrize("fusion", ["film", "concat"])
def test_an_injection_is_the_identity_at_the_start_and_then_is_heard(fusion: str):
    unet = small()
    x, step, condition = batch()
    z = torch.randn(5, 11, dtype=torch.float64)
    how = resolve(fusion)
    listen = how.build(11, unet.sites).double()
    plain = unet(x, step, condition)
    assert torch.equal(unet(x, step, condition, fusion=how, injected=listen(z)), plain)
    with torch.no_grad():
        for parameter in listen.parameters():
            parameter.normal_(std=0.3)
    assert (unet(x, step, condition, fusion=how, injected=listen(z)) - plain).abs().max() > 1e-3


def test_a_modulation_is_injected_behind_the_blocks_own():
    unet = small()
    x, step, condition = batch()
    own = unet.generator.of_raw(unet.step_rows(step) + unet.condition_rows(condition))
    more = {"mid_0": Modulation(torch.rand(5, 16).double(), torch.rand(5, 16).double())}
    both = own | {"mid_0": more["mid_0"].compose(own["mid_0"])}
    torch.testing.assert_close(unet.denoise(x, own, injected=more), unet.denoise(x, both))


def test_sites_are_named_in_the_order_of_the_computation():
    assert list(small().sites) == SITES


def test_a_length_that_cannot_be_halved_is_refused():
    x, step, condition = batch()
    with pytest.raises(ValueError, match=r"time divisible by 2, got \(5, 3, 3\)"):
        small()(x[:, :3], step, condition)


@pytest.mark.parametrize("options", [{"widths": (12,)}, {"widths": ()}, {"convolution": Convolution(4)}])
def test_sizes_that_do_not_fit_are_refused(options: dict):
    with pytest.raises(ValueError, match="expected widths divisible by groups=8 and an odd kernel_size"):
        ConditionalUnet1d(2, 3, **options)
