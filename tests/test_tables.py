"""Separable tables: equal to the generator, and refused where they cannot be."""

import copy
import math
import pickle

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import torchfilm as tf
from catalogue import randomise

SITES = {"block1": 3, "block2": 5}
STEPS = torch.arange(11)[:, None]
EXACT = [
    {},
    {"trunk": ("mish",)},
    {"trunk": ("silu", "tanh")},
    {"head": "shared", "trunk": ("mish",)},
    {"head": "lowrank:2", "trunk": ("mish",)},
    {"bound": "tanh:0.5", "trunk": ("gelu",)},
    {"bound": "exp", "trunk": ("relu",)},
    {"emit": ("gamma",)},
    {"emit": ("beta",)},
    {"emit": ("gamma", "beta", "gate"), "gate_start": 1.0},
    {"learned_scale": True},
]


def conditions(combine: str = "concat") -> tf.Several:
    periods = {"min_period": 2 * math.pi, "max_period": 2e4 * math.pi}
    task = tf.Maybe(tf.Classes(7, 8))
    parts = {"seen": tf.Vector(8), "time": tf.Scalars(1, 8, **periods), "task": task}
    return randomise(tf.Several(parts, combine)).eval()


def unequal() -> tf.Several:
    """Return conditions of 3, 8 and 5 numbers, of which one may be missing."""
    parts = {"seen": tf.Vector(3), "time": tf.Scalars(1, 8), "task": tf.Maybe(tf.Classes(7, 5))}
    return randomise(tf.Several(parts)).eval()


VALUES = {"seen": torch.rand(5, 3), "time": STEPS, "task": torch.arange(7)}


def observed(batch: int = 2) -> dict[str, torch.Tensor]:
    return {"seen": torch.randn(batch, 8), "task": torch.randint(7, (batch,))}


def assert_same(actual: dict[str, tf.Modulation], expected: dict[str, tf.Modulation]) -> None:
    assert list(actual) == list(expected)
    for one, other in zip(actual.values(), expected.values(), strict=True):
        torch.testing.assert_close(one.gamma, other.gamma.expand_as(one.gamma), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(one.beta, other.beta.expand_as(one.beta), rtol=1e-6, atol=1e-6)
        assert (one.gate is None) == (other.gate is None)
        if one.gate is not None:
            torch.testing.assert_close(one.gate, other.gate, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("options", EXACT, ids=str)
def test_a_row_and_an_addition_give_what_the_generator_gives(options):
    both, rest = conditions(), observed()
    generator = randomise(tf.Generator(both.dim, SITES, **options))
    table = tf.SeparableTable(both, generator, "time", STEPS)
    encoded = table.encode(rest)
    assert len(table) == 11
    for k in (0, 4, 10):
        expected = generator(both({**rest, "time": torch.full((2, 1), k)}))
        assert_same(table(k, encoded), expected)


def test_a_sum_without_a_trunk_is_separable():
    both, rest = conditions("sum"), observed()
    generator = randomise(tf.Generator(both.dim, SITES))
    table = tf.SeparableTable(both, generator, "time", STEPS)
    expected = generator(both({**rest, "time": torch.full((2, 1), 4)}))
    assert_same(table(4, table.encode(rest)), expected)


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("options", [{}, {"head": "shared"}, {"head": "lowrank:2", "learned_scale": True}])
def test_any_condition_can_be_the_one_in_the_table(name: str, options: dict[str, object]):
    both, given = unequal(), {each: values[:2] for each, values in VALUES.items()}
    generator = randomise(tf.Generator(both.dim, SITES, trunk=("silu",), **options))
    table = tf.SeparableTable(both, generator, name, VALUES[name])
    encoded = table.encode({each: values for each, values in given.items() if each != name})
    assert_same(table(torch.arange(2), encoded), generator(both(given)))


@pytest.mark.plain
@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("head", ["linear", "shared", "lowrank:2"])
def test_the_rest_is_multiplied_by_its_own_columns_alone(name: str, head: str):
    both, given = unequal(), {each: values[:2] for each, values in VALUES.items()}
    table = tf.SeparableTable(both, tf.Generator(both.dim, SITES, head=head), name, VALUES[name])
    with FlopCounterMode(display=False) as counted:
        table.encode({each: values for each, values in given.items() if each != name})
    columns, rows = both.dim - both.sizes[name], 2 * (3 + 5)
    products = columns * 2 + 2 * rows if head == "lowrank:2" else columns * rows
    assert counted.get_total_flops() == 2 * 2 * products


def test_a_table_of_a_network_in_bfloat16_is_that_of_its_weights_in_float32():
    both, rest = conditions().bfloat16(), observed()
    generator = randomise(tf.Generator(both.dim, SITES, trunk=("mish",))).bfloat16()
    table = tf.SeparableTable(both, generator, "time", STEPS)
    wider = copy.deepcopy(generator).float()
    expected = wider(both({**rest, "time": torch.full((2, 1), 4)}).float())
    for site, found in table(4, table.encode(rest)).items():
        assert found.gamma.dtype == found.beta.dtype == torch.float32
        torch.testing.assert_close(found.gamma, expected[site].gamma, rtol=0.02, atol=0.02)
        torch.testing.assert_close(found.beta, expected[site].beta, rtol=0.02, atol=0.02)


def test_a_table_of_a_network_in_float64_keeps_its_precision():
    both, rest = conditions().double(), {"seen": torch.randn(2, 8).double(), "task": torch.arange(2)}
    generator = randomise(tf.Generator(both.dim, SITES, trunk=("mish",))).double()
    table = tf.SeparableTable(both, generator, "time", STEPS.double())
    expected = generator(both({**rest, "time": torch.full((2, 1), 4.0).double()}))
    for site, found in table(4, table.encode(rest)).items():
        torch.testing.assert_close(found.gamma, expected[site].gamma, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(found.beta, expected[site].beta, rtol=1e-12, atol=1e-12)


def test_a_table_activates_a_condition_in_bfloat16_as_the_generator_does():
    both = tf.Several({"time": tf.Scalars(1, 8), "seen": tf.Vector(8)}).eval()
    generator = randomise(tf.Generator(both.dim, SITES, trunk=("mish",)))
    seen = torch.randn(2, 8).bfloat16()
    table = tf.SeparableTable(both, generator, "time", STEPS)
    assert torch.equal(table.encode({"seen": seen}), table.encode({"seen": seen.float()}))


def test_autocast_leaves_what_is_encoded_in_float32():
    both, rest = conditions(), observed()
    generator = tf.Generator(both.dim, SITES, trunk=("mish",), gamma_offset=1.001, init="default", init_std=0)
    table = tf.SeparableTable(both, generator, "time", STEPS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        made = table(4, table.encode(rest))
    torch.testing.assert_close(made["block1"].gamma, torch.full((2, 3), 1.001), rtol=0, atol=0)


def test_every_sample_may_be_at_a_step_of_its_own():
    both, rest = conditions(), observed()
    generator = randomise(tf.Generator(both.dim, SITES, trunk=("mish",)))
    table = tf.SeparableTable(both, generator, "time", STEPS)
    expected = generator(both({**rest, "time": torch.tensor([[3], [9]])}))
    assert_same(table(torch.tensor([3, 9]), table.encode(rest)), expected)


@pytest.mark.parametrize("tokens", [1, 2, 3])
def test_a_step_for_each_sample_goes_with_conditions_per_token(tokens: int):
    both = randomise(tf.Several({"seen": tf.Vector(8), "time": tf.Scalars(1, 8)})).eval()
    generator = randomise(tf.Generator(both.dim, SITES))
    table = tf.SeparableTable(both, generator, "time", STEPS)
    rest, index = {"seen": torch.randn(2, tokens, 8)}, torch.tensor([3, 9])
    expected = generator(both({**rest, "time": STEPS[index]}))
    found = table(index, table.encode(rest))
    assert found["block1"].gamma.shape == (2, tokens, 3)
    assert_same(found, expected)


def test_all_steps_at_once_are_the_steps():
    both, rest = conditions(), observed()
    generator = randomise(tf.Generator(both.dim, SITES, trunk=("mish",)))
    table = tf.SeparableTable(both, generator, "time", STEPS)
    encoded = table.encode(rest)
    steps = table.steps(encoded)
    assert len(steps) == 11
    for k, modulations in enumerate(steps):
        assert_same(modulations, table(k, encoded))


def test_a_missing_condition_of_the_rest_is_its_null():
    both, rest = conditions(), observed()
    generator = randomise(tf.Generator(both.dim, SITES, trunk=("mish",)))
    table = tf.SeparableTable(both, generator, "time", STEPS)
    expected = generator(both({"seen": rest["seen"], "time": torch.full((2, 1), 4)}))
    assert_same(table(4, table.encode({"seen": rest["seen"]})), expected)
    with pytest.raises(ValueError, match=r"got none for \['seen'\]"):
        table.encode({"task": rest["task"]})


def test_it_can_be_fed_to_a_conditioned_network():
    both, rest, x = conditions(), observed(), torch.randn(2, 3)
    model = randomise(tf.condition(torch.nn.Sequential(torch.nn.Linear(3, 5)), "0", both)).eval()
    table = tf.SeparableTable(both, tf.conditioning(model).generator, "time", STEPS)
    expected = model(x, cond={**rest, "time": torch.full((2, 1), 4)})
    torch.testing.assert_close(model(x, modulation=table(4, table.encode(rest))), expected)


def replaced(generator: torch.nn.Module) -> None:
    generator.load_state_dict({key: x + 1 for key, x in generator.state_dict().items()}, assign=True)


@pytest.mark.parametrize("change", [randomise, replaced])
def test_weights_that_have_changed_are_noticed(change):
    both, rest = conditions(), observed()
    generator = copy.deepcopy(tf.Generator(both.dim, SITES))
    table = tf.SeparableTable(both, generator, "time", STEPS)
    table.encode(rest)
    change(generator)
    with pytest.raises(ValueError, match=r"expected the weights it was made from[\s\S]*Build it again"):
        table.encode(rest)


REFUSED = [
    ("concat", {"trunk": (5, "silu")}, "the trunk's layer of 5 mixes the conditions"),
    ("sum", {"trunk": ("silu",)}, "'silu' of a sum is not the sum of 'silu'; concatenate"),
    ("compose", {}, "composed have a generator each"),
    ("concat", {"head": "table"}, "head='table' is a table already"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("combine", "options", "message"), REFUSED)
def test_what_is_not_separable_is_refused_with_the_reason(combine, options, message):
    both = conditions(combine)
    with pytest.raises(ValueError, match=message):
        tf.SeparableTable(both, tf.Generator(both.dim, SITES, **options), "time", STEPS)


@pytest.mark.plain
def test_a_composed_generator_is_refused():
    both = conditions()
    composed = tf.ComposedGenerator(tuple(both.sizes.values()), SITES)
    with pytest.raises(ValueError, match=r"expected a Generator, .* got a ComposedGenerator"):
        tf.SeparableTable(both, composed, "time", STEPS)


def test_the_reasons_are_true():
    both, rest = conditions("sum"), observed()
    generator = randomise(tf.Generator(both.dim, SITES, trunk=("silu",)))
    times = [torch.full((2, 1), k) for k in (3, 4)]
    others = [rest, observed()]
    raw = [[generator.raw(both({**other, "time": time})) for other in others] for time in times]
    assert not torch.allclose(raw[0][0] - raw[1][0], raw[0][1] - raw[1][1], atol=1e-3)


def test_rows_of_missing_conditions_do_not_get_into_the_table():
    both = tf.Several({"time": tf.Maybe(tf.Scalars(1, 8), dropout=0.5), "seen": tf.Vector(3)})
    generator = tf.Generator(both.dim, {"here": 5})
    with pytest.raises(ValueError, match=r"expected conditions in evaluation mode(.|\n)*conditions.eval\(\)"):
        tf.SeparableTable(both.train(), generator, "time", torch.arange(4.0)[:, None])
    table = tf.SeparableTable(both.eval(), generator, "time", torch.arange(4.0)[:, None])
    assert len(table) == 4
    both.train()
    with pytest.raises(ValueError, match=r"expected conditions in evaluation mode"):
        table.encode({"seen": torch.rand(2, 3)})


@pytest.mark.parametrize("index", [-1, 4, torch.tensor([0, -1])], ids=str)
def test_what_is_no_row_is_refused(index):
    both = tf.Several({"time": tf.Scalars(1, 8), "seen": tf.Vector(3)}).eval()
    table = tf.SeparableTable(both, tf.Generator(both.dim, {"here": 5}), "time", torch.arange(4.0)[:, None])
    with pytest.raises(IndexError, match=r"Table: expected an index from 0 to 3, got (-1|4): out of range"):
        table(index, table.encode({"seen": torch.randn(2, 3)}))


@pytest.mark.plain
def test_a_condition_without_others_is_refused():
    alone = tf.Several({"time": tf.Scalars(1, 8)}).eval()
    with pytest.raises(ValueError, match=r"other conditions besides 'time', got none(.|\n)*tabulate"):
        tf.SeparableTable(alone, tf.Generator(8, SITES), "time", STEPS)


def test_wrong_names_are_refused():
    both = conditions()
    generator = tf.Generator(both.dim, SITES)
    with pytest.raises(ValueError, match=r"a condition among \['seen', 'time', 'task'\], got 'tiem'"):
        tf.SeparableTable(both, generator, "tiem", STEPS)
    table = tf.SeparableTable(both, generator, "time", STEPS)
    with pytest.raises(ValueError, match="expected the conditions besides 'time'"):
        table.encode({**observed(), "time": torch.zeros(2, 1)})


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda table: pickle.loads(pickle.dumps(table))])
def test_a_copied_table_holds_as_long_as_its_weights(copied):
    both, rest = conditions(), observed()
    table = tf.SeparableTable(both, tf.Generator(both.dim, SITES), "time", STEPS)
    other = copied(table)
    torch.testing.assert_close(other.encode(rest), table.encode(rest))
    with torch.no_grad():
        next(table.generator.parameters()).add_(1)
    for stale in (table, copied(table)):
        with pytest.raises(ValueError, match="changed since"):
            stale.encode(rest)
    other.encode(rest)
