"""The physics against a plain loop over mj_step, and rows that do not know of one another."""

import numpy as np
import pytest

pytest.importorskip("mujoco")

import mujoco

from torchfilm.data.table.kinematics import finger_of, joints_of, velocity_of
from torchfilm.data.table.model import LAG, SUBSTEPS, TIMESTEP, TORQUES, compiled
from torchfilm.data.table.scenes import X_RANGE, Y_RANGE, sample_scene
from torchfilm.data.table.simulator import DeadSimulatorError, Tables, turn


def some_scenes(count: int, seed: int = 0, **options):
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, **options) for _ in range(count)]


def targets_of(tables: Tables, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    low, high = np.array((X_RANGE[0], Y_RANGE[0])), np.array((X_RANGE[1], Y_RANGE[1]))
    return rng.uniform(low, high, (len(tables), tables.arms, 2))


def test_joints_and_fingers_are_inverse_to_each_other():
    rng = np.random.default_rng(0)
    spots = rng.uniform((X_RANGE[0], Y_RANGE[0]), (X_RANGE[1], Y_RANGE[1]), (200, 2))
    assert np.allclose(finger_of(joints_of(spots)), spots, atol=1e-12)
    assert np.allclose(finger_of(joints_of(np.array((0.0, 5.0)))), (0, 0.9))  # out of reach: stretched


def test_the_velocity_is_the_derivative_of_the_position():
    joints, rates, step = np.array((0.7, 1.3)), np.array((-0.4, 0.9)), 1e-6
    slope = (finger_of(joints + step * rates) - finger_of(joints - step * rates)) / (2 * step)
    assert np.allclose(velocity_of(joints, rates), slope, atol=1e-8)


@pytest.mark.parametrize("arms", [1, 2])
def test_a_step_is_what_a_plain_loop_over_mj_step_gives_and_work_is_its_sum(arms):
    scene = some_scenes(1, arms=arms)[0]
    tables = Tables([scene])
    model = compiled(tuple(t.radius for t in scene.things), arms)
    data = mujoco.MjData(model)
    data.qpos[: 2 * arms] = joints_of(np.array(scene.starts)).ravel()
    data.qpos[2 * arms :] = [c for t in scene.things for c in (t.x, t.y)]
    for seed in range(6):
        targets = targets_of(tables, seed)
        trace = tables.step(targets)
        data.ctrl[:] = joints_of(targets[0]).ravel()
        data.qacc_warmstart[:] = 0  # a rollout starts cold
        work = np.zeros(arms)
        for _ in range(SUBSTEPS):
            before = data.qpos[: 2 * arms].copy()
            mujoco.mj_step(model, data)
            work += np.abs(data.actuator_force * (data.qpos[: 2 * arms] - before)).reshape(arms, 2).sum(1)
        assert np.allclose(tables.joints[0].ravel(), data.qpos[: 2 * arms], rtol=0, atol=1e-10)
        assert np.allclose(tables.things[0].ravel(), data.qpos[2 * arms :], rtol=0, atol=1e-10)
        assert np.allclose(trace.work[0], work, rtol=1e-8)


def test_a_row_is_the_same_to_the_bit_alone_and_in_any_batch():
    scenes = some_scenes(5)
    together, alone = Tables(scenes), Tables([scenes[3]])
    for seed in range(8):
        targets = targets_of(together, seed)
        together.step(targets[[4, 3]], rows=[4, 3])
        alone.step(targets[[3]])
    assert np.array_equal(together.joints[3], alone.joints[0])
    assert np.array_equal(together.things[3], alone.things[0])
    assert np.array_equal(together.joints[0], Tables(scenes).joints[0])  # a row left out stays


def test_torques_stay_within_their_limits():
    scene = some_scenes(1)[0]
    model = compiled(tuple(t.radius for t in scene.things), 1)
    assert np.allclose(model.actuator_forcerange[:, 1], TORQUES)
    tables = Tables([scene])
    tables.step(np.array([[[0.45, 0.7]]]))
    most = np.abs(tables.rates[0, 0]) * SUBSTEPS * TIMESTEP
    assert (most < 2).all()


def test_a_finger_comes_to_rest_where_it_is_sent_and_follows_with_the_lag():
    tables = Tables(some_scenes(3, in_the_way=0.0))
    goal = tables.fingers + np.array((0.05, 0.04))
    for _ in range(30):
        tables.step(goal)
    assert np.allclose(tables.fingers, goal, atol=2e-3)
    assert LAG == 0.1


def test_a_push_moves_a_thing_and_letting_go_stops_it():
    scene = some_scenes(1, num_things=1, in_the_way=0.0)[0]
    tables, thing = Tables([scene]), scene.things[0]
    for _ in range(60):
        tables.step(np.array([[[thing.x, thing.y + 0.02]]]))
    pushed = tables.things[0, 0].copy()
    assert np.linalg.norm(pushed - (thing.x, thing.y)) > 0.02
    back = 2 * tables.fingers - tables.things
    for _ in range(20):
        tables.step(back)
    assert np.allclose(tables.things[0, 0], pushed, atol=2e-3)


def test_the_second_arm_is_the_first_after_half_a_turn():
    scene = some_scenes(1, arms=2)[0]
    tables = Tables([scene])
    spots = np.array([[(0.1, 0.15), (0.1, 0.15)]])
    for _ in range(30):
        tables.step(spots)
    one, two = tables.fingers[0]
    assert np.allclose(one, two, atol=5e-3)
    assert np.allclose(turn(turn(tables.things)), tables.things)


def test_targets_beyond_the_table_mean_its_edge():
    scenes = some_scenes(1)
    inside, beyond = Tables(scenes), Tables(scenes)
    for _ in range(5):
        inside.step(np.array([[[X_RANGE[1], Y_RANGE[0]]]]))
        beyond.step(np.array([[[7.0, -9.0]]]))
    assert np.array_equal(inside.joints, beyond.joints)


def test_targets_that_are_not_numbers_are_named_and_move_nothing():
    tables = Tables(some_scenes(3))
    before, targets = tables.joints.copy(), tables.fingers.copy()
    targets[2, 0, 1] = np.nan
    with pytest.raises(ValueError, match="got nan for table 2, arm 0, y; nothing was moved"):
        tables.step(targets)
    assert np.array_equal(tables.joints, before)
    with pytest.raises(ValueError, match=r"expected \[rows, arms, 2\] = \[3, 1, 2\], got \[3, 2\]"):
        tables.step(targets[:, 0])


@pytest.mark.parametrize("rate", [np.nan, 1e11])
def test_a_dead_simulator_is_named_and_the_others_live_on(rate, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tables = Tables(some_scenes(2))
    tables.rates[1] = rate
    spots = tables.fingers
    with pytest.raises(
        DeadSimulatorError, match=r"table 1: the simulator gave positions that are not finite, or too large"
    ):
        tables.step(spots)
    tables.step(spots[:1], rows=[0])
    tables.put(1, some_scenes(1)[0])
    tables.step(tables.fingers)
    assert list(tmp_path.iterdir()) == []  # MuJoCo would write a log


def test_scenes_of_other_sizes_are_refused():
    scenes = some_scenes(1)
    with pytest.raises(ValueError, match="row 1: expected 1 arms and 3 things like the others"):
        Tables([scenes[0], some_scenes(1, num_things=2)[0]])
    with pytest.raises(ValueError, match="scenes: expected at least one, got none"):
        Tables([])
