"""Does our executor agree with CLEVR's public question generator, on its questions and on ours?

The public generator (facebookresearch/clevr-dataset-gen, BSD) is not part of this project: clone it, let it
ask about scenes of ours, then compare; G is the generator's folder `question_generation`:

    torchfilm data clevr DATA --split train --scenes 8 --seed 1
    cd G; python generate_questions.py --templates_per_image 30 \
        --input_scene_file SCENES --output_questions_file PUBLIC
    python benchmarks/clevr_executor_agreement.py SCENES PUBLIC G
"""

import datetime
import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from measuring import RESULTS, commit, parser_of, scenes
from torchfilm.data.clevr.executor import answer_text, execute
from torchfilm.data.clevr.questions import QuestionConfig, QuestionGenerator


def on_their_questions(about: list[dict[str, Any]], questions: list[dict[str, Any]]) -> dict[str, int]:
    """Our executor on the public generator's programs and its raw answers."""
    by_file = {scene["image_filename"]: scene for scene in about}
    wrong = sum(
        execute(q["program"], by_file[q["image_filename"]]) != answer_text(q["answer"]) for q in questions
    )
    families = {(q["template_filename"], q["question_family_index"]) for q in questions}
    asked = {q["image_filename"] for q in questions}
    return {
        "scenes": len(asked),
        "questions": len(questions),
        "families": len(families),
        "disagreements": wrong,
    }


def on_our_questions(engine: Any, metadata: dict[str, Any], number: int, seed: int) -> dict[str, int]:
    """The public engine on our programs, for fresh scenes of three to ten objects."""
    rng = np.random.default_rng(seed)
    made = scenes("full", number, rng)
    questions = QuestionGenerator(QuestionConfig(questions_per_scene=40)).generate(made, rng)
    wrong = 0
    for question in questions:
        nodes = [
            {"type": n["function"], "inputs": n["inputs"], "side_inputs": n["value_inputs"]}
            for n in question["program"]
        ]
        answer = engine.answer_question(
            {"nodes": nodes}, metadata, made[question["image_index"]], cache_outputs=False
        )
        wrong += answer_text(answer) != question["answer"]
    families = {question["question_family_index"] for question in questions}
    return {"scenes": number, "questions": len(questions), "families": len(families), "disagreements": wrong}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("scenes", type=Path, help="a scenes file of ours")
    parser.add_argument("public", type=Path, help="what the public generator asked about these scenes")
    parser.add_argument("generator", type=Path, help="the public generator's question_generation folder")
    parser.add_argument("--fresh-scenes", type=int, default=250)
    parser.add_argument("--seed", type=int, default=41)
    given = parser.parse_args()
    spec = importlib.util.spec_from_file_location("question_engine", given.generator / "question_engine.py")
    assert spec is not None
    assert spec.loader is not None
    engine = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(engine)
    metadata = json.loads((given.generator / "metadata.json").read_text())
    asked_about = json.loads(given.scenes.read_text())["scenes"]
    result = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "command": "python benchmarks/clevr_executor_agreement.py SCENES PUBLIC GENERATOR"
        f" --fresh-scenes {given.fresh_scenes} --seed {given.seed}",
        "python": sys.version.split()[0],
        "our_executor_on_the_public_generators_questions": on_their_questions(
            asked_about, json.loads(given.public.read_text())["questions"]
        ),
        "the_public_engine_on_our_questions": on_our_questions(
            engine, metadata, given.fresh_scenes, given.seed
        ),
    }
    text = json.dumps(result, indent=2) + "\n"
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "clevr_executor_agreement.json").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
