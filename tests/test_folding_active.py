"""Folding where something else is active, and what may be active where a network is folded."""

import copy
import pickle
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm import fold_draft as draft


def network(sites: str = "0|1|2") -> nn.Module:
    """Two sites that fold, and between them one that stays a constant."""
    base = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    found = tf.find(base, "[02]") + (tf.find(base, "1", dim=-1, features=5) if "1" in sites else [])
    model = tf.condition(base, found, tf.Vector(7))
    randomise(tf.conditioning(model))
    return model


def z() -> Tensor:
    return torch.randn(1, 7)


X = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
KEPT = {"leftover": "constant"}
EDIT = {"0|1|2": lambda m: 0.5 * m}


def test_an_edit_around_a_fold_is_folded_once():
    model, cond = network(), z()
    with tf.edit(model, EDIT):
        expected = model(X, cond=cond)
        plain, report = tf.fold(model, cond=cond, inputs=(X,), **KEPT)
        with tf.folded(model, cond=cond, **KEPT):
            torch.testing.assert_close(model(X), expected)
        assert torch.equal(model(X, cond=cond), expected)
    torch.testing.assert_close(plain(X), expected)
    assert report.error < 1e-5
    assert not torch.equal(model(X, cond=cond), expected)


INSIDE = [
    ("edit or record", lambda model: tf.edit(model, EDIT).__enter__()),
    ("edit or record", lambda model: tf.record(model).__enter__()),
    ("using or unconditioned", lambda model: tf.using(model, cond=z()).__enter__()),
    ("using or unconditioned", lambda model: tf.unconditioned(model).__enter__()),
    ("a condition of a call's own", lambda model: model(X, cond=z())),
    ("a condition of a call's own", lambda model: tf.fold(model, cond=z())),
    ("a condition of a call's own", lambda model: tf.folded(model, cond=z()).__enter__()),
    ("a copy or a pickle", copy.deepcopy),
    ("a copy or a pickle", pickle.dumps),
    ("save", lambda model: tf.save(model, "nowhere")),
    ("remove", tf.remove),
    ("freeze_base", tf.freeze_base),
]


@pytest.mark.parametrize("sites", ["0|2", "0|1|2"], ids=["all folded", "with a constant"])
@pytest.mark.parametrize(("got", "act"), INSIDE, ids=range(len(INSIDE)))
def test_inside_of_folded_nothing_else_is_silently_ignored(sites, got, act):
    model, cond = network(sites), z()
    expected = model(X, cond=cond)
    with tf.folded(model, cond=cond, **KEPT):
        with pytest.raises(
            ValueError, match=rf"folded: expected nothing (.|\n)*got {got}(.|\n)*goes around it"
        ):
            act(model)
        torch.testing.assert_close(model(X), expected)
    assert torch.equal(model(X, cond=cond), expected)


IN_ANOTHER_THREAD = [
    ("a copy or a pickle", lambda model: pickle.dumps(model)),
    ("save", lambda model: tf.save(model, "nowhere")),
    ("a call in another thread", lambda model: model(X)),
    ("a call in another thread", lambda model: model(X, cond=z())),
    ("using or unconditioned", lambda model: tf.using(model, cond=z()).__enter__()),
    ("a call in another thread", lambda model: tf.folded(model, cond=z()).__enter__()),
]


@pytest.mark.parametrize(("got", "act"), IN_ANOTHER_THREAD, ids=range(len(IN_ANOTHER_THREAD)))
def test_inside_of_folded_other_threads_do_not_use_the_network_unnoticed(got, act):
    model, cond = network("0|2"), z()
    expected = model(X, cond=cond)
    with ThreadPoolExecutor(1) as pool:
        with tf.folded(model, cond=cond):
            with pytest.raises(ValueError, match=rf"in the same thread(.|\n)*got {got}"):
                pool.submit(act, model).result()
            torch.testing.assert_close(model(X), expected)
        assert torch.equal(pool.submit(model, X, cond=cond).result(), expected)
        assert torch.equal(copy.deepcopy(model)(X, cond=cond), expected)


@pytest.mark.parametrize("sites", ["0|2", "0|1|2"], ids=["all folded", "with a constant"])
def test_a_block_that_ends_in_another_thread_is_over_in_its_own(sites: str):
    model, cond = network(sites), z()
    expected = model(X, cond=cond)
    block = tf.folded(model, cond=cond, **KEPT)
    block.__enter__()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(block.__exit__, None, None, None).result()
        assert torch.equal(pool.submit(model, X, cond=cond).result(), expected)
    with pytest.raises(ValueError, match="expected an active condition"):
        model(X)
    assert torch.equal(model(X, cond=cond), expected)
    with tf.folded(model, cond=cond, **KEPT):
        torch.testing.assert_close(model(X), expected)


def meeting(meet: Callable[[], object]) -> nn.Module:
    """A network whose code meets another thread, so that a trace of it does."""

    class Meeting(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            meet()
            return super().forward(x)

    return tf.condition(Meeting(nn.Linear(3, 5)).eval(), "0", tf.Vector(7))


def test_a_network_that_calls_its_parts_in_threads_folds():
    class Parallel(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(3, 5)

        def forward(self, x: Tensor) -> Tensor:
            with ThreadPoolExecutor(2) as pool:
                parts = [pool.submit(part, x) for part in (self.a, self.b)]
                return parts[0].result() + parts[1].result()

    model, cond = tf.condition(Parallel().eval(), "a", tf.Vector(7)), z()
    randomise(model.film)
    with tf.using(model, cond=cond):  # slots are of the calling thread alone
        expected = model.b(X) + model.a(X)
    torch.testing.assert_close(tf.fold(model, cond=cond)[0](X), expected)


def test_weights_are_folded_and_checked_in_their_own_precision_under_autocast():
    model, cond = network("0|2"), z()
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(X, cond=cond)
        with tf.folded(model, cond=cond):
            torch.testing.assert_close(model(X), expected, atol=0.05, rtol=0.05)


def test_another_thread_runs_its_network_while_one_is_traced():
    other, outputs = nn.Sequential(nn.Linear(3, 5), nn.ReLU()), []
    with ThreadPoolExecutor(1) as pool:
        tf.fold(meeting(lambda: outputs.append(pool.submit(other, X).result())), cond=z())
    assert outputs
    assert all(torch.equal(output, other(X)) for output in outputs)


def test_two_threads_that_fold_take_turns_and_leave_torch_as_it_was():
    before = nn.Module.__call__, nn.Module.__getattr__
    inside, over, folds = threading.Event(), threading.Event(), []

    def wait_for_over() -> None:
        inside.set()
        over.wait(0.1)

    def begin() -> None:
        if not folds:
            folds.append(pool.submit(tf.fold, meeting(wait_for_over), cond=z()))
            inside.wait(0.1)

    with ThreadPoolExecutor(1) as pool:
        tf.fold(meeting(begin), cond=z())
        over.set()
    assert folds[0].exception() is None
    assert (nn.Module.__call__, nn.Module.__getattr__) == before


def test_after_a_write_that_fails_everything_is_back(monkeypatch: pytest.MonkeyPatch):
    model, cond = network("0|2"), z()
    expected, before, written = model(X, cond=cond), dict(model.named_parameters()), []
    write = draft._parameter

    def full(*args) -> nn.Parameter:
        written.append(args)
        if len(written) == 7:  # the third of the network's own, after four of a copy
            raise RuntimeError("out of memory")
        return write(*args)

    monkeypatch.setattr(draft, "_parameter", full)
    with pytest.raises(RuntimeError, match="out of memory"), tf.folded(model, cond=cond):
        pass
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert torch.equal(model(X, cond=cond), expected)


def test_a_network_without_a_condition_is_not_folded():
    model = network()
    for act in (tf.fold, lambda *args, **options: tf.folded(*args, **options).__enter__()):
        with (
            tf.unconditioned(model),
            pytest.raises(ValueError, match="hears its condition, got it inside `uncon"),
        ):
            act(model, cond=z(), **KEPT)


@pytest.mark.plain
def test_a_compiled_network_hears_what_is_folded():
    model, cond = network(), z()
    compiled, expected = torch.compile(model, backend="eager"), model(X, cond=cond)
    torch.testing.assert_close(compiled(X, cond=cond), expected)
    with tf.folded(model, cond=cond, **KEPT):
        torch.testing.assert_close(compiled(X), expected)
    torch.testing.assert_close(compiled(X, cond=cond), expected)


@dataclass
class Answer:
    logits: Tensor


class Ends(nn.Module):
    def __init__(self, end) -> None:
        super().__init__()
        self.linear, self.end = nn.Linear(3, 5), end

    def forward(self, x: Tensor):
        return self.end(self.linear(x))


@pytest.mark.parametrize(("end", "got"), [(lambda y: y.argmax(-1), "torch.int64"), (Answer, "Answer")])
def test_outputs_that_cannot_be_compared_are_an_error(end, got):
    model = tf.condition(Ends(end).eval(), "linear", tf.Vector(7))
    with pytest.raises(ValueError, match=f"floating-point tensors, to compare them on the inputs, got {got}"):
        tf.fold(model, cond=z(), inputs=(X,))


def test_one_tensor_is_the_only_input():
    model, cond = network("0|2"), z()
    errors = [tf.fold(model, cond=cond, inputs=inputs)[1].error for inputs in (X, (X,), [X])]
    assert errors[0] == errors[1] == errors[2] < 1e-5


@pytest.mark.filterwarnings("ignore")
def test_weights_packed_in_half_precision_are_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = torch.ao.quantization.quantize_dynamic(
            nn.Sequential(nn.Linear(64, 5)), {nn.Linear}, dtype=torch.float16
        )
    model = tf.condition(base, tf.find(base, "0", dim=-1, features=5), tf.Vector(7))
    with pytest.raises(ValueError, match=r"0  its weight is packed as torch.float16, not as integers"):
        tf.fold(model, cond=z())


def test_a_fusion_with_numbers_of_its_own_folds_in_their_precision():
    class Basis:
        basis = torch.randn(4, 5)

        def build(self, cond_dim: int, sites: dict[str, int]) -> nn.Module:
            class Coordinates(nn.Linear):
                def forward(self, z: Tensor) -> dict[str, Tensor]:
                    return dict.fromkeys(sites, super().forward(z))

            return Coordinates(cond_dim, 4)

        def apply(self, x: Tensor, value: Tensor, dim: int, site: str) -> Tensor:
            return x * (1 + value @ self.basis)

        def fold(self, value: Tensor) -> tf.Modulation:
            gamma = 1 + value @ self.basis
            return tf.Modulation(gamma, torch.zeros_like(gamma))

    model, cond = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7), fusion=Basis()), z()
    torch.testing.assert_close(tf.fold(model, cond=cond)[0](X), model(X, cond=cond))
