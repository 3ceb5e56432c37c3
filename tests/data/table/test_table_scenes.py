"""Scenes: everything in its place, nothing alike, and told the same to the bit by seed and by JSON."""

import json
import math

import numpy as np
import pytest

from torchfilm.data.table import scenes
from torchfilm.data.table.scenes import PLACES, Scene, place_of, sample_scene, turned


def drawn(count: int, **options) -> list[Scene]:
    rng = np.random.default_rng(7)
    return [sample_scene(rng, **options) for _ in range(count)]


@pytest.mark.parametrize(("num_things", "arms"), [(1, 1), (3, 1), (4, 1), (2, 2), (4, 2)])
def test_nothing_overlaps_and_a_finger_passes_between(num_things, arms):
    for scene in drawn(40, num_things=num_things, arms=arms):
        assert len(scene.things) == num_things
        assert len(scene.starts) == arms
        assert len({(t.colour, t.shape, t.size) for t in scene.things}) == num_things
        round_things = [(t.x, t.y, t.radius) for t in scene.things]
        round_things.append((*scene.obstacle, scenes.OBSTACLE_RADIUS))
        for i, (x, y, radius) in enumerate(round_things):
            for u, v, other in round_things[:i]:
                assert math.hypot(x - u, y - v) - radius - other > 2 * scenes.FINGER_RADIUS
        for thing in scene.things:
            assert math.dist((thing.x, thing.y), scene.goal) > scenes.GOAL_RADIUS + thing.radius


def test_a_seed_gives_the_same_scenes_and_another_seed_others():
    first, again = (sample_scene(np.random.default_rng(3)) for _ in range(2))
    assert first == again
    assert first != sample_scene(np.random.default_rng(4))


def test_a_scene_survives_json_to_the_bit():
    for scene in drawn(20, arms=2):
        assert Scene.from_dict(json.loads(json.dumps(scene.to_dict()))) == scene


def test_half_a_turn_twice_is_no_turn():
    for scene in drawn(5, arms=2):
        back = scene.seen_by(1).seen_by(1)
        assert np.allclose([t.x for t in back.things], [t.x for t in scene.things], atol=1e-15)
        assert np.allclose(back.obstacle, scene.obstacle, atol=1e-15)
    assert turned((0.1, 0.2)) == (-0.1, pytest.approx(0.6))


def test_the_obstacle_stands_between_the_finger_and_a_thing_as_often_as_told():
    def between(scene: Scene, within: float) -> bool:
        start = np.array(scene.starts[0])
        for thing in scene.things:
            way, post = np.array((thing.x, thing.y)) - start, np.array(scene.obstacle) - start
            share = way @ post / (way @ way)
            if 0 < share < 1 and np.linalg.norm(post - share * way) < within:
                return True
        return False

    blocked = drawn(60, in_the_way=1.0)
    assert all(between(scene, within=0.046) for scene in blocked)
    assert np.mean([between(scene, within=0.01) for scene in blocked]) < 0.2  # seldom in the middle
    assert np.mean([between(scene, within=0.046) for scene in drawn(200, in_the_way=0.0)]) < 0.6


def test_numbers_out_of_range_are_named():
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="num_things: expected 1 to 4, got 5"):
        sample_scene(rng, num_things=5)
    with pytest.raises(ValueError, match="arms: expected 1 to 2, got 3"):
        sample_scene(rng, arms=3)
    with pytest.raises(ValueError, match=r"in_the_way: expected a chance in \[0, 1\], got 1.5"):
        sample_scene(rng, in_the_way=1.5)
    with pytest.raises(ValueError, match="scene: expected things, goal, obstacle and starts"):
        Scene.from_dict({"things": []})


def test_places_are_told_by_name():
    scene = drawn(1)[0]
    assert place_of(scene, "goal") == scene.goal
    assert place_of(scene, "left") == PLACES["left"]
    with pytest.raises(ValueError, match="place: expected goal, left, right, far, got 'moon'"):
        place_of(scene, "moon")
