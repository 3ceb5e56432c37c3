"""An unknown name is an error that says which names there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import torchfilm as tf
from torchfilm.naming import UnknownNameError, check_choice, check_size, entry, nearest


def test_an_unknown_name_gives_the_nearest_and_is_an_error_of_values_and_of_keys():
    assert entry("Here", {"first": 2}, "first") == 2
    with pytest.raises(
        ValueError, match=r"^Here: expected one of 1 names, got 'frist'.\nThe nearest are 'fi"
    ):
        entry("Here", {"first": 2}, "frist")
    with pytest.raises(KeyError) as raised:
        entry("Here", {}, "a")
    assert (
        str(raised.value)
        == "Here: expected one of 0 names, got 'a'.\nThe nearest are none, for there are no names."
    )
    assert isinstance(raised.value, UnknownNameError)
    assert nearest("b", ["stem", "block1", "block2", "block3"]) == "'block3', 'block2', 'block1'"


def test_a_diagnosis_asked_about_what_is_no_site_says_so():
    model = tf.condition(nn.Sequential(nn.Linear(3, 5), nn.ReLU()), "0", tf.Vector(7))
    found = tf.doctor(model, torch.rand(4, 3), cond=torch.randn(4, 7))
    assert found.of("0") == found.of("") == []
    with pytest.raises(UnknownNameError, match=r"Diagnosis: expected one of 1 names, got 'encoder\.0'"):
        found.of("encoder.0")


def test_a_choice_is_among_those_that_there_are():
    check_choice("here: mode", None, (None, "sum"))
    with pytest.raises(
        ValueError, match=r"^here: mode expected one of \[None, 'sum'\], got 'smu'.\nDid you mean 'sum'\?$"
    ):
        check_choice("here: mode", "smu", (None, "sum"))
    with pytest.raises(ValueError, match=r"one of \['sum', 'x:R'\], got 5.\nChoose one of these.$"):
        check_choice("here: mode", 5, {"sum": 2}, patterns=["x:R"])
    with pytest.raises(ValueError, match=r"got 'cross'.\nDid you mean 'cross_attention'\?$"):
        check_choice("here: mode", "cross", ("sum", "cross_attention"))
    with pytest.raises(ValueError, match=r"got 'sum_first'.\nDid you mean 'sum'\?$"):
        check_choice("here: mode", "sum_first", ("sum", "summer", "some_fish"))
    with pytest.raises(ValueError, match=r"got 'sum'.\nDid you mean 'sum1' or 'sum2' or 'sum3'\?$"):
        check_choice("here: mode", "sum", ("sum1", "sum2", "sum3", "suma"))
    with pytest.raises(ValueError, match=r"got 'sums'.\nDid you mean 'suma' or 'sum3' or 'sum2'\?$"):
        check_choice("here: mode", "sums", ("sum1", "sum2", "sum3", "suma"))
    with pytest.raises(ValueError, match=r"got \['x'\].\nLeave it out$"):
        check_choice("here: mode", ["x"], ("sum",), remedy="Leave it out")


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [
        ("algin", "align"),
        ("feature", "features"),
        ("batch_first", "batch"),
        ("repaet", "repeat"),
        ("match_parameters", "match_params"),
        ("haed", "head"),
        ("gate", "gate_start"),
    ],
)
def test_an_option_that_there_is_not_is_answered_with_the_one_that_was_meant(wrong: str, meant: str):
    takes = r"condition, fusion='film': options expected one of \['where', .*'batch', .*'head'"
    with pytest.raises(ValueError, match=rf"{takes}.* got '{wrong}'.\nDid you mean '{meant}'\?$"):
        tf.condition(nn.Linear(3, 5), "", tf.Vector(7), **{wrong: 1})
    with pytest.raises(ValueError, match=r"fusion='concat': .* got 'bound'.\nChoose one of these"):
        tf.condition(nn.Linear(3, 5), "", tf.Vector(7), fusion="concat", bound="tanh")


def test_a_size_is_a_whole_number_and_what_is_none_is_answered_with_what_to_give():
    check_size("here: dim", np.int64(3))
    with pytest.raises(
        ValueError, match=r"^here: dim expected a whole number from 1 on, got True.\nGive how many"
    ):
        check_size("here: dim", True)
    with pytest.raises(ValueError, match=r"got 0.\nLeave it out.$"):
        check_size("here: dim", 0, "Leave it out.")
