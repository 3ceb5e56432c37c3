"""Gradients by gamma and beta against differences of outputs."""

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.injection import condition
from torchfilm.inspection import modulations
from torchfilm.sensitivity import sensitivity


def network() -> nn.Module:
    net = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 7))
    return randomise(condition(net, "0|2", tf.Vector(11))).double()


def test_a_score_is_as_sensitive_as_a_small_step_of_each_channel_shows():
    model, x, z = network(), torch.randn(2, 3).double(), torch.randn(2, 11).double()
    found = sensitivity(model, x, cond=z, score=lambda y: y.square().sum(1))
    made, step = {name: m.detach() for name, m in modulations(model, z).items()}, 1e-6
    for name, m in made.items():
        for channel in range(m.gamma.shape[1]):
            for field in ("gamma", "beta"):
                moved = getattr(m, field).clone()
                moved[:, channel] += step
                scores = [
                    model(x, modulation={**made, name: value}).square().sum(1).detach()
                    for value in (m, m.replace(**{field: moved}))
                ]
                slope = ((scores[1] - scores[0]) / step).square().mean().sqrt()
                torch.testing.assert_close(getattr(found[name], field)[channel], slope, rtol=1e-4, atol=1e-4)


def test_without_a_score_it_is_the_norm_of_the_jacobian_in_units_of_the_output():
    model, x, z = network(), torch.randn(2, 3).double(), torch.randn(2, 11).double()
    found = sensitivity(model, x, cond=z, draws=2000)
    made = {name: m.detach() for name, m in modulations(model, z).items()}
    y = model(x, modulation=made)

    def output(gamma: torch.Tensor) -> torch.Tensor:
        return model(x, modulation={**made, "0": made["0"].replace(gamma=gamma)})

    jacobian = torch.autograd.functional.jacobian(output, made["0"].gamma)
    exact = (jacobian.square().sum((0, 1, 2)) / y.square().sum()).sqrt()
    torch.testing.assert_close(found["0"].gamma, exact, rtol=0.1, atol=0)


def test_it_is_the_same_in_inference_mode():
    model, x, z = network(), torch.randn(2, 3).double(), torch.randn(2, 11).double()
    expected = sensitivity(model, x, cond=z)["0"].gamma
    with torch.inference_mode():
        assert torch.equal(sensitivity(model, x.clone(), cond=z.clone())["0"].gamma, expected)


def test_what_all_samples_share_and_what_has_a_time_axis_is_measured_too():
    model, x = network(), torch.randn(2, 13, 3).double()
    shared = {"0": tf.Modulation.identity(5), "2": tf.Modulation.identity(7)}
    assert sensitivity(model, x[:, 0], modulation=shared)["2"].beta.shape == (7,)
    steps = {"0": tf.Modulation.identity(2, 13, 5), "2": tf.Modulation.identity(2, 13, 7)}
    found = sensitivity(model, x, modulation=steps)
    assert found["0"].gamma.shape == (5,)
    assert found["0"].gamma.min() > 0


def test_a_channel_that_does_not_matter_has_none():
    model = condition(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), "0", tf.Vector(11))
    with torch.no_grad():
        model[1].weight[:, 2] = 0
    found = sensitivity(model, torch.randn(4, 3), cond=torch.randn(4, 11))["0"]
    assert found.gamma[2] == found.beta[2] == 0
    assert (found.beta > 0).sum() == 4


@pytest.mark.plain
def test_other_fusions_are_refused():
    model = condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(11), fusion="low_rank")
    with pytest.raises(ValueError, match="expected a Modulation for each site, got Bilinear"):
        sensitivity(model, torch.randn(2, 3), cond=torch.randn(2, 11))
    assert model.get_submodule("film").transforms == []
