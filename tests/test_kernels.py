"""The kernels in C++ give what the plain path gives, forward and backward, wherever they take the tensors."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import torchfilm as tf
import torchfilm.functional as F
from kernels import LAYOUTS, NORMS, agree, conditional, given, needs_compiler, results
from torchfilm import native


@needs_compiler
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("rows", ["each", "all", "one row"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_film_agrees_with_the_plain_path(name: str, rows: str, activation, calls: list[str]):
    *leaves, dim = given(name, rows)
    agree(lambda x, gamma, beta: F.film(x, gamma, beta, dim, activation=activation), *leaves)
    assert calls == ["film"]
    with torch.no_grad():
        assert F.film(*leaves, dim, activation=activation).stride() == leaves[0].stride()
    assert calls == ["film", "film"]


@needs_compiler
@pytest.mark.parametrize("length", [*range(2, 37), 49, 64, 2049, 4100])
def test_rows_of_each_length(length: int, calls: list[str]):
    """Short rows are summed together, in 16, 8, 4 or 1 lanes; the last vectors of longer ones overlap."""
    x, gamma, beta = torch.randn(2, 23, length), torch.randn(2, 23), torch.randn(2, 23)
    agree(lambda *leaves: F.film(*leaves, activation="relu"), x, gamma, beta)
    whole = x.clone()
    F.film_(whole, gamma, beta)
    torch.testing.assert_close(whole, gamma[..., None] * x + beta[..., None])
    assert calls == ["film", "film"]


@needs_compiler
@pytest.mark.parametrize("name", ["images", "channels last", "tokens"])
def test_film_agrees_where_gamma_has_an_axis_for_each_of_the_features(name: str, calls: list[str]):
    x, gamma, beta, dim = given(name, "each")
    gamma, beta = (
        one.view([len(x) if i == 0 else -1 if i == dim % x.ndim else 1 for i in range(x.ndim)])
        for one in (gamma, beta)
    )
    agree(lambda *leaves: F.film(*leaves, dim), x, gamma, beta)
    assert calls == ["film"]


@needs_compiler
def test_what_does_not_fit_is_explained_as_ever(calls: list[str]):
    x, gamma = torch.randn(2, 3, 5, 7), torch.randn(2, 7)
    with pytest.raises(ValueError, match="gamma has 7 channels, but x has size 3"):
        F.film(x, gamma, gamma)
    with pytest.raises(ValueError, match="gamma has size 4 where x has size 2"):
        F.film(x, torch.randn(4, 3), torch.randn(4, 3))
    with pytest.raises(ValueError, match="dim=4 is no axis of x"):
        F.film(x, torch.randn(3), torch.randn(3), dim=4)
    assert calls == []


@needs_compiler
def test_silu_goes_the_plain_way(calls: list[str]):
    *leaves, dim = given("images", "each")
    agree(lambda x, gamma, beta: F.film(x, gamma, beta, dim, activation="silu"), *leaves)
    assert calls == []


@needs_compiler
def test_gammas_cut_out_of_a_wider_head(calls: list[str]):
    head = torch.randn(2, 10)
    agree(lambda x, head: F.film(x, head[:, :3], head[:, 4:7]), torch.randn(2, 3, 5, 7), head)
    assert calls == ["film"]


@needs_compiler
def test_the_gradient_of_a_sum_and_of_other_memory(calls: list[str]):
    x, gamma, beta, _ = given("channels last", "each")
    agree(lambda *leaves: F.film(*leaves).sum().expand(1), x, gamma, beta)
    agree(lambda *leaves: F.film(*leaves).transpose(1, 2).contiguous(), x, gamma, beta)
    assert calls == ["film", "film"]


@needs_compiler
def test_the_identity_is_kept_to_the_bit(calls: list[str]):
    for name in LAYOUTS:
        x, gamma, beta, dim = given(name, "each")
        assert torch.equal(F.film(x, torch.ones_like(gamma), torch.zeros_like(beta), dim), x)
    assert len(calls) == len(LAYOUTS)


@needs_compiler
@pytest.mark.parametrize("name", ["images", "tokens"])
def test_a_nan_stays_one_and_lets_its_gradient_through_as_torchs_relu(name: str, calls: list[str]):
    x, gamma, beta, dim = given(name, "each")
    x.view(-1)[[0, 5, 17]] = torch.tensor([float("nan"), float("inf"), -float("inf")])
    found = results(lambda *leaves: F.film(*leaves, dim, activation="relu"), x, gamma, beta)
    native.disable()
    plain = results(lambda *leaves: F.film(*leaves, dim).relu(), x, gamma, beta)
    assert calls == ["film"]
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-4, equal_nan=True)


@needs_compiler
def test_features_are_modulated_where_they_lie_and_autograd_sees_it(calls: list[str]):
    x, gamma, beta, dim = given("tokens", "each")
    expected, kept = gamma[:, None] * x + beta[:, None], x.clone().requires_grad_()
    y = F.film_(x, gamma, beta, dim)
    assert y is x
    assert calls == ["film"]
    torch.testing.assert_close(y, expected)
    features = torch.randn(3, 131, 7)
    product = kept * features
    with torch.no_grad():
        F.film_(features, gamma, beta, dim)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        unwatched = features.clone()
        assert F.film_(unwatched, gamma, beta, dim) is unwatched
    assert calls == ["film"] * 3


@needs_compiler
@pytest.mark.parametrize("name", ["images", "tokens", "group", "layer", "rms"])
def test_gradients_can_be_differentiated_again(name: str, calls: list[str]):
    if name in NORMS:
        layer, x, _ = conditional(name)
        channels = x.shape[1] if name == "group" else x.shape[-1]
        gamma, beta = torch.randn(5, channels), torch.randn(5, channels)

        def way(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            return copy.deepcopy(layer).to(x.dtype)(x, modulation=tf.Modulation(gamma, beta))
    else:
        x, gamma, beta, dim = given(name, "each")

        def way(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
            return F.film(x, gamma, beta, dim, activation="relu")

    def slopes(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        y = way(x, gamma, beta)
        found = torch.autograd.grad(y.square().sum(), (x, gamma), create_graph=True)
        return torch.cat([one.flatten() for one in found]) + beta.sum()

    agree(slopes, x, gamma, beta)
    assert calls


@needs_compiler
def test_a_graph_outlives_the_kernels(calls: list[str]):
    layer, x, _ = conditional("group")
    x.requires_grad_()
    gamma, beta = torch.randn(5, 12), torch.randn(5, 12)
    kept = [layer(x, modulation=tf.Modulation(gamma, beta)), F.film(x, gamma, beta)]
    native.disable()
    plain = [layer(x, modulation=tf.Modulation(gamma, beta)), F.film(x, gamma, beta)]
    weight = torch.randn(x.shape)
    for one, other in zip(kept, plain, strict=True):
        found, expected = (torch.autograd.grad(y, x, weight)[0] for y in (one, other))
        torch.testing.assert_close(found, expected, rtol=2e-5, atol=1e-5)
        assert not found.requires_grad
    assert calls == ["norm", "film", "film_gradients"]  # gamma needs no gradient: x was not kept


@needs_compiler
def test_threads_change_nothing(calls: list[str]):
    """With features enough for two, and for other threads of Python to go on meanwhile."""
    before = torch.get_num_threads()
    norms = [(layer, many(x, 100)) for layer, x, _ in map(conditional, ("of sixteen", "layer", "rms"))]
    rows = [(len(x), x.shape[layer.film.dim]) for layer, x in norms]
    modulations = [tf.Modulation(torch.randn(size), torch.randn(size)) for size in rows]
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        found.append([])
        for (layer, x), m in zip(norms, modulations, strict=True):
            found[-1] += results(lambda x, layer=layer, m=m: layer(x, modulation=m), x)
        for name in LAYOUTS:
            torch.manual_seed(1)
            *leaves, dim = given(name, "each")
            leaves = [many(leaf, 70_000 // leaves[0].numel() + 1) for leaf in leaves]
            found[-1] += results(lambda *leaves, dim=dim: F.film(*leaves, dim, activation="relu"), *leaves)
    torch.set_num_threads(before)
    assert calls == 2 * (len(norms) * ["norm"] + len(LAYOUTS) * ["film"])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def many(x: Tensor, times: int) -> Tensor:
    """The same samples again, in memory of the same order."""
    return torch.cat([x] * times)


class Named(Tensor):
    """A subclass, as a library for quantities or layouts may have one."""


def unlike_the_others() -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Features that the kernels must leave alone, with gamma and beta."""
    x, gamma, beta = torch.randn(2, 6, 4, 8), torch.randn(2, 6), torch.randn(2, 6)
    return {
        "double": (x.double(), gamma.double(), beta.double()),
        "bfloat16": (x.bfloat16(), gamma, beta),
        "gaps in memory": (x[:, :, ::2], gamma, beta),
        "another order": (x.permute(0, 1, 3, 2), gamma, beta),
        "negated when read": (torch._neg_view(x), gamma, beta),
        "a subclass": (x.as_subclass(Named), gamma, beta),
        "a map": (x, torch.randn(2, 6, 4, 8), torch.randn(2, 6, 4, 8)),
        "two shapes": (x, gamma, torch.randn(6)),
        "the meta device": (x.to("meta"), gamma.to("meta"), beta.to("meta")),
    }


@needs_compiler
@pytest.mark.parametrize("name", unlike_the_others())
def test_what_the_kernels_do_not_take_goes_the_plain_way(name: str, calls: list[str]):
    x, gamma, beta = unlike_the_others()[name]
    y = F.film(x, gamma, beta)
    assert calls == []
    if name != "the meta device":
        wide = [one if one.ndim == 4 else one.view(-1, 6, 1, 1) for one in (gamma, beta)]
        torch.testing.assert_close(
            y.as_subclass(Tensor), (wide[0] * x + wide[1]).to(x.dtype).as_subclass(Tensor)
        )


@needs_compiler
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")
def test_transforms_go_the_plain_way(calls: list[str]):
    x, gamma, beta = torch.randn(2, 6, 4, 8), torch.randn(2, 6), torch.randn(2, 6)
    layer = tf.ConditionalGroupNorm(3, 6, cond_dim=2)

    def norm(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return layer(x, modulation=tf.Modulation(gamma, beta))

    push = torch.randn_like(x)
    for way in (F.film, F.film_, norm):
        mapped = torch.vmap(lambda x, g, b, way=way: way(x[None], g[None], b[None])[0])(
            x.clone(), gamma, beta
        )
        torch.testing.assert_close(mapped, way(x.clone(), gamma, beta), rtol=1e-4, atol=1e-5)
        _, moved = torch.func.jvp(lambda x, way=way: way(x.clone(), gamma, beta), (x,), (push,))
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, push)
            tangent = torch.autograd.forward_ad.unpack_dual(way(dual.clone(), gamma, beta)).tangent
        torch.testing.assert_close(tangent, moved)
        assert float(moved.abs().max()) > 0


@needs_compiler
def test_gradients_of_functions_are_those_of_the_plain_path(calls: list[str]):
    x, gamma, beta = torch.randn(2, 6, 4, 8), torch.randn(2, 6), torch.randn(2, 6)

    def value(x: Tensor) -> Tensor:
        return F.film(x, gamma, beta, activation="relu").square().sum()

    found = torch.func.grad(value)(x)
    native.disable()
    torch.testing.assert_close(found, torch.func.grad(value)(x))


@needs_compiler
@pytest.mark.parametrize("kind", ["film", "film and relu", "norm"])
def test_several_gradients_at_once_are_those_of_the_plain_path(kind: str, calls: list[str]):
    layer = tf.ConditionalGroupNorm(3, 6, cond_dim=2)
    leaves = [torch.randn(*size, requires_grad=True) for size in ((2, 6, 4, 8), (2, 6), (2, 6))]
    grads = torch.randn(3, 2, 6, 4, 8)

    def found() -> tuple[Tensor, ...]:
        x, *m = leaves
        y = layer(x, modulation=tf.Modulation(*m)) if kind == "norm" else F.film(x, *m, activation=relu)
        return torch.autograd.grad(y, leaves, grads, is_grads_batched=True)

    relu = "relu" if kind == "film and relu" else None
    by_kernels, made = found(), list(calls)
    native.disable()
    name = "norm" if kind == "norm" else "film"
    assert made == [name, f"{name}_gradients"]
    torch.testing.assert_close(by_kernels, found(), rtol=1e-4, atol=1e-4)


@needs_compiler
def test_what_was_kept_may_come_back_in_another_layout(calls: list[str]):
    leaves = torch.randn(2, 6, 4, 8), torch.randn(2, 6), torch.randn(2, 6)
    expected = results(F.film, *leaves)

    def contiguous(kept: Tensor) -> Tensor:
        return kept.contiguous()

    with torch.autograd.graph.saved_tensors_hooks(contiguous, contiguous):
        image = leaves[0].contiguous(memory_format=torch.channels_last)
        found = results(F.film, image, *leaves[1:])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_compiler
@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:<class .torch.autograd.function.Function.> should not:DeprecationWarning")
def test_a_compiled_network_compiles_the_plain_way(calls: list[str]):
    *leaves, dim = given("images", "each")

    def way(*leaves: Tensor) -> Tensor:
        return F.film(*leaves, dim, activation="relu")

    torch.compiler.reset()
    compiled = torch.compile(way, fullgraph=True, backend="aot_eager")
    for one, other in zip(results(compiled, *leaves), results(way, *leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=1e-5)
    assert calls == ["film"]  # of the eager one


@needs_compiler
@pytest.mark.plain
@pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects:UserWarning")
@pytest.mark.parametrize("graph", [True, False])
def test_a_conditioned_network_is_compiled_and_exported_as_ever(calls: list[str], graph: bool):
    net = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5))
    net = tf.condition(net, "0|1", tf.Vector(7), init="default").requires_grad_(graph)
    x, z = torch.randn(2, 3), torch.randn(1, 7)
    expected = net(x, cond=z)
    called = list(calls)
    torch.compiler.reset()
    compiled = torch.compile(net, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, cond=z), expected)
    exported = torch.export.export(net, (x,), {"cond": z}, strict=True).module()
    torch.testing.assert_close(exported(x, cond=z), expected)
    assert called
    assert calls == called


@needs_compiler
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("wanted", ["x", "gamma", "beta", "x, gamma", "gamma, beta"])
def test_as_much_is_kept_as_by_the_plain_way(wanted: str, activation, calls: list[str]):
    leaves = dict(zip(("x", "gamma", "beta"), given("images", "each"), strict=False))
    for name in wanted.split(", "):
        leaves[name].requires_grad_()

    def kept() -> list[tuple[int, ...]]:
        shapes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda one: shapes.append(one.shape), lambda one: one):
            F.film(**leaves, activation=activation)
        return shapes

    by_kernels = kept()
    native.disable()
    assert by_kernels == kept()


@needs_compiler
def test_a_frozen_modulation_lets_the_features_be_written_into_afterwards(calls: list[str]):
    x, gamma, beta, _ = given("images", "each")
    features = x.requires_grad_() * 1
    y = F.film(features, gamma, beta)
    features += y
    features.sum().backward()
    torch.testing.assert_close(x.grad, (1 + gamma)[..., None, None].expand_as(x))


@needs_compiler
@pytest.mark.parametrize("activation", [None, "relu"])
def test_a_checkpoint_may_be_computed_again_the_plain_way(activation, calls: list[str]):
    leaves = [one.requires_grad_() for one in given("images", "each")[:3]]
    expected = torch.autograd.grad(F.film(*leaves, activation=activation).square().sum(), leaves)
    y = checkpoint(lambda *given: F.film(*given, activation=activation), *leaves, use_reentrant=False)
    with FlopCounterMode(display=False):  # which watches every operation
        found = torch.autograd.grad(y.square().sum(), leaves)
    torch.testing.assert_close(found, expected)


@needs_compiler
@pytest.mark.parametrize("activation", [None, "relu"])
def test_film_that_is_computed_again_within_a_backward_pass_for_chosen_inputs(activation, calls: list[str]):
    weight = torch.randn(3, 3).requires_grad_()
    leaves = [one.requires_grad_() for one in given("images", "each")[:3]]

    def way(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.film(
            (x.transpose(1, -1) @ weight).transpose(1, -1).contiguous(), gamma, beta, activation=activation
        )

    expected = torch.autograd.grad(way(*leaves).square().sum(), (weight, *leaves))
    y = checkpoint(way, *leaves, use_reentrant=False)
    found = torch.autograd.grad(y.square().sum(), (weight, *leaves))
    torch.testing.assert_close(found, expected)
    inner: list[Tensor] = []

    def within(grad: Tensor) -> None:
        with torch.enable_grad():
            inner.extend(torch.autograd.grad(way(*leaves).square().sum(), (weight, *leaves)))

    other = torch.randn(3, requires_grad=True)
    doubled = 2 * other
    doubled.register_hook(within)
    torch.autograd.grad(doubled.sum(), other)
    torch.testing.assert_close(tuple(inner), expected)


@needs_compiler
def test_a_modulation_that_lies_in_the_features_is_not_written_over(calls: list[str]):
    x = torch.randn(4, 3)
    expected = x[0] * x + 1
    torch.testing.assert_close(F.film_(x, x[0], torch.ones(3)), expected)
    assert calls == []


@needs_compiler
def test_what_the_plain_way_refuses_is_refused(calls: list[str]):
    x, row, column = torch.randn(2, 3, 5), torch.randn(2, 3), torch.randn(2, 3, 1)
    with pytest.raises(ValueError, match="gamma has 1 channels"):
        F.film(x, column, column, modulation_dim=-1)
    with pytest.raises(ValueError, match="gamma has 1 channels"):
        F.film_(x, column, column)
    for dim, error in ((1.0, TypeError), (None, TypeError), (2**70, ValueError)):
        with pytest.raises(error):
            F.film(x, row, row, dim=dim)  # type: ignore[arg-type]
    assert calls == []


@needs_compiler
def test_functions_that_others_watch_are_called_one_by_one(calls: list[str]):
    class Listing(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function.__name__)
            return function(*args, **(kwargs or {}))

    seen: list[str] = []
    with Listing():
        F.film(*given("images", "each")[:3])
    assert "mul" in seen
    assert calls == []
