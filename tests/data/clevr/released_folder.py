"""A hand-written folder in the released format: three scenes, six questions, images of 480x320."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SCENE, UNIQUE = {"function": "scene", "inputs": [], "value_inputs": []}, "unique"


def node(function: str, inputs: list[int], *values: str) -> dict:
    return {"function": function, "inputs": inputs, "value_inputs": list(values)}


COUNT_RED = [SCENE, node("filter_color", [0], "red"), node("count", [1])]
QUERY_SHAPE = [SCENE, node("filter_size", [0], "large"), node("unique", [1]), node("query_shape", [2])]
FEWER = [
    SCENE,
    node("filter_shape", [0], "cube"),
    node("count", [1]),
    SCENE,
    node("filter_color", [3], "cyan"),
    node("count", [4]),
    node("less_than", [2, 5]),
]

QUESTIONS = [
    ("How many red things are there?", "2", COUNT_RED, 0, 84),
    ("What shape is the large  thing?", "cube", QUERY_SHAPE, 0, 89),
    ("Are there fewer cubes than cyan things?", "yes", FEWER, 1, 1),
    ("There is a red thing; what number of things are red?", "0", COUNT_RED, 1, 84),
    ("What is the shape of the large thing, please?", "sphere", QUERY_SHAPE, 2, 89),
    ("how many red things are there?", "1", COUNT_RED, 2, 84),
]


def records(split: str, prefix: str = "CLEVR") -> list[dict]:
    return [
        {
            "split": split,
            "image_index": image,
            "image_filename": f"{prefix}_{split}_{image:06d}.png",
            "question": text,
            "answer": answer,
            "program": [dict(n) for n in program],
            "question_family_index": family,
            "question_index": number,
        }
        for number, (text, answer, program, image, family) in enumerate(QUESTIONS)
    ]


def write_questions(path: Path, questions: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"info": {"split": "x", "version": "1.0"}, "questions": questions}))


def write_folder(root: Path, splits: tuple[str, ...] = ("train",), key: str = "relationships") -> Path:
    pixels = np.random.default_rng(3).integers(0, 256, (3, 320, 480, 4), dtype=np.uint8)
    for split in splits:
        write_questions(root / "questions" / f"CLEVR_{split}_questions.json", records(split))
        scenes = [
            {"image_index": i, "objects": [{"color": "red"}] * i, key: {"left": [[]] * i}, "split": split}
            for i in range(3)
        ]
        (root / "scenes").mkdir(exist_ok=True)
        (root / "scenes" / f"CLEVR_{split}_scenes.json").write_text(
            json.dumps({"scenes": scenes, "info": {}})
        )
        (root / "images" / split).mkdir(parents=True)
        for i in range(3):
            mode = pixels[i] if i else pixels[i, :, :, :3]
            Image.fromarray(mode).save(root / "images" / split / f"CLEVR_{split}_{i:06d}.png")
    return root
