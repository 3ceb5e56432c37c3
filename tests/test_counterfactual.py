"""How conditions are exchanged, compared and taken apart by rows."""

import numpy as np
import pytest
import torch

from torchfilm.counterfactual import derange, keys, reworded, take


@pytest.mark.parametrize("groups", ["abcde", "aabbc", "aabb", "ab", "aaabbb", "abcabcabcde"])
def test_a_swap_gives_every_sample_a_different_condition(groups: str):
    for seed in range(20):
        order = derange(groups, np.random.default_rng(seed))
        assert sorted(order) == list(range(len(groups)))
        assert all(groups[i] != groups[j] for i, j in enumerate(order))


def test_where_one_condition_has_the_majority_as_many_as_possible_are_swapped():
    for seed in range(20):
        order = derange("aaaaabc", np.random.default_rng(seed))
        assert sorted(order) == list(range(7))
        moved = [(i, j) for i, j in enumerate(order) if i != j]
        assert len(moved) == 4
        assert all("aaaaabc"[i] != "aaaaabc"[j] for i, j in moved)
    assert derange("aaa", np.random.default_rng(0)).tolist() == [0, 1, 2]


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
