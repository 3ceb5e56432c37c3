"""Random scenes made apart from the package: objects on a plane, relations with a margin of 0.2."""

import itertools
import math
import random
from typing import Any

SIZES = ("large", "small")
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
MATERIALS = ("metal", "rubber")
SHAPES = ("cube", "cylinder", "sphere")


def make_scene(rnd: random.Random, index: int, fewest: int = 3, most: int = 6) -> dict[str, Any]:
    angle = rnd.uniform(-0.6, 0.6)
    right, behind = (math.cos(angle), math.sin(angle), 0.0), (-math.sin(angle), math.cos(angle), 0.0)
    directions = {
        "right": right,
        "left": tuple(-x for x in right),
        "behind": behind,
        "front": tuple(-x for x in behind),
        "above": (0.0, 0.0, 1.0),
        "below": (0.0, 0.0, -1.0),
    }
    objects = [
        {
            "shape": rnd.choice(SHAPES),
            "size": rnd.choice(SIZES),
            "material": rnd.choice(MATERIALS),
            "color": rnd.choice(COLORS),
            "3d_coords": [rnd.uniform(-3, 3), rnd.uniform(-3, 3), 0.5],
            "pixel_coords": [rnd.randrange(480), rnd.randrange(320), rnd.uniform(7, 13)],
            "rotation": rnd.uniform(0, 360),
        }
        for _ in range(rnd.randint(fewest, most))
    ]
    relationships: dict[str, list[list[int]]] = {
        name: [[] for _ in objects] for name in ("left", "right", "behind", "front")
    }
    for (i, one), (j, two) in itertools.permutations(enumerate(objects), 2):
        for name, near in relationships.items():
            way = sum(
                d * (b - a)
                for d, a, b in zip(directions[name], one["3d_coords"], two["3d_coords"], strict=True)
            )
            if way > 0.2:
                near[i].append(j)
    return {
        "split": "train",
        "image_index": index,
        "image_filename": f"CLEVR_train_{index:06d}.png",
        "directions": {name: list(way) for name, way in directions.items()},
        "objects": objects,
        "relationships": relationships,
    }


def make_scenes(count: int, seed: int, fewest: int = 3, most: int = 6) -> list[dict[str, Any]]:
    rnd = random.Random(seed)
    return [make_scene(rnd, index, fewest, most) for index in range(count)]
