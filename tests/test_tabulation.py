"""A tabulated network computes what its generator would have made it compute, without the generator."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.folding import fold
from torchfilm.tabulation import Table, tabulate


def conditioned(cond: nn.Module | None = None, **options) -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)).eval()
    model = tf.condition(model, "0|2", tf.Vector(7) if cond is None else cond, **options)
    randomise(tf.conditioning(model))
    return model


@pytest.mark.parametrize("options", [{}, {"emit": ("gamma", "beta", "gate")}, {"fusion": "gate"}], ids=str)
def test_rows_of_the_table_are_what_the_generator_makes(options):
    model, conds, x, k = conditioned(**options), torch.randn(11, 7), torch.randn(2, 3), torch.tensor([10, 0])
    expected = model(x, cond=conds[k])
    assert tabulate(model, conds=conds) is model
    torch.testing.assert_close(model(x, cond=k), expected)
    torch.testing.assert_close(model(x[:1], cond=10), expected[:1])


def test_a_table_that_was_made_in_inference_mode_is_trained_with_and_loaded():
    model, x = conditioned(), torch.randn(2, 3)
    with torch.inference_mode():
        tabulate(model, conds=torch.randn(11, 7))
    model(x, cond=3).sum().backward()
    before = model(x, cond=3)
    model.load_state_dict({key: 2 * value for key, value in model.state_dict().items()})
    assert not torch.allclose(model(x, cond=3), before)


def test_the_parameters_of_generator_and_encoder_are_gone():
    model = conditioned(tf.Classes(5, 4))
    keys = {name for name, _ in model.named_parameters() if not name.startswith("film.")}
    tabulate(model, conds=torch.arange(5))
    assert {name for name, _ in model.named_parameters()} == keys
    assert {module.training for module in model.film.modules()} == {model.training}
    assert dict(model.named_buffers())["film.generator.table"].shape == (5, 2 * (5 + 2))


def test_a_schedule_of_time_steps_is_looked_up_by_the_number_of_the_step():
    model, times, x = conditioned(tf.Scalars(1, 8)), torch.tensor([[99.0], [50.0], [0.0]]), torch.randn(2, 3)
    expected = [model(x, cond=times[k].expand(2, 1)) for k in range(3)]
    tabulate(model, conds=times)
    for k in range(3):
        torch.testing.assert_close(model(x, cond=k), expected[k])


def test_a_list_holds_conditions_of_any_size():
    model, x = conditioned(tf.Tokens(7)), torch.randn(2, 3)
    sentences = [torch.randn(1, 2, 7), torch.randn(1, 5, 7), (torch.randn(1, 3, 7), torch.ones(1, 3).bool())]
    expected = [model(x, cond=sentence) for sentence in sentences]
    tabulate(model, conds=sentences)
    for k in range(3):
        torch.testing.assert_close(model(x, cond=k), expected[k])


def test_dropped_conditions_do_not_get_into_the_table():
    model, conds = conditioned().train(), torch.randn(11, 7)
    modes = [module.training for module in model.modules()]
    expected = tf.conditioning(model).eval().modulations(conds)
    model.train()
    tabulate(model, conds=conds)
    table = tf.conditioning(model).generator
    assert isinstance(table, Table)
    torch.testing.assert_close(table(torch.arange(11))["0"].gamma, expected["0"].gamma)
    assert all(modes)
    assert model[0].training


def test_copies_pickles_and_loaded_tables_give_their_own_rows():
    model, x = tabulate(conditioned(), conds=torch.randn(11, 7)), torch.randn(2, 3)
    expected = model(x, cond=3)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x, cond=3), expected)
        other.load_state_dict(tabulate(conditioned(), conds=torch.randn(11, 7)).state_dict())
        assert not torch.equal(other(x, cond=3), expected)
    assert torch.equal(model(x, cond=3), expected)
    wide = copy.deepcopy(model).double()
    torch.testing.assert_close(wide(x.double(), cond=3), expected.double(), rtol=1e-5, atol=1e-5)


def test_the_table_stays_in_float32_where_the_network_does_not():
    model, x = tabulate(conditioned(), conds=torch.randn(11, 7)), torch.randn(2, 3)
    expected = tf.conditioning(model).modulations(3)["0"].gamma
    model.bfloat16()
    assert torch.equal(tf.conditioning(model).modulations(3)["0"].gamma, expected)
    assert model(x.bfloat16(), cond=3).dtype == torch.bfloat16


@pytest.mark.plain
def test_a_tabulated_network_compiles_and_exports():
    model, x, k = tabulate(conditioned(), conds=torch.randn(11, 7)), torch.randn(2, 3), torch.tensor([10, 0])
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, cond=k), model(x, cond=k))
    torch.testing.assert_close(compiled(x, cond=3), model(x, cond=3))
    program = torch.export.export(model, (x,), {"cond": k}, strict=False)
    torch.testing.assert_close(program.module()(x, cond=k.flip(0)), model(x, cond=k.flip(0)))


def test_a_tabulated_condition_folds():
    model, x = tabulate(conditioned(), conds=torch.randn(11, 7)), torch.randn(2, 3)
    plain, _ = fold(model, cond=4)
    torch.testing.assert_close(plain(x), model(x, cond=4))


def test_a_number_of_numpy_is_a_row():
    model, x = tabulate(conditioned(), conds=torch.randn(11, 7)), torch.randn(2, 3)
    assert torch.equal(model(x, cond=np.int64(4)), model(x, cond=4))
    assert tf.modulations(model, np.int32(4))["0"].gamma.shape == (5,)


@pytest.mark.plain
def test_what_is_no_row_is_refused():
    model, x = tabulate(conditioned(), conds=torch.randn(11, 7)), torch.randn(2, 3)
    with pytest.raises(IndexError, match=r"Table of 11 conditions: .* got 11"):
        model(x, cond=11)
    with pytest.raises(IndexError, match="got -1"):
        model(x, cond=-1)
    for index in (11, -1):
        with pytest.raises(IndexError, match=f"Table: expected an index from 0 to 10, got {index}: out of"):
            model(x, cond=torch.tensor([0, index]))
    with pytest.raises(ValueError, match=r"expected indices, int64 or int32, got torch.float32"):
        model(x, cond=torch.randn(2, 7))
    with pytest.raises(ValueError, match="expected the index of one, or a tensor of them, got float"):
        model(x, cond=1.5)


def test_what_is_no_table_of_modulations_is_refused_and_the_model_is_as_it_was():
    model, x, cond = conditioned(fusion="concat"), torch.randn(2, 3), torch.randn(2, 7)
    expected = model(x, cond=cond)
    with pytest.raises(ValueError, match=r"site '0': expected a Modulation for each condition, got Mixing"):
        tabulate(model, conds=torch.randn(11, 7))
    assert torch.equal(model(x, cond=cond), expected)
    with pytest.raises(ValueError, match=r"got modulations of shapes \[\(2,\), \(5,\)\]"):
        tabulate(conditioned(), conds=torch.randn(7))
    with pytest.raises(ValueError, match="expected single conditions in the list"):
        tabulate(conditioned(), conds=[torch.randn(2, 7)])


@pytest.mark.parametrize("kind", [list, torch.Tensor])
def test_neither_nothing_nor_what_is_no_number_takes_the_place_of_the_generator(kind: type):
    model, x, conds = conditioned(), torch.randn(2, 3), torch.randn(3, 7)
    expected, film = model(x, cond=conds[:2]), dict(tf.conditioning(model).named_children())
    broken = conds.clone()
    broken[1, 4], broken[2, 0] = float("nan"), float("inf")
    for given, message in (
        (broken, "for 2 of 3 conditions, .* number 1"),
        (conds[:0], "one condition, got none"),
    ):
        with pytest.raises(ValueError, match=message):
            tabulate(model, conds=list(given) if kind is list else given)
    assert torch.equal(model(x, cond=conds[:2]), expected)
    assert dict(tf.conditioning(model).named_children()) == film


def test_a_table_does_not_keep_what_was_asked_for_without_a_bound():
    rows = Table(torch.randn(300, 200), {str(site): (1, 2) for site in range(100)})
    for index in range(300):
        assert rows(index)["7"].gamma == rows.table[index, 14]
    assert len(rows._seen[1]) == 100
    assert rows(3)["7"] is rows(3)["7"]
    assert rows(299)["7"].beta == rows.table[299, 15]


def test_a_table_on_the_meta_device_is_made_for_numbers_to_come():
    with torch.device("meta"):
        model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7))
        tabulate(model, conds=torch.empty(11, 7))
    assert tf.conditioning(model).generator.table.is_meta
