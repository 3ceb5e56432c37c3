"""Several conditions at once, and those that are missing: per batch, per sample, by chance, per process."""

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.several import Sizes

SITES = {"block1": 3, "block2": 5}
PRESENT = torch.tensor([True, False, True, True, False])


def labels(batch: int = 5) -> torch.Tensor:
    return torch.randint(11, (batch,))


def several(combine: str = "concat", **options: float) -> tf.Several:
    parts = {"kind": tf.Classes(11, 7), "words": tf.Tokens(7), "time": tf.Scalars(1, 7 * 2)}
    parts["time"] = nn.Sequential(parts["time"], nn.Linear(14, 7))
    parts["time"].dim = 7
    return randomise(tf.Several({name: tf.Maybe(c) for name, c in parts.items()}, combine, **options))


def given(batch: int = 5) -> dict:
    return {
        "kind": labels(batch),
        "words": (torch.randn(batch, 3, 7), torch.rand(batch, 3) < 0.7),
        "time": torch.rand(batch, 1),
    }


def test_what_is_missing_is_null_and_what_is_there_is_untouched():
    maybe = randomise(tf.Maybe(tf.Classes(11, 7)))
    classes = labels()
    z = maybe(tf.Masked(classes, PRESENT))
    assert torch.equal(z[PRESENT], maybe.condition(classes)[PRESENT])
    assert torch.equal(z[~PRESENT], maybe.null.expand(2, 7))
    assert torch.equal(maybe(classes), maybe.condition(classes))
    assert torch.equal(maybe(tf.Masked(classes)), maybe.condition(classes))


@pytest.mark.parametrize("as_what", [list, np.array])
def test_a_mask_may_be_a_list_an_array_or_one_boolean(as_what):
    maybe, vectors = randomise(tf.Maybe(tf.Vector(7))), torch.randn(5, 7)
    expected = maybe(tf.Masked(vectors, PRESENT))
    assert torch.equal(maybe(tf.Masked(vectors, as_what(PRESENT.tolist()))), expected)
    assert torch.equal(maybe(tf.Masked(vectors, True)), vectors)
    assert torch.equal(maybe(tf.Masked(vectors, False)), maybe.null.expand(5, 7))


class Sum(nn.Module):
    """An encoder of two arguments."""

    dim = 7

    def forward(self, one, other):
        return one + 2 * other


class Pair(Sum):
    """An encoder of one argument, which is a pair."""

    def forward(self, both):
        return super().forward(*both)


def test_a_tuple_holds_several_arguments_also_where_they_may_be_missing():
    one, other = torch.randn(5, 7), torch.randn(5, 7)
    expected = one + 2 * other
    assert torch.equal(tf.Maybe(Sum())(one, other), expected)
    assert torch.equal(tf.Maybe(Sum())((one, other)), expected)
    assert torch.equal(tf.Several({"both": Sum()})({"both": (one, other)}), expected)
    for pair in (Pair(), Scaled()):
        assert torch.equal(tf.Several({"both": pair})({"both": (one, other)}), expected)
    masked = tf.Maybe(tf.Maybe(Sum()))(tf.Masked((one, other), PRESENT))
    assert torch.equal(masked[PRESENT], expected[PRESENT])


class Scaled(Pair):
    """An encoder of a pair, with an option behind it."""

    def forward(self, both, scale=1.0):
        return scale * super().forward(both)


class Optional(Sum):
    """An encoder of two arguments, one of which may be left out."""

    def forward(self, one, other=None):
        return one if other is None else super().forward(one, other)


def test_a_tuple_holds_several_arguments_also_where_the_encoder_can_do_without():
    one, other = torch.randn(5, 7), torch.randn(5, 7)
    expected = one + 2 * other
    assert torch.equal(tf.Maybe(Optional())(one, other), expected)
    assert torch.equal(tf.Maybe(Optional())((one, other)), expected)
    assert torch.equal(tf.Maybe(Optional())(one), one)
    assert torch.equal(tf.Several({"both": Optional()})({"both": (one, other)}), expected)


def test_missing_for_the_batch_is_missing_for_every_sample():
    maybe = randomise(tf.Maybe(tf.Classes(11, 7)))
    nobody = maybe(tf.Masked(labels(), torch.tensor([False])[0]))
    for missing in (None, tf.Masked(None), tf.Masked(None, PRESENT)):
        assert torch.equal(maybe(missing).expand(5, 7), nobody)


def test_a_zero_null_is_zero_and_no_parameter():
    maybe = tf.Maybe(tf.Classes(11, 7), null="zero")
    assert [name for name, _ in maybe.named_parameters()] == ["condition.table.weight"]
    assert not maybe(tf.Masked(labels(), PRESENT))[~PRESENT].any()
    assert torch.equal(maybe(None), torch.zeros(7))


def test_a_learned_null_starts_at_zero_and_learns():
    maybe = tf.Maybe(tf.Classes(11, 7))
    assert not maybe.null.any()
    maybe(tf.Masked(labels(), PRESENT)).sum().backward()
    assert torch.equal(maybe.null.grad, torch.full((7,), 2.0))
    randomise(maybe).reset_parameters()
    assert not maybe.null.any()


def test_a_missing_sample_may_hold_anything_finite_and_nothing_leaks():
    maybe = randomise(tf.Maybe(tf.Vector(7)))
    vectors = torch.randn(5, 7)
    wild = torch.where(PRESENT[:, None], vectors, 1e30).requires_grad_()
    z = maybe(tf.Masked(wild, PRESENT))
    assert torch.equal(z, maybe(tf.Masked(vectors, PRESENT)))
    z.sum().backward()
    assert torch.equal(wild.grad.bool().any(dim=1), PRESENT)


def test_a_condition_per_token_is_missing_for_whole_samples():
    maybe = randomise(tf.Maybe(tf.Vector(7)))
    vectors = torch.randn(5, 4, 7)
    z = maybe(tf.Masked(vectors, PRESENT))
    assert torch.equal(z[PRESENT], vectors[PRESENT])
    assert torch.equal(z[~PRESENT], maybe.null.expand(2, 4, 7))


def test_missing_unpooled_tokens_are_one_learned_token():
    maybe = randomise(tf.Maybe(tf.Tokens(7, pooling=None)))
    tokens, mask = torch.randn(5, 3, 7), torch.rand(5, 3) < 0.7
    chosen, real = maybe(tf.Masked((tokens, mask), PRESENT))
    assert torch.equal(real[PRESENT], mask[PRESENT])
    assert torch.equal(chosen[PRESENT][mask[PRESENT]], tokens[PRESENT][mask[PRESENT]])
    assert real[~PRESENT].tolist() == [[True, False, False]] * 2
    assert torch.equal(chosen[~PRESENT][:, 0], maybe.null.expand(2, 7))
    alone, one = maybe(None)
    assert torch.equal(alone, maybe.null.view(1, 1, 7))
    assert one.tolist() == [[True]]
    assert torch.equal(maybe(tokens, mask)[1], mask)


def test_dropout_takes_its_share_in_training_and_nothing_else():
    maybe = tf.Maybe(tf.Vector(1), dropout=0.3, null="zero")
    ones = torch.ones(20_000, 1)
    assert maybe(ones).mean().item() == pytest.approx(0.7, abs=0.02)
    assert torch.equal(maybe.eval()(ones), ones)
    assert tf.Maybe(tf.Vector(1), dropout=1.0)(ones).any().item() is False


def test_random_numbers_are_drawn_only_where_something_may_be_dropped():
    vectors, cond = torch.ones(5, 7), given()
    quiet = [
        lambda: tf.Maybe(tf.Vector(7))(vectors),
        lambda: tf.Maybe(tf.Vector(7), dropout=0.5).eval()(vectors),
        lambda: tf.Maybe(tf.Vector(7), dropout=0.5)(tf.Masked(vectors, PRESENT)),
        lambda: tf.Maybe(tf.Vector(7), dropout=0.5)(None),
    ]
    both = several(joint_dropout=0.5)
    state = torch.get_rng_state()
    for call in quiet:
        call()
    both.eval()(cond)
    assert torch.equal(torch.get_rng_state(), state)
    both.train()(cond)
    assert not torch.equal(torch.get_rng_state(), state)


def test_dropout_draws_from_a_generator_where_one_is_given():
    maybe, vectors = randomise(tf.Maybe(tf.Vector(7), dropout=0.5)), torch.randn(50, 7)
    one, same = (maybe(vectors, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, maybe(vectors, generator=torch.Generator().manual_seed(4)))
    both, cond = several(joint_dropout=0.5), given(50)
    one, same = (both(cond, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, same)


NESTED = {
    "Maybe": lambda part: tf.Maybe(part),
    "Several": lambda part: tf.Several({"inner": tf.Several({"part": part})}),
}


@pytest.mark.parametrize("outer", NESTED)
def test_dropout_of_conditions_inside_of_others_draws_from_the_generator_too(outer: str):
    made, vectors = NESTED[outer](tf.Maybe(tf.Vector(7), dropout=0.5)), torch.randn(50, 7)
    given = vectors if outer == "Maybe" else {"inner": {"part": vectors}}
    one, same = (made(given, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(one, same)
    assert not torch.equal(one, vectors)


def test_an_explicit_mask_is_final():
    maybe = randomise(tf.Maybe(tf.Vector(7), dropout=1.0))
    vectors = torch.randn(5, 7)
    assert torch.equal(maybe(tf.Masked(vectors, PRESENT))[PRESENT], vectors[PRESENT])
    both = tf.Several({"a": tf.Maybe(tf.Vector(7), dropout=1.0)}, joint_dropout=1.0)
    assert torch.equal(both({"a": tf.Masked(vectors, PRESENT)})[PRESENT], vectors[PRESENT])


def test_a_concatenation_lies_in_the_order_of_the_names():
    both, cond = several().eval(), given()
    expected = torch.cat([both.parts[name](cond[name]) for name in ("kind", "words", "time")], dim=-1)
    assert both.dim == 21
    assert torch.equal(both(cond), expected)
    assert torch.equal(both(dict(reversed(cond.items()))), expected)


def test_a_sum_is_the_sum():
    both, cond = several("sum").eval(), given()
    assert both.dim == 7
    expected = both.parts["kind"](cond["kind"]) + both.parts["words"](cond["words"])
    torch.testing.assert_close(both(cond), expected + both.parts["time"](cond["time"]))


def test_the_modulations_of_a_composition_are_applied_in_order():
    both, cond, x = several("compose").eval(), given(), torch.randn(5, 3)
    generator = randomise(tf.build_generator(both.dim, SITES))
    m = generator(both(cond))["block1"]
    expected = x
    for name, part in zip(both.parts, generator.parts, strict=True):
        own = part(both.parts[name](cond[name]))["block1"]
        expected = own.gamma * expected + own.beta
    assert [part.cond_dim for part in generator.parts] == [7, 7, 7]
    torch.testing.assert_close(m.gamma * x + m.beta, expected)


def test_a_composition_conditions_a_network():
    both, cond, x = several("compose"), given(), torch.randn(5, 3)
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", both)
    with tf.unconditioned(model):
        plain = model(x)
    assert torch.equal(model(x, cond=cond), plain)
    randomise(tf.conditioning(model).generator)
    assert not torch.allclose(model(x, cond=cond), model(x, cond={**cond, "kind": None}))


def test_with_a_linear_head_a_concatenation_adds_the_deltas():
    both, cond = several().eval(), given()
    generator = randomise(tf.Generator(both.dim, SITES))
    torch.nn.init.zeros_(generator.head.bias)
    total = generator(both(cond))["block1"]
    vectors = both.encode(cond)
    zeros = {name: torch.zeros_like(z) for name, z in vectors.items()}
    alone = [generator(both.join({**zeros, name: z}))["block1"] for name, z in vectors.items()]
    torch.testing.assert_close(total.gamma, 1 + sum(m.gamma - 1 for m in alone))
    torch.testing.assert_close(total.beta, sum(m.beta for m in alone))


def test_each_condition_may_be_missing_for_other_samples():
    both, cond = several().eval(), given()
    z = both({**cond, "kind": tf.Masked(cond["kind"], PRESENT), "words": None})
    expected = both(cond)
    assert torch.equal(z[PRESENT][:, :7], expected[PRESENT][:, :7])
    assert torch.equal(z[~PRESENT][:, :7], both.parts["kind"].null.expand(2, 7))
    assert torch.equal(z[:, 7:14], both.parts["words"].null.expand(5, 7))
    assert torch.equal(z[:, 14:], expected[:, 14:])
    absent = {name: value for name, value in cond.items() if name != "words"}
    assert torch.equal(both(absent), both({**cond, "words": None}))


def test_with_nothing_given_at_all_there_is_one_row_for_every_sample():
    both, cond = several().eval(), given()
    nobody = torch.zeros(5, dtype=torch.bool)
    masked = both({name: tf.Masked(value, nobody) for name, value in cond.items()})
    assert torch.equal(both({}).expand(5, 21), masked)


def test_what_may_not_be_missing_is_asked_for():
    both = tf.Several({"time": tf.Scalars(1, 8), "text": tf.Vector(7), "style": tf.Maybe(tf.Classes(5, 3))})
    given = {"time": torch.rand(5, 1), "text": tf.Masked(torch.randn(5, 7), PRESENT)}
    assert both(given).shape == (5, 18)
    for lacking in ({"time": given["time"]}, {**given, "text": None}):
        with pytest.raises(
            ValueError, match=r"all of \['time', 'text'\], got none for \['text'\][\s\S]*Maybe"
        ):
            both(lacking)
    assert tf.Several({"text": tf.Vector(7)}, joint_dropout=0.1)({}).shape == (7,)


def test_joint_dropout_takes_all_of_a_sample_or_nothing():
    both, cond = several(joint_dropout=0.4), given(2000)
    z, kept = both(cond), both.eval()(cond)
    nulls = both({})
    lost = (z == nulls).all(dim=1)
    assert lost.float().mean().item() == pytest.approx(0.4, abs=0.05)
    assert torch.equal(z[~lost], kept[~lost])


def test_joint_dropout_may_be_set_later_as_a_schedule_does():
    both = tf.Several({"time": tf.Vector(7), "text": tf.Vector(2)}, joint="text").train()
    given = {"time": torch.ones(5, 7), "text": torch.ones(5, 2)}
    assert (both.required, both(given).sum()) == (("time", "text"), 45)
    both.joint_dropout = 1.0
    assert (both.required, both(given).sum()) == (("time",), 35)


class Causal(nn.Module):
    """An encoder of steps, and of what is added to the scores between them."""

    dim = 3

    def forward(self, steps: torch.Tensor, added: torch.Tensor) -> torch.Tensor:
        return (steps @ steps.mT + added).softmax(-1) @ steps


def test_what_masks_with_infinity_beside_a_condition_is_no_part_of_it():
    steps, added = torch.randn(3, 3, 3), torch.full((3, 3), float("-inf")).triu(1)
    present = torch.tensor([[False, True, True], [True] * 3, [True] * 3])
    z = tf.Maybe(Causal())(tf.Masked((steps, added), present))
    assert torch.equal(z[1:], Causal()(steps, added)[1:])


class Frozen(nn.Module):
    """An encoder without memory for its weights."""

    dim = 3

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(5, 3, device="meta").requires_grad_(requires_grad=False)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        return z.to_dense()[:, :3]


def test_frozen_weights_and_sparse_values_are_left_alone():
    maybe = tf.Maybe(Frozen()).eval()
    maybe.null = nn.Parameter(torch.ones(3))
    assert torch.equal(maybe(tf.Masked(None)), torch.ones(3))
    z = maybe(tf.Masked(torch.eye(5).to_sparse(), torch.tensor([True] * 4 + [False])))
    assert torch.equal(z[4], torch.ones(3))


def test_a_condition_that_all_samples_share_is_dropped_for_each():
    both = tf.Several({"time": tf.Scalars(1, 8), "text": tf.Vector(7)}, joint_dropout=0.5).train()
    z = both({"time": torch.rand(1, 1), "text": torch.rand(400, 7)})
    lost = z[:, :8].eq(0).all(dim=1)
    assert torch.equal(lost, z[:, 8:].eq(0).all(dim=1))
    assert 120 < int(lost.sum()) < 280


def test_joint_dropout_comes_on_top_of_each_condition_s_own():
    parts = {name: tf.Maybe(tf.Vector(1), dropout=0.5, null="zero") for name in ("a", "b")}
    both = tf.Several(parts, joint_dropout=0.2)
    z = both({"a": torch.ones(20_000, 1), "b": torch.ones(20_000, 1)})
    assert z.mean(dim=0).tolist() == pytest.approx([0.4, 0.4], abs=0.02)
    assert (z == 0).all(dim=1).float().mean().item() == pytest.approx(0.2 + 0.8 * 0.25, abs=0.02)


def test_a_condition_per_sample_and_one_per_token_go_together():
    both = randomise(tf.Several({"a": tf.Maybe(tf.Vector(7)), "b": tf.Vector(2)})).eval()
    a, b = torch.randn(5, 7), torch.randn(5, 4, 2)
    z = both({"a": a, "b": b})
    assert torch.equal(z, torch.cat([a[:, None].expand(5, 4, 7), b], dim=-1))
    assert torch.equal(both({"b": b})[..., :7], both.parts["a"].null.expand(5, 4, 7))


def test_nothing_given_in_training_leaves_no_parameter_without_a_gradient():
    both = several()
    for part in both.parts.values():
        with torch.no_grad():
            for parameter in part.condition.parameters():
                parameter[0] = float("nan")
    both({}).sum().backward()
    for name, parameter in both.named_parameters():
        expected = torch.ones_like(parameter) if name.endswith("null") else torch.zeros_like(parameter)
        assert torch.equal(parameter.grad, expected), name


def test_a_size_made_of_sizes_is_a_number_that_survives_copies():
    size = Sizes((3, 4))
    assert size == 7
    assert isinstance(size, int)
    for other in (copy.deepcopy(size), pickle.loads(pickle.dumps(size))):
        assert other == 7
        assert other.parts == (3, 4)
    assert json.dumps(size) == "7"


def test_masked_is_a_pytree():
    leaves, spec = torch.utils._pytree.tree_flatten(tf.Masked((torch.ones(2), None), PRESENT))
    assert torch.utils._pytree.tree_unflatten(leaves, spec).present is PRESENT


def test_two_processes_that_miss_different_conditions_get_the_gradients_of_one(tmp_path: Path):
    script = Path(__file__).with_name("ddp_missing.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(script), str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    found = json.loads((tmp_path / "found.json").read_text())
    assert found.keys() == {"masks", "one has none", "all dropped on one", "None on one"}
    for case, error in found.items():
        assert error < 1e-12, case


VECTORS = torch.randn(5, 7)


class Unpooled(nn.Module):
    """An encoder of one's own that gives tokens and their mask."""

    dim = 7

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return tokens[:, None], torch.ones(len(tokens), 1, dtype=torch.bool)


REFUSED = [
    (lambda: tf.Maybe(tf.Classes(11)), r"gives vectors, got Classes\(11[\s\S]*Classes\(12\)"),
    (
        lambda: tf.Maybe(tf.Vector(7), dropout=1.5),
        "Maybe: dropout expected a probability from 0 to 1, got 1.5",
    ),
    (lambda: tf.Maybe(tf.Vector(7), null="leraned"), "got 'leraned'[\\s\\S]*Did you mean 'learned'"),
    (lambda: tf.Maybe(tf.Vector(7), dropout="0.1"), "dropout expected a probability from 0 to 1, got '0.1'"),
    (lambda: tf.Maybe(nn.Linear(2, 3)), "integer `dim`, .* got Linear with dim=None"),
    (lambda: tf.Maybe(32), "integer `dim`, .* got int.\\nUse Vector"),
    (lambda: tf.Several({"a": VECTORS}), r"got Tensor \(5, 7\).\nA value goes into the call.* Vector\(7\)"),
    (lambda: tf.Several([tf.Vector(7)]), "conditions by name, got a list"),
    (lambda: tf.Several({}), "expected conditions by name, got none"),
    (
        lambda: tf.Several({"keys": tf.Vector(7)}),
        "names that modules may have, got 'keys'[\\s\\S]*'the_keys'",
    ),
    (lambda: tf.Several({"a.b": tf.Vector(7)}), "got 'a.b': it has a dot"),
    (lambda: tf.Several({"a": tf.Vector(7)}, "add"), "combine expected one of"),
    (lambda: tf.Several({"a": tf.Vector(7)}, joint_dropout=-1), "joint_dropout expected a probability"),
    (
        lambda: tf.Several({"text": tf.Vector(7)}, joint_dropout=0.1, joint=["txt"]),
        "joint expected one of .*'text'.*, got 'txt'",
    ),
    (lambda: tf.Several({"a": tf.Vector(7)}, joint_dropout=0.1, joint=[]), "lost together, got none"),
    (lambda: tf.Several({"a": tf.Vector(7), "b": tf.Vector(3)}, "sum"), "of one size to sum, got"),
    (lambda: tf.Several({"a": tf.Tokens(7, None)}), "give vectors, got 'a' Tokens[\\s\\S]*Pool it"),
    (lambda: tf.Several({"a": Unpooled()})({"a": VECTORS}), r"vectors, got 'a' Unpooled\(\)[\s\S]*Pool"),
    (
        lambda: tf.Several({"a": tf.Several({"b": tf.Vector(7)}, "compose"), "c": tf.Vector(2)}),
        r"one generator reads, got 'a' with combine='compose'[\s\S]*outermost",
    ),
    (
        lambda: tf.Several({"a": tf.Vector(7), "b": tf.Vector(7)}, joint_dropout=0.5)(
            {"a": VECTORS, "b": VECTORS[:3]}
        ),
        r"one batch, got different sizes.\n  a  \(5, 7\)\n  b  \(3, 7\)",
    ),
    (lambda: tf.Several({"a": tf.Vector(7)})(VECTORS), r"mapping .* got Tensor[\s\S]*'a': ..."),
    (lambda: tf.Several({"words": tf.Vector(7)})({"word": VECTORS}), "got 'word'[\\s\\S]*mean 'words'"),
    (
        lambda: tf.Several({"a": tf.Vector(7), "b": tf.Vector(7)})({"a": VECTORS, "b": VECTORS[:2]}),
        r"one batch, got different sizes.\n  a  \(5, 7\)\n  b  \(2, 7\)[\s\S]*repeat_interleave",
    ),
]


@pytest.mark.plain
@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_cannot_be_meant_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.plain
def test_dropout_in_training_compiles_as_one_graph_for_any_batch():
    both = tf.Several({"force": tf.Maybe(tf.Vector(3), dropout=0.5)}).train()
    compiled = torch.compile(both, backend="eager", fullgraph=True, dynamic=True)
    for batch in (4, 6):
        value = torch.rand(batch, 3)
        z = compiled({"force": value})
        kept = (z == value).all(dim=1)
        assert torch.equal(z[~kept], torch.zeros_like(z[~kept]))
