"""Tasks and ways: around what has to be avoided, no longer than needed, and in the way or not."""

import itertools
import math

import numpy as np
import pytest

from torchfilm.data.table.episodes import sample_episode
from torchfilm.data.table.route import ahead, clear, clearance_of, length_of, route
from torchfilm.data.table.scenes import Scene, Thing, sample_scene
from torchfilm.data.table.tasks import Task, in_the_way, tasks_of


def sampled(path, count: int = 400) -> np.ndarray:
    """Points along a path, evenly within each stretch."""
    shares = np.linspace(0, 1, count)[:, None]
    return np.concatenate([np.array(a) + shares * (np.array(b) - a) for a, b in itertools.pairwise(path)])


def test_a_way_stays_out_of_all_circles():
    rng = np.random.default_rng(0)
    for _ in range(30):
        circles = [(tuple(rng.uniform((-0.3, 0.25), (0.3, 0.55))), rng.uniform(0.03, 0.08)) for _ in range(4)]
        start, end = (-0.35, 0.2), (0.35, 0.6)
        path = route(start, end, circles)
        assert (path[0], path[-1]) == (start, end)
        for centre, radius in circles:
            assert np.linalg.norm(sampled(path) - centre, axis=1).min() >= radius - 1e-6


def test_a_way_around_one_circle_is_nearly_the_shortest():
    circle = ((0.0, 0.4), 0.1)
    path = route((-0.3, 0.4), (0.3, 0.4), [circle])
    tangent = math.sqrt(0.3**2 - 0.1**2)
    shortest = 2 * tangent + 0.1 * (math.pi - 2 * math.acos(0.1 / 0.3))
    assert shortest <= length_of(path) <= 1.02 * shortest
    assert clearance_of(path, circle) >= 0
    assert not clear((-0.3, 0.4), (0.3, 0.4), [circle])


def test_a_free_way_is_straight_and_a_hopeless_one_too():
    assert route((0, 0.2), (0, 0.6), [((0.3, 0.4), 0.05)]) == [(0, 0.2), (0, 0.6)]
    wall = [((x / 20, 0.4), 0.06) for x in range(-10, 11)]
    assert len(route((0, 0.2), (0, 0.6), wall)) >= 2


def test_a_circle_around_an_end_is_shrunk():
    path = route((0.0, 0.4), (0.3, 0.4), [((0.02, 0.4), 0.08)])
    assert (path[0], path[-1]) == ((0.0, 0.4), (0.3, 0.4))
    assert clearance_of(path, ((0.02, 0.4), 0.015)) >= 0


def test_ahead_walks_along_the_path_and_knows_what_is_left():
    path = [(0.0, 0.0), (0.3, 0.0), (0.3, 0.4)]
    point, left = ahead(path, (0.1, 0.02), 0.0)
    assert (point, left) == (pytest.approx((0.1, 0.0)), pytest.approx(0.6))
    assert ahead(path, (0.1, 0.0), 0.3)[0] == pytest.approx((0.3, 0.1))
    assert ahead(path, (0.3, 0.35), 0.3)[0] == (0.3, 0.4)


def test_the_obstacle_is_in_the_way_where_a_straight_line_says_so():
    thing = Thing("red", "cube", "small", 0.0, 0.5)
    inside = Scene((thing,), (0.25, 0.4), (0.0, 0.33), ((0.0, 0.15),))
    beside = Scene((thing,), (0.25, 0.4), (0.08, 0.33), ((0.0, 0.15),))
    assert in_the_way(inside, Task(0))
    assert not in_the_way(beside, Task(0))
    assert in_the_way(inside, Task(0, how="avoid"))  # a property of the scene, not of the manner
    pushed = Scene((thing,), (0.0, 0.28), (0.01, 0.38), ((-0.4, 0.45),))
    assert in_the_way(pushed, Task(0, "push", "plain", "goal"))
    assert not in_the_way(pushed, Task(0, "push", "plain", "far"))


def test_episodes_are_blocked_where_asked_and_say_what_was_asked():
    rng = np.random.default_rng(0)
    for blocked in (True, False):
        for what in ("reach", "push"):
            for _ in range(5):
                episode = sample_episode(rng, what=what, how="save", blocked=blocked)
                assert in_the_way(episode.scene, episode.tasks[0]) == blocked
                assert (episode.tasks[0].what, episode.tasks[0].how) == (what, "save")
    assert {sample_episode(rng, by=("colour", "shape")).told[0].by for _ in range(20)} == {"colour", "shape"}
    with pytest.raises(ValueError, match="expected options that scenes can meet, got blocked=None, by="):
        sample_episode(rng, by=("smell",))
    pair = sample_episode(rng, arms=2)
    assert pair.tasks[0].which != pair.tasks[1].which
    with pytest.raises(ValueError, match="num_things: expected one for each of 2 arms at least, got 1"):
        sample_episode(rng, num_things=1, arms=2)


def test_the_obstacle_does_not_tell_which_thing_is_meant():
    rng = np.random.default_rng(1)
    drawn = [sample_episode(rng, what="reach") for _ in range(400)]
    blocked = [e for e in drawn if any(in_the_way(e.scene, Task(i)) for i in range(3))]
    told = np.mean([in_the_way(e.scene, e.tasks[0]) for e in blocked])
    share = np.mean([np.mean([in_the_way(e.scene, Task(i)) for i in range(3)]) for e in blocked])
    assert abs(told - share) < 0.08


def test_tasks_that_make_no_sense_are_refused():
    for options, pattern in (
        ({"what": "eat"}, "task: expected reach or push"),
        ({"how": "fast"}, "task: expected reach or push, and one of plain, avoid, save, both"),
        ({"what": "push"}, "task: expected a place to push to"),
        ({"place": "goal"}, "task: expected a place to push to"),
        ({"what": "push", "place": "moon"}, "task: expected a place to push to"),
    ):
        with pytest.raises(ValueError, match=pattern):
            Task(0, **options)
    task = Task(2, "push", "both", "far")
    assert Task(**task.to_dict()) == task
    scene = sample_scene(np.random.default_rng(0))
    assert all(task.avoids == (task.how in ("avoid", "both")) for task in tasks_of(scene))
