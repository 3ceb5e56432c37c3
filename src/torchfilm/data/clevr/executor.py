"""Answer any CLEVR program on any CLEVR scene, node by node.

`execute(program, scene)` gives the answer as the released data write it ("yes", "3", "cube"); `trace` gives
what every node gave, for inspection. Programs may be in the released form (`function`, `value_inputs`) or as
the public generator writes them (`type`, `side_inputs`). Semantics: Johnson et al. 2017 (arXiv 1612.06890),
appendix A.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .catalogue import ATTRIBUTES, PRIMITIVES, VALUES, Primitive, function_name, node_values
from .vocabulary import answer_text

Value = tuple[int, ...] | int | bool | str
"""What a node gives: a set's objects in ascending order, an object, a number, a truth or a value."""

Scene = Mapping[str, Any]
Node = Mapping[str, Any]


def execute(program: Sequence[Node], scene: Scene) -> str:
    """Answer of a program on a scene: "yes" or "no", "0" to "10", or an attribute's value such as "cube".

    Raises ValueError, naming the node, for an unknown function, a wrong number or type of inputs, a value
    that is none of the function's, or `unique` on a set that does not have exactly one object; also for a
    program that does not end on a terminal.
    """
    values = trace(program, scene)
    last = function_name(program[-1])
    if not PRIMITIVES[last].terminal:
        terminals = sorted(name for name, primitive in PRIMITIVES.items() if primitive.terminal)
        raise ValueError(
            f"Program node {len(program) - 1} ({last}) cannot end a program; expected one of {terminals}."
        )
    return answer_text(values[-1])


def trace(program: Sequence[Node], scene: Scene) -> list[Value]:
    """What each node of a program gives on a scene, in the program's order; same errors as `execute`."""
    if not program:
        raise ValueError("The program is empty; expected at least one node.")
    values: list[Value] = []
    for index, node in enumerate(program):
        primitive = _checked(index, node, program)
        inputs = [values[i] for i in node.get("inputs", ())]
        values.append(_HANDLERS[primitive.name](index, scene, inputs, node_values(node)))
    return values


def check_program(program: Sequence[Node]) -> str:
    """Type-check a program against the catalogue, without a scene; gives its type (such as "Bool")."""
    if not program:
        raise ValueError("The program is empty; expected at least one node.")
    for index, node in enumerate(program):
        _checked(index, node, program)
    return PRIMITIVES[function_name(program[-1])].output


def _checked(index: int, node: Node, program: Sequence[Node]) -> Primitive:
    if "function" not in node and "type" not in node:
        raise ValueError(
            f"Program node {index} has neither 'function' nor 'type'; its keys are {sorted(node)}."
        )
    name = function_name(node)
    if name not in PRIMITIVES:
        raise ValueError(
            f"Program node {index}: unknown function {name!r}; expected one of {sorted(PRIMITIVES)}."
        )
    primitive = PRIMITIVES[name]
    inputs, values = node.get("inputs", ()), node_values(node)
    if len(inputs) != len(primitive.inputs):
        raise ValueError(
            f"Program node {index} ({name}) takes {len(primitive.inputs)} inputs, got {list(inputs)}."
        )
    for source, expected in zip(inputs, primitive.inputs, strict=True):
        if not 0 <= source < index:
            raise ValueError(f"Program node {index} ({name}) reads node {source}; expected 0 to {index - 1}.")
        got = PRIMITIVES[function_name(program[source])].output
        if got != expected:
            raise ValueError(
                f"Program node {index} ({name}) expects {expected} from node {source}, got {got}"
                f" ({function_name(program[source])})."
            )
    allowed = VALUES[primitive.value] if primitive.value else ()
    if len(values) != bool(allowed) or any(value not in allowed for value in values):
        expected = f"one of {list(allowed)}" if allowed else "none"
        raise ValueError(f"Program node {index} ({name}) expects value {expected}, got {list(values)}.")
    return primitive


_Handler = Callable[[int, Scene, list[Any], Sequence[str]], Value]


def _unique(index: int, scene: Scene, inputs: list[Any], values: Sequence[str]) -> int:
    if len(inputs[0]) != 1:
        raise ValueError(
            f"Program node {index} (unique) needs exactly one object, got {len(inputs[0])}."
            " The question is ill-posed on this scene."
        )
    return inputs[0][0]


def _relate(index: int, scene: Scene, inputs: list[Any], values: Sequence[str]) -> tuple[int, ...]:
    relationships = scene.get("relationships", scene.get("relations"))
    if relationships is None or values[0] not in relationships:
        raise ValueError(
            f"Program node {index} (relate) needs relationships[{values[0]!r}], the scene has none."
        )
    return tuple(sorted(relationships[values[0]][inputs[0]]))


def _filter(attribute: str) -> _Handler:
    def run(index: int, scene: Scene, inputs: list[Any], values: Sequence[str]) -> tuple[int, ...]:
        objects = scene["objects"]
        return tuple(i for i in inputs[0] if objects[i][attribute] == values[0])

    return run


def _same(attribute: str) -> _Handler:
    def run(index: int, scene: Scene, inputs: list[Any], values: Sequence[str]) -> tuple[int, ...]:
        objects, one = scene["objects"], inputs[0]
        wanted = objects[one][attribute]
        return tuple(i for i, other in enumerate(objects) if i != one and other[attribute] == wanted)

    return run


def _query(attribute: str) -> _Handler:
    return lambda index, scene, inputs, values: scene["objects"][inputs[0]][attribute]


def _equal(index: int, scene: Scene, inputs: list[Any], values: Sequence[str]) -> bool:
    return inputs[0] == inputs[1]


_HANDLERS: dict[str, _Handler] = {
    "scene": lambda index, scene, inputs, values: tuple(range(len(scene["objects"]))),
    "unique": _unique,
    "relate": _relate,
    "union": lambda index, scene, inputs, values: tuple(sorted({*inputs[0], *inputs[1]})),
    "intersect": lambda index, scene, inputs, values: tuple(sorted({*inputs[0]} & {*inputs[1]})),
    "count": lambda index, scene, inputs, values: len(inputs[0]),
    "exist": lambda index, scene, inputs, values: len(inputs[0]) > 0,
    "less_than": lambda index, scene, inputs, values: inputs[0] < inputs[1],
    "greater_than": lambda index, scene, inputs, values: inputs[0] > inputs[1],
    **{name: _equal for name in PRIMITIVES if name.startswith("equal_")},
    **{f"filter_{attribute}": _filter(attribute) for attribute in ATTRIBUTES},
    **{f"same_{attribute}": _same(attribute) for attribute in ATTRIBUTES},
    **{f"query_{attribute}": _query(attribute) for attribute in ATTRIBUTES},
}
