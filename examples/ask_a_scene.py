"""Render a scene, ask it questions, and compare the network's answers with the true ones.

Without a trained network (a path, or the one that the package ships) an untrained one guesses.

    python examples/ask_a_scene.py [RUN]
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

from torchfilm.data.clevr.questions import QuestionConfig, QuestionGenerator
from torchfilm.data.clevr.render import render
from torchfilm.data.clevr.scenes import SceneConfig, sample_scene
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning import RECIPES, SHIPPED, VisualReasoner, build
from torchfilm.systems.visual_reasoning.answering import Answerer
from torchfilm.systems.visual_reasoning.perception import Perception, PerceptionConfig


def answerer(run: Path | None, vocabulary: Vocabulary) -> Answerer:
    if run is not None or (SHIPPED / "weights.safetensors").is_file():
        return Answerer.load(run)
    print("No trained network here: these answers are guesses.")
    words, answers = len(vocabulary.questions), len(vocabulary.answers)
    network = build(replace(RECIPES["tiny"].config, vocabulary=words, answers=answers))
    assert isinstance(network, VisualReasoner)
    return Answerer(network, vocabulary, Perception(PerceptionConfig()))


def main() -> None:
    rng = np.random.default_rng(3)
    scene, view = sample_scene(rng, SceneConfig(max_objects=6))
    scene |= {"split": "new", "image_index": 0, "image_filename": "CLEVR_new_000000.png"}
    questions = QuestionGenerator(QuestionConfig(questions_per_scene=8)).generate([scene], rng)
    picture = render(scene, view, width=96, height=64).image
    ready = answerer(Path(sys.argv[1]) if sys.argv[1:] else None, Vocabulary.build(questions))
    seen = ready.see(picture)  # the picture is looked at once for all questions
    for question in questions:
        found = ready.answer(seen, question["question"])
        verdict = "right" if found.answer == question["answer"] else f"wrong, it is {question['answer']}"
        print(f"{question['question']}\n  {found.answer} ({found.probability:.0%}): {verdict}")


if __name__ == "__main__":
    main()
