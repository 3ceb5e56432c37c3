"""The judge against plain sums over what a recorded episode did."""

import itertools
import math

import numpy as np
import pytest

pytest.importorskip("mujoco")

from torchfilm.data.table.episodes import Episode, sample_episode
from torchfilm.data.table.playing import Experts, play
from torchfilm.data.table.scenes import FINGER_RADIUS, OBSTACLE_RADIUS, Scene, Thing, sample_scene
from torchfilm.data.table.simulator import Tables
from torchfilm.data.table.tasks import Task
from torchfilm.data.table.trials import HOLD, Trials


def some_episodes(count: int, **options) -> list[Episode]:
    rng = np.random.default_rng(3)
    return [sample_episode(rng, **options) for _ in range(count)]


@pytest.mark.parametrize("what", ["reach", "push"])
def test_energy_clearance_collisions_time_and_path_are_sums_over_what_happened(what):
    for episode in some_episodes(4, what=what, blocked=True):
        trials = Trials([episode.scene], [episode.tasks])
        actor, again = Experts(trials), Tables([episode.scene])
        task, scene = episode.tasks[0], episode.scene
        energy = path = 0.0
        gaps, last = [math.inf], again.fingers[0, 0]
        while len(rows := trials.running):
            targets = actor(trials, rows)
            trace = again.step(targets)
            trials.step(targets, rows)
            energy += trace.work[0, 0]
            for finger, things in zip(trace.fingers[0, :, 0], trace.things[0], strict=True):
                path, last = path + math.dist(last, finger), finger
                gap = math.dist(finger, scene.obstacle) - FINGER_RADIUS - OBSTACLE_RADIUS
                if what == "push":
                    radius = scene.things[task.which].radius
                    gap = min(gap, math.dist(things[task.which], scene.obstacle) - radius - OBSTACLE_RADIUS)
                gaps.append(gap)
        outcome = trials.outcomes(0)[0]
        entries = sum(a >= 0 > b for a, b in itertools.pairwise(gaps))
        assert outcome.energy == pytest.approx(energy)
        assert outcome.path == pytest.approx(path)
        assert outcome.collisions == entries
        assert outcome.clearance <= min(gaps) + 1e-12
        assert outcome.time == pytest.approx((len(gaps) - 1) / 5 * 0.05)


def test_an_outcome_does_not_depend_on_the_company():
    drawn = some_episodes(6)
    scenes, tasks = [e.scene for e in drawn], [e.tasks for e in drawn]
    together = play(scenes, tasks)
    assert [play([s], [t])[0] for s, t in zip(scenes, tasks, strict=True)] == together


def test_a_finger_that_passes_by_has_not_reached():
    scene = Scene((Thing("red", "ball", "small", 0.0, 0.4),), (0.2, 0.5), (-0.3, 0.5), ((0.0, 0.15),))
    trials = Trials([scene], [[Task(0)]])
    beside = np.array([[[0.0, 0.4 - 0.027 - FINGER_RADIUS - 0.005]]])
    steps = 0
    while not trials.done[0]:
        trials.step(beside)
        steps += 1
    outcome = trials.outcomes(0)[0]
    assert outcome.success
    assert steps >= HOLD
    through = Trials([scene], [[Task(0)]])
    for _ in range(12):
        through.step(np.array([[[0.0, 0.7]]]))
    assert not through.done[0]


def test_rows_begin_anew_without_touching_the_others():
    drawn = some_episodes(3)
    trials = Trials([e.scene for e in drawn], [e.tasks for e in drawn])
    actor = Experts(trials)
    for _ in range(5):
        trials.step(actor(trials, trials.running), trials.running)
    before = [trials.outcomes(row) for row in range(3)]
    fresh = sample_episode(np.random.default_rng(8))
    trials.put(1, fresh.scene, fresh.tasks)
    assert trials.outcomes(0) == before[0]
    assert trials.outcomes(2) == before[2]
    assert trials.outcomes(1)[0].energy == trials.outcomes(1)[0].time == 0


def test_each_arm_is_judged_by_its_own_task():
    scene = sample_scene(np.random.default_rng(1), arms=2)
    trials = Trials([scene], [[Task(0), Task(1)]])
    expert = Experts(trials)
    still = trials.tables.fingers
    for _ in range(60):
        answers = expert(trials, np.array([0]))
        answers[0, 1] = still[0, 1]  # the second arm does nothing
        trials.step(answers)
    first, second = trials.outcomes(0)
    assert (first.success, second.success) == (True, False)
    assert first.energy > 10 * second.energy
    assert not trials.done[0]


def test_a_table_whose_simulator_fails_has_failed_and_the_others_end_as_they_would():
    episodes = some_episodes(3, what="reach")
    scenes, tasks = [e.scene for e in episodes], [e.tasks for e in episodes]
    experts, sound, told = Experts(Trials(scenes, tasks)), play(scenes, tasks), []

    def wild(trials, rows):
        if trials.outcomes(1)[0].time > 0.3 and 1 in rows:
            trials.tables.rates[1] = 1e11
        told.append(rows.tolist())
        return experts(trials, rows)

    found = play(scenes, tasks, wild)
    assert [found[0], found[2]] == [sound[0], sound[2]]
    (failed,) = found[1]
    assert (failed.done, failed.success) == (True, False)
    assert failed.failure.startswith("table 1: the simulator gave positions that are not finite")
    assert failed.to_dict()["failure"] == failed.failure
    assert "failure" not in found[0][0].to_dict()
    assert 1 not in told[-1]
    trials = Trials(scenes, tasks)
    trials.fail([1], "gone")
    trials.put(1, scenes[1], tasks[1])
    assert (trials.outcomes(1)[0].failure, trials.outcomes(1)[0].done) == (None, False)


def test_tasks_that_do_not_fit_are_named():
    scene = sample_scene(np.random.default_rng(0))
    with pytest.raises(ValueError, match="tasks of row 0: expected 1, each about one of 3 things"):
        Trials([scene], [[Task(0), Task(1)]])
    with pytest.raises(ValueError, match="tasks of row 0: expected 1, each about one of 3 things"):
        Trials([scene], [[Task(3)]])
    with pytest.raises(ValueError, match="tasks: expected one entry for each of 1 scenes, got 2"):
        Trials([scene], [[Task(0)], [Task(0)]])
