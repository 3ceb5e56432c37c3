"""How many images and how many questions a second does one core generate?

Images: drawing the scene (3 to 6 objects; 3 to 10 at 480x320) and rendering it, apart. Questions: a shard of
scenes as `torchfilm data clevr` has it, forty questions each for the laptop recipe, ten for the full one.

    python benchmarks/generation_speed.py
"""

import statistics
import time

import numpy as np
import torch

from measuring import parser_of, save, scenes
from torchfilm.data.clevr.generate import RECIPES
from torchfilm.data.clevr.questions import QuestionConfig, QuestionGenerator
from torchfilm.data.clevr.render import render
from torchfilm.data.clevr.scenes import SceneConfig, sample_scene

SIZES = {(64, 64): "laptop", (96, 64): "laptop", (96, 96): "laptop", (480, 320): "full"}


def images(number: int, seed: int) -> dict[str, dict[str, float]]:
    """Median CPU milliseconds a scene, size by size in turn; the same scenes for sizes of one recipe."""
    drawing: dict[str, list[float]] = {"laptop": [], "full": []}
    rendering: dict[tuple[int, int], list[float]] = {size: [] for size in SIZES}
    rng = np.random.default_rng(seed)
    for _ in range(number):
        made = {}
        for recipe, times in drawing.items():
            start = time.process_time()
            made[recipe] = sample_scene(rng, SceneConfig(max_objects=RECIPES[recipe].max_objects))
            times.append(time.process_time() - start)
        for (width, height), recipe in SIZES.items():
            scene, view = made[recipe]
            start = time.process_time()
            render(scene, view, width, height)
            rendering[width, height].append(time.process_time() - start)
    found = {}
    for (width, height), recipe in SIZES.items():
        draw, cast = (1000 * statistics.median(t) for t in (drawing[recipe], rendering[width, height]))
        found[f"{width}x{height}"] = {
            "objects": f"3 to {RECIPES[recipe].max_objects}",
            "scene_ms": draw,
            "render_ms": cast,
            "images_per_second": 1000 / (draw + cast),
        }
    return found


def asked(number_of_scenes: int, rounds: int) -> dict[str, dict[str, float]]:
    """Questions per CPU second: median, and the slowest and fastest round."""
    rates: dict[str, list[float]] = {"laptop": [], "full": []}
    for seed in range(rounds):
        for recipe, found in rates.items():
            made = scenes(recipe, number_of_scenes, np.random.default_rng(seed))
            config = QuestionConfig(questions_per_scene=RECIPES[recipe].questions_per_scene)
            start = time.process_time()
            questions = QuestionGenerator(config).generate(made, np.random.default_rng(seed))
            found.append(len(questions) / (time.process_time() - start))
    return {
        recipe: {"median": statistics.median(found), "slowest": min(found), "fastest": max(found)}
        for recipe, found in rates.items()
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--images", type=int, default=40)
    parser.add_argument("--scenes", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=7)
    given = parser.parse_args()
    torch.set_num_threads(1)
    images(2, seed=0)
    save(
        "generation_speed",
        {
            "images": given.images,
            "by_size": images(given.images, seed=1),
            "scenes": given.scenes,
            "questions_per_second": asked(given.scenes, given.rounds),
        },
    )


if __name__ == "__main__":
    main()
