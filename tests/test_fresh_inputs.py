"""Tools that call a network several times: each call meets the inputs and the random numbers of the first."""

import threading
from collections import UserDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.restoring import fresh

X, Z = torch.linspace(-1, 1, 5 * 3).reshape(5, 3).sin(), torch.linspace(-2, 3, 5 * 7).reshape(5, 7).cos()


class Halves(nn.Linear):
    """Writes into its input."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.div_(2))


class Appends(nn.Linear):
    """Keeps what it computed in a list, as a cache of keys and values does."""

    def forward(self, x: Tensor, past: list[Tensor]) -> Tensor:
        past.append(x + sum(past))
        return super().forward(past[-1])


class Draws(nn.Linear):
    """Adds noise in evaluation too."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + torch.rand_like(x))


class Parts(nn.Module):
    """A layer whose output is conditioned, and others around it."""

    def __init__(self, kind: type[nn.Linear]) -> None:
        super().__init__()
        self.before, self.site, self.after = kind(3, 5), nn.Linear(5, 4), nn.Linear(4, 2)

    def forward(self, *given: Any) -> Tensor:
        return self.after(self.site(self.before(*given)).relu())


class Writes(tf.Vector):
    """An encoder that normalises its condition in place."""

    def forward(self, cond: Tensor) -> Tensor:
        return super().forward(cond.div_(2))


def network(kind: type[nn.Linear], cond: nn.Module | None = None) -> nn.Module:
    return tf.condition(Parts(kind), "site", tf.Vector(7) if cond is None else cond).eval()


def inputs(kind: type[nn.Linear]) -> tuple[Any, ...]:
    return (X.clone(), [X.clone()]) if kind is Appends else (X.clone(),)


def compared(model: nn.Module, given: tuple[Any, ...]) -> None:
    assert tf.compare({"film": model}, (*given, Z), rounds=3).rows


def folds(model: nn.Module, given: tuple[Any, ...]) -> None:
    _, report = tf.fold(model, cond=Z[:1], inputs=given)
    assert report.error is not None
    assert report.error < 1e-6


def is_ignored(model: nn.Module, given: tuple[Any, ...]) -> None:
    found = tf.heard(model, [(given, Z)], resamples=40)
    assert found.verdict == "ignored"
    assert found.effects["repeat"].output.value == found.effects["swap"].output.value == 0


TOOLS: dict[str, Callable[[nn.Module, tuple[Any, ...]], Any]] = {
    "compare": compared,
    "doctor": lambda model, given: tf.doctor(model, *given, cond=Z),
    "fold": folds,
    "heard": is_ignored,
    "sensitivity": lambda model, given: tf.sensitivity(model, *given, cond=Z),
}


@pytest.mark.parametrize("kind", [Halves, Appends, Draws])
@pytest.mark.parametrize("tool", TOOLS)
def test_calls_leave_no_trace_in_one_another_nor_in_inputs_and_random_numbers(tool, kind):
    model, given = network(kind), inputs(kind)
    if tool == "fold":
        randomise(model)
    chance = torch.get_rng_state()
    TOOLS[tool](model, given)
    assert torch.equal(given[0], X)
    assert kind is not Appends or (len(given[1]) == 1 and torch.equal(given[1][0], X))
    assert torch.equal(torch.get_rng_state(), chance)


@pytest.mark.parametrize("kind", [Halves, Appends])
def test_calls_of_a_comparison_and_of_a_diagnosis_all_see_the_same(kind):
    model, given, seen = network(kind), inputs(kind), []
    model.before.register_forward_pre_hook(lambda _, args: seen.append(str(args)))
    tf.compare({"film": model}, (*given, Z), rounds=3)
    tf.doctor(model.train(), *given, cond=Z)
    assert len(seen) > 8
    assert len({one.replace(", requires_grad=True", "") for one in seen}) == 1


def test_a_sweep_differs_by_strength_alone():
    model, chance = randomise(network(Draws)), torch.get_rng_state()
    first, again, other = tf.sweep(model, ".*", [1, 1, 0], lambda: model(X, cond=Z))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), chance)


def test_an_encoder_that_writes_into_its_condition_writes_into_a_copy():
    model, z = network(nn.Linear, Writes(7)), Z.clone()
    randomise(model)
    plain, _ = tf.fold(model, cond=z[:1], inputs=X)
    torch.testing.assert_close(plain(X), model(X, cond=z[:1].clone()))
    expected = model(X, cond=z.clone())
    tf.heard(model, [(X, z)], resamples=40)
    tf.doctor(model, X, cond=z)
    assert torch.equal(z, Z)
    table = tf.tabulate(model, conds=[z[0], z[0]])
    assert torch.equal(z, Z)
    torch.testing.assert_close(table(X[:1], cond=1), expected[:1])


def test_functions_that_write_into_what_they_are_given_do_not_change_what_is_measured():
    z, target = Z.clone(), torch.zeros(5, 3)

    def both(x: Tensor, cond: Tensor) -> Tensor:
        return x + cond[:, :3]

    def loss(output: Tensor, target: Tensor) -> Tensor:
        return output.sub_(target.add_(1)).square().mean(1)

    found = tf.heard(both, [(X, z, target)], loss=loss, blank=lambda c: c.zero_(), resamples=40)
    assert found.effects["repeat"].output.value == 0
    assert found.effects["repeat"].loss.value == 0
    assert found.effects["blank"].output.value > 0
    assert torch.equal(z, Z)
    assert not target.any()


def test_outputs_in_one_memory_are_told_apart():
    memory = torch.empty(5, 3)
    found = tf.heard(lambda x, cond: torch.add(x, cond[:, :3], out=memory), [(X, Z)], resamples=40)
    assert found.verdict == "heard"


class Unlike:
    """Something that cannot be copied."""

    def __deepcopy__(self, memo: object) -> Any:
        raise RuntimeError("a handle")


def test_what_cannot_be_copied_and_what_is_learned_is_handed_on_beside_copies_of_the_rest():
    handle, steps, layer, past = Unlike(), iter([1]), nn.Linear(2, 3), [torch.zeros(2)]
    one, two, three, four, five, six = fresh((handle, (n for n in steps), layer, layer.weight, past, past[0]))
    assert one is handle
    assert list(two) == [1]
    assert three is layer
    assert four is layer.weight
    assert five is not past
    assert five[0] is six
    assert six is not past[0]


def test_copies_of_tensors_take_no_more_memory_than_they_show_and_keep_marks():
    every, one = torch.zeros(100, 3), torch.ones(2)
    one.mark = "kept"
    some, (column,), marked = fresh((every[:2], [every[:, 1]], one))
    assert some.untyped_storage().nbytes() == 24
    assert column.untyped_storage().nbytes() == 400
    assert marked.mark == "kept"


class Cache:
    """All in one memory, and each layer's part of it."""

    def __init__(self) -> None:
        self.all = torch.zeros(2, 5, 4)
        self.layers = [self.all[0], self.all[1]]


class Fills(nn.Module):
    """Writes into a part of a cache, and reads the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.site = nn.Linear(3, 4)

    def forward(self, x: Tensor, cache: Cache) -> Tensor:
        cache.layers[1].copy_(self.site(x))
        return cache.all.sum(dim=0)


def test_what_is_written_into_a_part_of_a_cache_is_read_in_the_whole():
    model, cache = randomise(tf.condition(Fills(), "site", tf.Vector(7)).eval()), Cache()
    assert tf.heard(model, [((X, cache), Z)], resamples=40).verdict == "heard"
    assert tf.fold(model, cond=Z[:1], inputs=(X, cache))[1].error < 1e-6
    assert not cache.all.any()


class Handle:
    """What it holds is closed with it."""

    def __init__(self, closed: list[str]) -> None:
        self.closed, self.read = closed, []

    def __del__(self) -> None:
        self.closed.append("closed")


class Holder:
    """Keeps something, in a slot."""

    __slots__ = ("kept",)

    def __init__(self, kept: Any) -> None:
        self.kept = kept


def test_what_ends_with_an_object_is_not_copied():
    closed: list[str] = []
    handle = Handle(closed)
    one, two = fresh(([handle], {"here": handle}))
    assert one[0] is handle is two["here"]
    del one, two
    assert not closed
    fresh((handle, threading.Lock(), torch.zeros(2)))
    del handle
    assert closed  # at once: what was copied is held by nothing


def test_what_cannot_be_copied_leaves_no_trace_in_copies_of_the_rest():
    given = [Holder([k]) for k in range(6)] + [UserDict(k=k) for k in range(6)]
    copies = fresh((*given, (n for n in [1]), threading.Lock()))[:12]
    assert [one.kept for one in copies[:6]] == [[k] for k in range(6)]
    assert [one["k"] for one in copies[6:]] == list(range(6))
    assert all(one is not other for one, other in zip(copies, given, strict=True))
    assert all(one.kept is not other.kept for one, other in zip(copies[:6], given[:6], strict=True))


def test_an_object_that_fails_when_it_is_made_is_handed_on():
    class TwoError(Exception):
        def __init__(self, one: int, other: int) -> None:
            super().__init__("two arguments, of which pickle knows none")

    fails, past = TwoError(1, 2), [torch.zeros(2)]
    one, two = fresh((fails, past))
    assert one is fails
    assert two[0] is not past[0]


def test_functions_and_methods_of_networks_are_handed_on():
    layer = nn.Linear(2, 3)
    one, two = fresh((layer.forward, {"measure": torch.relu}))
    assert one.__self__ is layer
    assert two["measure"] is torch.relu


class Force(nn.Module):
    """A gradient with respect to an input of another."""

    def __init__(self) -> None:
        super().__init__()
        self.site, self.out = nn.Linear(1, 4), nn.Linear(4, 1)

    def forward(self, place: Tensor, distance: Tensor) -> Tensor:
        energy = self.out(self.site(distance).tanh()).sum()
        return torch.autograd.grad(energy, place, create_graph=True)[0]


def test_tensors_in_a_graph_are_those_of_the_graph():
    place = X.clone().requires_grad_()
    distance = place.norm(dim=1, keepdim=True)
    assert tf.doctor(tf.condition(Force(), "site", tf.Vector(7)).eval(), place, distance, cond=Z)
    one, two = fresh((place, [distance]))
    assert one is place
    assert two[0] is distance


def test_parameters_of_inference_mode_are_no_part_of_a_graph():
    model = network(nn.Linear)
    for needs in (False, True):
        with torch.inference_mode():
            given = nn.Parameter(X.clone(), requires_grad=needs)
        assert tf.doctor(model, given, cond=Z) is not None
        assert tf.compare({"film": model}, (given, Z), rounds=1).rows


def test_a_copy_that_ends_the_memory_says_so():
    class Large:
        def __deepcopy__(self, memo: object) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        fresh([Large()])
