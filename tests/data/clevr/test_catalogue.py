import itertools

import pytest

from torchfilm.data.clevr.catalogue import (
    ATTRIBUTES,
    FAMILY_FILES,
    KINDS,
    NUM_FAMILIES,
    PRIMITIVES,
    TERMINAL_KINDS,
    VALUES,
    family_file,
    family_index,
    question_kind,
    question_type,
)


def test_the_language_has_27_primitives_and_40_program_tokens():
    assert len(PRIMITIVES) == 27
    tokens = [len(VALUES[p.value]) if p.value else 1 for p in PRIMITIVES.values() if p.name != "equal_object"]
    assert sum(tokens) == 40 - 1 + 1


def test_every_signature_uses_known_types():
    known = {"Object", "ObjectSet", "Integer", "Bool", *VALUES}
    for primitive in PRIMITIVES.values():
        assert {*primitive.inputs, primitive.output} <= known
        assert primitive.value is None or primitive.value in VALUES
        assert primitive.terminal == (primitive.output not in ("Object", "ObjectSet"))


def test_thirteen_terminals_fall_into_five_kinds():
    assert len(TERMINAL_KINDS) == 13
    assert set(TERMINAL_KINDS.values()) == set(KINDS)
    terminals = {name for name, primitive in PRIMITIVES.items() if primitive.terminal}
    assert terminals == {*TERMINAL_KINDS, "equal_object"}


def test_attribute_values_are_all_different_words():
    values = list(itertools.chain(*ATTRIBUTES.values()))
    assert len(values) == len(set(values)) == 15


def test_global_family_numbers_run_over_the_files_in_the_released_order():
    assert NUM_FAMILIES == 90
    starts = {"compare_integer": 0, "comparison": 9, "three_hop": 25, "single_and": 31, "same_relate": 36}
    starts |= {"single_or": 64, "two_hop": 72, "one_hop": 78, "zero_hop": 84}
    for file, start in starts.items():
        assert family_index(file, 0) == start
    for index in range(90):
        assert family_index(*family_file(index)) == index
    assert {file for file, _ in FAMILY_FILES} == set(starts)


def test_type_and_kind_come_from_the_last_node_of_either_form():
    assert question_type([{"type": "scene"}, {"type": "count", "inputs": [0]}]) == "count"
    assert question_kind([{"function": "less_than"}]) == "compare_number"
    assert question_kind([{"function": "equal_object"}]) == "compare_attribute"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: family_file(90), "must be 0 to 89, got 90"),
        (lambda: family_file(-1), "must be 0 to 89, got -1"),
        (lambda: family_index("four_hop", 0), "Unknown template file 'four_hop'; expected one of"),
        (lambda: family_index("one_hop", 6), "'one_hop' has families 0 to 5, got 6"),
        (lambda: question_type([]), "The program is empty"),
        (lambda: question_kind([{"function": "scene"}]), "ends on 'scene'; expected one of"),
    ],
)
def test_errors_name_what_was_expected(call, message):
    with pytest.raises(ValueError, match=message):
        call()
