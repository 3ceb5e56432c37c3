"""Norms by the kernels, and generators of a single condition, give what the plain path gives."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.nn.utils import parametrize

import torchfilm as tf
import torchfilm.functional as F
from kernels import NORMS, agree, close, conditional, needs_compiler, sizes_of
from torchfilm import native, onepass


@needs_compiler
@pytest.mark.parametrize("rows", ["each", "all", "one row"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_agree_with_the_plain_path(name: str, rows: str, calls: list[str]):
    layer, x, parameters = conditional(name)
    sizes = sizes_of(rows, len(x), x.shape[layer.film.dim])

    def way(x: Tensor, gamma: Tensor, beta: Tensor, *own: Tensor) -> Tensor:
        names = [name for name, p in layer.named_parameters() if any(p is one for one in parameters)]
        called = (x, None), {"modulation": tf.Modulation(gamma, beta)}
        return torch.func.functional_call(layer, dict(zip(names, own, strict=True)), *called)

    agree(way, x, torch.randn(sizes), torch.randn(sizes), *parameters)
    assert calls == ["norm"]


@needs_compiler
@pytest.mark.parametrize("rows", ["each", "all", "one row"])
@pytest.mark.parametrize("name", NORMS)
def test_norms_agree_without_a_graph(name: str, rows: str, calls: list[str]):
    layer, x, _ = conditional(name)
    sizes = sizes_of(rows, len(x), x.shape[layer.film.dim])
    modulation = tf.Modulation(torch.randn(sizes), torch.randn(sizes))
    with torch.no_grad():
        found, exact = (
            layer(x, modulation=modulation),
            copy.deepcopy(layer).double()(x.double(), modulation=modulation.to(torch.float64)),
        )
    assert calls == ["norm"]
    close(found, exact)


@needs_compiler
@pytest.mark.parametrize("length", [1, *range(3, 19), 32, 49, 2049])
@pytest.mark.parametrize("width", [3, 7, 21, 70])
def test_groups_of_each_size(width: int, length: int, calls: list[str]):
    layer = tf.ConditionalGroupNorm(2, 2 * width, 3)

    def way(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return layer(x, modulation=tf.Modulation(gamma, beta))

    agree(way, 3 * torch.randn(2, 2 * width, length) + 20, *torch.randn(2, 2, 2 * width))
    assert calls == ["norm"]


@needs_compiler
@pytest.mark.parametrize("name", ["group", "layer"])
def test_a_norm_with_a_bias_alone_goes_the_plain_way(name: str, calls: list[str]):
    layer, x, _ = conditional(name)
    bias = torch.randn(x.shape[layer.film.dim])
    layer.register_parameter("weight", None)

    def way(x: Tensor, bias: Tensor, *modulation: Tensor) -> Tensor:
        called = (x, None), {"modulation": tf.Modulation(*modulation)}
        return torch.func.functional_call(layer, {"bias": bias}, *called)

    agree(way, x, bias, *torch.randn(2, len(x), len(bias)))
    assert "norm" not in calls


@needs_compiler
def test_rows_of_one_sample_go_back_with_all_threads(calls: list[str]):
    before = torch.get_num_threads()
    layer, x = tf.ConditionalLayerNorm(256, 3), torch.randn(1, 256, 256)
    for threads, taken in ((1, ["norm"]), (2, [])):
        torch.set_num_threads(threads)
        agree(
            lambda x, *m: copy.deepcopy(layer).to(x.dtype)(x, modulation=tf.Modulation(*m)),
            x,
            *torch.randn(2, 256),
        )
        assert calls == taken
        calls.clear()
    torch.set_num_threads(before)


@needs_compiler
@pytest.mark.parametrize("norm", [(1, 3, 1e-5), (-1, 1, 1e-5), (-1, 0, 1e-5)])
def test_gradients_by_torch_of_tensors_that_come_back_without_a_graph(norm: tuple[int, int, float]):
    x, (gamma, weight) = torch.randn(4, 6, 6), torch.randn(2, 6)
    grad, leaves = torch.randn(4, 6, 6), (x, gamma.expand(4, 6), weight)
    detached = onepass.norm_gradients(grad, *leaves, None, norm, (True, True, True, True, False))
    kept = [leaf.clone().requires_grad_() for leaf in leaves]
    expected = onepass.norm_gradients(grad, *kept, None, norm, (True, True, True, True, False))
    torch.testing.assert_close(detached, expected)
    assert all(one is not None for one in detached[:4])


@needs_compiler
@pytest.mark.parametrize("name", ["group", "layer", "rms"])
def test_what_was_kept_may_come_back_with_gaps_in_memory(name: str, calls: list[str]):
    layer, x, _ = conditional(name)
    gamma, beta = torch.randn(2, len(x), x.shape[layer.film.dim])

    def with_gaps(kept: Tensor) -> Tensor:
        return torch.stack([kept, torch.full_like(kept, float("nan"))], dim=-1)[..., 0]

    def way(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        pack = with_gaps if x.dtype is torch.float32 else torch.clone  # torch's own norms would read the gaps
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            return copy.deepcopy(layer).to(x.dtype)(x, modulation=tf.Modulation(gamma, beta))

    agree(way, x, gamma, beta)
    assert calls == ["norm", "norm_gradients"]


EVALUATED = {
    "images": (nn.BatchNorm2d(6), (3, 6, 5, 7), torch.contiguous_format),
    "channels last": (nn.BatchNorm2d(6), (3, 6, 5, 7), torch.channels_last),
    "without affine": (nn.BatchNorm2d(6, affine=False), (3, 6, 5, 7), torch.contiguous_format),
    "sequences": (nn.BatchNorm1d(6), (3, 6, 21), torch.contiguous_format),
    "vectors": (nn.BatchNorm1d(6), (3, 6), torch.contiguous_format),
    "volumes": (nn.BatchNorm3d(6), (2, 6, 3, 5, 7), torch.channels_last_3d),
}


@needs_compiler
@pytest.mark.parametrize("rows", ["each", "all", "one row"])
@pytest.mark.parametrize("name", EVALUATED)
def test_batch_norms_agree_in_evaluation_without_a_graph(name: str, rows: str, calls: list[str]):
    norm, shape, memory = copy.deepcopy(EVALUATED[name])
    x = (3 * torch.randn(shape) + 20).contiguous(memory_format=memory)
    for tensor in (*norm.parameters(), norm.running_mean):
        nn.init.normal_(tensor, 1.0)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    sizes = sizes_of(rows, len(x), 6)
    modulation = tf.Modulation(torch.randn(sizes), torch.randn(sizes))

    def modulated() -> Tensor | None:
        return native.kernels.batch_norm(norm, x, modulation, onepass.BATCH_NORMS[type(norm)], 1)

    with torch.no_grad():
        assert modulated() is None  # in training each batch has statistics of its own
        norm.eval()
        found = modulated()
        exact = F.film(
            norm.double()(x.double()), *(one.double() for one in (modulation.gamma, modulation.beta))
        )
    norm.float()
    modulated()  # with a graph, where there are weights
    assert calls == ["batch_norm"]
    close(found, exact)
    assert found.stride() == x.stride()


@needs_compiler
@torch.no_grad()
def test_batch_norms_at_sites_are_looked_at_before_they_are_taken(calls: list[str]):
    model = tf.condition(nn.Sequential(nn.BatchNorm2d(6)).eval(), "0", tf.Vector(3))
    model(torch.randn(2, 6, 4, 5), cond=torch.randn(2, 3))
    assert calls.count("batch_norm") == 1
    with pytest.raises(ValueError, match="expected 4D input"):
        model(torch.randn(2, 6, 4), cond=torch.randn(2, 3))
    parametrize.register_parametrization(model[0], "weight", nn.Tanh())  # no parameter of the norm itself
    x, z = torch.randn(2, 6, 4, 5), torch.randn(2, 3)
    found = model(x, cond=z)
    tf.remove(model)
    torch.testing.assert_close(found, model(x), rtol=2e-5, atol=2e-5)
    assert calls.count("batch_norm") == 2
    rows = tf.condition(nn.Sequential(nn.BatchNorm2d(6)).eval(), "0", tf.Vector(3), dim=-1, features=6)
    rows(torch.randn(2, 6, 4, 6), cond=torch.randn(2, 3))
    gated = tf.condition(nn.Sequential(nn.BatchNorm2d(6)).eval(), "0", tf.Vector(3))
    gated(x, modulation={"0": tf.Modulation(*torch.randn(3, 6))})
    assert calls.count("batch_norm") == 2


@needs_compiler
def test_a_single_condition_makes_all_modulations_in_one_call(calls: list[str]):
    sites = {"a": 3, "b": 5, "c": 7}
    for emit in (("gamma", "beta"), ("gamma", "beta", "gate")):
        generator = tf.Generator(65, sites, emit=emit, gate_start=float("gate" in emit), init="default")
        for shape in ((65,), (1, 65), (1, 1, 65)):
            z = torch.randn(shape)
            with torch.no_grad():
                found = generator(z)
                assert calls.pop() == "generated"
                exact = generator.double()(z.double())
            generator.float()
            assert list(found) == list(sites)
            for name, m in found.items():
                for field in emit:
                    one, other = getattr(m, field), getattr(exact[name], field)
                    assert one.shape == (*shape[:-1], sites[name])
                    torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-6)
    assert calls == []


@needs_compiler
def test_what_is_no_single_condition_of_a_plain_head_goes_the_plain_way(calls: list[str]):
    sites, z = {"a": 3, "b": 5}, torch.randn(1, 7)
    generator = tf.Generator(7, sites)
    generator(z)  # has a graph
    with torch.no_grad():
        generator(torch.randn(2, 7))
        generator(z.double())
        with torch.autocast("cpu"):
            generator(z)
        for options in ({"bound": "exp"}, {"trunk": (5,)}, {"head": "lowrank:2"}, {"learned_scale": True}):
            tf.Generator(7, sites, **options)(z)
        seen = []
        handle = generator.head.register_forward_hook(lambda *given: seen.append(given))
        generator(z)
        handle.remove()
        assert len(seen) == 1
        with pytest.raises(ValueError, match="expected 7 numbers"):
            generator(torch.randn(1, 6))
        assert calls == []
        identity = generator(z)["a"]
    assert calls == ["generated"]
    assert torch.equal(identity.gamma, torch.ones(1, 3))
    assert torch.equal(identity.beta, torch.zeros(1, 3))


@needs_compiler
def test_norms_with_a_gate_and_without_a_graph(calls: list[str]):
    layer, x, _ = conditional("group")
    modulation = tf.Modulation(*(torch.randn(5, 12) for _ in range(3)))
    with torch.no_grad():
        found = layer(x, modulation=modulation)
        native.disable()
        torch.testing.assert_close(found, layer(x, modulation=modulation), rtol=2e-5, atol=2e-5)
    assert calls == ["norm"]


REFUSED = {
    "channels that the groups do not divide": (lambda: tf.ConditionalGroupNorm(4, 8, 3), (2, 6, 5, 5)),
    "groups of one number": (lambda: tf.ConditionalGroupNorm(8, 8, 3), (1, 8, 1, 1)),
    "channels of one number": (lambda: tf.ConditionalInstanceNorm2d(8, 3), (2, 8, 1, 1)),
    "tokens of another size": (lambda: tf.ConditionalLayerNorm(64, 3), (2, 5, 32)),
    "tokens of another size, RMS": (lambda: tf.ConditionalRMSNorm(64, 3), (2, 5, 32)),
}


@needs_compiler
@pytest.mark.parametrize("name", REFUSED)
def test_what_torchs_norms_refuse_is_refused(name: str, calls: list[str]):
    build, shape = REFUSED[name]
    layer, x = build(), torch.randn(shape)
    m = tf.Modulation(*torch.randn(2, len(x), x.shape[layer.film.dim]))
    with pytest.raises((ValueError, RuntimeError), match=r"Expected|expected|divisible"):
        layer(x, modulation=m)
    assert calls == []


@needs_compiler
def test_norms_see_their_features_as_the_plain_way_does(calls: list[str]):
    """Without an affine an instance norm takes any number of channels; groups of one number give beta."""
    cases = (tf.ConditionalInstanceNorm2d(8, 3), (2, 16, 5, 5)), (tf.ConditionalGroupNorm(8, 8, 3), (2, 8, 1))
    for layer, shape in cases:
        x, m = torch.randn(shape), tf.Modulation(*torch.randn(2, *shape[:2]))
        norm = nn.InstanceNorm2d(16) if len(shape) == 4 else nn.GroupNorm(8, 8, affine=False)
        expected = F.film(norm(x), m.gamma, m.beta)
        torch.testing.assert_close(layer(x, modulation=m), expected, rtol=1e-4, atol=1e-5)
        layer.eps = None
        with pytest.raises(TypeError):
            layer(x, modulation=m)


class Doubled(tf.Generator):
    """A generator of others, which changes what the head says."""

    def raw(self, condition: Tensor) -> Tensor:
        return 2 * super().raw(condition)


@needs_compiler
@pytest.mark.parametrize("changed", ["subclass", "method", "call of the head", "hook of all modules"])
def test_what_others_do_between_condition_and_modulation_is_done(changed: str, calls: list[str]):
    sites, z, seen = {"a": 3}, torch.randn(1, 7), []
    generator = (
        Doubled(7, sites, init="default") if changed == "subclass" else tf.Generator(7, sites, init="default")
    )
    head, handle = generator.head, None
    if changed == "method":
        generator.raw = lambda z: seen.append(z) or head(z)  # type: ignore[method-assign]
    elif changed == "call of the head":
        own = head.forward
        head.forward = lambda z: seen.append(z) or own(z)  # type: ignore[method-assign]
    elif changed == "hook of all modules":
        handle = register_module_forward_hook(lambda *given: seen.append(given))
    with torch.no_grad():
        found = generator(z)["a"].beta
        expected = head(z)[:, 3:] * (2 if changed == "subclass" else 1)
    if handle is not None:
        handle.remove()
    torch.testing.assert_close(found, expected)
    assert calls == []
    assert seen or changed == "subclass"


@needs_compiler
def test_heads_without_a_bias_or_with_weights_of_others_go_the_plain_way(calls: list[str]):
    generator, z = tf.Generator(7, {"a": 3}, init="default"), torch.randn(1, 7)
    head: Any = generator.head
    head.bias = None
    with torch.no_grad():
        torch.testing.assert_close(generator(z)["a"].beta, z @ head.weight[3:].T)
    weight = head.weight.detach()
    del head.weight
    head.weight = weight  # as what makes the weights of others does
    torch.testing.assert_close(generator(z)["a"].beta, z @ weight[3:].T)
    assert calls == []


LAYERS = {
    "film": (lambda: tf.FiLM(32, 7), (32, 9), ["film"]),
    "dense film": (lambda: tf.DenseFiLM(32, 7), (9, 32), ["film"]),
    "batch norm": (lambda: tf.ConditionalBatchNorm1d(32, 7), (32, 9), ["film"]),
    "group norm": (lambda: tf.ConditionalGroupNorm(4, 32, 7), (32, 9), ["norm"]),
    "instance norm": (lambda: tf.ConditionalInstanceNorm1d(32, 7), (32, 9), ["norm"]),
    "layer norm": (lambda: tf.ConditionalLayerNorm(32, 7), (9, 32), ["norm"]),
    "RMS norm": (lambda: tf.ConditionalRMSNorm(32, 7), (9, 32), ["norm"]),
    "adaptive layer norm": (lambda: tf.AdaLNZero(32, 7), (9, 32), ["norm"]),
    "a site with a large head": (
        lambda: tf.condition(nn.Sequential(nn.GroupNorm(4, 4096)), "0", tf.Vector(7)),
        (4096, 3),
        ["norm"],
    ),
}


@needs_compiler
@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_are_computed_by_the_kernels_with_modulations_of_their_own(
    name: str, graph: bool, calls: list[str]
):
    build, shape, expected = LAYERS[name]
    layer, x, z = build(), torch.randn(5, *shape), torch.randn(5, 7)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    keywords = {"cond": z} if "large head" in name else {"condition": z}
    with torch.set_grad_enabled(graph):
        found = layer(x, **keywords)
        assert calls == expected
        native.disable()
        outs = found, layer(x, **keywords)
    for one, other in zip(*((out if isinstance(out, tuple) else (out,)) for out in outs), strict=True):
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-4)


CHAINS = {
    "tied": ("group", 1),
    "tied layer": ("layer", 1),
    "tied rms": ("rms", 1),
    "two of them": ("instance with affine", 2),
}


def chain(name: str) -> tuple[Any, nn.Module, Tensor, Tensor]:
    """Norms one after the other, one of them several times or two in turn, features and a condition."""
    kind, count = CHAINS[name]
    layer, x, _ = conditional(kind)
    layers = nn.ModuleList(copy.deepcopy(layer) for _ in range(count))
    for parameter in layers.parameters():
        nn.init.normal_(parameter, 1.0, 0.3)

    def way(x: Tensor, z: Tensor) -> Tensor:
        for i in range(3):
            x = x + torch.tanh(layers[i % count](x, z))
        return x.square().flatten(1).mean(1)

    return way, layers, x, torch.randn(len(x), 2)


@needs_compiler
@pytest.mark.parametrize("name", CHAINS)
def test_gradients_that_are_differentiated_again_agree_in_a_chain_of_norms(name: str, calls: list[str]):
    way, layers, x, z = chain(name)

    def twice(x: Tensor, z: Tensor) -> list[Tensor]:
        leaves = [x.clone().requires_grad_(), z.clone().requires_grad_(), *layers.parameters()]
        first = torch.autograd.grad(way(*leaves[:2]).sum(), leaves, create_graph=True)
        second = torch.autograd.grad(sum(grad.square().sum() for grad in first), leaves)
        return [one.detach() for one in (*first, *second)]

    found = twice(x, z)
    assert "norm" in calls
    layers.double()
    for one, exact in zip(found, twice(x.double(), z.double()), strict=True):
        torch.testing.assert_close(one.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@needs_compiler
@pytest.mark.parametrize("name", CHAINS)
def test_several_gradients_at_once_agree_in_a_chain_of_norms(name: str, calls: list[str]):
    way, layers, x, z = chain(name)
    found = torch.autograd.functional.jacobian(lambda z: way(x, z), z, vectorize=True)
    assert "norm" in calls
    layers.double()
    exact = torch.autograd.functional.jacobian(lambda z: way(x.double(), z), z.double())
    torch.testing.assert_close(found.double(), exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))


@needs_compiler
@pytest.mark.parametrize("name", CHAINS)
def test_kernels_may_be_disabled_between_forward_and_backward(name: str, calls: list[str]):
    way, layers, x, z = chain(name)
    y = way(x, z)
    assert "norm" in calls
    native.disable()
    found = torch.autograd.grad(y.sum(), list(layers.parameters()))
    for one, exact in zip(
        found, torch.autograd.grad(way(x, z).sum(), list(layers.parameters())), strict=True
    ):
        torch.testing.assert_close(one, exact, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
