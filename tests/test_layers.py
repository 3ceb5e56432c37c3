"""FiLM, DenseFiLM and the conditional norm against loops over single numbers."""

import pytest
import torch
from torch import nn

import oracles
import torchfilm as tf
from catalogue import randomise
from torchfilm.layers import Head


def arrays(layer: nn.Module) -> tuple:
    head = layer.head if isinstance(layer, tf.FiLM) else layer.film.head
    return head.weight.detach().numpy(), head.bias.detach().numpy()


def test_film_is_gamma_times_x_plus_beta_with_gamma_one_plus_the_head():
    layer = randomise(tf.FiLM(3, 7)).double()
    x, z = torch.randn(2, 3, 5, 4).double(), torch.randn(2, 7).double()
    ((gamma, beta),) = oracles.paper_generator(z.numpy(), *arrays(layer), channels=[3])
    torch.testing.assert_close(layer(x, z), torch.from_numpy(oracles.film(x.numpy(), gamma, beta, 1)))


@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3), -1), ((2, 3, 5), 1), ((2, 3, 5, 7), 1)], ids=str)
def test_a_condition_per_step_modulates_each_step_by_its_own(shape: tuple, dim: int):
    layer = randomise(tf.FiLM(3, 7, dim=dim)).double()
    x, z = torch.randn(shape).double(), torch.randn(2, 5, 7).double()
    ((gamma, beta),) = oracles.paper_generator(z.reshape(10, 7).numpy(), *arrays(layer), channels=[3])
    expected = oracles.film(x.numpy(), gamma.reshape(2, 5, 3), beta.reshape(2, 5, 3), dim)
    torch.testing.assert_close(layer(x, z), torch.from_numpy(expected))


def test_steps_and_channels_of_equal_number_are_not_confused():
    layer = randomise(tf.FiLM(5, 7)).double()
    x, z = torch.randn(2, 5, 5).double(), torch.randn(2, 5, 7).double()
    columns = [layer(x[:, :, t], z[:, t]) for t in range(5)]
    torch.testing.assert_close(layer(x, z), torch.stack(columns, dim=2))


def test_dense_film_scales_and_shifts_by_a_linear_map_of_mish():
    layer = randomise(tf.DenseFiLM(3, 7)).double()
    x, z = torch.randn(2, 5, 3).double(), torch.randn(2, 7).double()
    ((gamma, beta),) = oracles.paper_generator(oracles.mish(z.numpy()), *arrays(layer), channels=[3])
    torch.testing.assert_close(layer(x, z), torch.from_numpy(oracles.film(x.numpy(), gamma, beta, -1)))


def test_the_conditional_norm_modulates_normalised_features():
    layer = randomise(tf.ConditionalBatchNorm2d(3, 7, eps=0.01)).double()
    x, z = 4 + 3 * torch.randn(2, 3, 5, 4).double(), torch.randn(2, 7).double()
    ((gamma, beta),) = oracles.paper_generator(z.numpy(), *arrays(layer), channels=[3])
    expected = oracles.film(oracles.batch_norm(x.numpy(), eps=0.01), gamma, beta, 1)
    torch.testing.assert_close(layer(x, z), torch.from_numpy(expected))


def pretrained_norm() -> nn.BatchNorm2d:
    norm = randomise(nn.BatchNorm2d(3, eps=0.01, momentum=0.3))
    norm(2 + torch.randn(11, 3, 5, 4))
    return norm


@pytest.mark.parametrize("training", [True, False])
def test_a_conditioned_pretrained_norm_starts_as_it_was_to_the_bit(training: bool):
    norm, x, z = pretrained_norm().train(training), torch.randn(2, 3, 5, 4), torch.randn(2, 7)
    other = pretrained_norm().train(training)
    other.load_state_dict(norm.state_dict())
    layer = tf.ConditionalBatchNorm2d.from_norm(norm, cond_dim=7)
    assert layer.training == training
    assert layer.norm is norm
    assert torch.equal(layer(x, z), other(x))
    assert torch.equal(norm.running_var, other.running_var)


def test_the_condition_of_a_pretrained_norm_acts_on_its_affine_output():
    norm, x = pretrained_norm().eval(), torch.randn(2, 3, 5, 4)
    layer = tf.ConditionalBatchNorm2d.from_norm(norm, cond_dim=7)
    y = layer(x, modulation=tf.Modulation(torch.tensor([0.0, 1.0, 2.0]), torch.tensor([5.0, 0.0, -1.0])))
    torch.testing.assert_close(y[:, 0], torch.full((2, 5, 4), 5.0))
    torch.testing.assert_close(y[:, 1], norm(x)[:, 1])
    torch.testing.assert_close(y[:, 2], 2 * norm(x)[:, 2] - 1)


@pytest.mark.plain
def test_only_a_batch_norm_can_be_conditioned_as_one():
    with pytest.raises(ValueError, match=r"expected nn.BatchNorm2d, got GroupNorm"):
        tf.ConditionalBatchNorm2d.from_norm(nn.GroupNorm(1, 3), cond_dim=7)


def test_converting_to_a_synchronised_norm_keeps_the_condition():
    layer = nn.SyncBatchNorm.convert_sync_batchnorm(tf.ConditionalBatchNorm2d(3, 7))
    assert isinstance(layer, tf.ConditionalBatchNorm2d)
    assert isinstance(layer.norm, nn.SyncBatchNorm)


def test_the_layers_keep_a_plain_layout_of_names_in_the_state_dict():
    assert set(tf.FiLM(3, 7).state_dict()) == {"head.weight", "head.bias"}
    assert set(tf.DenseFiLM(3, 7).state_dict()) == {"film.head.weight", "film.head.bias"}
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    names = {"film.head.weight", "film.head.bias"} | statistics
    assert set(tf.ConditionalBatchNorm2d(3, 7).state_dict()) == names
    assert set(tf.ConditionalBatchNorm2d(3, 7, affine=True).state_dict()) == names | {
        "norm.weight",
        "norm.bias",
    }


def test_the_head_is_no_linear_layer_for_the_hooks_of_others():
    assert not isinstance(Head(7, 6), nn.Linear)


@pytest.mark.plain
@pytest.mark.parametrize("shape", [(2, 5), ()], ids=str)
def test_a_condition_of_another_size_is_refused(shape: tuple):
    with pytest.raises(
        ValueError, match=r"condition: expected 7 numbers on the last axis \(cond_dim\), got shape"
    ):
        tf.FiLM(3, 7)(torch.randn(2, 3, 5), torch.randn(shape))


def test_both_halves_of_the_head_receive_gradients_at_the_identity():
    layer = tf.FiLM(3, 7)
    layer(torch.randn(2, 3, 5), torch.randn(2, 7)).square().sum().backward()
    assert layer.head.weight.grad.abs().min() > 0
    assert layer.head.bias.grad.abs().min() > 0
