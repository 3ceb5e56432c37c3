"""How CLEVR's questions are grouped: 13 types (the program's last function), 5 kinds, 90 families."""

from collections.abc import Mapping, Sequence
from typing import Any

KIND_OF_TYPE: Mapping[str, str] = {
    "count": "count",
    "exist": "exist",
    "equal_integer": "compare_numbers",
    "less_than": "compare_numbers",
    "greater_than": "compare_numbers",
    "query_color": "query",
    "query_material": "query",
    "query_shape": "query",
    "query_size": "query",
    "equal_color": "compare_attribute",
    "equal_material": "compare_attribute",
    "equal_shape": "compare_attribute",
    "equal_size": "compare_attribute",
}
TYPES: tuple[str, ...] = tuple(KIND_OF_TYPE)
KINDS: tuple[str, ...] = ("count", "exist", "compare_numbers", "query", "compare_attribute")

# The released family numbers count the templates of these files in this order; the public question generator
# numbers them within the file, and names the file in `template_filename`.
_TEMPLATES_PER_FILE: Mapping[str, int] = {
    "compare_integer": 9,
    "comparison": 16,
    "one_hop": 6,
    "same_relate": 28,
    "single_and": 5,
    "single_or": 8,
    "three_hop": 6,
    "two_hop": 6,
    "zero_hop": 6,
}
NUM_FAMILIES = sum(_TEMPLATES_PER_FILE.values())


def family(question: Mapping[str, Any]) -> int:
    """The global number of the question's family, 0 to 89; -1 where the file does not say."""
    index = question.get("question_family_index")
    if index is None:
        return -1
    offset = 0
    name = str(question.get("template_filename", "")).removesuffix(".json")
    if name in _TEMPLATES_PER_FILE:
        names = list(_TEMPLATES_PER_FILE)
        offset = sum(_TEMPLATES_PER_FILE[n] for n in names[: names.index(name)])
    return offset + int(index)


def function(node: Mapping[str, Any]) -> str:
    """The function of a program node: released files say `function`, the public generator's say `type`."""
    name = node.get("function", node.get("type"))
    if name is None:
        raise ValueError(
            f"a program node needs 'function' or 'type', got the keys {sorted(node)}. "
            "Is this a CLEVR questions file?"
        )
    return str(name)


def program_tokens(program: Sequence[Mapping[str, Any]]) -> list[str]:
    """The program in prefix order (last node, then its inputs), values in brackets: `filter_color[red]`."""
    tokens: list[str] = []
    stack = [len(program) - 1] if program else []
    while stack:
        node = program[stack.pop()]
        values = node.get("value_inputs") or []
        tokens.append(function(node) + (f"[{','.join(map(str, values))}]" if values else ""))
        if len(tokens) > 1000:
            raise ValueError(
                "a program's inputs run in a circle; expected each node to read earlier nodes only"
            )
        stack.extend(reversed(node.get("inputs") or []))
    return tokens
