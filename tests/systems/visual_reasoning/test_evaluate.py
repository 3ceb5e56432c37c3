import json
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from small_exam import small_exam, small_network, small_records

from torchfilm.data.clevr.encoding import NO_ANSWER
from torchfilm.systems.visual_reasoning.evaluate import (
    Score,
    evaluate,
    most_frequent,
    resampled_interval,
    score,
    wilson,
)
from torchfilm.systems.visual_reasoning.exam import predict

KIND = {"count": "count", "exist": "exist", "equal_integer": "compare_number", "less_than": "compare_number"}
KIND |= {"greater_than": "compare_number"}
KIND |= {f"query_{a}": "query_attribute" for a in ("color", "shape", "size", "material")}
KIND |= {f"equal_{a}": "compare_attribute" for a in ("color", "shape", "size", "material")}


def given_answers(exam) -> tuple[np.ndarray, list[str]]:
    """Half of the answers right, the others drawn at random."""
    rng = np.random.default_rng(1)
    drawn = rng.integers(4, len(exam.vocabulary.answers), len(exam)).astype(np.int16)
    predictions = np.where(rng.random(len(exam)) < 0.5, exam.questions.answers, drawn).astype(np.int16)
    return predictions, [exam.vocabulary.answer_words[p] for p in predictions]


def test_every_number_of_the_report_is_what_counting_by_hand_gives() -> None:
    exam, records = small_exam(), small_records()
    predictions, given = given_answers(exam)
    report = score(exam, predictions, seed=4)
    right = [g == r["answer"] for g, r in zip(given, records, strict=True)]

    def by(key) -> dict:
        total, correct = Counter(), Counter()
        for ok, record in zip(right, records, strict=True):
            total[key(record)] += 1
            correct[key(record)] += ok
        return {name: (total[name], correct[name]) for name in total}

    def found(scores) -> dict:
        return {name: (s.n, s.correct) for name, s in scores.items()}

    assert report.accuracy == sum(right) / 60
    assert report.n == 60
    assert report.seed == 4
    assert report.scenes == len({r["image_index"] for r in records})
    assert found(report.types) == by(lambda r: r["program"][-1]["function"])
    assert found(report.kinds) == by(lambda r: KIND[r["program"][-1]["function"]])
    assert found(report.families) == by(lambda r: r["question_family_index"])
    assert found(report.question_lengths) == by(lambda r: len(r["question"].split()))
    assert found(report.program_lengths) == by(lambda r: len(r["program"]))
    table = Counter((r["answer"], g) for r, g in zip(records, given, strict=True))
    assert {(t, g): n for t, row in report.confusion.items() for g, n in row.items()} == table
    assert 0 < report.low < report.accuracy < report.high < 1


def test_count_errors_are_measured_in_steps_of_one() -> None:
    exam, records = small_exam(), small_records()
    counting = [i for i, r in enumerate(records) if r["program"][-1]["function"] == "count"]
    words = exam.vocabulary.answers
    predictions = exam.questions.answers.copy()
    for place, answer in enumerate(("3", "3", "yes", "0")):
        predictions[counting[place]] = words[answer]
    errors = score(exam, predictions).count_errors
    differences, strange = Counter(), 0
    for i in counting:
        given = exam.vocabulary.answer_words[predictions[i]]
        if given.isdigit():
            differences[int(given) - int(records[i]["answer"])] += 1
        else:
            strange += 1
    assert errors.differences == differences
    assert errors.no_number == strange == 1
    assert errors.n == len(counting)
    wrong = strange + sum(n for d, n in differences.items() if d)
    assert errors.wrong == wrong
    assert errors.off_by_one == (differences[1] + differences[-1]) / wrong
    assert math.isnan(score(exam, exam.questions.answers).count_errors.off_by_one)


def test_an_answer_outside_the_vocabulary_counts_as_wrong() -> None:
    exam = small_exam()
    answers = exam.questions.answers.copy()
    answers[:15] = NO_ANSWER
    partly = replace(exam, questions=replace(exam.questions, answers=answers))
    assert score(partly, exam.questions.answers).accuracy == 45 / 60


def test_a_split_without_answers_is_refused() -> None:
    exam = small_exam()
    none = replace(exam.questions, answers=np.full(60, NO_ANSWER, np.int16))
    with pytest.raises(ValueError, match="Test splits have none"):
        score(replace(exam, questions=none), exam.questions.answers)
    with pytest.raises(ValueError, match="expected 60 predictions"):
        score(exam, exam.questions.answers[:7])
    with pytest.raises(ValueError, match="training questions with answers"):
        most_frequent(none, exam.questions)


def test_a_network_is_reported_beside_a_blind_one_and_the_usual_answer(tmp_path) -> None:
    exam = small_exam()
    network, blind = small_network(0), small_network(1)
    report = evaluate(network, exam, blind=blind, train=exam.questions, seed=2)
    assert report.accuracy == (predict(network, exam) == exam.questions.answers).mean()
    assert report.blind is not None
    assert report.mode is not None
    assert report.blind.accuracy == (predict(blind, exam) == exam.questions.answers).mean()
    by_hand = 0
    for kind in set(exam.questions.types.tolist()):
        rows = exam.questions.types == kind
        by_hand += Counter(exam.questions.answers[rows].tolist()).most_common(1)[0][1]
    assert report.mode.accuracy == by_hand / 60
    report.save(tmp_path / "report.json")
    stored = json.loads((tmp_path / "report.json").read_text())
    assert {"accuracy", "by_kind", "n", "seed"} <= set(stored)
    assert stored["by_kind"]["count"] == report.kinds["count"].accuracy
    assert stored["blind"]["accuracy"] == report.blind.accuracy
    assert json.loads(json.dumps(report.to_json(), allow_nan=False)) == stored


def test_a_type_that_training_lacks_gets_the_most_frequent_answer_of_all() -> None:
    questions = small_exam().questions
    usual = Counter(questions.answers[questions.types != 3].tolist()).most_common()
    found = most_frequent(questions.select(questions.types != 3), questions)
    best = {answer for answer, n in usual if n == usual[0][1]}
    assert set(found[questions.types == 3].tolist()) <= best


def test_wilsons_interval_solves_its_equation() -> None:
    for correct, n in ((0, 5), (3, 11), (97, 100), (7, 7)):
        for bound in wilson(correct, n):
            if 0 < bound < 1:
                assert abs(correct / n - bound) == pytest.approx(
                    1.959964 * math.sqrt(bound * (1 - bound) / n)
                )
    assert wilson(0, 0) == (0.0, 1.0)
    assert Score.of(np.array([True, False, True])).accuracy == 2 / 3


def test_resampling_scenes_is_wider_when_a_scenes_questions_fail_together() -> None:
    scene = np.repeat(np.arange(50), 10)
    together = np.repeat(np.arange(50) % 2 == 0, 10)
    mixed = np.tile([True, False], 250)
    _, low, high = resampled_interval(together, scene, seed=0)
    _, narrow_low, narrow_high = resampled_interval(mixed, scene, seed=0)
    assert (narrow_low, narrow_high) == (0.5, 0.5)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 50), rel=0.2)
    assert resampled_interval(together, scene, seed=0) == (50, low, high)
