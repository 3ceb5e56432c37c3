"""Ctrl-C, whenever it comes: what is changed is first written down, so that it is given back or complete.

Interrupts in a `finally`, within what gives back, are left out.
"""

import ast
import inspect
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from textwrap import dedent
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import fx, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm import adapter, fold_draft, folding, freezing, injection, slots, tabulation
from torchfilm.filling import Conditioning, active, again_active
from torchfilm.injection import film_of
from torchfilm.lookup import Row, Table
from torchfilm.restoring import _Changed, in_mode, undisturbed

pytestmark = pytest.mark.plain


def interrupts(act: Callable[[], object], *functions: Callable[..., Any]) -> Iterator[str]:
    """Call `act` again and again, interrupted at each line of the functions in turn; yield the line.

    The last call is not interrupted. A line counts once per frame, and not in a `finally`.
    """
    lines = dict(map(_lines, functions))
    for after in itertools.count():
        if not (line := _interrupted(act, lines, after)):
            break
        yield line
    assert after > 0


def _lines(function: Callable[..., Any]) -> tuple[CodeType, set[int]]:
    """Return the code of a function, and its lines but for those in a `finally`."""
    source, first = inspect.getsourcelines(plain := inspect.unwrap(function))
    tries = [one for one in ast.walk(ast.parse(dedent("".join(source)))) if isinstance(one, ast.Try)]
    ends = {line for one in tries for end in one.finalbody for line in range(end.lineno, end.end_lineno + 1)}
    return plain.__code__, {first + i for i in range(len(source)) if i + 1 not in ends}


def _interrupted(act: Callable[[], object], lines: dict[CodeType, set[int]], after: int) -> str:
    """Interrupt where that many lines were reached before; return which it is, "" where there is none."""
    seen: dict[tuple[FrameType, int], None] = {}

    def watch(frame: FrameType, event: str, argument: object) -> Any:
        if event == "line" and frame.f_lineno in lines[frame.f_code]:
            seen.setdefault((frame, frame.f_lineno))
            if len(seen) > after:
                raise KeyboardInterrupt
        return watch if frame.f_code in lines else None

    before = sys.gettrace()
    sys.settrace(watch)
    try:
        kept = act()  # till tracing is over: a block ends with the object
    except KeyboardInterrupt:
        frame, line = list(seen)[-1]
        return f"{frame.f_code.co_name}, line {line}"
    finally:
        sys.settrace(before)
    del kept
    return ""


def begun(block: AbstractContextManager[Any]) -> object:
    """Begin a block; it ends when nobody has what this returns."""
    block.__enter__()
    return block


def network() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5)).eval()
    return randomise(tf.condition(model, "0", tf.Vector(7)))


X, Z = torch.ones(2, 3), torch.ones(2, 7)
BLOCKS = {
    "using": lambda model: tf.using(model, cond=-Z),
    "unconditioned": tf.unconditioned,
    "edit": lambda model: tf.edit(model, {".*": lambda m: 0 * m}),
    "record": tf.record,
    "folded": lambda model: tf.folded(model, cond=-Z[:1]),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_block_that_is_interrupted_as_it_begins_leaves_nothing_behind(name: str):
    model, block = network(), BLOCKS[name]
    expected, weights = model(X, cond=Z), dict(model.named_parameters())
    parts = active, again_active, Conditioning.transformed, Conditioning.fixed
    fold = folding.folded, folding._fold_in_place, fold_draft.Draft.apply
    for line in interrupts(lambda: begun(block(model)), *parts, *fold):
        assert torch.equal(model(X, cond=Z), expected), line
        with pytest.raises(ValueError, match="expected an active condition"):
            model(X)
        assert all(weights[key] is one for key, one in model.named_parameters()), line
        assert not model.film.transforms, line


def test_a_measurement_that_is_interrupted_as_it_begins_leaves_modes_to_the_block_around_it():
    model = nn.Sequential(nn.Dropout(), nn.Linear(3, 5))
    with in_mode(model, training=False):
        for _ in interrupts(lambda: begun(in_mode(model, training=False)), in_mode):
            pass
    assert all(module.training for module in model.modules())


def test_a_measurement_that_is_interrupted_as_it_begins_lets_others_be_compiled():
    compiled = []
    model = torch.compile(nn.Linear(3, 5), backend=lambda graph, inputs: compiled.append(graph) or graph)
    block = _Changed.block
    for count, line in enumerate(interrupts(lambda: begun(undisturbed(nn.Linear(3, 5))), block), 1):
        torch._dynamo.reset()
        model(X)
        assert len(compiled) == count, line


@pytest.mark.parametrize("patch", ["_PatchedFnSetAttr", "_PatchedFnSetItem"])
def test_a_trace_that_is_interrupted_as_it_ends_leaves_torch_as_it_was(
    patch: str, monkeypatch: pytest.MonkeyPatch
):
    class Block(nn.Sequential):
        pass

    def interrupted(patched: Any) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    model = tf.condition(nn.Sequential(Block(nn.Linear(3, 5))), "0", tf.Vector(7), features=5, dim=-1)
    names = [(vars(one), dict(vars(one))) for one in (math, fx._symbolic_trace)]
    methods = nn.Module.__call__, nn.Module.__getattr__
    monkeypatch.setattr(getattr(fx._symbolic_trace, patch), "revert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        tf.fold(model, cond=Z[:1])
    after = nn.Module.__call__, nn.Module.__getattr__, *(dict(now) for now, _ in names)
    nn.Module.__call__, nn.Module.__getattr__ = methods  # or no other test would run
    for now, before in names:
        now.update(before)
    assert after == (*methods, *(before for _, before in names))


def encoder() -> nn.Module:
    return nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 5, batch_first=True), 2).eval()


@pytest.mark.parametrize("site", ["layers.0.norm1", "layers.1.linear1"])
def test_a_network_that_was_to_be_conditioned_is_as_it_was(site: str):
    model = encoder()
    kinds = [type(module) for module in model.modules()]
    parts = injection._apply, injection.attach, injection._nesting, slots.listen, slots.swap
    for line in interrupts(lambda: tf.condition(model, site, tf.Vector(7)), *parts):
        assert [type(module) for module in model.modules()] == kinds, line
        assert model.use_nested_tensor, line
        assert not any("_film_slot" in vars(module) for module in model.modules()), line
    assert film_of(model) is not None


def test_a_removal_goes_on_where_it_was_interrupted():
    model = tf.condition(encoder(), "layers.0.norm1", tf.Vector(7))
    for line in interrupts(lambda: tf.remove(model), injection._undo, slots.swap_back):
        if film_of(model) is not None:
            tf.remove(model)
        assert model.use_nested_tensor, line
        tf.condition(model, "layers.0.norm1", tf.Vector(7))


def test_what_was_to_be_frozen_trains_again():
    model = network()
    for line in interrupts(lambda: tf.freeze_base(model), freezing.Frozen.freeze):
        tf.unfreeze_base(model)
        assert all(one.requires_grad for one in model.parameters()), line


def test_a_network_is_tabulated_or_it_is_not():
    made = []

    def act() -> None:
        made.append(network())
        tf.tabulate(made[-1], conds=Z)

    for line in interrupts(act, tabulation.tabulate):
        film = made[-1].film
        assert isinstance(film.cond, Row) == isinstance(film.generator, Table), line


def test_a_base_is_loaded_or_plain(tmp_path: Path):
    model, made = network(), []
    tf.save(model, tmp_path)

    def act() -> None:
        made.append(tf.remove(network()))
        made[-1].load_state_dict(tf.remove(network()).state_dict() | base)
        tf.load(made[-1], tmp_path)

    base = {key: value for key, value in model.state_dict().items() if not key.startswith("film.")}
    for line in interrupts(act, adapter.load):
        if film_of(made[-1]) is not None:
            assert torch.equal(made[-1](X, cond=Z), model(X, cond=Z)), line


def test_a_second_run_of_a_checkpoint_leaves_nothing_behind():
    model = network()
    expected = model(X, cond=Z)
    with tf.edit(model, {".*": lambda m: 0 * m}):
        again = tf.checkpoint_context(model)()[1]
    for line in interrupts(again.__enter__, type(again).__enter__):
        assert torch.equal(model(X, cond=Z), expected), line
    again.__exit__(None, None, None)
    assert torch.equal(model(X, cond=Z), expected)
