"""Every call hears what is active now, and asks whether the sites are still in the network."""

import asyncio
import copy
import gc
import pickle
import weakref
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from networks import conditioned, inputs

pytestmark = pytest.mark.plain


def small() -> tuple[nn.Sequential, torch.Tensor, torch.Tensor]:
    """Return a network that has heard a condition, and its inputs."""
    layers = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 1)
    model = randomise(tf.condition(nn.Sequential(*layers), "1", tf.Vector(7))).eval()
    x, z = torch.randn(2, 3, 5, 5), torch.randn(2, 7)
    model(x, cond=z)
    return model, x, z


def test_a_site_that_was_replaced_between_two_calls_is_an_error_and_not_silence():
    model, x, z = small()
    site = model[1]
    model[1] = nn.BatchNorm2d(8).eval()
    with pytest.raises(ValueError, match=r"Site '1': .* got another BatchNorm2d in its place.\nConvert or"):
        model(x, cond=z)
    with pytest.raises(ValueError, match=r"Site '1'"), tf.using(model, cond=z):
        model(x)
    model[1] = site
    assert not torch.equal(model(x, cond=z), model(x, cond=-z))


def test_a_converter_that_works_in_place_is_an_error_and_not_silence():
    model, (x, z) = conditioned(), inputs()
    model(x, cond=z)
    assert nn.SyncBatchNorm.convert_sync_batchnorm(model) is model
    with pytest.raises(ValueError, match=r"Site 'blocks.0.bn': .* got another SyncBatchNorm in its place"):
        model(x, cond=z)


def test_a_block_around_a_site_that_was_replaced_or_deleted_is_an_error():
    model, (x, z) = conditioned(), inputs()
    model(x, cond=z)
    block = model.blocks[1]
    model.blocks[1] = nn.Identity()
    with pytest.raises(ValueError, match=r"Site 'blocks.1.bn': .* got nothing in its place"):
        model(x, cond=z)
    model.blocks[1] = block
    model(x, cond=z)
    del model.blocks[0].bn
    with pytest.raises(ValueError, match=r"Site 'blocks.0.bn': .* got nothing in its place"):
        model(x, cond=z)


def test_one_of_two_uses_of_a_tied_site_that_was_replaced_is_an_error():
    layer = nn.Linear(3, 3)
    model = tf.condition(nn.Sequential(layer, nn.ReLU(), layer), "0", tf.Vector(7))
    x, z = torch.randn(2, 3), torch.randn(2, 7)
    model(x, cond=z)
    model[2] = nn.Linear(3, 3)
    with pytest.raises(ValueError, match=r"Site '2': .* got another Linear in its place"):
        model(x, cond=z)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_asked_about_their_own_modules(copied):
    model, x, z = small()
    other = copied(model)
    model[1] = nn.BatchNorm2d(8).eval()
    assert not torch.equal(other(x, cond=z), other(x, cond=-z))
    other[1] = nn.BatchNorm2d(8).eval()
    with pytest.raises(ValueError, match=r"Site '1': expected the module that was conditioned"):
        other(x, cond=z)


class Wrapper(nn.Module):
    """What others put around a block, as torch.compile and checkpoint wrappers do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_a_site_inside_of_a_new_wrapper_is_still_heard():
    model, (x, z) = conditioned(), inputs()
    expected = model(x, cond=z)
    model.blocks[0] = Wrapper(model.blocks[0])
    model.blocks[1].bn = Wrapper(model.blocks[1].bn)
    assert torch.equal(model(x, cond=z), expected)
    model.blocks[0].inner.bn = nn.BatchNorm2d(3).eval()
    with pytest.raises(ValueError, match=r"Site 'blocks.0.inner.bn': .* got another BatchNorm2d"):
        model(x, cond=z)


def test_a_compiled_network_asks_again_after_a_change():
    model, x, z = small()
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    compiled(x, cond=z)
    model[1] = nn.BatchNorm2d(8).eval()
    with pytest.raises(Exception, match=r"Site '1': expected the module that was conditioned"):
        compiled(x, cond=z)


def test_a_network_without_a_condition_says_how_to_give_none():
    x, base = torch.randn(2, 3), nn.Sequential(nn.Linear(3, 5))
    maybe = tf.condition(copy.deepcopy(base), "0", tf.Maybe(tf.Vector(7)))
    with pytest.raises(ValueError, match=r"expected an active condition, (.|\n)*give cond=Masked\(None\)"):
        maybe(x)
    several = tf.condition(copy.deepcopy(base), "0", tf.Several({"a": tf.Maybe(tf.Vector(7))}))
    with pytest.raises(ValueError, match=r"that may be missing are left out: cond=\{\}"):
        several(x)
    assert torch.equal(maybe(x, cond=tf.Masked(None)), several(x, cond={}))
    some = tf.condition(base, "0", tf.Several({"a": tf.Maybe(tf.Vector(7)), "b": tf.Vector(2)}))
    with pytest.raises(ValueError, match=r"left out: cond=\{'b': ...\}"):
        some(x)


class Tree(nn.Module):
    """A network that calls itself."""

    def __init__(self) -> None:
        super().__init__()
        self.leaf = nn.Linear(3, 3)

    def forward(self, x, depth=2):
        return self.leaf(self(x, depth - 1) if depth else x)


def test_calls_of_the_network_inside_of_a_call_hear_what_it_hears():
    model = randomise(tf.condition(Tree(), "leaf", tf.Vector(7)))
    x, a, b = torch.randn(2, 3), torch.randn(2, 7), torch.randn(2, 7)
    m, leaf = model.film.modulations(b)["leaf"], model.leaf

    def expected(beta: torch.Tensor) -> torch.Tensor:
        y = x
        for _ in range(3):
            y = m.gamma * nn.functional.linear(y, leaf.weight, leaf.bias) + beta
        return y

    torch.testing.assert_close(model(x, cond=b), expected(m.beta))
    with tf.edit(model, {"leaf": lambda m: m.replace(beta=m.beta + 1)}):
        torch.testing.assert_close(model(x, cond=b), expected(m.beta + 1))
    with tf.using(model, cond=a):
        torch.testing.assert_close(model(x, cond=b), expected(m.beta))
    with pytest.raises(ValueError, match="expected an active condition, got none"):
        model(x)


class Later(nn.Module):
    """A network whose forward runs after the call."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 5)


class Steps(Later):
    def forward(self, x):
        yield self.linear(x)


class Awaited(Later):
    async def forward(self, x):
        return self.linear(x)


@pytest.mark.parametrize("kind", [Steps, Awaited])
def test_a_forward_that_runs_after_the_call_hears_what_is_active_then(kind):
    model = randomise(tf.condition(kind(), "linear", tf.Vector(7)))
    x, z = torch.randn(2, 3), torch.randn(2, 7)
    with tf.using(model, cond=z):
        later, expected = model(x), model.linear(x)
        found = next(later) if kind is Steps else asyncio.run(later)
        assert torch.equal(found, expected)
        with pytest.raises(ValueError, match=r"forward that has run when the call returns, got a (gen|cor)"):
            model(x, cond=-z)


def test_a_network_with_an_argument_cond_of_its_own_is_told_to_use_the_block():
    class Own(Later):
        def forward(self, x, cond=None):
            return self.linear(x)

    model = tf.condition(Own(), "linear", tf.Vector(7))
    with pytest.raises(ValueError, match=r"got none.\nWrap the call in `with using\(model, cond=...\):`"):
        model(torch.randn(2, 3), cond=torch.randn(2, 7))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_a_block_inside_of_a_compiled_function_is_heard_by_the_network_and_by_its_parts():
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), r"\d", tf.Vector(7)))
    x, z = torch.randn(2, 3), torch.randn(2, 7)

    def both(x, z):
        with tf.using(model, cond=z):
            return model[0](x), model(x)

    torch._dynamo.reset()
    expected = both(x, z)
    for one, other in zip(torch.compile(both, backend="eager")(x, z), expected, strict=True):
        torch.testing.assert_close(one, other)


def test_modulations_without_names_of_sites_are_refused():
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7))
    with pytest.raises(
        ValueError, match=r"mapping from the names of sites, got Modulation.\nGive \{'0': mod"
    ):
        model(torch.randn(2, 3), modulation=tf.Modulation.identity(2, 5))


def test_values_that_cannot_be_fixed_are_not_fixed():
    model, x, z = small()
    with pytest.raises(KeyError), model.film.fixed({"another": None}):
        pass
    model(x, cond=z)


def test_a_fresh_layer_of_the_class_of_a_site_is_plain_and_can_be_conditioned():
    model, x, z = small()
    fresh = type(model[1])(8).eval()
    features = torch.randn(2, 8, 5, 5)
    assert torch.equal(fresh(features), nn.BatchNorm2d(8).eval()(features))
    other = randomise(tf.condition(nn.Sequential(nn.Conv2d(3, 8, 3), fresh), "1", tf.Vector(7)))
    assert not torch.equal(other(x, cond=z), other(x, cond=-z))
    assert type(tf.remove(other)[1]) is nn.BatchNorm2d
    model, (x, z) = conditioned(), inputs()
    with pytest.raises(ValueError, match=r"got a fresh one of its class(.|\n)*copy.deepcopy"):
        type(model)().train().eval()(x, cond=z)


def test_tracing_is_to_come_before_or_after():
    model, z = conditioned(), inputs()[1]
    with pytest.raises(ValueError, match=r"got torch.fx tracing it.\nFold it first"):
        torch.fx.symbolic_trace(model)
    with tf.using(model, cond=z), pytest.raises(ValueError, match=r"got torch.fx tracing it"):
        torch.fx.symbolic_trace(model)


CHANGES = {
    "another tensor": lambda model, given: given.update(told=given["told"] + 1),
    "written into": lambda model, given: given["told"].add_(1),
    "another part": lambda model, given: given.update(told=None),
    "mode": lambda model, given: model.train(),
    "mode of the encoder": lambda model, given: model.film.cond.train(),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compiled", [False, True])
def test_what_changes_while_a_condition_is_active_is_heard(change: str, compiled: bool):
    if compiled and change in ("written into", "mode of the encoder"):
        pytest.skip("a compiled network does not see it: docs of `using`")
    told = tf.Several({"told": tf.Maybe(tf.Vector(7), dropout=1.0)})
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", told).eval()
    randomise(model.film)
    x, given = torch.randn(2, 3), {"told": torch.randn(2, 7)}
    called = torch.compile(model, fullgraph=True, backend="eager") if compiled else model
    with tf.using(model, cond=given):
        before = called(x)
        CHANGES[change](model, given)
        after = called(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(x, cond=given))


def another_generator(model: nn.Module, state: dict[str, torch.Tensor]) -> None:
    model.film.generator = copy.deepcopy(model.film.generator)
    model.load_state_dict(state, assign=True)


REPLACED = {
    "parameters": lambda model, state: model.load_state_dict(state, assign=True),
    "generator": another_generator,
}


@torch.no_grad()
@pytest.mark.parametrize("change", REPLACED)
def test_what_is_replaced_while_a_condition_is_active_is_heard(change: str):
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7))
    x, z, state = torch.randn(2, 3), torch.randn(2, 7), model.state_dict()
    model.load_state_dict({key: value.clone() for key, value in state.items()}, assign=True)
    with tf.using(model, cond=z):
        model(x)
        REPLACED[change](model, {key: value + 1 for key, value in state.items()})
        after = model(x)
    assert torch.equal(after, model(x, cond=z))


@torch.no_grad()
def test_parameters_of_a_call_are_heard_in_the_block_alone_and_by_vmap():
    made = [randomise(tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7))) for _ in range(2)]
    models = [copy.deepcopy(model) for model in made]
    x, z, (stacked, _) = torch.randn(2, 3), torch.randn(2, 7), torch.func.stack_module_state(models)
    expected = [model(x, cond=z) for model in models]
    with tf.using(models[0], cond=z):
        alone = torch.func.functional_call(models[0], dict(models[1].named_parameters()), (x,))
        both = torch.vmap(lambda given: torch.func.functional_call(models[0], given, (x,)))(stacked)
    assert torch.equal(alone, expected[1])
    torch.testing.assert_close(both, torch.stack(expected))


class Numbers(nn.Module):
    """An encoder of arrays, which tell nobody that they were written into."""

    dim = 7

    def forward(self, array):
        return torch.as_tensor(array).float()


@torch.no_grad()
def test_an_array_that_is_written_into_is_heard():
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", Numbers()))
    x, z = torch.randn(2, 3), torch.randn(2, 7).numpy()
    with tf.using(model, cond=z):
        before = model(x)
        z += 1
        after = model(x)
    assert not torch.allclose(before, after)
    assert torch.equal(after, model(x, cond=z))


def test_blocks_of_generators_that_take_turns_end_with_an_error_and_leave_nothing():
    model, (x, z) = conditioned(), inputs()

    def stream(z: torch.Tensor):
        with tf.using(model, cond=z):
            while True:
                yield model(x)

    one, other = stream(z), stream(-z)
    next(one), next(other)
    with pytest.raises(RuntimeError, match=r"entered last to end first(.|\n)*hear each other's conditions"):
        one.close()
    assert torch.equal(next(other), model(x, cond=-z))
    other.close()
    with pytest.raises(ValueError, match="expected an active condition"):
        model(x)


def test_a_block_that_ends_in_another_thread_is_over_in_its_own():
    model, (x, z) = conditioned(), inputs()
    block = tf.using(model, cond=z)
    block.__enter__()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="in its thread"):
        pool.submit(block.__exit__, None, None, None).result()
    with pytest.raises(ValueError, match="expected an active condition"):
        model(x)
    assert torch.isfinite(model(x, cond=z)).all()


def test_a_block_without_a_condition_that_ends_in_another_thread_is_over_in_its_own():
    model, (x, z) = conditioned(), inputs()
    expected, block = model(x, cond=z), tf.unconditioned(model)
    block.__enter__()
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match="in its thread"):
        pool.submit(block.__exit__, None, None, None).result()
    assert torch.equal(model(x, cond=z), expected)


def test_steps_of_the_original_network_may_come_after_the_call():
    class Steps(nn.Sequential):
        def forward(self, x: torch.Tensor) -> Iterator[torch.Tensor]:
            yield super().forward(x)

    model = tf.condition(Steps(nn.Linear(3, 5)), "0", tf.Vector(7))
    with tf.unconditioned(model):
        assert len(list(model(torch.randn(2, 3), cond=torch.randn(2, 7)))) == 1


def test_classes_of_others_live_no_longer_than_their_networks():
    def once() -> list[weakref.ref]:
        site, root = type("Own", (nn.Linear,), {}), type("Root", (nn.Sequential,), {})
        model = tf.condition(root(site(3, 5)), "0", tf.Vector(7))
        model(torch.randn(2, 3), cond=torch.randn(2, 7))
        return [weakref.ref(kind) for kind in (site, root, type(model), type(model[0]))]

    known = once()
    gc.collect()  # what condition made
    gc.collect()  # what it was made of
    assert [ref() for ref in known] == [None] * 4


def test_a_block_that_another_thread_ended_is_over_for_all_who_ask():
    model, x, z = small()

    def block() -> Iterator[None]:
        with tf.unconditioned(model):
            yield

    entered = block()
    next(entered)
    with ThreadPoolExecutor(1) as pool, pytest.raises(RuntimeError, match=r"in its thread"):
        pool.submit(entered.close).result()
    assert tf.sensitivity(model, x, cond=z).keys() == {"1"}


def test_a_tuple_is_no_modulation():
    model, x, _ = small()
    with pytest.raises(
        ValueError, match=r"Site '1': expected a Modulation, got a tuple of 2.\nGive Modulation"
    ):
        model(x, modulation={"1": (torch.ones(8), torch.zeros(8))})


ADDED = {
    "a parameter": lambda encoder: encoder.layers[0].register_parameter("more", nn.Parameter(torch.ones(()))),
    "a buffer": lambda encoder: encoder.layers[0].register_buffer("more", torch.ones(())),
    "a module": lambda encoder: encoder.layers[0].add_module("more", nn.Linear(1, 1)),
}


class Deep(nn.Module):
    """An encoder that adds what its first layer gets later."""

    dim = 7

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 7), nn.ReLU(), nn.Linear(7, 7))

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        more = getattr(self.layers[0], "more", 0.0)
        return self.layers(z) + (more.weight if isinstance(more, nn.Module) else more)


@torch.no_grad()
@pytest.mark.parametrize("added", ADDED)
def test_what_an_encoder_gets_while_a_condition_is_active_is_heard(added: str):
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", Deep()))
    x, z = torch.randn(2, 3), torch.randn(2, 7)
    with tf.using(model, cond=z):
        before = model(x)
        ADDED[added](model.film.cond)
        after = model(x)
    assert not torch.allclose(before, after)
    torch.testing.assert_close(after, model(x, cond=z))


@torch.no_grad()
def test_calls_in_a_block_do_not_walk_through_the_encoder(monkeypatch: pytest.MonkeyPatch):
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", Deep()))
    x, z = torch.randn(2, 3), torch.randn(2, 7)
    model(x, cond=z)  # looks once where the sites are
    with tf.using(model, cond=z), monkeypatch.context() as patched:
        patched.setattr(nn.Module, "named_modules", None)
        after = model(x)
    assert torch.equal(after, model(x, cond=z))
