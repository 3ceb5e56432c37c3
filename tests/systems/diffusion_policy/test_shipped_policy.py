"""What the shipped policy does on fresh tables, one arm or two."""

import numpy as np
import pytest

from torchfilm.data.table.episodes import sample_episode
from torchfilm.systems.diffusion_policy import load
from torchfilm.systems.diffusion_policy.evaluate import draw_scenes, in_all_manners, rows_of
from torchfilm.systems.diffusion_policy.inspect_figures import company
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.rollouts import roll_out

for package in ("mujoco", "diffusers"):
    pytest.importorskip(package)


def test_two_arms_on_one_table_reach_each_its_own_thing():
    rng = np.random.default_rng(21)
    episodes = [sample_episode(rng, what="reach", how="plain", arms=2) for _ in range(12)]
    outcomes = roll_out(Policy(load()), episodes)
    told = [task.which for episode in episodes for task in episode.tasks]
    right = np.mean([outcome.chosen == which for outcome, which in zip(outcomes, told, strict=True)])
    other = np.mean([outcome.chosen == which for outcome, which in zip(outcomes, told[::-1], strict=True)])
    assert right >= 0.8
    assert other <= 0.6


def test_it_pushes_in_company_each_arm_in_its_own_manner():
    told = [episode for seed in range(8) for episode in company(seed)]
    outcomes = roll_out(Policy(load()), told)
    pushes, reaches = outcomes[::2], outcomes[1::2]
    assert np.mean([one.success for one in pushes]) >= 0.7
    assert np.mean([one.success for one in reaches]) >= 0.8
    for one in (pushes, reaches):  # of each deed every other one saves, on the same tables
        by_turns = np.array([o.energy for o in one]).reshape(-1, 2).mean(axis=0)
        assert by_turns.min() <= 0.7 * by_turns.max()
    assert np.mean([one.collisions > 0 for one in pushes[::2]]) <= 0.3
    assert np.mean([one.collisions > 0 for one in pushes[1::2]]) >= 0.7


def test_told_how_it_reaches_otherwise_on_the_same_tables():
    told = in_all_manners([e for e in draw_scenes(24, seed=31) if e.tasks[0].what == "reach"], seed=31)
    rows = rows_of(told, roll_out(Policy(load()), told))
    assert rows["reach plain"].success.value >= 0.8
    assert rows["reach save"].energy <= 0.6 * rows["reach plain"].energy
    assert rows["reach plain"].collisions.value >= 0.8
