"""film and gated_residual against loops, and every refusal with its message."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import oracles
import torchfilm.functional as F


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def torchs_own_warnings(test: Callable) -> Callable:
    """Let pass what torch itself warns of when it compiles or takes forward gradients."""
    for message in (".torch.jit.script", "<class .torch.autograd.function.Function.> should not be inst"):
        test = pytest.mark.filterwarnings(f"ignore:{message}:DeprecationWarning")(test)
    return test


def assert_close(actual: Tensor, expected: np.ndarray) -> None:
    torch.testing.assert_close(actual, torch.from_numpy(expected))


CHANNELS_LAST = [
    # x, dim, gamma, beta
    ((2, 3, 5, 7), 1, (3,), (3,)),
    ((2, 3, 5, 7), 1, (2, 3), (2, 3)),
    ((2, 3, 5, 7), 1, (2, 3), (3,)),
    ((2, 3, 5, 7), 1, (1, 3), (2, 3)),
    ((2, 3, 5, 7), 1, (2, 5, 3), (2, 3)),
    ((2, 3, 5, 7), 1, (2, 1, 3), (2, 5, 3)),
    ((2, 3, 5, 7), 1, (2, 5, 7, 3), (2, 5, 7, 3)),
    ((2, 3, 5, 7), -1, (2, 3, 5, 7), (2, 3, 7)),
    ((2, 3, 5, 7), 2, (2, 3, 5), (2, 5)),
    ((2, 3, 5), 1, (2, 5, 3), (2, 3)),
    ((2, 3, 5), -1, (2, 3, 5), (2, 5)),
    ((2, 3), 1, (2, 3), (3,)),
    ((3, 5), 0, (3,), (5, 3)),
    ((3,), 0, (3,), (3,)),
    ((2, 3, 3, 3), 1, (2, 3), (3,)),
    ((0, 3, 5), 1, (0, 3), (3,)),
]


@pytest.mark.parametrize(("shape", "dim", "gamma", "beta"), CHANNELS_LAST, ids=str)
def test_film_is_a_scale_and_a_shift_of_each_channel(shape, dim, gamma, beta):
    x, g, b = random(*shape), random(*gamma), random(*beta)
    expected = oracles.film(x.numpy(), g.numpy(), b.numpy(), dim)
    assert_close(F.film(x, g, b, dim), expected)
    assert_close(F.film(x, g, b, dim - len(shape) if dim >= 0 else dim + len(shape)), expected)


@pytest.mark.parametrize("gamma", [(2, 3, 5, 7), (2, 3, 1, 1), (1, 3, 5, 1), (2, 3, 1, 7)], ids=str)
def test_a_full_map_follows_the_layout_of_x(gamma):
    x, g, b = random(2, 3, 5, 7), random(*gamma), random(2, 3, 5, 7)
    assert_close(F.film(x, g, b), oracles.film_map(x.numpy(), g.numpy(), b.numpy()))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_film_agrees_with_the_loop_for_any_shape_and_channel_axis(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    dim = data.draw(st.integers(-len(shape), len(shape) - 1))
    rest = [size for i, size in enumerate(shape) if i != dim % len(shape)]
    count = data.draw(st.integers(0, len(rest) - 1 if dim % len(shape) != len(shape) - 1 else len(rest)))
    lead = [data.draw(st.sampled_from([1, size])) for size in rest[:count]]
    x, g, b = random(*shape), random(*lead, shape[dim]), random(shape[dim])
    assert_close(F.film(x, g, b, dim), oracles.film(x.numpy(), g.numpy(), b.numpy(), dim))


def test_a_square_of_steps_and_channels_is_never_guessed():
    x, g = random(2, 5, 5), random(2, 5, 5)
    with pytest.raises(ValueError, match=r"gamma fits with its channels on axis 1 and with them last"):
        F.film(x, g, g)
    last = F.film(x, g, g, modulation_dim=-1)
    assert_close(last, oracles.film(x.numpy(), g.numpy(), g.numpy(), 1))
    as_map = F.film(x, g, g, modulation_dim=1)
    assert_close(as_map, oracles.film_map(x.numpy(), g.numpy(), g.numpy()))
    assert not torch.allclose(last, as_map)


@pytest.mark.parametrize("size", [7, 70_000])
@pytest.mark.parametrize("grad", [True, False])
def test_the_fast_paths_agree_with_the_definition(size: int, grad: bool):
    x, g, b = random(2, 3, size, dtype=torch.float32), torch.randn(2, 3), torch.randn(2, 3)
    before = x.clone()
    y = F.film(x.requires_grad_(grad), g, b)
    torch.testing.assert_close(y.detach(), g[..., None] * before + b[..., None])
    assert torch.equal(x.detach(), before)
    if grad:
        y.sum().backward()
        torch.testing.assert_close(x.grad, g[..., None].expand_as(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_small_modulations_survive_half_precision(dtype: torch.dtype):
    x = torch.full((1, 2, 3), 100.0, dtype=dtype)
    gamma, beta = torch.tensor([1.0009, 0.9991]), torch.tensor([0.9, -0.9])
    y = F.film(x, gamma, beta)
    assert y.dtype == dtype
    exact = torch.tensor([100.99, 99.01])[None, :, None].expand(1, 2, 3)
    torch.testing.assert_close(y, exact.to(dtype), rtol=0, atol=0)
    in_half = gamma.to(dtype)[:, None] * x + beta.to(dtype)[:, None]
    if dtype == torch.bfloat16:
        assert (in_half.float() - exact).abs().max() >= (y.float() - exact).abs().max()


@pytest.mark.parametrize(
    ("x", "g", "b"),
    [
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_mixed_precisions_keep_that_of_the_features(x, g, b):
    features, gamma, beta = random(2, 3, 5, dtype=x), random(2, 3, dtype=g), random(2, 3, dtype=b)
    y = F.film(features, gamma, beta)
    assert y.dtype == x
    expected = gamma.double()[..., None] * features.double() + beta.double()[..., None]
    torch.testing.assert_close(y, expected.to(x))


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (64, 3, 50, 20)], ids=str)
def test_channels_last_memory_stays_channels_last(shape):
    x = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    y = F.film(x, torch.randn(shape[0], 3), torch.randn(shape[0], 3))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_film_is_differentiable_twice_in_x_gamma_and_beta():
    variables = [random(*shape).requires_grad_() for shape in ((2, 3, 5), (2, 3), (2, 5, 3))]
    assert torch.autograd.gradcheck(F.film, variables)
    assert torch.autograd.gradgradcheck(F.film, variables)


def test_vmap_over_gamma_or_beta_alone():
    x, g, b = random(2, 3, 5), random(3), random(7, 3)
    stacked = torch.stack([F.film(x, g, row) for row in b])
    torch.testing.assert_close(torch.vmap(lambda row: F.film(x, g, row))(b), stacked)
    stacked = torch.stack([F.film(x, row, g) for row in b])
    torch.testing.assert_close(torch.vmap(lambda row: F.film(x, row, g))(b), stacked)


@pytest.mark.parametrize("gate", [(3,), (2, 3), (2, 5, 3), (1, 3)], ids=str)
@pytest.mark.parametrize("activation", [None, "relu", "silu"])
def test_a_gate_scales_what_film_and_its_activation_give(gate: tuple, activation: str | None):
    x, g, b, scale = random(2, 3, 5, 7), random(2, 3), random(2, 5, 3), random(*gate)
    before = oracles.film(x.numpy(), g.numpy(), b.numpy(), 1)
    after = {None: lambda v: v, "relu": lambda v: np.maximum(v, 0), "silu": oracles.silu}[activation](before)
    expected = oracles.film(after, scale.numpy(), np.zeros(3), 1)
    assert_close(F.film(x, g, b, gate=scale, activation=activation), expected)


ACTIVATED = [("relu", torch.relu), ("silu", torch.nn.functional.silu)]
ALIGNED = [shapes for shapes in CHANNELS_LAST if 0 not in shapes[0]]


@pytest.mark.parametrize(("activation", "function"), ACTIVATED)
@pytest.mark.parametrize(("shape", "dim", "gamma", "beta"), ALIGNED, ids=str)
def test_a_fused_activation_has_the_value_and_gradients_of_one_applied_after(
    activation, function, shape, dim, gamma, beta
):
    values = [random(*shape), random(*gamma), random(*beta)]
    assert_close(F.film(*values, dim, activation=activation), function(F.film(*values, dim)).numpy())
    leaves = [value.requires_grad_() for value in values]
    ours = F.film(*leaves, dim, activation=activation)
    theirs = function(F.film(*leaves, dim))
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    pairs = zip(
        torch.autograd.grad(ours, leaves, weight), torch.autograd.grad(theirs, leaves, weight), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(("activation", "function"), ACTIVATED)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
def test_only_the_gradients_that_are_wanted_are_made_and_they_are_right(activation, function, wanted):
    values = [random(2, 3, 5), random(2, 3), random(2, 5, 3)]
    leaves = [values[i].requires_grad_() for i in wanted]
    ours = torch.autograd.grad(F.film(*values, activation=activation).square().sum(), leaves)
    theirs = torch.autograd.grad(function(F.film(*values)).square().sum(), leaves)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


@torchs_own_warnings
@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("beta", [(2, 3), (2, 5, 3), (3,)], ids=str)
def test_a_fused_activation_is_differentiable_forwards_in_batches_and_twice(activation: str, beta: tuple):
    variables = [random(*shape).requires_grad_() for shape in ((2, 3, 5), (2, 3), beta)]

    def fused(*values: Tensor) -> Tensor:
        return F.film(*values, activation=activation)

    assert torch.autograd.gradcheck(fused, variables, check_forward_ad=True, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(fused, variables)


@torchs_own_warnings
@pytest.mark.parametrize(("activation", "function"), ACTIVATED)
def test_a_fused_activation_goes_through_the_transforms_of_functions(activation, function):
    x, g, b = random(2, 3, 5), random(2, 3), random(7, 3)

    def loss(take, x: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return take(x, g, b).square().sum()

    def fused(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return F.film(x, g, b, activation=activation)

    def plain(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return function(F.film(x, g, b))

    ours, theirs = (
        (
            torch.vmap(torch.func.grad(loss, argnums=(1, 2, 3)), (None, None, None, 0))(take, x, g, b),
            torch.func.hessian(loss, argnums=(1, 2, 3))(take, x, g, b[0]),
            torch.vmap(lambda row: take(x, g, row))(b),  # noqa: B023
            torch.func.jvp(lambda g: take(x, g, b[0]), (g,), (g,)),  # noqa: B023
        )
        for take in (fused, plain)
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", ["relu", "silu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_saves_no_activation_beyond_the_inputs(activation: str, dtype: torch.dtype):
    x, g, b = torch.randn(2, 3, 500, dtype=dtype), torch.randn(2, 3), torch.randn(2, 3)
    leaves, saved = [value.requires_grad_() for value in (x, g, b)], []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        y = F.film(*leaves, activation=activation)
    inputs = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    assert {tensor.untyped_storage().data_ptr() for tensor in saved} <= inputs
    before = [leaf.detach().clone() for leaf in leaves]
    y.sum().backward()
    assert [leaf.grad.dtype for leaf in leaves] == [leaf.dtype for leaf in leaves]
    for leaf, value in zip(leaves, before, strict=True):
        assert torch.equal(leaf.detach(), value)


@pytest.mark.parametrize(("activation", "function"), ACTIVATED)
@pytest.mark.parametrize(
    ("x", "g", "b"),
    [
        (torch.float32, torch.float64, torch.float32),
        (torch.float32, torch.float32, torch.float64),
        (torch.float64, torch.float32, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_a_fused_activation_of_mixed_precisions_is_rounded_once(activation, function, x, g, b):
    values = [random(2, 3, 5, dtype=x), random(2, 3, dtype=g), random(3, dtype=b)]
    exact = [value.double().requires_grad_() for value in values]
    leaves = [value.requires_grad_() for value in values]
    y, expected = F.film(*leaves, activation=activation), function(F.film(*exact))
    torch.testing.assert_close(y, expected.to(x))
    y.sum().backward()
    expected.sum().backward()
    for leaf, other in zip(leaves, exact, strict=True):
        torch.testing.assert_close(leaf.grad, other.grad.to(leaf.dtype), rtol=0.02, atol=0.02)


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_a_fused_activation_agrees_with_the_loop_in_any_layout(data):
    shape = data.draw(st.lists(st.integers(1, 4), min_size=2, max_size=4))
    dim, order = (
        data.draw(st.integers(-len(shape), len(shape) - 1)),
        data.draw(st.permutations(range(len(shape)))),
    )
    back = [order.index(i) for i in range(len(shape))]
    x, g, b = random(*(shape[i] for i in order)).permute(back), random(shape[dim]), random(shape[dim])
    leaf = x.detach().requires_grad_(data.draw(st.booleans()))
    y = F.film(leaf, g, b, dim, activation="relu")
    expected = np.maximum(oracles.film(x.numpy(), g.numpy(), b.numpy(), dim), 0)
    assert_close(y.detach(), expected)
    wide = [i for i, size in enumerate(shape) if size > 1]
    assert [y.stride(i) for i in wide] == [torch.relu(g[0] * x).stride(i) for i in wide]


@pytest.mark.plain
def test_another_activation_is_refused():
    with pytest.raises(ValueError, match=r"one of \['relu', 'silu'\] or None, got 'gelu'[\s\S]*apply any"):
        F.film(random(2, 3), random(3), random(3), activation="gelu")


def test_the_feature_wise_affine_adds_one_to_its_scale():
    x, scale, shift = random(2, 5, 3), random(2, 3), random(2, 3)
    expected = oracles.film(x.numpy(), 1 + scale.numpy(), shift.numpy(), -1)
    assert_close(F.featurewise_affine(x, scale, shift), expected)
    assert_close(F.featurewise_affine(x.mT, scale, shift, dim=1), expected.transpose(0, 2, 1))
    small = torch.full((3,), 0.001, dtype=torch.bfloat16)
    big = torch.full((2, 3), 1000.0)
    assert F.featurewise_affine(big, small, 0 * small).min() > 1000.9  # 1 + 0.001 is 1 in bfloat16


@pytest.mark.parametrize("gate", [(3,), (2, 3), (2, 5, 3)], ids=str)
def test_a_gated_residual_adds_its_branch_through_the_gate(gate):
    x, branch, g = random(2, 3, 5, 7), random(2, 3, 5, 7), random(*gate)
    expected = oracles.gated_residual(x.numpy(), branch.numpy(), g.numpy(), 1)
    assert_close(F.gated_residual(x, branch, g), expected)


def test_a_gate_of_zero_is_no_branch_and_of_one_the_plain_sum():
    x, branch = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    assert torch.equal(F.gated_residual(x, branch, torch.zeros(2, 3)), x)
    assert torch.equal(F.gated_residual(x, branch, torch.ones(2, 3)), x + branch)
    assert F.gated_residual(x.bfloat16(), branch.bfloat16(), torch.ones(2, 3)).dtype == torch.bfloat16


CHANNELS_LAST_BY_MISTAKE = """\
FiLM site 'stage2.block1': gamma has 64 channels, but x has size 1 on its channel axis (dim=1).
  x      (2, 1, 1, 64)
  gamma  (2, 64)
If x is channels-last, use dim=-1."""


def test_the_message_for_channels_last_features_is_whole():
    with pytest.raises(ValueError, match="channels-last") as caught:
        F.film(torch.rand(2, 1, 1, 64), torch.rand(2, 64), torch.rand(2, 64), site="stage2.block1")
    assert str(caught.value) == CHANNELS_LAST_BY_MISTAKE


REFUSED = [
    # x, dim, gamma, beta, the message
    ((2, 3, 5), 1, (2, 7), (2, 3), r"film: gamma has 7 channels, but x has size 3 .*\(dim=1\)"),
    (
        (2, 3, 5),
        1,
        (2, 3),
        (2, 7),
        r"beta has 7 channels[\s\S]*  x     \(2, 3, 5\)\n  beta  \(2, 7\)\nMake the gen",
    ),
    ((2, 3, 5, 7), 1, (2, 5), (5,), "If the channels of x are on axis 2, use dim=2"),
    ((2, 3, 5, 7), 1, (2, 9, 1, 1), (3,), "gamma has 9 channels"),
    ((2, 3, 5, 7), 1, (2, 9, 5, 7), (3,), "gamma has 9 channels"),
    ((2, 3, 5), 1, (2, 1), (3,), "gamma has 1 channels"),
    (
        (6, 3, 5),
        1,
        (2, 3),
        (3,),
        r"size 2 where x has size 6 \(axis 0 of x\)[\s\S]*repeat_interleave\(3, dim=0\)",
    ),
    (
        (5, 3, 7),
        1,
        (2, 3),
        (3,),
        r"size 2 where x has size 5 \(axis 0 of x\)[\s\S]*align with x's from the left",
    ),
    ((5, 3, 7), 1, (0, 3), (3,), r"size 0 where x has size 5 \(axis 0 of x\)"),
    ((2, 3, 5, 7), 1, (2, 7, 3), (3,), r"size 7 where x has size 5 \(axis 2 of x\)"),
    ((2, 3), 1, (2, 5, 3), (3,), "gamma has 3 axes, expected at most the 2 of x"),
    ((2, 3), 1, (), (3,), "gamma is a single number, expected one per channel"),
    ((2, 3), 2, (3,), (3,), "dim=2 is no axis of x, which has 2"),
]


@pytest.mark.parametrize(("shape", "dim", "gamma", "beta", "message"), REFUSED)
def test_sizes_that_do_not_fit_are_refused_before_anything_is_multiplied(shape, dim, gamma, beta, message):
    with pytest.raises(ValueError, match=message):
        F.film(random(*shape), random(*gamma), random(*beta), dim)


@pytest.mark.parametrize("shape", [(6, 3, 5), (7, 3, 5), (6, 5), (7, 5)], ids=str)
def test_time_is_only_suspected_first_where_there_is_time(shape: tuple[int, ...]):
    hint = "If time .* batch=1.$" if len(shape) > 2 else r"graphs, give cond=z\[graph\], that of each node.$"
    with pytest.raises(ValueError, match=rf"axis 0 of x[\s\S]*\n.*{hint}"):
        F.film(random(*shape), random(3, 5), random(5), -1, site="here")


def test_a_modulation_axis_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="modulation_dim=2 is no axis of gamma"):
        F.film(random(2, 3, 5), random(2, 3), random(3), modulation_dim=2)


@pytest.mark.plain
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool], ids=str)
@pytest.mark.parametrize(
    "modulated",
    [
        lambda x, gamma: F.film(x, gamma, gamma),
        lambda x, gamma: F.film(x, gamma, gamma, activation="relu"),
        lambda x, gamma: F.film(x, gamma, gamma, gate=gamma),
        lambda x, gamma: F.film_(x, gamma, gamma),
        lambda x, gamma: F.gated_residual(x, x, gamma),
    ],
    ids=["film", "activation", "gate", "in place", "gated residual"],
)
def test_features_of_integers_are_refused(modulated: Callable, dtype: torch.dtype):
    x = torch.ones(2, 3, 5, dtype=dtype)
    with pytest.raises(
        ValueError, match=rf"can hold the result in torch.float32, got {dtype}.*\n.*\(2, 3, 5\)"
    ):
        modulated(x, torch.rand(2, 3))


@pytest.mark.plain
def test_the_imaginary_part_of_gamma_is_never_dropped():
    x, gamma, beta = torch.randn(2, 3, 5), torch.randn(2, 3, dtype=torch.complex64), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"the result in torch.complex64, got torch.float32"):
        F.film(x, gamma, beta)
    y = F.film(x.to(torch.complex64), gamma, beta)
    torch.testing.assert_close(y, gamma[..., None] * x)


@pytest.mark.plain
def test_a_branch_of_another_shape_is_refused():
    with pytest.raises(ValueError, match=r"expected a branch of the shape of x[\s\S]*branch  \(2, 3, 1\)"):
        F.gated_residual(random(2, 3, 5), random(2, 3, 1), random(3))


@pytest.mark.plain
def test_the_compiled_film_is_one_graph_for_every_layout_and_agrees():
    torch.compiler.reset()
    compiled = torch.compile(F.film, fullgraph=True, backend="aot_eager", dynamic=False)
    for shape, dim, gamma in [((2, 3, 5), 1, (2, 3)), ((2, 5, 3), -1, (2, 5, 3)), ((2, 3, 5), 1, (2, 5, 3))]:
        x, g, b = random(*shape), random(*gamma), random(3)
        torch.testing.assert_close(compiled(x, g, b, dim), F.film(x, g, b, dim))


@torchs_own_warnings
@pytest.mark.plain
@pytest.mark.parametrize(("activation", "function"), ACTIVATED)
def test_a_compiled_fused_activation_is_one_graph_with_the_same_gradients(activation, function):
    torch.compiler.reset()
    compiled = torch.compile(F.film, fullgraph=True, backend="aot_eager")
    leaves = [value.requires_grad_() for value in (random(2, 3, 5), random(2, 3), random(2, 3))]
    ours = compiled(*leaves, activation=activation).square().sum()
    theirs = function(F.film(*leaves)).square().sum()
    pairs = zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other)


@torchs_own_warnings
@pytest.mark.plain
@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_fused_activation_takes_another_batch(strict: bool):
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gamma, self.beta = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return F.film(x, self.gamma, self.beta, activation="relu")

    block, batch = Block(), torch.export.Dim("batch")
    program = torch.export.export(block, (torch.randn(2, 3, 5),), dynamic_shapes=[{0: batch}], strict=strict)
    x = torch.randn(7, 3, 5)
    torch.testing.assert_close(program.module()(x), block(x))


@pytest.mark.plain
@torchs_own_warnings
def test_the_native_compiler_makes_the_same_numbers_forward_and_backward():
    torch.compiler.reset()

    def loss(x: Tensor, g: Tensor, b: Tensor) -> Tensor:
        return F.film(x, g, b, activation="relu").square().sum()

    values = [random(2, 3, 5, dtype=torch.float32), torch.randn(2, 3), torch.randn(2, 3)]
    leaves = [value.requires_grad_() for value in values]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    actual = torch.autograd.grad(torch.compile(loss, fullgraph=True)(*leaves), leaves)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("function", [F.film, F.film_])
@pytest.mark.parametrize(
    ("narrow", "wide"), [(torch.float32, torch.float64), (torch.bfloat16, torch.float32)]
)
def test_a_gate_is_taken_in_the_precision_of_the_features_where_that_is_wider(function, narrow, wide):
    x = torch.rand(2, 3, 5, dtype=wide)
    gamma, beta, gate = torch.rand(3, 2, 3, dtype=narrow)
    g, b, a = (value.to(wide)[..., None] for value in (gamma, beta, gate))
    expected = a * (g * x + b)
    eps = 4 * torch.finfo(wide).eps
    torch.testing.assert_close(function(x, gamma, beta, gate=gate), expected, rtol=eps, atol=eps)
