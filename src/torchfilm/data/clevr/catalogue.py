"""The CLEVR language: 27 typed primitives, attribute values, kinds of question, the order of the 90 families.

Facts of Johnson et al. 2017 (CLEVR, arXiv 1612.06890) and of the released CLEVR_v1.0 data. A program is a
list of nodes in topological order, `{"function": name, "inputs": [node indices], "value_inputs": [values]}`;
its last node is the answer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "size": ("small", "large"),
    "color": ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
    "material": ("rubber", "metal"),
    "shape": ("cube", "sphere", "cylinder"),
}
"""Values of each attribute, in the order in which the attributes are said: size, color, material, shape."""

RELATIONS: tuple[str, ...] = ("left", "right", "behind", "front")

KINDS: tuple[str, ...] = ("count", "exist", "compare_number", "query_attribute", "compare_attribute")
"""The five kinds in the order of Perez et al. 2018, table 1."""

MAX_COUNT = 10


@dataclass(frozen=True)
class Primitive:
    """One function of the language: types of its inputs, type of its one value input, type of its output."""

    name: str
    inputs: tuple[str, ...]
    output: str
    value: str | None = None
    terminal: bool = False


def _primitives() -> dict[str, Primitive]:
    found = [
        Primitive("scene", (), "ObjectSet"),
        Primitive("unique", ("ObjectSet",), "Object"),
        Primitive("relate", ("Object",), "ObjectSet", value="Relation"),
        Primitive("union", ("ObjectSet", "ObjectSet"), "ObjectSet"),
        Primitive("intersect", ("ObjectSet", "ObjectSet"), "ObjectSet"),
        Primitive("count", ("ObjectSet",), "Integer", terminal=True),
        Primitive("exist", ("ObjectSet",), "Bool", terminal=True),
        Primitive("equal_integer", ("Integer", "Integer"), "Bool", terminal=True),
        Primitive("less_than", ("Integer", "Integer"), "Bool", terminal=True),
        Primitive("greater_than", ("Integer", "Integer"), "Bool", terminal=True),
        Primitive("equal_object", ("Object", "Object"), "Bool", terminal=True),
    ]
    for attribute in ATTRIBUTES:
        kind = attribute.capitalize()
        found += [
            Primitive(f"filter_{attribute}", ("ObjectSet",), "ObjectSet", value=kind),
            Primitive(f"same_{attribute}", ("Object",), "ObjectSet"),
            Primitive(f"query_{attribute}", ("Object",), kind, terminal=True),
            Primitive(f"equal_{attribute}", (kind, kind), "Bool", terminal=True),
        ]
    return {primitive.name: primitive for primitive in found}


PRIMITIVES: dict[str, Primitive] = _primitives()
"""The 27 primitives by name. `equal_object` is in the language but in no family."""

VALUES: dict[str, tuple[str, ...]] = {
    "Relation": RELATIONS,
    **{attribute.capitalize(): values for attribute, values in ATTRIBUTES.items()},
}
"""What each type of value input may be."""

TERMINAL_KINDS: dict[str, str] = {
    "count": "count",
    "exist": "exist",
    "equal_integer": "compare_number",
    "less_than": "compare_number",
    "greater_than": "compare_number",
    **{f"query_{attribute}": "query_attribute" for attribute in ATTRIBUTES},
    **{f"equal_{attribute}": "compare_attribute" for attribute in ATTRIBUTES},
}
"""The 13 types of question (last function of the program) and the kind of each."""

FAMILY_FILES: tuple[tuple[str, int], ...] = (
    ("compare_integer", 9),
    ("comparison", 16),
    ("three_hop", 6),
    ("single_and", 5),
    ("same_relate", 28),
    ("single_or", 8),
    ("two_hop", 6),
    ("one_hop", 6),
    ("zero_hop", 6),
)
"""Template files and sizes, in the order in which the released `question_family_index` counts them.

The public generator numbers the families inside each file; the released data number them globally, in this
order: compare_integer 0-8, comparison 9-24, three_hop 25-30, single_and 31-35, same_relate 36-63, single_or
64-71, two_hop 72-77, one_hop 78-83, zero_hop 84-89. No document of the release states it. One released record
was seen to agree with it; nothing else was compared.
"""

NUM_FAMILIES = sum(size for _, size in FAMILY_FILES)


def family_file(index: int) -> tuple[str, int]:
    """Template file of a global family index (0 to 89) and the family's place inside that file."""
    if not 0 <= index < NUM_FAMILIES:
        raise ValueError(f"question_family_index must be 0 to {NUM_FAMILIES - 1}, got {index}.")
    first = 0
    for name, size in FAMILY_FILES:
        if index < first + size:
            return name, index - first
        first += size
    raise AssertionError(index)


def family_index(file: str, place: int) -> int:
    """Global index (0 to 89) of the family at `place` in a template file: the inverse of `family_file`."""
    first = 0
    for name, size in FAMILY_FILES:
        if name == file:
            if not 0 <= place < size:
                raise ValueError(f"Template file {file!r} has families 0 to {size - 1}, got {place}.")
            return first + place
        first += size
    raise ValueError(f"Unknown template file {file!r}; expected one of {[name for name, _ in FAMILY_FILES]}.")


def function_name(node: Mapping[str, Any]) -> str:
    """Name of a node's function: key `function` (released data) or `type` (the public generator's output)."""
    return node["function"] if "function" in node else node["type"]


def node_values(node: Mapping[str, Any]) -> Sequence[str]:
    """A node's literal values: key `value_inputs` (released data) or `side_inputs` (the public generator)."""
    return node.get("value_inputs") or node.get("side_inputs") or ()


def question_type(program: Sequence[Mapping[str, Any]]) -> str:
    """One of the 13 types: the last function of the program."""
    if not program:
        raise ValueError("The program is empty; expected at least one node.")
    return function_name(program[-1])


def question_kind(program: Sequence[Mapping[str, Any]]) -> str:
    """One of the five KINDS, from the last function; equal_object compares attributes."""
    name = question_type(program)
    if name == "equal_object":
        return "compare_attribute"
    if name not in TERMINAL_KINDS:
        raise ValueError(f"The program ends on {name!r}; expected one of {sorted(TERMINAL_KINDS)}.")
    return TERMINAL_KINDS[name]
