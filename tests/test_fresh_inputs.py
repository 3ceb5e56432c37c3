"""Tools that call a network several times: each call meets the inputs and the random numbers of the first."""

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


def test_copies_of_tensors_are_small_and_have_gradients_graphs_and_marks_of_their_own():
    every = torch.zeros(100, 3, requires_grad=True)
    part, leaf = every[:2] * 1, torch.ones(2, requires_grad=True)
    leaf.mark = "kept"
    slice_, (one, two) = fresh((every.detach()[:2], (part, leaf)))
    assert slice_.untyped_storage().nbytes() == 24
    assert two.is_leaf
    assert two.requires_grad
    assert two.mark == "kept"
    one.add_(1)  # no leaf, as before
    one.sum().backward()
    assert every.grad[:2].eq(1).all()
    assert not part.any()


def test_a_copy_that_ends_the_memory_says_so():
    class Large:
        def __deepcopy__(self, memo: object) -> Any:
            raise MemoryError

    with pytest.raises(MemoryError):
        fresh([Large()])
