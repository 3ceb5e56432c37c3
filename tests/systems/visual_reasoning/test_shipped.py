"""The checkpoint in the package: small enough, complete, and right about scenes that nobody has seen."""

from pathlib import Path

import pytest

from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.data.clevr.generate import generate_dataset
from torchfilm.systems.visual_reasoning import SHIPPED
from torchfilm.systems.visual_reasoning.answering import Answerer
from torchfilm.systems.visual_reasoning.bundle import load_blind, load_bundle
from torchfilm.systems.visual_reasoning.evaluate import Report, evaluate
from torchfilm.systems.visual_reasoning.exam import predict
from torchfilm.systems.visual_reasoning.running import Material

MOST_BYTES = 8_000_000


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("clevr")
    generate_dataset(out, "fresh", 40, seed=20_261_121, workers=1, questions_per_scene=15)
    return out


@pytest.fixture(scope="module")
def report(folder: Path) -> Report:
    bundle = load_bundle()
    material = Material(ClevrFolder(folder), bundle.vocabulary, bundle.sight)
    blind = load_blind(None, None, bundle.vocabulary)
    return evaluate(bundle.network, material.exam(bundle.network.config, "fresh"), blind=blind)


def test_the_checkpoint_is_small():
    assert sum(path.stat().st_size for path in SHIPPED.rglob("*") if path.is_file()) <= MOST_BYTES


def test_it_answers_questions_about_fresh_scenes_and_the_blind_network_does_not(report: Report):
    found = report.to_json()
    assert found["n"] == 600
    assert found["accuracy"] > 0.92
    assert found["blind"]["accuracy"] < 0.5


def test_one_question_is_answered_as_the_exam_answers_it(folder: Path):
    answerer, data = Answerer.load(), ClevrFolder(folder)
    bundle = load_bundle()
    exam = Material(data, bundle.vocabulary, bundle.sight).exam(bundle.network.config, "fresh")
    words, files = bundle.vocabulary.answer_words, data.image_files("fresh")
    expected = [words[number] for number in predict(bundle.network, exam)[:30]]
    questions = [question for question, _ in zip(data.questions("fresh"), range(30), strict=False)]
    given = [answerer.answer(files[one["image_index"]], one["question"]).answer for one in questions]
    assert given == expected
    assert len(set(given)) > 5
