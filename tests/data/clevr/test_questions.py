import collections
import itertools
import json
import random

import numpy as np
import pytest
from scene_factory import make_scenes

from torchfilm.data.clevr.balancing import AnswerBalance
from torchfilm.data.clevr.catalogue import PRIMITIVES, family_file, question_kind, question_type
from torchfilm.data.clevr.executor import check_program, execute, trace
from torchfilm.data.clevr.questions import QuestionConfig, QuestionGenerator
from torchfilm.data.clevr.templates import FAMILIES

SCENES = make_scenes(150, seed=3)


def generate(seed=0, scenes=SCENES, **config):
    config = {"questions_per_scene": 40, **config}
    return QuestionGenerator(QuestionConfig(**config)).generate(scenes, np.random.default_rng(seed))


@pytest.fixture(scope="module")
def questions():
    return generate()


@pytest.fixture(scope="module")
def strict():
    """Questions of which each relation matters."""
    return generate(1, SCENES[:50], trivial_fraction=0.0)


def scene_of(question):
    return SCENES[question["image_index"]]


def parts(question):
    """Function names that a question's program uses, with how many filters each noun phrase has: its form."""
    names = [node["function"] for node in question["program"]]
    return question["question_family_index"], tuple(names)


def test_every_answer_is_the_executors_on_the_released_program(questions):
    assert len(questions) == 150 * 40
    for question in questions:
        assert execute(question["program"], scene_of(question)) == question["answer"], question


def test_questions_have_exactly_the_released_keys_and_survive_json(questions):
    keys = {
        "split",
        "image_index",
        "image_filename",
        "question",
        "answer",
        "program",
        "question_family_index",
        "question_index",
    }
    for place, question in enumerate(questions):
        assert set(question) == keys
        assert question["question_index"] == place
        assert isinstance(question["answer"], str)
        assert question["question"].endswith("?")
        assert "  " not in question["question"]
        assert question["image_filename"] == scene_of(question)["image_filename"]
        for node in question["program"]:
            assert set(node) == {"function", "inputs", "value_inputs"}
    assert json.loads(json.dumps(questions)) == questions


def test_programs_type_check_and_are_topologically_sorted_and_wholly_used(questions):
    for question in questions:
        program = question["program"]
        check_program(program)
        assert PRIMITIVES[question_type(program)].terminal
        used = sorted(source for node in program for source in node["inputs"])
        assert used == list(range(len(program) - 1)), "each node but the last feeds exactly one later node"
        family = FAMILIES[question["question_family_index"]]
        assert question_type(program) == family.terminal


def test_all_families_have_about_equal_shares(questions):
    shares = collections.Counter(question["question_family_index"] for question in questions)
    assert set(shares) == set(range(90))
    assert max(shares.values()) <= 1.15 * len(questions) / 90
    assert min(shares.values()) >= 0.4 * len(questions) / 90


def test_same_seed_same_questions_and_other_seed_other_questions():
    few = SCENES[:7]
    assert generate(5, few) == generate(5, few)
    assert generate(5, few) != generate(6, few)


def test_no_question_is_asked_twice_on_a_scene(questions):
    for _, asked in itertools.groupby(questions, key=lambda question: question["image_index"]):
        programs = [
            (question["question_family_index"], json.dumps(question["program"])) for question in asked
        ]
        assert len(set(programs)) == len(programs)


def without(program, index):
    """The program with one relate or same node replaced by all objects of the scene."""
    changed = [dict(node) for node in program]
    changed[index] = {"function": "scene", "inputs": [], "value_inputs": []}
    return changed


def changes_something(program, index, scene):
    """Brute force: without this relation a later set differs, or there is no single object."""
    before = trace(program, scene)
    at = next(
        j
        for j in range(index + 1, len(program))
        if not program[j]["function"].startswith(("filter", "intersect", "union"))
    )
    if program[at]["function"] != "unique":
        return trace(without(program[:at], index), scene)[at - 1] != before[at - 1]
    try:
        return trace(without(program[: at + 1], index), scene)[at] != before[at]
    except ValueError:
        return True


def relation_nodes(question):
    for index, node in enumerate(question["program"]):
        if node["function"] == "relate" or node["function"].startswith("same_"):
            yield index


def test_without_any_of_its_relations_a_question_means_other_objects(strict):
    for question in strict:
        for index in relation_nodes(question):
            if family_file(question["question_family_index"])[0] == "single_or":
                continue  # a union can hide what one side gains; tested on the side alone below
            assert changes_something(question["program"], index, scene_of(question)), question


def test_each_side_of_an_or_needs_its_relation(strict):
    for question in strict:
        if family_file(question["question_family_index"])[0] != "single_or":
            continue
        program, scene = question["program"], scene_of(question)
        union = next(i for i, node in enumerate(program) if node["function"] == "union")
        for index in relation_nodes(question):
            side = next(end for end in program[union]["inputs"] if end >= index)
            assert trace(program, scene)[side] != trace(without(program, index), scene)[side]


def test_at_most_a_tenth_of_the_relations_to_sets_change_nothing(questions):
    chained = [
        question
        for question in questions
        if family_file(question["question_family_index"])[0] in ("one_hop", "two_hop", "three_hop")
        and question_type(question["program"]) in ("count", "exist")
    ]
    trivial = sum(
        not all(changes_something(q["program"], index, scene_of(q)) for index in relation_nodes(q))
        for q in chained
    )
    assert 0 < trivial <= 0.1 * len(chained)


def test_yes_and_no_are_balanced_in_each_family_and_form(questions):
    totals, forms = collections.defaultdict(collections.Counter), collections.defaultdict(collections.Counter)
    for question in questions:
        if question["answer"] in ("yes", "no"):
            totals[question["question_family_index"]][question["answer"]] += 1
            forms[parts(question)][question["answer"]] += 1
    for family, answers in totals.items():
        share = answers["yes"] / sum(answers.values())
        assert 0.4 <= share <= 0.6, (family, answers)
    large = [answers for answers in forms.values() if sum(answers.values()) >= 8]
    assert len(large) > 10
    for answers in large:
        assert 0.25 <= answers["yes"] / sum(answers.values()) <= 0.75, answers


def test_no_count_and_no_value_prevails(questions):
    kinds = collections.defaultdict(collections.Counter)
    for question in questions:
        kinds[question_type(question["program"])][question["answer"]] += 1
    counts = kinds["count"]
    assert max(counts.values()) <= 0.36 * sum(counts.values())
    for name, values in (("query_color", 8), ("query_shape", 3), ("query_size", 2), ("query_material", 2)):
        assert len(kinds[name]) == values
        assert max(kinds[name].values()) <= 1.2 * sum(kinds[name].values()) / values


def type_of(question):
    return question_type(question["program"])


def length(question):
    return type_of(question), len(question["question"].split())


def blind_accuracies(train, test, key):
    """Of the most frequent answer among other scenes' questions with the same key, else type; by kind."""
    table, hits = collections.defaultdict(collections.Counter), collections.defaultdict(list)
    for question in train:
        for group in (key(question), type_of(question)):
            table[group][question["answer"]] += 1
    for question in test:
        answers = table.get(key(question)) or table[type_of(question)]
        hits[question_kind(question["program"])].append(answers.most_common(1)[0][0] == question["answer"])
    return {kind: sum(found) / len(found) for kind, found in hits.items()}


def test_a_question_cannot_be_answered_by_its_type_and_length_or_its_family_and_form():
    """Blind, by more than its type, no kind gains 6 points; counts by their form gain 7."""
    train = [q for seed in (1, 2, 3) for q in generate(seed, make_scenes(100, seed=10 + seed))]
    test = generate(4, make_scenes(100, seed=20))
    usual = blind_accuracies(train, test, type_of)
    assert max(usual[kind] for kind in ("exist", "compare_number", "compare_attribute")) < 0.53
    assert usual["query_attribute"] < 0.37
    assert usual["count"] < 0.32
    for key in (length, parts):
        for kind, accuracy in blind_accuracies(train, test, key).items():
            gain = 0.08 if (key, kind) == (parts, "count") else 0.06
            assert accuracy < usual[kind] + gain, (key.__name__, kind)


def test_scenes_of_ten_objects_work_too():
    scenes = make_scenes(11, seed=8, fewest=10, most=10)
    for question in generate(0, scenes, questions_per_scene=13):
        assert execute(question["program"], scenes[question["image_index"]]) == question["answer"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"questions_per_scene": 0}, "questions_per_scene must be at least 1, got 0"),
        ({"attempts": 0}, "attempts must be at least 1, got 0"),
        ({"count_cap": 0.0}, r"count_cap must be in \(0, 1\], got 0.0"),
        ({"family_cap": 1.5}, r"family_cap must be in \(0, 1\], got 1.5"),
        ({"trivial_fraction": 1.0}, r"trivial_fraction must be in \[0, 1\), got 1.0"),
    ],
)
def test_a_config_out_of_range_is_named(config, message):
    with pytest.raises(ValueError, match=message):
        QuestionConfig(**config)


def test_the_answer_owed_is_the_least_used_and_a_share_has_its_cap():
    balance = AnswerBalance()
    for answer in ("cube", "cube", "sphere"):
        balance.add([("family", 3)], answer)
    assert balance.owed([("family", 3)], ["cube", "sphere"], random.Random(0)) == "sphere"
    assert not balance.allowed(("family", 3), "cube", cap=0.4, spare=1)
    assert balance.allowed(("family", 3), "sphere", cap=0.4, spare=1)
    with pytest.raises(ValueError, match="No answers to choose from; expected at least one"):
        balance.owed([("family", 3)], [], random.Random(0))
