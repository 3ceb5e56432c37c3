"""A norm of somebody else's network that is a site takes the modulation into its own affine."""

import pytest
import torch
from torch import nn

import torchfilm as tf
from torchfilm import slots
from torchfilm.functional import film

NORMS = {
    "group": (lambda: nn.GroupNorm(3, 6), (4, 6, 5, 3)),
    "group of a sequence": (lambda: nn.GroupNorm(2, 6, eps=0.01), (4, 6, 7)),
    "instance 1d": (lambda: nn.InstanceNorm1d(6, affine=True), (4, 6, 7)),
    "instance 2d": (lambda: nn.InstanceNorm2d(6, affine=True), (4, 6, 5, 3)),
    "layer": (lambda: nn.LayerNorm(6), (4, 5, 6)),
    "rms": (lambda: nn.RMSNorm(6), (4, 5, 6)),
}


def network(kind: str, **options) -> nn.Module:
    torch.manual_seed(0)
    norm = NORMS[kind][0]()
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.normal_()
    return tf.condition(nn.Sequential(norm, nn.ReLU()), "0", tf.Vector(5), **options)


def trained(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for parameter in model.get_submodule("film").parameters():
            parameter.normal_(std=0.5)
    return model


def spied(monkeypatch) -> list[bool]:
    """Whether each call of a site was absorbed."""
    calls, absorb = [], slots.absorbed

    def absorbed(*args):
        found = absorb(*args)
        calls.append(found is not None)
        return found

    monkeypatch.setattr(slots, "absorbed", absorbed)
    return calls


@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("rows", [4, 1])
def test_the_output_and_all_gradients_are_those_of_two_steps(kind: str, rows: int, monkeypatch):
    model, shape = trained(network(kind)).double(), NORMS[kind][1]
    calls, x = spied(monkeypatch), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    cond = torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, cond, *model[0].parameters(), *model.get_submodule("film").parameters()]
    found = model(x, cond=cond)
    m = tf.modulations(model, cond)["0"]
    with tf.unconditioned(model):
        normed = model[0](x)
    dim = -1 if kind in ("layer", "rms") else 1
    expected = torch.relu(film(normed, m.gamma, m.beta, dim, modulation_dim=-1))
    torch.testing.assert_close(found, expected)
    weights = torch.randn_like(found)
    one, other = (torch.autograd.grad((y * weights).sum(), leaves) for y in (found, expected))
    torch.testing.assert_close(one, other)
    assert calls == [rows == 1 or dim == 1]


@pytest.mark.parametrize("kind", NORMS)
def test_nothing_changes_at_the_start_to_the_bit(kind: str):
    model, x = network(kind), torch.randn(NORMS[kind][1])
    with tf.unconditioned(model):
        plain = model(x)
    assert torch.equal(model(x, cond=torch.randn(len(x), 5)), plain)


def test_what_does_not_fit_into_the_affine_takes_two_steps(monkeypatch):
    calls = spied(monkeypatch)
    model = tf.condition(nn.Sequential(nn.GroupNorm(3, 6, affine=False)), "0", tf.Vector(5))
    model(torch.randn(4, 6, 7), cond=torch.randn(4, 5))
    assert calls == []  # an affine of ones would round otherwise
    trained(network("group", fusion="concat"))(torch.randn(4, 6, 7), cond=torch.randn(4, 5))
    trained(network("group", repeat=2))(torch.randn(8, 6, 7), cond=torch.randn(4, 5))
    assert calls == []
    model = trained(network("group"))
    image = torch.randn(4, 6, 5, 3)
    expected = model(image, cond=(cond := torch.randn(4, 5)))
    found = model(image.contiguous(memory_format=torch.channels_last), cond=cond)
    torch.testing.assert_close(found, expected)
    assert calls == [True, False]


def test_wrong_sizes_are_refused_as_elsewhere():
    with pytest.raises(ValueError, match=r"FiLM site '0': gamma has size 3 where x has size 4"):
        trained(network("group"))(torch.randn(4, 6, 7), cond=torch.randn(3, 5))


def test_a_site_that_is_no_norm_may_take_an_input_without_axes():
    words = nn.Embedding(5, 3)
    model = trained(tf.condition(nn.Sequential(words), "0", tf.Vector(2)))
    with torch.no_grad():
        y, m = model(torch.tensor(1), cond=torch.ones(2)), tf.modulations(model, torch.ones(2))["0"]
    assert torch.allclose(y, film(words.weight[1], m.gamma, m.beta, -1))
