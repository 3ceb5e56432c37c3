import random

import pytest
from scene_factory import make_scene, make_scenes

from torchfilm.data.clevr.executor import answer_text, check_program, execute, trace

ATTRIBUTES = ("size", "color", "material", "shape")


def objects_of(scene):
    return [{**one, "me": index} for index, one in enumerate(scene["objects"])]


def oracle(program, scene, at=None):
    """Recursive naive semantics, written apart: sets are lists of object records."""
    node = program[-1 if at is None else at]
    name, value = node["function"], (node["value_inputs"] or [None])[0]
    inputs = [oracle(program, scene, i) for i in node["inputs"]]
    if name == "scene":
        return objects_of(scene)
    if name == "unique":
        (one,) = inputs[0]
        return one
    if name == "relate":
        near = scene["relationships"][value][inputs[0]["me"]]
        return [one for one in objects_of(scene) if one["me"] in near]
    if name in ("union", "intersect"):
        mine, yours = ({one["me"] for one in side} for side in inputs)
        kept = mine | yours if name == "union" else mine & yours
        return [one for one in objects_of(scene) if one["me"] in kept]
    verb, _, attribute = name.partition("_")
    if verb == "filter":
        return [one for one in inputs[0] if one[attribute] == value]
    if verb == "same":
        others = [one for one in objects_of(scene) if one["me"] != inputs[0]["me"]]
        return [one for one in others if one[attribute] == inputs[0][attribute]]
    if verb == "query":
        return inputs[0][attribute]
    return {
        "count": lambda: len(inputs[0]),
        "exist": lambda: bool(inputs[0]),
        "less_than": lambda: inputs[0] < inputs[1],
        "greater_than": lambda: inputs[0] > inputs[1],
    }.get(name, lambda: inputs[0] == inputs[1])()


def node(function, inputs=(), *values):
    return {"function": function, "inputs": list(inputs), "value_inputs": list(values)}


def random_program(scene, rnd):
    """A random well-typed program, built forwards from typed pools, whose `unique` are valid on the scene."""
    program = [node("scene")]
    pools = {"set": [0], "one": [], "integer": [], **{attribute: [] for attribute in ATTRIBUTES}}

    def add(pool, *made):
        program.append(node(*made))
        pools[pool].append(len(program) - 1)

    for _ in range(12):
        attribute = rnd.choice(ATTRIBUTES)
        group = rnd.choice(pools["set"])
        value = rnd.choice(scene["objects"])[attribute]
        moves = [("set", f"filter_{attribute}", [group], value), ("integer", "count", [group])]
        moves += [("set", rnd.choice(["union", "intersect"]), [group, rnd.choice(pools["set"])])]
        if len(oracle(program, scene, group)) == 1:
            moves += [("one", "unique", [group])] * 6
        if pools["one"]:
            one = rnd.choice(pools["one"])
            moves += [("set", "relate", [one], rnd.choice(["left", "right", "front", "behind"]))]
            moves += [("set", f"same_{attribute}", [one]), (attribute, f"query_{attribute}", [one])]
        add(*rnd.choice(moves))
    endings = [node("exist", [pools["set"][-1]]), node("count", [pools["set"][-1]])]
    if len(pools["integer"]) > 1:
        pair = rnd.sample(pools["integer"], 2)
        endings += [node(name, pair) for name in ("equal_integer", "less_than", "greater_than")]
    for attribute in ATTRIBUTES:
        if pools[attribute]:
            endings += [node(f"equal_{attribute}", [rnd.choice(pools[attribute]) for _ in range(2)])]
    if pools["one"]:
        endings += [node("equal_object", [rnd.choice(pools["one"]) for _ in range(2)])]
        endings += [node(f"query_{rnd.choice(ATTRIBUTES)}", [pools["one"][-1]])]
    return [*program, rnd.choice(endings)]


def test_random_programs_answer_as_naive_set_semantics_do():
    rnd, used = random.Random(0), set()
    for index in range(400):
        scene = make_scene(rnd, index, 2, 7)
        program = random_program(scene, rnd)
        check_program(program)
        used |= {one["function"] for one in program}
        expected = oracle(program, scene)
        assert execute(program, scene) == {True: "yes", False: "no"}.get(expected, str(expected)) or (
            isinstance(expected, int)
            and not isinstance(expected, bool)
            and execute(program, scene) == str(expected)
        )
    assert len(used) == 27, "every primitive has been executed"


def test_the_public_generators_form_gives_the_same_answer():
    rnd = random.Random(1)
    for scene in make_scenes(23, seed=5):
        program = random_program(scene, rnd)
        public = [
            {"type": n["function"], "inputs": n["inputs"], "side_inputs": n["value_inputs"], "_output": None}
            for n in program
        ]
        assert execute(public, scene) == execute(program, scene)


def test_trace_gives_every_nodes_value():
    scene = make_scene(random.Random(2), 0, 5, 5)
    color = scene["objects"][3]["color"]
    program = [node("scene"), node("filter_color", [0], color), node("count", [1])]
    alike = tuple(i for i, one in enumerate(scene["objects"]) if one["color"] == color)
    assert trace(program, scene) == [(0, 1, 2, 3, 4), alike, len(alike)]


def test_answers_are_written_as_in_the_released_data():
    assert [answer_text(value) for value in (True, False, 0, 10, "cube")] == ["yes", "no", "0", "10", "cube"]


def test_a_scene_with_the_readmes_key_relations_is_read_too():
    scene = make_scene(random.Random(3), 0, 1, 1)
    scene["relations"] = scene.pop("relationships")
    program = [node("scene"), node("unique", [0]), node("relate", [1], "left"), node("exist", [2])]
    assert execute(program, scene) == "no"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ([], "program is empty"),
        (
            [node("scene"), node("unique", [0]), node("query_size", [1])],
            r"node 1 \(unique\) needs exactly one object, got 3",
        ),
        ([node("scene"), node("sort", [0])], "node 1: unknown function 'sort'; expected one of"),
        ([{"inputs": []}], "node 0 has neither 'function' nor 'type'"),
        ([node("scene"), node("count")], r"node 1 \(count\) takes 1 inputs, got \[\]"),
        ([node("scene"), node("union", [0])], r"node 1 \(union\) takes 2 inputs, got \[0\]"),
        ([node("scene"), node("count", [1])], r"node 1 \(count\) reads node 1; expected 0 to 0"),
        (
            [node("scene"), node("query_size", [0])],
            r"node 1 \(query_size\) expects Object from node 0, got ObjectSet",
        ),
        (
            [node("scene"), node("filter_color", [0], "pink")],
            r"node 1 \(filter_color\) expects value one of .*got \['pink'\]",
        ),
        (
            [node("scene"), node("filter_color", [0])],
            r"node 1 \(filter_color\) expects value one of .*got \[\]",
        ),
        (
            [node("scene", [], "red"), node("count", [0])],
            r"node 0 \(scene\) expects value none, got \['red'\]",
        ),
        (
            [node("scene"), node("filter_size", [0], "large")],
            r"node 1 \(filter_size\) cannot end a program; expected one of",
        ),
    ],
)
def test_an_invalid_program_is_refused_with_its_node(program, message):
    scene = make_scene(random.Random(4), 0, 3, 3)
    with pytest.raises(ValueError, match=message):
        execute(program, scene)


def test_a_scene_without_relations_is_named_when_one_is_needed():
    scene = {"objects": make_scene(random.Random(6), 0, 1, 1)["objects"]}
    program = [node("scene"), node("unique", [0]), node("relate", [1], "left"), node("count", [2])]
    with pytest.raises(
        ValueError, match=r"node 2 \(relate\) needs relationships\['left'\], the scene has none"
    ):
        execute(program, scene)
