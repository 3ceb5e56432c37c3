"""An edit is heard by calls and by parts alone while it lasts, in whichever order and thread blocks end."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from networks import conditioned, inputs

pytestmark = pytest.mark.plain


DOUBLED = {".*": lambda m: 2 * m}


def test_an_edit_is_heard_by_parts_whether_it_is_inside_of_using_or_around_it():
    model, (x, z) = conditioned(), inputs()
    with tf.using(model, cond=z):
        plain = model.features(x)
    with tf.edit(model, DOUBLED), tf.using(model, cond=z):
        expected = model.features(x)
    with tf.using(model, cond=z):
        with tf.edit(model, DOUBLED), tf.record(model) as calls:
            assert torch.equal(model.features(x), expected)
        assert torch.equal(model.features(x), plain)
        (swept,) = tf.sweep(model, ".*", [2.0], lambda: model.features(x), change=lambda m, by: m * float(by))
        assert torch.equal(swept, expected)
        with tf.unconditioned(model), tf.edit(model, DOUBLED):
            assert not torch.equal(model.features(x), expected)
        with tf.edit(model, DOUBLED), tf.using(model, cond=-z):
            pass
        assert torch.equal(model.features(x), plain)
    assert calls.calls == [], "a part that is called by itself is no call of the network"
    with pytest.raises(ValueError, match="expected an active condition"):
        model.features(x)


@pytest.mark.parametrize("given", ["part", "none", "list"])
def test_modulations_that_lack_a_site_are_named_where_an_edit_is_heard_too(given: str):
    model, (x, z) = conditioned(), inputs()
    whole = tf.modulations(model, z)
    wrong = {"part": dict(list(whole.items())[:1]), "none": {}, "list": [1]}[given]
    said = "expected a mapping" if given == "list" else "expected one for each of the 2 sites, got none for"
    with tf.edit(model, DOUBLED):
        with pytest.raises(ValueError, match=said):
            model(x, modulation=wrong)
        with pytest.raises(ValueError, match=said), tf.using(model, modulation=wrong):
            pass
    with pytest.raises(ValueError, match=said):
        tf.sweep(model, ".*", [1.0], lambda: model(x, modulation=wrong))
    model(x, modulation=whole)


def test_edits_that_end_in_another_order_than_they_began_leave_nothing():
    model, (x, z) = conditioned(), inputs()
    shifted = {".*": lambda m: m.replace(beta=m.beta + 1)}

    def heard(changes: dict) -> torch.Tensor:
        with tf.using(model, cond=z), tf.edit(model, changes):
            return model.features(x)

    def stream(changes: dict):
        with tf.edit(model, changes), tf.record(model):
            while True:
                yield model.features(x)

    plain = heard({".*": lambda m: m})
    with tf.using(model, cond=z):
        expected, one, other = heard(shifted), stream(DOUBLED), stream(shifted)
        next(one), next(other)
        one.close()
        assert torch.equal(next(other), expected)
        other.close()
        assert torch.equal(model.features(x), plain)


@pytest.mark.parametrize(
    "block", [lambda model, z: tf.using(model, cond=-z), lambda m, z: tf.unconditioned(m)]
)
def test_an_edit_and_a_block_that_end_in_any_order_leave_nothing(block):
    model, (x, z) = conditioned(), inputs()
    with tf.using(model, cond=z):
        plain = model.features(x)
        with tf.edit(model, DOUBLED):
            expected = model.features(x)
        edit = tf.edit(model, DOUBLED)
        edit.__enter__()
        with block(model, z):
            edit.__exit__(None, None, None)
        assert torch.equal(model.features(x), plain)
        edit = tf.edit(model, DOUBLED)
        with block(model, z):
            edit.__enter__()
        assert torch.equal(model.features(x), expected)
        edit.__exit__(None, None, None)
        assert torch.equal(model.features(x), plain)


def test_an_edit_that_fails_where_a_condition_is_active_is_over():
    model, (x, z) = conditioned(), inputs()
    with tf.using(model, cond=z):
        expected = model.features(x)
        with pytest.raises(ValueError, match="expected a Modulation"), tf.edit(model, {".*": lambda m: 2}):
            pass
        assert torch.equal(model.features(x), expected)
        assert not model.film.transforms


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
@pytest.mark.parametrize("fullgraph", [False, True])
def test_an_edit_inside_of_a_compiled_function_is_heard_by_the_network_and_by_its_parts(fullgraph):
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2)), r"\d", tf.Vector(7)))
    x, z = torch.randn(2, 3), torch.randn(2, 7)

    def both(x, z):
        with tf.using(model, cond=z), model.film.transformed(lambda values: {n: 2 * values[n] for n in "01"}):
            return model[0](x), model(x)

    torch._dynamo.reset()
    expected, plain = both(x, z), model(x, cond=z)
    compiled = torch.compile(both, backend="eager", fullgraph=fullgraph)
    for one, other in zip(compiled(x, z), expected, strict=True):
        torch.testing.assert_close(one, other)
    assert torch.equal(model(x, cond=z), plain)  # also of a function that is made inside


def test_an_edit_that_ends_in_another_thread_is_over_in_its_own():
    model, (x, z) = conditioned(), inputs()
    expected, edit = model(x, cond=z), tf.edit(model, {".*": lambda m: m.replace(gamma=2 * m.gamma)})
    edit.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(edit.__exit__, None, None, None).result()
    assert torch.equal(model(x, cond=z), expected)


def test_an_edit_of_an_active_condition_that_ends_in_another_thread_leaves_nothing_there():
    model, (x, z) = conditioned(), inputs()
    with tf.using(model, cond=z):
        edit = tf.edit(model, DOUBLED)
        edit.__enter__()
        with ThreadPoolExecutor(1) as pool:
            pool.submit(edit.__exit__, None, None, None).result()
            with pytest.raises(ValueError, match="expected an active condition"):
                pool.submit(model.features, x).result()


class Twice(nn.Module):
    """A network that calls itself, with its own modulations recorded and doubled in between."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.inner = nn.Linear(3, 5), True

    def forward(self, x: torch.Tensor, *, inner: bool = False) -> torch.Tensor:
        if inner:
            return self.layer(x)
        with tf.record(self) as calls, tf.edit(self, {"layer": lambda m: 2 * m}):
            y = self(x, inner=True)
        assert len(calls.calls) == 1
        return y


def test_an_edit_inside_of_a_call_is_heard_by_the_calls_in_it_once():
    model = randomise(tf.condition(Twice(), "layer", tf.Vector(7)))
    x, z = torch.randn(2, 3), torch.randn(2, 7)
    plain = model(x, cond=z, inner=True)
    torch.testing.assert_close(model(x, cond=z), 2 * plain)
    with tf.edit(model, {"layer": lambda m: 3 * m}):
        torch.testing.assert_close(model(x, cond=z), 6 * plain)
    torch.testing.assert_close(model(x, cond=z, inner=True), plain)


def test_an_edit_inside_of_a_call_is_not_asked_of_what_the_call_does_not_hear():
    asked = []

    class Own(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with tf.edit(self, {"0": lambda m: asked.append(len(m.gamma)) or m}):
                return super().forward(x) if asked else self(x)

    model = tf.condition(Own(nn.Linear(3, 5)), "0", tf.Vector(7))
    with tf.using(model, cond=torch.randn(11, 7)):
        model(torch.randn(2, 3), cond=torch.randn(2, 7))
        with tf.unconditioned(model):
            model(torch.randn(2, 3))
    assert asked == [2]
