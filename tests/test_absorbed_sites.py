"""A norm of somebody else's network that is a site takes the modulation into its own affine."""

import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

import torchfilm as tf
from torchfilm import absorption, slots
from torchfilm.functional import film

NORMS = {
    "batch": (lambda: nn.BatchNorm2d(6).eval(), (4, 6, 5, 3)),
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
    """Whether each call of a site was absorbed: with an affine made before, or there."""
    calls, absorb, apply = [], slots.absorbed, absorption.Ready.applied

    def absorbed(*args, **how):
        found = absorb(*args, **how)
        calls.append(found is not None)
        return found

    def applied(*args):
        found = apply(*args)
        if found is not None:
            calls.append(True)
        return found

    monkeypatch.setattr(slots, "absorbed", absorbed)
    monkeypatch.setattr(absorption.Ready, "applied", applied)
    return calls


def ready_at_the_call(model: nn.Module) -> list[bool]:
    """Whether the slot of the norm holds its affine, at each call of the norm from here on."""
    slot, found = tf.conditioning(model).slots["0"], []
    model[0].register_forward_hook(lambda *_: found.append(slot.ready is not None))
    return found


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
    assert calls == [rows == 1 or (dim == 1 and kind != "batch")]


@pytest.mark.parametrize("kind", NORMS)
def test_nothing_changes_at_the_start_to_the_bit(kind: str):
    model, x = network(kind), torch.randn(NORMS[kind][1])
    with tf.unconditioned(model):
        plain = model(x)
    assert torch.equal(model(x, cond=torch.randn(len(x), 5)), plain)


@pytest.mark.parametrize("sizes", [(2, 6, 1, 1), (2, 1, 5, 3), (2, 6, 1, 1, 1), (2, 1, 5, 3, 2)], ids=str)
@pytest.mark.parametrize("last", [True, False], ids=["channels last", "channels first"])
@torch.no_grad()
def test_a_group_norm_of_features_in_both_memory_formats_changes_nothing_to_the_bit(sizes: tuple, last: bool):
    norm = nn.Sequential(nn.GroupNorm(min(sizes[1], 3), sizes[1]))
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    many = [torch.randn(sizes) for _ in range(20)]
    many = [x.to(memory_format=formats[len(sizes)]) for x in many] if last else many
    assert all(x.is_contiguous() for x in many)
    plain, model = [norm(x) for x in many], tf.condition(norm, "0", tf.Vector(5))
    for x, y in zip(many, plain, strict=True):
        assert torch.equal(model(x, cond=torch.randn(2, 5)), y)


@torch.no_grad()
@pytest.mark.parametrize("kind", NORMS)
def test_an_affine_is_made_before_the_norm_is_called_where_all_rows_share_it(kind: str):
    model, x = trained(network(kind)), torch.randn(NORMS[kind][1])
    found = ready_at_the_call(model)
    alike, apart = torch.randn(1, 5).expand(4, 5), torch.randn(4, 5)
    torch.testing.assert_close(model(x, cond=alike[:1]), model(x, cond=alike))
    model(x, cond=apart)
    model(x, modulation={"0": tf.modulations(model, alike[0])["0"]})
    with torch.enable_grad():
        model(x, cond=alike[:1])
    assert found == [True, False, False, True, False]
    assert tf.conditioning(model).slots["0"].ready is None


class Changing(nn.Module):
    """A network that does something to its norm, which is a site, before it calls it."""

    def __init__(self, change) -> None:
        super().__init__()
        self.norm, self.change = NORMS["batch"][0](), change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.change(self.norm)
        return self.norm(x)


CHANGES = {
    "nothing": lambda norm: None,
    "mode": lambda norm: norm.train(),
    "values": lambda norm: norm.weight.copy_(torch.linspace(1, 2, 6)),
    "bias": lambda norm: norm.bias.add_(1),
    "data": lambda norm: setattr(norm.weight, "data", torch.linspace(1, 2, 6)),
    "statistics": lambda norm: setattr(norm, "running_mean", torch.linspace(1, 2, 6)),
    "eps": lambda norm: setattr(norm, "eps", 0.1),
    "other bias": lambda norm: setattr(norm, "bias", nn.Parameter(torch.linspace(1, 2, 6))),
    "parameter": lambda norm: setattr(norm, "weight", nn.Parameter(torch.linspace(1, 2, 6))),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_an_affine_made_before_is_not_used_for_a_norm_that_was_changed_since(change: str, monkeypatch):
    model = trained(tf.condition(Changing(CHANGES[change]).eval(), "norm", tf.Vector(5)))
    x, cond, calls = torch.randn(4, 6, 5, 3), torch.randn(1, 5), spied(monkeypatch)
    found, m = model(x, cond=cond), tf.modulations(model, cond)["norm"]
    other = NORMS["batch"][0]()
    CHANGES[change](other)
    torch.testing.assert_close(found, film(other(x), m.gamma, m.beta, 1))
    assert calls == {"nothing": [True], "mode": [False]}.get(change, [True])


@torch.no_grad()
def test_weights_that_a_hook_puts_in_place_are_read_then():
    model, x, cond = trained(network("batch")), torch.randn(4, 6, 5, 3), torch.randn(1, 5)
    other = model[0].weight + 1

    def put_in_place(norm: nn.Module, args: tuple[torch.Tensor]) -> None:
        norm.weight.copy_(other)

    model[0].register_forward_pre_hook(put_in_place)
    with tf.unconditioned(model):
        plain = model[0](x)
    model[0].weight.sub_(1)
    m = tf.modulations(model, cond)["0"]
    torch.testing.assert_close(model(x, cond=cond), torch.relu(film(plain, m.gamma, m.beta, 1)))


@torch.no_grad()
def test_weights_that_a_block_puts_in_place_are_read_then():
    model, x, cond = trained(network("batch")), torch.randn(4, 6, 5, 3), torch.randn(1, 5)
    inner = tf.condition(nn.Sequential(nn.Sequential(tf.remove(model))), r"0\.0\.0", tf.Vector(5))
    norm, real = inner[0][0][0], inner[0][0][0].weight.clone()
    expected = trained(inner)(x, cond=cond)
    norm.weight.mul_(0)

    def loaded(block: nn.Module, args: tuple[torch.Tensor]) -> None:
        norm.weight.data.copy_(real)

    inner[0].register_forward_pre_hook(loaded)
    torch.testing.assert_close(inner(x, cond=cond), expected)


def test_what_does_not_fit_into_the_affine_takes_two_steps(monkeypatch):
    calls = spied(monkeypatch)
    model = tf.condition(nn.Sequential(nn.GroupNorm(3, 6, affine=False)), "0", tf.Vector(5))
    model(torch.randn(4, 6, 7), cond=torch.randn(4, 5))
    assert not any(calls)  # an affine of ones would round otherwise
    trained(network("group", fusion="concat"))(torch.randn(4, 6, 7), cond=torch.randn(4, 5))
    trained(network("group", repeat=2))(torch.randn(8, 6, 7), cond=torch.randn(4, 5))
    assert not any(calls)
    calls.clear()
    model = trained(network("group"))
    image = torch.randn(4, 6, 5, 3)
    expected = model(image, cond=(cond := torch.randn(4, 5)))
    found = model(image.contiguous(memory_format=torch.channels_last), cond=cond)
    torch.testing.assert_close(found, expected)
    assert calls == [True, False]
    m, many = tf.modulations(model, cond[:1]), image.contiguous(memory_format=torch.channels_last)
    for learns in (True, False):  # torch's backward pass of it would crash
        with torch.set_grad_enabled(learns):
            found = absorption.absorbed(nn.GroupNorm, model[0], many, m["0"])
        assert (found is None) is learns


@pytest.mark.parametrize("learning", ["gamma", "beta"])
def test_a_group_norm_of_channels_last_features_leaves_what_learns_outside(learning: str):
    x = torch.randn(1, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    m = tf.Modulation(*(torch.randn(6, requires_grad=name == learning) for name in ("gamma", "beta")))
    assert absorption.absorbed(nn.GroupNorm, nn.GroupNorm(3, 6), x, m) is None


@pytest.mark.parametrize("kind", NORMS)
def test_one_row_may_have_a_batch_axis_or_none(kind: str):
    model, x = network(kind), torch.randn(NORMS[kind][1])
    gamma, beta = torch.randn(6), torch.randn(6)
    expected = model(x, modulation={"0": tf.Modulation(gamma, beta)})
    for m in (tf.Modulation(gamma[None], beta), tf.Modulation(gamma, beta[None])):
        torch.testing.assert_close(model(x, modulation={"0": m}), expected)


@pytest.mark.parametrize("kind", NORMS)
def test_as_many_numbers_as_channels_on_another_axis_are_refused(kind: str):
    m = tf.Modulation(torch.randn(6, 1), torch.randn(6, 1))
    with torch.no_grad(), pytest.raises(ValueError, match="gamma has 1 channels"):
        network(kind)(torch.randn(NORMS[kind][1]), modulation={"0": m})


@pytest.mark.parametrize("batch", [1, 4])
def test_another_axis_than_the_norm_s_own_is_modulated_behind_it(batch: int):
    norm = nn.LayerNorm(6)
    model = trained(tf.condition(nn.Sequential(norm), "0", tf.Vector(5), features=6, dim=1))
    x, z = torch.randn(batch, 6, 6), torch.randn(batch, 5)
    m = tf.modulations(model, z)["0"]
    expected = film(functional.layer_norm(x, (6,)), m.gamma, m.beta, dim=1)
    for learns in (True, False):
        with torch.set_grad_enabled(learns):
            torch.testing.assert_close(model(x, cond=z), expected)


@pytest.mark.plain
@pytest.mark.parametrize("kind", NORMS)
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.filterwarnings("ignore:.torch.jit", "ignore::torch.jit.TracerWarning")
def test_a_trace_takes_other_batches(kind: str, rows: int, learns: bool):
    model, (_, *size) = trained(network(kind)), NORMS[kind][1]

    class Called(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
            return self.model(x, cond=z)

    with torch.set_grad_enabled(learns):
        traced = torch.jit.trace(Called(), (torch.randn(rows, *size), torch.randn(rows, 5)))
    x, z = torch.randn(3, *size), torch.randn(3, 5)
    torch.testing.assert_close(traced(x, z), model(x, cond=z))


def test_wrong_sizes_are_refused_as_elsewhere():
    with pytest.raises(ValueError, match=r"FiLM site '0': gamma has size 3 where x has size 4"):
        trained(network("group"))(torch.randn(4, 6, 7), cond=torch.randn(3, 5))


def test_a_site_that_is_no_norm_may_take_an_input_without_axes():
    words = nn.Embedding(5, 3)
    model = trained(tf.condition(nn.Sequential(words), "0", tf.Vector(2)))
    with torch.no_grad():
        y, m = model(torch.tensor(1), cond=torch.ones(2)), tf.modulations(model, torch.ones(2))["0"]
    assert torch.allclose(y, film(words.weight[1], m.gamma, m.beta, -1))


FRESH = {
    "linear": (lambda: nn.Linear(4, 6), (2, 5, 4), -1),
    "convolution": (lambda: nn.Conv2d(4, 6, 3), (2, 4, 7, 5), 1),
    "transposed convolution": (lambda: nn.ConvTranspose1d(4, 6, 3), (2, 4, 5), 1),
    "batch norm": (lambda: nn.BatchNorm2d(6), (2, 6, 5, 3), 1),
    "layer norm": (lambda: nn.LayerNorm(6), (2, 5, 6), -1),
}


def listening(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return trained(tf.condition(nn.Sequential(FRESH[kind][0]()).eval(), "0", tf.Vector(5)))


def in_place(monkeypatch) -> list[bool]:
    """Whether each call of `film_` at a site wrote into its input."""
    calls, modulate = [], slots.film_

    def film_(x, *args, **options):
        y = modulate(x, *args, **options)
        calls.append(y.data_ptr() == x.data_ptr())
        return y

    monkeypatch.setattr(slots, "film_", film_)
    return calls


@pytest.mark.parametrize("kind", FRESH)
def test_without_a_graph_a_new_output_is_modulated_where_it_lies(kind: str, monkeypatch):
    model, (_, shape, dim), calls = listening(kind), FRESH[kind], in_place(monkeypatch)
    x, cond = torch.randn(shape), torch.randn(2, 5)
    kept, m = x.clone(), tf.modulations(model, cond)["0"]
    with torch.no_grad():
        found = model(x, cond=cond)
        with tf.unconditioned(model):
            expected = film(model(x), m.gamma, m.beta, dim, modulation_dim=-1)
    torch.testing.assert_close(found, expected)
    assert torch.equal(x, kept)
    torch.testing.assert_close(model(x, cond=cond), expected)  # with a graph
    assert calls == [True, False]


@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_derivatives_of_a_frozen_network_go_forwards_through_what_is_written_in_place(kind: str):
    model, x = listening(kind).double().requires_grad_(False), torch.randn(FRESH[kind][1]).double()
    cond, step = torch.randn(2, 2, 5, dtype=torch.float64)
    _, found = torch.func.jvp(lambda z: model(x, cond=z), (cond,), (step,))
    steps = model(x, cond=cond + step) - model(x, cond=cond)  # the output is linear in the condition
    torch.testing.assert_close(found, steps)


@pytest.mark.parametrize("kind", [nn.Identity, nn.Dropout, nn.Flatten])
def test_an_output_that_may_be_the_input_itself_is_left_alone(kind: type[nn.Module], monkeypatch):
    model, calls = nn.Sequential(kind()).eval(), in_place(monkeypatch)
    trained(tf.condition(model, "0", tf.Vector(5), dim=-1, features=6))
    x = torch.randn(2, 6)
    kept = x.clone()
    with torch.no_grad():
        model(x, cond=torch.randn(2, 5))
    assert torch.equal(x, kept)
    assert calls == []


CRASHING = """
import torch, torchfilm as tf
from torch import nn
torch.manual_seed(0)
for batch in (1, 4):
    x, z = torch.randn(batch, 3, 9, 9), torch.randn(1, 7)
    net = nn.Sequential(nn.Conv2d(3, 20, 3), nn.GroupNorm(5, 20), nn.ReLU())
    net = tf.freeze_base(tf.condition(net, "1", tf.Vector(7), init="default"))
    layer = tf.ConditionalGroupNorm(3, 3, 7)
    found = []
    for format in (torch.channels_last, torch.contiguous_format):
        net.to(memory_format=format).zero_grad()
        layer.zero_grad()
        given = x.to(memory_format=format)
        (net(given, cond=z).exp().mean() + layer(given, z).exp().mean()).backward()
        found.append([p.grad.clone() for p in (*net.film.parameters(), *layer.parameters())])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-5)
"""


def test_a_frozen_group_norm_of_channels_last_features_is_trained_through():
    done = subprocess.run([sys.executable, "-c", CRASHING], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@torch.no_grad()
def test_an_error_while_affines_are_made_leaves_none_behind(monkeypatch: pytest.MonkeyPatch):
    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)), nn.BatchNorm2d(6)).eval()
    tf.condition(model, r"0\.1|1", tf.Vector(5), init="default")
    x, cond, other = torch.randn(1, 3, 2, 2), torch.randn(1, 5), torch.randn(1, 5)
    expected = model(x, cond=cond)
    made = slots.prepared

    def stopped(kind, norm, *others):
        if norm is model[1]:
            raise KeyboardInterrupt
        return made(kind, norm, *others)

    monkeypatch.setattr(slots, "prepared", stopped)
    with pytest.raises(KeyboardInterrupt):
        model(x, cond=other)
    monkeypatch.undo()
    model[0].register_forward_pre_hook(lambda *_: None)  # no affine is made ahead inside of it from now on
    torch.testing.assert_close(model(x, cond=cond), expected)
