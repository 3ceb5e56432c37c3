"""Conditional norms against loops, against torch's own norms, and absorbed against not."""

import copy
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import oracles
import torchfilm as tf
from catalogue import randomise
from torchfilm import absorption

BATCH = {nn.BatchNorm1d: (2, 3, 5), nn.BatchNorm2d: (2, 3, 5, 4), nn.BatchNorm3d: (2, 3, 5, 4, 2)}
INSTANCE = {nn.InstanceNorm1d: (2, 3, 5), nn.InstanceNorm2d: (2, 3, 5, 4), nn.InstanceNorm3d: (2, 3, 5, 4, 2)}


def conditional(kind: type[nn.Module]) -> type:
    return getattr(tf, f"Conditional{kind.__name__}")


def values(norm: nn.Module) -> nn.Module:
    """Fill a norm as training would have."""
    for buffer in norm.buffers():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    return randomise(norm)


TRAINED = {
    "batch 1d": (lambda: nn.BatchNorm1d(6, eps=0.01, momentum=0.3), (2, 6, 5)),
    "batch 2d": (lambda: nn.BatchNorm2d(6, eps=0.01), (2, 6, 5, 4)),
    "batch 3d": (lambda: nn.BatchNorm3d(6), (2, 6, 5, 4, 3)),
    "batch 2d without statistics": (lambda: nn.BatchNorm2d(6, track_running_stats=False), (2, 6, 5, 4)),
    "instance 1d": (lambda: nn.InstanceNorm1d(6, eps=0.01), (2, 6, 5)),
    "instance 2d affine": (lambda: nn.InstanceNorm2d(6, affine=True), (2, 6, 5, 4)),
    "instance 2d statistics": (lambda: nn.InstanceNorm2d(6, track_running_stats=True), (2, 6, 5, 4)),
    "instance 3d": (lambda: nn.InstanceNorm3d(6, affine=True), (2, 6, 5, 4, 3)),
    "instance 2d unbatched": (lambda: nn.InstanceNorm2d(6, affine=True), (6, 5, 4)),
    "group": (lambda: nn.GroupNorm(3, 6, eps=0.01), (2, 6, 5, 4)),
    "group without positions": (lambda: nn.GroupNorm(3, 6), (2, 6)),
    "layer": (lambda: nn.LayerNorm(6, eps=0.01), (2, 5, 6)),
    "layer without bias": (lambda: nn.LayerNorm(6, bias=False), (2, 5, 6)),
    "layer without affine": (lambda: nn.LayerNorm(6, elementwise_affine=False), (2, 5, 6)),
    "rms": (lambda: nn.RMSNorm(6, eps=0.01), (2, 5, 6)),
    "rms with torch's eps": (lambda: nn.RMSNorm(6), (2, 6)),
}
over_trained = pytest.mark.parametrize("name", TRAINED)


def trained(name: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A trained norm, the conditional norm around a copy of it, features and conditions."""
    build, shape = TRAINED[name]
    norm = values(build())
    layer = conditional(type(norm)).from_norm(copy.deepcopy(norm), cond_dim=7)
    z = torch.randn(7) if "unbatched" in name else torch.randn(shape[0], 7)
    return norm, layer, 2 + 3 * torch.randn(shape), z


def head(layer: nn.Module) -> tuple:
    return layer.film.head.weight.detach().numpy(), layer.film.head.bias.detach().numpy()


def check(layer: nn.Module, x: Tensor, z: Tensor, normed: np.ndarray, channels: int, dim: int) -> None:
    ((gamma, beta),) = oracles.paper_generator(z.numpy(), *head(layer), channels=[channels])
    torch.testing.assert_close(layer(x, z), torch.from_numpy(oracles.film(normed, gamma, beta, dim)))


@pytest.mark.parametrize("kind", BATCH)
def test_a_batch_norm_is_modulated_after_it_has_normalised(kind: type):
    layer = randomise(conditional(kind)(3, 7, eps=0.01)).double()
    x, z = 4 + 3 * torch.randn(BATCH[kind]).double(), torch.randn(2, 7).double()
    check(layer, x, z, oracles.batch_norm(x.numpy(), eps=0.01), 3, 1)


@pytest.mark.parametrize("kind", INSTANCE)
def test_an_instance_norm_is_modulated_after_it_has_normalised(kind: type):
    layer = randomise(conditional(kind)(3, 7, eps=0.01)).double()
    x, z = 4 + 3 * torch.randn(INSTANCE[kind]).double(), torch.randn(2, 7).double()
    check(layer, x, z, oracles.group_norm(x.numpy(), 3, eps=0.01), 3, 1)


@pytest.mark.parametrize("shape", [(2, 6), (2, 6, 5), (2, 6, 5, 4)], ids=str)
@pytest.mark.parametrize("groups", [1, 2])
def test_a_group_norm_is_modulated_after_it_has_normalised(groups: int, shape: tuple):
    layer = randomise(tf.ConditionalGroupNorm(groups, 6, 7, eps=0.01)).double()
    x, z = 4 + 3 * torch.randn(shape).double(), torch.randn(2, 7).double()
    check(layer, x, z, oracles.group_norm(x.numpy(), groups, eps=0.01), 6, 1)


@pytest.mark.parametrize("kind", ["Layer", "RMS"])
@pytest.mark.parametrize("batch", [1, 2])
def test_token_norms_are_modulated_after_they_have_normalised(kind: str, batch: int):
    layer = randomise(getattr(tf, f"Conditional{kind}Norm")(3, 7, eps=0.01)).double()
    x, z = 4 + 3 * torch.randn(batch, 5, 3).double(), torch.randn(batch, 7).double()
    normed = (oracles.layer_norm if kind == "Layer" else oracles.rms_norm)(x.numpy(), eps=0.01)
    check(layer, x, z, normed, 3, -1)


def test_a_condition_per_token_modulates_each_token_by_its_own():
    for kind in (tf.ConditionalLayerNorm, tf.ConditionalRMSNorm):
        layer = randomise(kind(3, 7))
        x, z = torch.randn(2, 5, 3), torch.randn(2, 5, 7)
        each = torch.stack([layer(x[:, t], z[:, t]) for t in range(5)], dim=1)
        torch.testing.assert_close(layer(x, z), each)


@over_trained
@pytest.mark.parametrize("training", [True, False])
def test_a_conditioned_trained_norm_starts_as_it_was_to_the_bit(name: str, training: bool):
    norm, layer, x, z = trained(name)
    norm.train(training)
    layer.train(training)
    assert torch.equal(layer(x, z), norm(x))
    for one, other in zip(layer.buffers(), norm.buffers(), strict=True):
        assert torch.equal(one, other)


@over_trained
def test_the_condition_acts_on_the_trained_output(name: str):
    norm, layer, x, z = trained(name)
    m = randomise(layer.film).modulation(z).detach()
    dim = -1 if isinstance(norm, nn.LayerNorm | nn.RMSNorm) else (0 if z.ndim == 1 else 1)
    expected = oracles.film(*(t.detach().numpy() for t in (norm(x), m.gamma, m.beta)), dim)
    torch.testing.assert_close(layer(x, z).detach(), torch.from_numpy(expected), rtol=1e-5, atol=1e-5)


@over_trained
def test_a_conditioned_norm_is_built_around_what_was_trained(name: str):
    build, _ = TRAINED[name]
    norm = values(build()).eval()
    layer = conditional(type(norm)).from_norm(norm, cond_dim=7)
    own = layer.norm if hasattr(layer, "norm") else layer
    assert [id(p) for p in own.parameters(recurse=False)] == [id(p) for p in norm.parameters()]
    assert not layer.training
    assert not any(module.training for module in layer.modules())
    assert own.eps == norm.eps
    assert isinstance(own, type(norm))
    assert "film" not in dict(norm.named_modules())


@over_trained
def test_copies_and_pickles_of_a_conditioned_norm_compute_the_same(name: str):
    _, layer, x, z = trained(name)
    layer = randomise(layer).eval()
    expected = layer(x, z)
    assert torch.equal(copy.deepcopy(layer)(x, z), expected)
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x, z), expected)


def test_the_checkpoint_of_a_base_loads_into_its_conditioned_norm():
    for kind, sizes in ((nn.GroupNorm, (3, 6)), (nn.LayerNorm, (6,)), (nn.RMSNorm, (6,))):
        option = "affine" if kind is nn.GroupNorm else "elementwise_affine"
        norm, layer = values(kind(*sizes)), conditional(kind)(*sizes, cond_dim=7, **{option: True})
        missing, unexpected = layer.load_state_dict(norm.state_dict(), strict=False)
        assert (missing, unexpected) == (["film.head.weight", "film.head.bias"], [])
        assert isinstance(layer, kind)


def test_a_batch_norm_keeps_its_names_below_norm():
    statistics = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}
    names = {"film.head.weight", "film.head.bias"} | statistics
    assert set(tf.ConditionalBatchNorm2d(3, 7).state_dict()) == names
    affine = {"norm.weight", "norm.bias"}
    assert set(tf.ConditionalBatchNorm2d(3, 7, affine=True).state_dict()) == names | affine


@pytest.mark.parametrize("kind", BATCH)
def test_hooks_that_go_by_class_names_find_the_weight_and_bias_of_a_batch_norm(kind: type):
    layer = conditional(kind)(3, 7, affine=True)
    assert layer.weight is layer.norm.weight
    assert layer.bias is layer.norm.bias
    assert conditional(kind)(3, 7).weight is None


@pytest.mark.parametrize("kind", BATCH)
def test_converting_to_a_synchronised_norm_keeps_the_condition(kind: type):
    layer = randomise(conditional(kind)(3, 7)).eval()
    x, z = torch.randn(BATCH[kind]), torch.randn(2, 7)
    expected = layer(x, z)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(layer)
    assert isinstance(converted, conditional(kind))
    assert isinstance(converted.norm, nn.SyncBatchNorm)
    assert torch.equal(converted(x, z), expected)
    again = conditional(kind).from_norm(converted.norm, cond_dim=7)
    assert again.norm is converted.norm


WRONG = [
    (nn.BatchNorm2d, nn.GroupNorm(1, 3), r"BatchNorm2d\.from_norm: expected nn.BatchNorm2d, got GroupNorm"),
    (nn.BatchNorm1d, nn.BatchNorm2d(3), r"expected nn.BatchNorm1d, got BatchNorm2d"),
    (nn.InstanceNorm1d, nn.InstanceNorm2d(3), r"expected nn.InstanceNorm1d, got InstanceNorm2d"),
    (nn.GroupNorm, nn.BatchNorm2d(3), r"expected nn.GroupNorm, got BatchNorm2d[\s\S]*put a FiLM"),
    (nn.LayerNorm, nn.RMSNorm(3), r"expected nn.LayerNorm, got RMSNorm"),
    (nn.RMSNorm, nn.Identity(), r"expected nn.RMSNorm, got Identity"),
    (nn.LayerNorm, nn.LayerNorm((3, 5)), r"normalized_shape of one axis, the channels, got \(3, 5\)"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("kind", "norm", "message"), WRONG)
def test_only_its_own_kind_of_norm_can_be_conditioned(kind: type, norm: nn.Module, message: str):
    before = dict(vars(norm))
    with pytest.raises(ValueError, match=message):
        conditional(kind).from_norm(norm, cond_dim=7)
    assert vars(norm) == before


@pytest.mark.plain
def test_a_subclass_that_may_compute_something_else_is_refused():
    class ChannelsFirst(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    with pytest.raises(ValueError, match=r"expected nn.LayerNorm, got ChannelsFirst"):
        tf.ConditionalLayerNorm.from_norm(ChannelsFirst(3), cond_dim=7)


@pytest.mark.plain
@pytest.mark.parametrize("kind", [tf.AdaLNZero, tf.AdaRMSNorm])
def test_a_norm_of_others_in_front_of_a_gate_is_refused_with_the_way_to_keep_it(kind: type):
    class OffsetRMSNorm(nn.RMSNorm):
        """As Gemma's: the weight is what is added to one."""

    with pytest.raises(ValueError, match=r"got OffsetRMSNorm.\n.*condition\(model, .*'mlp': \('gate',\)"):
        kind.from_norm(OffsetRMSNorm(3), cond_dim=7)


@pytest.mark.plain
def test_a_norm_over_several_axes_has_no_channel_axis():
    for kind in (tf.ConditionalLayerNorm, tf.ConditionalRMSNorm, tf.AdaLNZero, tf.AdaRMSNorm):
        with pytest.raises(ValueError, match=r"normalized_shape of one axis, the channels, got \(3, 5\)"):
            kind((3, 5), 7)


# Absorption: the same numbers and gradients as the norm, then FiLM.


def heard_before(norm: nn.Module) -> nn.Module:
    """A batch norm with statistics, in evaluation."""
    norm(torch.randn(8, 6, *[4] * (AXES[type(norm)] - 2)) * 2 + 1)
    return norm.eval()


AXES = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}

ABSORBING = {
    "batch 1d": (nn.BatchNorm1d, lambda: heard_before(nn.BatchNorm1d(6)), (2, 6, 5)),
    "batch 2d": (nn.BatchNorm2d, lambda: heard_before(nn.BatchNorm2d(6)), (2, 6, 5, 4)),
    "batch 3d without affine": (
        nn.BatchNorm3d,
        lambda: heard_before(nn.BatchNorm3d(6, affine=False)),
        (2, 6, 5, 4, 3),
    ),
    "group": (nn.GroupNorm, lambda: nn.GroupNorm(3, 6), (2, 6, 5, 4)),
    "group without affine": (nn.GroupNorm, lambda: nn.GroupNorm(2, 6, affine=False), (2, 6, 5)),
    "instance": (nn.InstanceNorm2d, lambda: nn.InstanceNorm2d(6, affine=True), (2, 6, 5, 4)),
    "instance 1d": (nn.InstanceNorm1d, lambda: nn.InstanceNorm1d(6), (2, 6, 5)),
    "instance 3d": (nn.InstanceNorm3d, lambda: nn.InstanceNorm3d(6), (2, 6, 5, 4, 3)),
    "layer": (nn.LayerNorm, lambda: nn.LayerNorm(6), (2, 5, 6)),
    "rms": (nn.RMSNorm, lambda: nn.RMSNorm(6), (2, 5, 6)),
}


@pytest.mark.parametrize("name", ABSORBING)
@pytest.mark.parametrize(
    "rows",
    [[()], [(1,)], [(2,)], [(2,), ()], [(), (2,), (1,)], [(1, 1), (1,)], [(1, 1), (2,)], [(1,), (), (2,)]],
    ids=str,
)
def test_absorbed_is_the_norm_and_then_film_with_all_gradients(name: str, rows: list):
    kind, build, shape = ABSORBING[name]
    norm, x = values(build()).double(), torch.randn(shape).double()
    rows = rows * 2 if len(rows) == 1 else rows
    fields = [torch.randn(*each, 6).double() for each in rows]
    leaves = [leaf.requires_grad_() for leaf in (x, *fields, *norm.parameters())]
    m = tf.Modulation(*fields)
    y = absorption.absorbed(kind, norm, x, m)
    token = kind in (nn.LayerNorm, nn.RMSNorm)
    if ((2,) in rows and (token or kind in AXES)) or (1, 1) in rows[: 2 if (2,) in rows else 0]:
        assert y is None
        return
    expected = tf.FiLM(6, 7, dim=-1 if token else 1)(norm(x), modulation=m)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    ours, theirs = ((value * weight).sum() for value in (y, expected))
    for one, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        torch.testing.assert_close(one, other)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_group_norms_agree_with_the_loop_for_any_shape_precision_and_layout(data: st.DataObject):
    draw = data.draw
    groups, size, batch = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    spatial = draw(st.lists(st.integers(2, 4), min_size=1, max_size=2))
    dtype = draw(st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
    layer = randomise(tf.ConditionalGroupNorm(groups, groups * size, 7))
    layer = layer.double() if dtype == torch.float64 else layer
    x, z = torch.randn(batch, groups * size, *spatial, dtype=dtype), torch.randn(batch, 7)
    x = x.movedim(1, -1).contiguous().movedim(-1, 1) if draw(st.booleans()) else x
    z = z.to(layer.film.head.weight.dtype)
    m = layer.film.modulation(z).detach()
    normed = oracles.group_norm(x.double().numpy(), groups, layer.eps)
    expected = oracles.film(normed, m.gamma.double().numpy(), m.beta.double().numpy(), 1)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-4
    actual = layer(x, z).detach()
    assert actual.dtype == dtype
    torch.testing.assert_close(actual.double(), torch.from_numpy(expected), rtol=tolerance, atol=tolerance)


def test_a_batch_of_none_goes_through():
    assert tf.ConditionalGroupNorm(1, 3, 7)(torch.randn(0, 3, 5), torch.randn(0, 7)).shape == (0, 3, 5)
    assert tf.ConditionalLayerNorm(3, 7)(torch.randn(0, 5, 3), torch.randn(0, 7)).shape == (0, 5, 3)


def test_a_batch_norm_that_takes_its_statistics_from_the_batch_is_never_absorbed():
    m, x = tf.Modulation.identity(6), torch.randn(2, 6, 5)
    assert absorption.absorbed(nn.BatchNorm1d, nn.BatchNorm1d(6), x, m) is None
    assert (
        absorption.absorbed(nn.BatchNorm1d, nn.BatchNorm1d(6, track_running_stats=False).eval(), x, m) is None
    )


def test_wrong_sizes_are_refused_and_never_absorbed():
    layer = tf.ConditionalGroupNorm(1, 3, 7)
    with pytest.raises(ValueError, match=r"gamma has size 2 where x has size 6"):
        layer(torch.randn(6, 3, 5), torch.randn(2, 7))
    with pytest.raises(ValueError, match=r"gamma has 5 channels"):
        layer(torch.randn(2, 3, 5), modulation=tf.Modulation.identity(2, 5))
    with pytest.raises(ValueError, match=r"gamma has 3 axes, expected at most the 2"):
        tf.ConditionalLayerNorm(3, 7)(torch.randn(2, 3), modulation=tf.Modulation.identity(1, 1, 3))


@pytest.mark.parametrize("rows", [0, 1])
def test_no_samples_are_normalised_to_none(rows: int):
    layer = tf.ConditionalInstanceNorm2d(4, 7)
    assert layer(torch.randn(0, 4, 3, 3), torch.randn(rows, 7)).shape == (0, 4, 3, 3)


def test_a_norm_that_keeps_statistics_keeps_them_also_when_it_listens():
    layer = tf.ConditionalInstanceNorm2d(3, 7, track_running_stats=True)
    x, z = 4 + torch.randn(2, 3, 5, 4), torch.randn(2, 7)
    layer(x, z)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(dim=(0, 2, 3)))


def test_per_sample_gradients_come_out_of_vmap():
    for layer in (randomise(tf.ConditionalGroupNorm(1, 3, 7)), randomise(tf.ConditionalLayerNorm(3, 7))):
        x, z = torch.randn(2, 3, 3), torch.randn(2, 7)
        state = dict(layer.named_parameters())

        def loss(state: dict, x: Tensor, z: Tensor, layer: nn.Module = layer) -> Tensor:
            return torch.func.functional_call(layer, state, (x[None], z[None])).square().sum()

        each = torch.vmap(torch.func.grad(loss), (None, 0, 0))(state, x, z)
        for i in range(2):
            one = torch.func.grad(loss)(state, x[i], z[i])
            for name in state:
                torch.testing.assert_close(each[name][i], one[name])


@pytest.mark.plain
def test_conditioned_trained_norms_compile_in_one_graph():
    for name in ("batch 2d", "instance 2d affine", "group", "layer without bias", "rms"):
        _, layer, x, z = trained(name)
        layer = randomise(layer).eval()
        torch.compiler.reset()  # classes that share a forward share its limit of recompilations
        compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x, z), layer(x, z))


# Gated branches.


def test_ada_ln_zero_modulates_by_a_linear_map_of_silu():
    layer = randomise(tf.AdaLNZero(3, 7, eps=0.01)).double()
    x, z = 4 + 3 * torch.randn(2, 5, 3).double(), torch.randn(2, 7).double()
    raw = oracles.linear(oracles.silu(z.numpy()), *head(layer))
    y, gate = layer(x, z)
    expected = oracles.film(oracles.layer_norm(x.numpy(), eps=0.01), 1 + raw[:, :3], raw[:, 3:6], -1)
    torch.testing.assert_close(y, torch.from_numpy(expected))
    torch.testing.assert_close(gate, torch.from_numpy(raw[:, 6:]))


def test_ada_rms_modulates_each_token_by_a_linear_map_of_its_condition():
    layer = randomise(tf.AdaRMSNorm(3, 7, eps=0.01)).double()
    x, z = torch.randn(2, 5, 3).double(), torch.randn(2, 5, 7).double()
    raw = oracles.linear(z.reshape(10, 7).numpy(), *head(layer)).reshape(2, 5, 9)
    y, gate = layer(x, z)
    expected = oracles.film(oracles.rms_norm(x.numpy(), eps=0.01), 1 + raw[..., :3], raw[..., 3:6], -1)
    torch.testing.assert_close(y, torch.from_numpy(expected))
    torch.testing.assert_close(gate, torch.from_numpy(raw[..., 6:]))


GATED = [(tf.AdaLNZero, nn.LayerNorm), (tf.AdaRMSNorm, nn.RMSNorm)]


@pytest.mark.parametrize(("kind", "base"), GATED)
def test_a_fresh_block_is_the_identity_and_a_pretrained_one_is_kept(kind: type, base: type):
    x, z, branch = torch.randn(2, 5, 3), torch.randn(2, 7), nn.Linear(3, 3)
    fresh = kind(3, 7)
    y, gate = fresh(x, z)
    assert torch.equal(tf.functional.gated_residual(x, branch(y), gate, dim=-1), x)
    assert torch.equal(y, base(3, eps=1e-6, elementwise_affine=False)(x))
    norm = values(base(3))
    y, gate = kind.from_norm(copy.deepcopy(norm), cond_dim=7)(x, z)
    assert torch.equal(tf.functional.gated_residual(x, branch(y), gate, dim=-1), x + branch(norm(x)))
    assert torch.equal(kind.from_norm(norm, cond_dim=7, gate="zero")(x, z)[1], torch.zeros(2, 3))


@pytest.mark.parametrize(("kind", "base"), GATED)
def test_the_gate_hears_the_condition(kind: type, base: type):
    layer, x, z = randomise(kind(3, 7)), torch.randn(2, 5, 3), torch.randn(2, 7)
    (y, gate), (other_y, other_gate) = layer(x, z), layer(x, z + 1)
    assert not torch.allclose(gate, other_gate)
    assert not torch.allclose(y, other_y)
    m = layer.modulation(z)
    again = layer(x, modulation=m)
    assert torch.equal(again[0], y)
    assert torch.equal(again[1], gate)
    assert isinstance(layer, base)


@pytest.mark.plain
@pytest.mark.parametrize(("kind", "base"), GATED)
def test_a_gated_norm_needs_a_gate(kind: type, base: type):
    x, layer = torch.randn(2, 5, 3), kind(3, 7)
    with pytest.raises(ValueError, match=rf"{kind.__name__}: expected a modulation with a gate"):
        layer(x, modulation=tf.Modulation.identity(2, 3))
    with pytest.raises(ValueError, match=r"expected a condition or a modulation, got neither"):
        layer(x)
    with pytest.raises(ValueError, match=r"gate expected one of \[None, 'zero', 'one'\], got 'half'"):
        kind.from_norm(base(3), 7, gate="half")


def test_both_ends_of_a_gated_block_receive_gradients_at_the_start():
    layer, branch = tf.AdaLNZero(3, 7), nn.Linear(3, 3)
    x, z = torch.randn(2, 5, 3), torch.randn(2, 7)
    y, gate = layer(x, z)
    tf.functional.gated_residual(x, branch(y), gate, dim=-1).square().sum().backward()
    weight = layer.film.head.weight.grad
    assert weight[6:].abs().min() > 0
    assert not weight[:6].any()  # the closed gate; they follow once it has opened


def test_the_start_of_a_norm_on_the_meta_device_is_that_of_torch():
    with torch.device("meta"):
        layer = tf.ConditionalGroupNorm(3, 6, 7, affine=True)
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    layer.film.reset_parameters()
    x, z = torch.randn(2, 6, 5), torch.randn(2, 7)
    assert torch.equal(layer(x, z), nn.GroupNorm(3, 6)(x))
