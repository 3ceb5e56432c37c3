"""Random scenes under CLEVR's constraints, as the dictionaries that CLEVR's scene files hold.

Objects are placed one by one in [-3, 3]^2: apart by a minimum distance, apart along each cardinal direction
by a margin (so that "left of" is never a matter of opinion), and each visible in the end. Johnson et al.
2017 (arXiv 1612.06890), section 3, image generation.
"""

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .camera import FRAME_HEIGHT, FRAME_WIDTH, Camera, Point, View
from .shapes import RADII, Solid, half_width, visible

SHAPES = ("cube", "sphere", "cylinder")
SIZES = ("large", "small")
MATERIALS = ("rubber", "metal")
COLORS = ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow")
RELATIONS = ("left", "right", "front", "behind")

CAMERA: Point = (
    7.48113,
    -6.50764,
    5.34367,
)  # the released scenes' directions are those of this point, to six digits
LIGHTS: dict[str, Point] = {"key": (0.9, -6.6, 7.4), "fill": (6.6, 2.4, 5.2), "back": (-4.6, 2.6, 6.4)}

_HALF_A, _HALF_B = ("gray", "blue", "brown", "yellow"), ("red", "green", "purple", "cyan")
_COGENT = {  # CLEVR-CoGenT: the colours a shape may have; spheres have all
    "A": {"cube": _HALF_A, "cylinder": _HALF_B, "sphere": COLORS},
    "B": {"cube": _HALF_B, "cylinder": _HALF_A, "sphere": COLORS},
}
_EXTENT = 3.0  # objects' centres lie within this of the origin, on both axes
_RELATION_MARGIN = 0.2  # how far along a direction an object must lie to count as being there
_CHECK_WIDTH, _CHECK_HEIGHT = 120, 80  # the frame on which visible pixels are counted

Scene = dict[str, Any]


@dataclass(frozen=True)
class SceneConfig:
    """Which scenes to draw; the defaults are CLEVR's.

    `margin` and `min_distance` are world units; `min_visible` is the share of the image that each object must
    cover (CLEVR: 200 pixels of 320x240); the jitters are the largest offsets per coordinate; `condition`
    restricts colours by shape as CLEVR-CoGenT's A and B do.
    """

    min_objects: int = 3
    max_objects: int = 10
    condition: Literal["A", "B"] | None = None
    margin: float = 0.4
    min_distance: float = 0.25
    min_visible: float = 200 / (320 * 240)
    camera_jitter: float = 0.5
    light_jitter: float = 1.0

    def __post_init__(self) -> None:
        if not 1 <= self.min_objects <= self.max_objects <= 10:
            raise ValueError(
                "SceneConfig: expected 1 <= min_objects <= max_objects <= 10 (more do not fit the margins), "
                f"got min_objects={self.min_objects}, max_objects={self.max_objects}"
            )
        if self.condition not in (None, "A", "B"):
            raise ValueError(f"SceneConfig: expected condition None, 'A' or 'B', got {self.condition!r}")


def sample_scene(rng: np.random.Generator, config: SceneConfig) -> tuple[Scene, View]:
    """Draw a scene and where its camera and lights stand.

    The scene has the released keys and value types; `split`, `image_index` and `image_filename` are left
    empty for whoever writes it. The number of objects is uniform in the configured range and kept however
    often the placing has to start again.
    """
    view = _sample_view(rng, config)
    camera = Camera(view.camera, FRAME_WIDTH, FRAME_HEIGHT)
    count = int(rng.integers(config.min_objects, config.max_objects + 1))
    small = Camera(view.camera, _CHECK_WIDTH, _CHECK_HEIGHT)
    while True:
        items = _place(rng, config, camera, count)
        if (
            items is not None
            and _smallest_area(items, small) >= config.min_visible * _CHECK_WIDTH * _CHECK_HEIGHT
        ):
            break
    for item in items:
        column, row, depth = camera.project(np.array(item["3d_coords"]))
        item["pixel_coords"] = [round(float(column)), round(float(row)), float(depth)]
    scene: Scene = {
        "split": "",
        "image_index": 0,
        "image_filename": "",
        "directions": camera.directions(),
        "objects": items,
    }
    scene["relationships"] = relationships(scene)
    return scene, view


def relationships(scene: Scene) -> dict[str, list[list[int]]]:
    """Return for each cardinal direction and object i the sorted indices of the objects there, seen from i.

    j is left of i where (p_j - p_i) . left > 0.2, with p the `3d_coords`.
    """
    points = np.array([item["3d_coords"] for item in scene["objects"]]).reshape(-1, 3)
    result = {}
    for name in RELATIONS:
        place = (points * np.array(scene["directions"][name])).sum(-1)
        there = place[None, :] - place[:, None] > _RELATION_MARGIN
        result[name] = [np.flatnonzero(row).tolist() for row in there]
    return result


def _sample_view(rng: np.random.Generator, config: SceneConfig) -> View:
    def jittered(point: Point, reach: float) -> Point:
        x, y, z = (float(v) for v in np.array(point) + rng.uniform(-reach, reach, 3))
        return x, y, z

    lights = {name: jittered(point, config.light_jitter) for name, point in LIGHTS.items()}
    return View(camera=jittered(CAMERA, config.camera_jitter), **lights)


def _place(rng: np.random.Generator, config: SceneConfig, camera: Camera, count: int) -> list[dict] | None:
    """Draw `count` objects, or None when one finds no place in 50 tries."""
    right = camera.right[:2]
    axes = np.array([right, [right[1], -right[0]]])  # rows: right, front
    radii = np.zeros(count)
    spots = np.zeros((count, 2))
    items = []
    for index in range(count):
        size = SIZES[rng.integers(2)]
        spot = _free_spot(rng, config, axes, spots[:index], radii[:index] + RADII[size])
        if spot is None:
            return None
        radii[index], spots[index] = RADII[size], spot
        items.append(_sample_object(rng, config, size, spot))
    return items


def _free_spot(
    rng: np.random.Generator, config: SceneConfig, axes: NDArray, others: NDArray, reach: NDArray
) -> NDArray | None:
    """Return the first of 50 random spots [2] that keeps clear of `others` [n, 2], or None.

    `reach` [n] is the sum of the two radii.
    """
    tries = rng.uniform(-_EXTENT, _EXTENT, (50, 2))
    offset = tries[:, None, :] - others
    apart = (offset**2).sum(-1) >= (reach + config.min_distance) ** 2
    along = np.abs((offset[:, :, None, :] * axes).sum(-1))
    free = (apart & (along >= config.margin).all(-1)).all(-1)
    first = int(free.argmax())
    return tries[first] if free[first] else None


def _sample_object(rng: np.random.Generator, config: SceneConfig, size: str, spot: NDArray) -> dict[str, Any]:
    shape = SHAPES[rng.integers(len(SHAPES))]
    colors = COLORS if config.condition is None else _COGENT[config.condition][shape]
    return {
        "shape": shape,
        "size": size,
        "material": MATERIALS[rng.integers(len(MATERIALS))],
        "color": colors[rng.integers(len(colors))],
        "3d_coords": [float(spot[0]), float(spot[1]), half_width(shape, size)],
        "pixel_coords": [0, 0, 0.0],
        "rotation": float(rng.uniform(0, 360)),
    }


def _smallest_area(items: list[dict], camera: Camera) -> int:
    """Return how many pixels the least visible object covers."""
    owner, _ = visible([Solid.of(item) for item in items], camera)
    return int(np.bincount(owner[owner >= 0], minlength=len(items)).min())
