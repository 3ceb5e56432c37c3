"""Scenes keep CLEVR's constraints; geometry is checked against a released scene and plain linear algebra."""

import itertools
import json
import math

import numpy as np
import pytest

from torchfilm.data.clevr.camera import Camera, View
from torchfilm.data.clevr.render import render
from torchfilm.data.clevr.scenes import CAMERA, COLORS, SceneConfig, relationships, sample_scene

OPPOSITE = {"left": "right", "right": "left", "front": "behind", "behind": "front"}
# Facts of the released scene CLEVR_val_000000 (CC-BY 4.0, Johnson et al.).
RELEASED_POINTS = [
    [-1.4937210083007812, -1.9936031103134155, 0.699999988079071],
    [1.555708646774292, -2.104736566543579, 0.699999988079071],
    [-2.342184543609619, -0.5205014944076538, 0.3499999940395355],
    [-0.8073106408119202, 1.914123773574829, 0.699999988079071],
    [2.6763813495635986, 0.03453871235251427, 0.3499999940395355],
]
RELEASED_RIGHT, RELEASED_FRONT = (
    (0.6563112735748291, 0.7544902563095093),
    (0.754490315914154, -0.6563112735748291),
)
RELEASED_RELATIONS = {
    "right": [[1, 2, 3, 4], [3, 4], [1, 3, 4], [4], []],
    "behind": [[2, 3], [0, 2, 3, 4], [3], [], [0, 2, 3]],
    "front": [[1, 4], [], [0, 1, 4], [0, 1, 2, 4], [1]],
    "left": [[], [0, 2], [0], [0, 1, 2], [0, 1, 2, 3]],
}


def scenes(count: int, seed: int = 0, **config) -> list:
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, SceneConfig(**config)) for _ in range(count)]


def projected(view: View, point: list[float]) -> tuple[float, float, float]:
    """Pixel and depth in the 480x320 frame by a look-at matrix and an intrinsic matrix: the textbook way."""
    eye = np.array(view.camera)
    back = eye / np.linalg.norm(eye)
    side = np.cross([0, 0, 1], back)
    side /= np.linalg.norm(side)
    to_camera = np.stack([side, np.cross(back, side), back])
    x, y, z = to_camera @ (np.array(point) - eye)
    intrinsic = np.array([[480 * 35 / 32, 0, 240], [0, 480 * 35 / 32, 160], [0, 0, 1]])
    u, v, w = intrinsic @ np.array([x, -y, -z])
    return u / w, v / w, w


def test_relationships_are_those_of_the_released_scene():
    directions = {}
    for name, vector in (("right", RELEASED_RIGHT), ("front", RELEASED_FRONT)):
        directions[name] = [*vector, 0.0]
        directions[OPPOSITE[name]] = [-vector[0], -vector[1], 0.0]
    scene = {"directions": directions, "objects": [{"3d_coords": point} for point in RELEASED_POINTS]}
    assert relationships(scene) == RELEASED_RELATIONS


def test_the_unjittered_camera_has_the_released_directions():
    directions = Camera(CAMERA, 480, 320).directions()
    assert directions["right"] == pytest.approx([*RELEASED_RIGHT, 0], abs=1e-6)
    assert directions["front"] == pytest.approx([*RELEASED_FRONT, 0], abs=1e-6)


def test_directions_are_opposite_unit_vectors_on_the_ground():
    for scene, _ in scenes(5):
        directions = scene["directions"]
        assert set(directions) == {"left", "right", "front", "behind", "above", "below"}
        assert np.dot(directions["left"], directions["front"]) == pytest.approx(0, abs=1e-12)
        for a, b in (("left", "right"), ("front", "behind"), ("above", "below")):
            np.testing.assert_array_equal(np.negative(directions[a]), directions[b])
            assert math.hypot(*directions[a]) == pytest.approx(1)


def test_a_relation_and_its_opposite_hold_of_swapped_objects():
    for scene, _ in scenes(20):
        for name, there in scene["relationships"].items():
            back = scene["relationships"][OPPOSITE[name]]
            assert all(i in back[j] for i, others in enumerate(there) for j in others)


def test_the_margin_decides_every_pair_along_both_axes():
    for scene, _ in scenes(20):
        related = scene["relationships"]
        for i, j in itertools.permutations(range(len(scene["objects"])), 2):
            assert (j in related["left"][i]) != (j in related["right"][i])
            assert (j in related["front"][i]) != (j in related["behind"][i])


def test_objects_keep_margin_and_distance():
    for scene, _ in scenes(20, margin=0.5, min_distance=0.3, max_objects=6):
        for a, b in itertools.combinations(scene["objects"], 2):
            apart = np.subtract(a["3d_coords"], b["3d_coords"])[:2]
            reach = sum(0.7 if item["size"] == "large" else 0.35 for item in (a, b))
            assert math.hypot(*apart) >= reach + 0.3 - 1e-9
            for name in ("left", "front"):
                assert abs(apart @ np.array(scene["directions"][name])[:2]) >= 0.5 - 1e-9


def test_objects_stand_on_the_ground_within_reach():
    height = {"cube": 1 / math.sqrt(2), "sphere": 1, "cylinder": 1}
    for scene, _ in scenes(20):
        for item in scene["objects"]:
            x, y, z = item["3d_coords"]
            assert max(abs(x), abs(y)) <= 3
            assert z == pytest.approx((0.7 if item["size"] == "large" else 0.35) * height[item["shape"]])
            assert 0 <= item["rotation"] < 360


def test_every_object_is_visible():
    for scene, view in scenes(8, min_objects=10):
        seen = np.bincount(render(scene, view, 240, 160, samples=1).mask.ravel())[1:]
        assert len(seen) == len(scene["objects"])
        assert seen.min() >= 0.75 * 240 * 160 * 200 / (320 * 240)  # the sampler counts on a coarser grid


def test_pixel_coords_are_the_projected_centres():
    for scene, view in scenes(10):
        for item in scene["objects"]:
            column, row, depth = projected(view, item["3d_coords"])
            assert item["pixel_coords"][:2] == pytest.approx([column, row], abs=0.5 + 1e-9)
            assert item["pixel_coords"][2] == pytest.approx(depth)


@pytest.mark.parametrize("condition", ["A", "B"])
def test_cogent_conditions_split_colours_by_shape(condition):
    first, second = {"gray", "blue", "brown", "yellow"}, {"red", "green", "purple", "cyan"}
    cubes, cylinders = (first, second) if condition == "A" else (second, first)
    found: dict[str, set] = {"cube": set(), "cylinder": set(), "sphere": set()}
    for scene, _ in scenes(60, condition=condition):
        for item in scene["objects"]:
            found[item["shape"]].add(item["color"])
    assert found == {"cube": cubes, "cylinder": cylinders, "sphere": set(COLORS)}


def test_counts_are_uniform_and_attributes_all_occur():
    drawn = [scene for scene, _ in scenes(300, max_objects=5)]
    counts = np.bincount([len(scene["objects"]) for scene in drawn], minlength=6)[3:]
    assert len(counts) == 3
    assert counts.min() > 70  # of 100 expected; 3.7 standard deviations
    items = [item for scene in drawn for item in scene["objects"]]
    for key, number in (("shape", 3), ("size", 2), ("material", 2), ("color", 8)):
        assert len({item[key] for item in items}) == number


def test_a_scene_has_the_released_keys_and_types_and_survives_json():
    scene, view = scenes(1)[0]
    assert set(scene) == {
        *("split", "image_index", "image_filename", "directions", "objects", "relationships"),
    }
    item = scene["objects"][0]
    types = {key: type(value) for key, value in item.items()}
    names = dict.fromkeys(("shape", "size", "material", "color"), str)
    assert types == {**names, "3d_coords": list, "pixel_coords": list, "rotation": float}
    assert [type(value) for value in item["3d_coords"]] == [float] * 3
    assert [type(value) for value in item["pixel_coords"]] == [int, int, float]
    assert json.loads(json.dumps(scene)) == scene
    assert View.from_dict(json.loads(json.dumps(view.to_dict()))) == view


def test_the_same_seed_gives_the_same_scenes():
    assert scenes(3, seed=5) == scenes(3, seed=5)
    assert scenes(3, seed=5) != scenes(3, seed=6)


def test_jitter_moves_camera_and_lights_as_far_as_it_says():
    still = {view for _, view in scenes(3, camera_jitter=0, light_jitter=0)}
    assert len(still) == 1
    moved = np.array([view.camera for _, view in scenes(40)]) - CAMERA
    assert 0.4 < np.abs(moved).max() <= 0.5


def test_impossible_configurations_are_named():
    with pytest.raises(ValueError, match="min_objects=5, max_objects=4"):
        SceneConfig(min_objects=5, max_objects=4)
    with pytest.raises(ValueError, match="got 'C'"):
        SceneConfig(condition="C")  # type: ignore[arg-type]
