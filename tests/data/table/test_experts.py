"""The experts do what they are told, how they are told; energy and collisions are what was promised."""

import time

import numpy as np
import pytest

pytest.importorskip("mujoco")

from torchfilm.data.table.episodes import Episode, sample_episode
from torchfilm.data.table.experts import Expert
from torchfilm.data.table.kinematics import joints_of
from torchfilm.data.table.playing import play
from torchfilm.data.table.scenes import sample_scene
from torchfilm.data.table.simulator import Tables
from torchfilm.data.table.tasks import HOWS, Task
from torchfilm.data.table.trials import Outcome


def some_episodes(what: str, count: int, **options) -> list[Episode]:
    rng = np.random.default_rng(11)
    return [sample_episode(rng, what=what, how="plain", **options) for _ in range(count)]


def outcomes(drawn: list[Episode], how: str) -> list[Outcome]:
    tasks = [[Task(t.which, t.what, how, t.place) for t in episode.tasks] for episode in drawn]
    return [arm for table in play([episode.scene for episode in drawn], tasks) for arm in table]


@pytest.mark.parametrize(("what", "least"), [("reach", 0.99), ("push", 0.95)])
def test_success_energy_and_collisions_in_all_four_manners(what, least):
    drawn = some_episodes(what, 40, blocked=True)
    done = {how: outcomes(drawn, how) for how in HOWS}
    share = {how: np.mean([o.success for o in found]) for how, found in done.items()}
    hits = {how: np.mean([o.collisions > 0 for o in found]) for how, found in done.items()}
    energy = {how: np.mean([o.energy for o in found]) for how, found in done.items()}
    assert min(share.values()) >= least
    assert hits["plain"] >= 0.9
    assert hits["save"] >= 0.9
    assert hits["avoid"] <= 0.025
    assert hits["both"] <= 0.025
    assert energy["save"] <= 0.5 * energy["plain"]
    assert energy["both"] <= 0.5 * energy["avoid"]


def test_two_arms_on_one_table_each_do_their_own():
    found = outcomes(some_episodes("reach", 15, arms=2), "avoid")
    assert len(found) == 30
    assert np.mean([o.success for o in found]) >= 0.9


def test_an_expert_takes_over_from_any_state():
    rng = np.random.default_rng(2)
    for _ in range(5):
        scene = sample_scene(rng)
        expert, tables = Expert(scene, Task(0, "push", "plain", "goal")), Tables([scene])
        for step in range(200):
            if step in (20, 50):  # somebody moves the finger aside
                tables.joints[0, 0] = joints_of(rng.uniform((-0.3, 0.13), (0.3, 0.2)))
            (x, y), things = tables.fingers[0, 0].tolist(), [tuple(t) for t in tables.things[0].tolist()]
            tables.step(np.array([[expert((x, y), things)]]))
        assert np.linalg.norm(tables.things[0, 0] - scene.goal) < 0.03


@pytest.mark.slow
def test_thousands_of_steps_a_second():
    rng = np.random.default_rng(0)
    drawn = [sample_episode(rng) for _ in range(100)]
    steps = 0

    def count(step) -> None:
        nonlocal steps
        steps += len(step.rows)

    start = time.process_time()
    play([e.scene for e in drawn], [e.tasks for e in drawn], watch=count)
    assert steps / (time.process_time() - start) > 2000
