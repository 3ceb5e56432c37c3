"""Damaged content ends in words that name the file, and sizes are seen before they cost memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from torch import nn

from torchfilm.reading import intact, sketched


@pytest.mark.parametrize(
    ("read", "said"),
    [
        (lambda: {}["a"], "a.json: expected a list, got KeyError('a'). Save again."),
        (lambda: [][3], "a.json: expected a list, got IndexError('list index out of range'). Save again."),
        (lambda: int(float("inf")), "a.json: expected a list, got OverflowError("),
        (lambda: json.loads("["), "a.json: expected a list, got JSONDecodeError("),
        (lambda: b"\xff".decode(), "a.json: expected a list, got UnicodeDecodeError("),
        (lambda: int("x"), "a.json: invalid literal"),
    ],
)
def test_what_damaged_content_raises_names_the_file(read: Callable[[], Any], said: str):
    with pytest.raises(ValueError, match=rf"^{re.escape(said)}"), intact("a.json", "a list", "Save again."):
        read()


def test_an_error_that_names_the_file_and_one_of_another_kind_stay_as_they_are():
    for error in (ValueError("of a.json: wrong"), OSError("no such file"), KeyboardInterrupt()):
        with pytest.raises(type(error)) as caught, intact("a.json", "a list", "Save again."):
            raise error
        assert caught.value is error


def test_a_sketch_has_sizes_and_no_memory():
    with sketched():
        layer = nn.Linear(10**6, 10**6)
    assert layer.weight.is_meta
    with (
        pytest.raises(ValueError, match=r"^expected sizes that tensors can have, got others: .*-1"),
        sketched(),
    ):
        nn.Linear(-1, 3)
