"""How CLEVR's questions are grouped: 13 types (the program's last function), 5 kinds, 90 families."""

from collections.abc import Mapping, Sequence
from typing import Any

from .catalogue import FAMILY_FILES, TERMINAL_KINDS, family_index, node_values

TYPES: tuple[str, ...] = tuple(TERMINAL_KINDS)
"""The 13 types: the last function of a program, which says what is asked."""


def family(question: Mapping[str, Any]) -> int:
    """The global number of the question's family, 0 to 89; -1 where the record does not say.

    Released records number the families globally; those of the public generator number them within a template
    file and name it in `template_filename`.
    """
    index = question.get("question_family_index")
    if index is None:
        return -1
    file = str(question.get("template_filename", "")).removesuffix(".json")
    known = any(file == name for name, _ in FAMILY_FILES)
    return family_index(file, int(index)) if known else int(index)


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
        values = node_values(node)
        tokens.append(function(node) + (f"[{','.join(map(str, values))}]" if values else ""))
        if len(tokens) > 1000:
            raise ValueError(
                "a program's inputs run in a circle; expected each node to read earlier nodes only"
            )
        stack.extend(reversed(node.get("inputs") or []))
    return tokens
