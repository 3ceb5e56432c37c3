"""On a device everything computes what it computes on the CPU, and the host never waits in between."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

import torchfilm as tf
from catalogue import CASES, Case, randomise
from simulated_device import IS_THERE, NAME, Simulated
from torchfilm.fold_check import difference
from torchfilm.functional import film, film_
from torchfilm.fusion import FUSIONS
from torchfilm.restoring import same_chance
from torchfilm.tables import SeparableTable

pytestmark = pytest.mark.skipif(not IS_THERE, reason="this torch cannot be told of a device in Python")

MASK = torch.tensor([[True] * 4 + [False], [True] * 2 + [False] * 3])
X, Z = torch.rand(2, 3, 9), torch.rand(2, 7)
BOTH = {"t": tf.Scalars(1, 8), "v": tf.Maybe(tf.Vector(7), null="zero")}
CONDS = {
    "vector": (tf.Vector(7), Z),
    "classes": (tf.Classes(5, 7), torch.tensor([1, 4])),
    "scalars": (tf.Scalars(1, 8), torch.rand(2, 1)),
    "learned scalars": (tf.Scalars(1, 8, learned=True), torch.tensor([[3], [0]])),
    "tokens": (tf.Tokens(7), (torch.rand(2, 5, 7), MASK)),
    "attention": (tf.Tokens(8, "attention", heads=2), (torch.rand(2, 5, 8), MASK)),
    "missing": (tf.Maybe(tf.Vector(7)), tf.Masked(None)),
    "missing, zero": (tf.Maybe(tf.Vector(7), null="zero"), tf.Masked(None)),
    "missing for some": (tf.Maybe(tf.Classes(5, 7)), tf.Masked(torch.tensor([2, -1]), MASK[:, 3])),
    "masked by a number": (tf.Maybe(tf.Vector(7)), tf.Masked(Z, True)),
    "concat": (tf.Several(BOTH), {"t": torch.rand(2, 1), "v": Z}),
    "concat, missing": (tf.Several(BOTH), {"t": torch.rand(2, 1)}),
    "sum": (tf.Several({"a": tf.Vector(7), "b": tf.Classes(5, 7)}, "sum"), {"a": Z, "b": MASK[:, 0].long()}),
    "compose": (tf.Several(BOTH, "compose"), {"t": torch.rand(2, 1), "v": Z}),
}
FUSED = {
    **{fusion: {"fusion": fusion} for fusion in FUSIONS},
    "gate of FiLM": {"emit": ("gamma", "beta", "gate"), "gate_start": 0.5},
    "shared": {"head": "shared", "learned_scale": True},
    "low rank": {"head": "lowrank:2", "trunk": (5, "mish")},
}


def network(cond: nn.Module, **options: Any) -> nn.Module:
    base = nn.Sequential(
        nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 6, 1), nn.GroupNorm(2, 6)
    )
    model = tf.condition(base, "[0134]", copy.deepcopy(cond), **options)
    randomise(model.film)
    return model.eval()


def moved(value: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda one: one.to(NAME), value)


def held(value: Any) -> list[Tensor]:
    return [getattr(leaf, "held", leaf).detach() for leaf in pytree.tree_leaves(value)]


def there(*values: Any) -> list[Any]:
    """Return copies on the device."""
    with Simulated():
        return [copy.deepcopy(v).to(NAME) if isinstance(v, nn.Module) else moved(v) for v in values]


def run(act: Callable[..., Any], model: nn.Module, *values: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Return what act(model, *values) returns, and the gradients of a loss of that."""
    torch.manual_seed(0)
    found = act(model, *values)
    losses = [leaf.square().mean() for leaf in pytree.tree_leaves(found) if leaf.requires_grad]
    if losses:
        sum(losses).backward()
    return held(found), held([p.grad for p in model.parameters() if p.grad is not None])


def check(act: Callable[..., Any], model: nn.Module, *values: Any) -> Simulated:
    """Check that act(model, *values) and its backward pass are the same on the device, without a wait."""
    copies, expected = there(model, *values), run(act, model, *values)
    with Simulated() as device:
        found = run(act, *copies)
    assert [len(part) for part in found] == [len(part) for part in expected]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert device.waits == []
    return device


def called(model: nn.Module, x: Tensor, cond: Any) -> Tensor:
    return model(x, cond=cond)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CONDS)
def test_every_condition(kind: str, training: bool):
    cond, value = CONDS[kind]
    check(called, network(cond).train(training), X, value)


@pytest.mark.parametrize("kind", FUSED)
def test_every_fusion(kind: str):
    check(called, network(tf.Vector(7), **FUSED[kind]), X, Z)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_module(case: Case):
    check(lambda module, *inputs: module(*inputs), randomise(case.build()), *case.inputs(2))


def within(model: nn.Module, x: Tensor, z: Tensor) -> list[Tensor]:
    """Call where things are active, with and without gradients."""
    with tf.using(model, cond=z), tf.edit(model, {"[01]": lambda m: 0.5 * m}):
        with tf.record(model) as rec, torch.no_grad():
            first = model(x)
        again = checkpoint(model, x, use_reentrant=False, context_fn=tf.checkpoint_context(model))
    with tf.unconditioned(model):
        return [first, again, model(x), *pytree.tree_leaves(rec.calls)]


class Still(tf.Vector):
    """An encoder that nobody may move, as none whose tensors are fake."""

    def _apply(self, *args: Any) -> Any:
        raise AssertionError


def test_a_conditioning_is_moved_where_a_part_of_it_is_elsewhere():
    tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", Still(7))
    base, null = nn.Sequential(nn.Linear(3, 5)).to(NAME), tf.Maybe(tf.Vector(7), null="zero")
    tf.condition(base, "0", null, generator=lambda *sizes: tf.Generator(*sizes).to(NAME))
    assert null.place.device.type == NAME


def test_what_is_active():
    check(within, network(tf.Vector(7)), X, Z)


def test_a_checkpointed_network_runs_again_in_the_thread_of_the_device():
    threads = set()
    model = network(tf.Vector(7))
    model[0].register_forward_hook(lambda *_: threads.add(threading.get_ident()))
    copied, x, z = there(model, X, Z)
    with Simulated(), tf.using(copied, cond=z):
        context = tf.checkpoint_context(copied)
        checkpoint(copied, x, use_reentrant=False, context_fn=context).sum().backward()
    assert len(threads) == 2


GUIDED = {
    "one": (tf.Maybe(tf.Vector(7)), Z, 3.0),
    "masked": (tf.Maybe(tf.Vector(7), null="zero"), tf.Masked(Z, MASK[:, 3]), 3.0),
    "several": (tf.Several(BOTH), {"t": X[:, 0, :1], "v": Z}, {"v": 2.0}),
    "per sample": (tf.Maybe(tf.Vector(7)), Z, torch.tensor([0.5, 3.0])),
}


@pytest.mark.parametrize("space", ["output", "modulation"])
@pytest.mark.parametrize("kind", GUIDED)
def test_guidance(kind: str, space: str):
    cond, value, scale = GUIDED[kind]

    def guided(model: nn.Module, x: Tensor, cond: Any, scale: Any) -> Tensor:
        return tf.guide(model, x, cond=cond, scale=scale, space=space)

    check(guided, network(cond), X, value, scale)


@pytest.mark.parametrize("index", [2, torch.tensor([1, 0])], ids=["one", "per sample"])
def test_tables(index: Any):
    check(called, tf.tabulate(network(tf.Vector(7)), conds=torch.rand(3, 7)), X, index)


def test_a_separable_table():
    both = tf.Several(BOTH).eval()
    generator = randomise(tf.Generator(both.dim, {"a": 3, "b": 5}, trunk=("mish",)))
    expected = SeparableTable(both, generator, "t", torch.arange(4.0)[:, None])
    copies, z, times = there(nn.ModuleList([both, generator]), Z, torch.arange(4.0)[:, None])
    with Simulated():
        table = SeparableTable(*copies, "t", times)
    with Simulated() as device:
        found = table(3, table.encode({"v": z}))
    torch.testing.assert_close(held(found), held(expected(3, expected.encode({"v": Z}))))
    assert device.waits == []


def test_a_fold_is_checked_where_there_is_no_float64():
    model, x, z = there(network(tf.Vector(7)), X, Z[:1])
    film = tf.conditioning(model)
    with Simulated(), tf.using(model, cond=z):
        assert difference(film, model, model, film(z), (x,)) == 0


def test_doctor_says_the_same_of_a_device():
    model = network(tf.Vector(7))
    copies = there(model, X, Z)
    with Simulated():
        found = tf.doctor(copies[0], copies[1], cond=copies[2])
    assert str(found) == str(tf.doctor(model, X, cond=Z))


def test_a_comparison_waits_for_the_device_that_it_measures(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.accelerator, "synchronize", waited.append)
    model, x, z = there(network(tf.Vector(7)), X, Z)
    with Simulated():
        found = tf.compare(
            {"film": model}, (x, z), rounds=2, score=lambda model: model(x, cond=z).mean((1, 2))
        )
    passes = 3 * 2  # a round more, of two networks
    assert waited == [torch.device(NAME, 0)] * 2 * passes
    assert found["film"].score is not None


@pytest.mark.parametrize("act", [film, film_])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_device_makes_one_pass_where_nothing_is_differentiated(act: Callable, dtype: torch.dtype):
    values = X.to(dtype), Z[:, :3], Z[:, 3:6]
    copies = there(*values)
    with Simulated() as device:
        y = act(*copies)
    torch.testing.assert_close(y.held, film(*values))
    assert [name for name in device.ran if name not in ("view", "_to_copy")] == ["addcmul"]


def test_random_numbers_of_the_device_go_on_too():
    device = torch.get_device_module(NAME)
    before = device.get_rng_state(0)
    with same_chance():
        device.set_rng_state(before + 1, 0)
    assert device.get_rng_state(0) is before


def test_the_device_tells_of_waits_and_of_numbers_of_the_cpu():
    (x,) = there(torch.rand(3))
    with Simulated() as device:
        for act in (
            lambda: x.sum().item(),
            lambda: x[x > 0.5],
            lambda: x.cpu(),
            lambda: x + torch.tensor(1.0),
            lambda: torch.as_tensor([True], device=NAME),
        ):
            before = len(device.waits)
            act()
            assert len(device.waits) == before + 1
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.rand(3)
        with pytest.raises(TypeError, match="float64"):
            x.double()
