"""How conditions are exchanged, compared and taken apart by rows."""

import numpy as np
import pytest
import torch

from torchfilm.counterfactual import keys, others, reworded, take


@pytest.mark.parametrize("conditions", ["abcde", "aabbc", "ab", "aaaaabc", "abcabcabcde"])
def test_every_sample_is_given_one_of_the_different_conditions_each_as_often(conditions: str):
    rng = np.random.default_rng(0)
    drawn = np.stack([others(conditions, rng) for _ in range(2000)])
    for row, given in enumerate(drawn.T):
        different = [i for i, one in enumerate(conditions) if one != conditions[row]]
        found = np.bincount(given, minlength=len(conditions))
        assert set(np.flatnonzero(found)) == set(different)
        assert found[different] == pytest.approx(2000 / len(different), abs=180)


def test_where_all_conditions_are_equal_none_is_exchanged():
    assert others("aaa", np.random.default_rng(0)).tolist() == [0, 1, 2]


def test_zero_has_no_sign():
    for zeros in (
        torch.tensor([0.0, -0.0]),
        np.array([[0.0], [-0.0]]),
        -torch.zeros(2, dtype=torch.bfloat16),
    ):
        assert len(set(keys(zeros))) == 1
    complex_zeros = torch.complex(torch.tensor([0.0, -0.0]), torch.tensor([-0.0, 0.0]))
    assert len(set(keys(complex_zeros))) == 1


def test_what_padding_holds_makes_no_condition_different():
    tokens = torch.zeros(3, 2, 5)
    tokens[:, 0], tokens[0, 1] = 1, 9
    mask = torch.tensor([[True, False], [True, False], [True, True]])
    first, second, third = keys((tokens, mask))
    assert first == second != third


def test_rows_without_a_paraphrase_are_told_apart():
    other, known = reworded(torch.tensor([[1.0], [2.0]]), (torch.tensor([[2.0]]), torch.tensor([[5.0]])))
    assert known.tolist() == [False, True]
    assert other[1] == 5


def test_taking_rows_keeps_the_kind_of_every_part():
    taken = take((["a", "b"], np.arange(2), torch.arange(2), None), np.array([1, 1]))
    assert taken[0] == ["b", "b"]
    assert taken[1].tolist() == taken[2].tolist() == [1, 1]
    assert taken[3] is None


def test_numbers_beside_numbers_hide_nothing():
    first, second = keys({"flag": torch.zeros(2, 1), "to": torch.tensor([[1.0], [2.0]])})
    assert first != second
