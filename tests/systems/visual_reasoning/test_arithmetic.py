import csv
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from small_exam import small_exam, small_network

from torchfilm.data.clevr.encoding import encode_questions
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning.arithmetic import (
    SEEN_IN_A,
    Swapped,
    encoded,
    interpolate,
    swapped,
    zero_shot,
)
from torchfilm.systems.visual_reasoning.exam import Exam, modulate

CYAN_CUBE = ["count", "filter_shape[cube]", "filter_color[cyan]", "scene"]


def test_a_cyan_cube_is_a_cyan_sphere_plus_a_gray_cube_minus_a_gray_sphere() -> None:
    assert swapped("How many cyan cubes are there", CYAN_CUBE) == Swapped(
        "How many cyan spheres are there", "How many gray cubes are there", "How many gray spheres are there"
    )


def test_synonyms_materials_and_number_are_kept() -> None:
    program = [
        "query_size",
        "unique",
        "filter_shape[cube]",
        "filter_material[metal]",
        "filter_color[red]",
        "scene",
    ]
    assert swapped("What size is the red shiny block ; it is left of a ball", program) == Swapped(
        "What size is the red shiny sphere ; it is left of a ball",
        "What size is the gray shiny block ; it is left of a ball",
        "What size is the gray shiny sphere ; it is left of a ball",
    )


def test_every_mention_is_replaced_and_other_phrases_stay() -> None:
    chain = ["filter_shape[cylinder]", "filter_color[blue]", "scene"]
    program = ["less_than", "count", *chain, "count", "filter_size[large]", *chain]
    found = swapped("Are there fewer blue cylinders than large blue cylinders and red cylinders", program)
    assert isinstance(found, Swapped)
    assert found.both == "Are there fewer red spheres than large red spheres and red cylinders"


@pytest.mark.parametrize(
    ("text", "program", "reason"),
    [
        (
            "How many brown cubes",
            ["count", "filter_shape[cube]", "filter_color[brown]", "scene"],
            "no unseen",
        ),
        (
            "How many cyan spheres",
            ["count", "filter_shape[sphere]", "filter_color[cyan]", "scene"],
            "no unseen",
        ),
        ("How many cyan things", ["count", "filter_color[cyan]", "scene"], "no unseen"),
        (
            "Is a cube left of the cyan thing",
            ["exist", "filter_shape[cube]", "relate[left]", "unique", "filter_color[cyan]", "scene"],
            "no unseen",
        ),
        ("How many cubes are cyan", CYAN_CUBE, "words and program differ"),
        (
            "Is the red cube as big as the gray cylinder",
            [
                *["equal_size", "query_size", "unique", "filter_shape[cube]", "filter_color[red]", "scene"],
                *["query_size", "unique", "filter_color[gray]", "filter_shape[cylinder]", "scene"],
            ],
            "several",
        ),
    ],
)
def test_the_rule_says_why_it_does_not_apply(text, program, reason) -> None:
    found = swapped(text, program)
    assert isinstance(found, str)
    assert reason in found


def test_the_questions_to_add_and_subtract_are_all_about_combinations_of_condition_a() -> None:
    for shape in ("cube", "cylinder"):
        for color in SEEN_IN_A["sphere"]:
            program = ["count", f"filter_shape[{shape}]", f"filter_color[{color}]", "scene"]
            found = swapped(f"How many {color} {shape}s", program)
            assert isinstance(found, str) == (color in SEEN_IN_A[shape])
            if isinstance(found, Swapped):
                for text in vars(found).values():
                    said, noun = text.split()[-2:]
                    assert said in SEEN_IN_A[noun.removesuffix("s")]


def test_a_rewritten_question_has_no_empty_token_that_the_first_had_not() -> None:
    vocabulary = Vocabulary.build([{"question": "a  b; c"}])
    assert "" in vocabulary.questions
    tokens = encoded(["a b ; c"], vocabulary).tokens[0]
    assert [vocabulary.question_words[t] for t in tokens] == ["<START>", "a", "b", ";", "c", "<END>"]


def condition_b_exam() -> Exam:
    """Half of the questions are about cyan cubes."""
    nodes = [
        {"function": "scene", "inputs": [], "value_inputs": []},
        {"function": "filter_color", "inputs": [0], "value_inputs": ["cyan"]},
        {"function": "filter_shape", "inputs": [1], "value_inputs": ["cube"]},
        {"function": "count", "inputs": [2], "value_inputs": []},
    ]
    records = []
    for i in range(24):
        shape = "cube" if i % 2 else "sphere"
        program = [dict(node) for node in nodes]
        program[2] = {**nodes[2], "value_inputs": [shape]}
        text = f"how many {'red ' * (i % 3)}cyan {shape} are there ; left of the gray thing brown blue yellow"
        records.append({"question": text, "answer": str(i % 4), "image_index": i % 7, "program": program})
    vocabulary = Vocabulary.build(records)
    full = small_exam().vocabulary
    merged = full.expand(records)
    vocabulary = Vocabulary(merged.questions, vocabulary.programs, full.answers)
    return Exam(small_exam().pictures, encode_questions(records, vocabulary), vocabulary)


def network_for(exam: Exam):
    network = small_network()
    torch.manual_seed(1)
    config = replace(network.config, vocabulary=len(exam.vocabulary.questions))
    wider = type(network)(config).eval()
    with torch.no_grad():
        for parameter in wider.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return wider


def test_before_and_after_are_what_doing_it_question_by_question_gives(tmp_path) -> None:
    exam = condition_b_exam()
    network = network_for(exam)
    found = zero_shot(network, exam, tmp_path)
    assert found.applies == 12
    assert found.share == 0.5
    assert found.why_not == {"no unseen combination": 12}

    def answer(modulations, i) -> int:
        with torch.no_grad():
            picture = torch.from_numpy(exam.pictures[exam.questions.image_index[i]][None])
            return 4 + int(network.reason(network.features(picture), modulations).logits[0, 4:].argmax())

    right = {"before": [], "after": []}
    for i in range(1, 24, 2):
        text = exam.vocabulary.decode(exam.questions.tokens[i])
        own = modulate(network, encoded([text], exam.vocabulary))
        texts = [text.replace("cyan cube", other) for other in ("cyan sphere", "gray cube", "gray sphere")]
        a, b, c = (modulate(network, encoded([t], exam.vocabulary)) for t in texts)
        total = {site: a[site] + b[site] - c[site] for site in own}
        right["before"].append(answer(own, i) == exam.questions.answers[i])
        right["after"].append(answer(total, i) == exam.questions.answers[i])
    assert found.before == np.mean(right["before"])
    assert found.after == np.mean(right["after"])
    assert found.all_after - found.all_before == pytest.approx((found.after - found.before) / 2)
    assert json.loads((tmp_path / "zero_shot.json").read_text())["paper"]["after"] == 0.807
    with (tmp_path / "zero_shot.csv").open() as stream:
        assert len(list(csv.reader(stream))) == 13
    assert (tmp_path / "zero_shot.png").stat().st_size > 5000


def test_a_split_of_condition_a_is_refused(tmp_path) -> None:
    exam = condition_b_exam()
    only_a = replace(exam, questions=exam.questions.select(np.arange(0, 24, 2)))
    with pytest.raises(ValueError, match="Use valB or testB"):
        zero_shot(network_for(exam), only_a, tmp_path)


def test_interpolation_starts_at_one_question_and_ends_at_the_other(tmp_path) -> None:
    exam, network = small_exam(), small_network()
    first, second = "how many red cube", "are there cyan thing left of the sphere"
    found = interpolate(network, exam, 3, first, second, tmp_path, steps=11)
    assert found.shape == (11, len(exam.vocabulary.answers))
    assert np.allclose(found.sum(1), 1)
    for row, text in ((0, first), (10, second)):
        tokens = torch.tensor([exam.vocabulary.encode(text)])
        with torch.no_grad():
            logits = network(torch.from_numpy(exam.pictures[3:4]), tokens, torch.tensor([tokens.shape[1]]))
        expected = logits[0, 4:].double().softmax(0).numpy()
        assert np.allclose(found[row, 4:], expected, atol=1e-5)
    assert (tmp_path / "interpolation.png").stat().st_size > 5000
    with (tmp_path / "interpolation.csv").open() as stream:
        assert len(list(csv.reader(stream))) == 12
    with pytest.raises(ValueError, match="'cubee'; the nearest are cube"):
        interpolate(network, exam, 3, "how many cubee", second, tmp_path)
    with pytest.raises(ValueError, match="a picture from 0 to 6, got 7"):
        interpolate(network, exam, 7, first, second, tmp_path)
