"""Rows of text stand in columns; files that are whole are tested with those who write them."""

from __future__ import annotations

from torchfilm.writing import in_columns

ROWS = [("", "x", "note"), ("first", "-1.25", ""), ("b", "", "two words")]


def test_cells_stand_below_one_another_two_spaces_apart_and_no_line_ends_with_a_space():
    assert in_columns(ROWS) == "       x      note\nfirst  -1.25\nb             two words"


def test_numbers_stand_to_the_right():
    assert in_columns(ROWS[::2], right=True) == "   x       note\nb     two words"
