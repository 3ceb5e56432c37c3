import csv
from dataclasses import replace

import numpy as np
from PIL import Image
from small_exam import small_exam

from torchfilm.systems.visual_reasoning.evaluate import score
from torchfilm.systems.visual_reasoning.report_figures import write_report


def test_a_report_is_written_with_its_figures_and_numbers(tmp_path) -> None:
    exam = small_exam()
    predictions = np.roll(exam.questions.answers, 3)
    report = score(exam, predictions)
    files = write_report(report, tmp_path / "eval")
    names = {path.name for path in files}
    figures = {"confusion.png", "count_errors.png", "by_words.png", "by_functions.png"}
    assert names == {"report.json", "scores.csv"} | figures == {p.name for p in (tmp_path / "eval").iterdir()}
    for name in figures:
        with Image.open(tmp_path / "eval" / name) as image:
            assert min(image.size) > 200
    with (tmp_path / "eval" / "scores.csv").open() as stream:
        rows = [r for r in csv.DictReader(stream) if r["group"] == "type"]
    assert {r["name"]: float(r["accuracy"]) for r in rows} == {n: s.accuracy for n, s in report.types.items()}


def test_questions_without_programs_have_no_figures_by_program(tmp_path) -> None:
    exam = small_exam()
    bare = replace(
        exam.questions,
        types=np.full(60, -1, np.int8),
        families=np.full(60, -1, np.int16),
        program_lengths=np.zeros(60, np.int16),
    )
    report = score(replace(exam, questions=bare), exam.questions.answers)
    assert report.kinds == {}
    names = {path.name for path in write_report(report, tmp_path)}
    assert names == {"report.json", "scores.csv", "confusion.png", "by_words.png"}
