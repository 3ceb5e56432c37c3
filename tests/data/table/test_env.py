"""The environment as gymnasium wants it, one table or many; what it reports, and how it fails."""

import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mujoco")
pytest.importorskip("gymnasium")

import gymnasium
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import SyncVectorEnv

from torchfilm.data.table.env import TableEnv, TableVectorEnv
from torchfilm.data.table.episodes import sample_episode
from torchfilm.data.table.experts import Expert
from torchfilm.data.table.observations import OBS_TYPES
from torchfilm.data.table.simulator import DeadSimulatorError
from torchfilm.data.table.trials import MAX_STEPS, STATE_NAMES, environment_names


def expert_action(env: TableEnv, expert: Expert) -> np.ndarray:
    tables = env.trials.tables
    (x, y), things = tables.fingers[0, 0].tolist(), [tuple(t) for t in tables.things[0].tolist()]
    return np.array(expert((x, y), things), np.float32)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")  # positions have no natural bounds
@pytest.mark.parametrize("arms", [1, 2])
def test_gymnasium_finds_nothing_to_complain_of(arms):
    env = gymnasium.make("torchfilm/Table-v0", arms=arms, render_mode="rgb_array").unwrapped
    assert isinstance(env, TableEnv)
    check_env(env)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_gymnasium_makes_many_tables_at_once():
    many = gymnasium.make_vec("torchfilm/Table-v0", num_envs=2)
    assert isinstance(many.unwrapped, TableVectorEnv)
    assert many.unwrapped.num_envs == 2


def test_gymnasium_stacks_tables_over_whole_episodes():
    many = SyncVectorEnv([TableEnv, TableEnv])
    _, info = many.reset(seed=0, options={"what": "push", "how": "plain"})
    expert, ends, chosen = None, [], set()
    for _ in range(3 * MAX_STEPS):
        first, second = many.envs
        if expert is None or info["outcome"]["time"][0] == 0:
            expert = Expert(first.episode.scene, first.episode.tasks[0])
        still = second.trials.tables.fingers[0, 0].astype(np.float32)
        _, _, terminated, truncated, info = many.step(np.stack([expert_action(first, expert), still]))
        ends += [(row, bool(terminated[row])) for row in np.flatnonzero(terminated | truncated).tolist()]
        chosen |= {tuple(info["outcome"]["chosen"].tolist())}
        if {(0, True), (1, False)} <= set(ends) and len(ends) > 3:
            break
    assert {(0, True), (1, False)} <= set(ends)  # one by success, one by the end of time
    assert any(a >= 0 and b == -1 for a, b in chosen)
    assert info["is_success"].dtype == bool


@pytest.mark.parametrize("arms", [1, 2])
@pytest.mark.filterwarnings("ignore:no OpenGL")
@pytest.mark.parametrize("obs_type", OBS_TYPES)
def test_observations_lie_in_their_space(obs_type, arms):
    env = TableEnv(obs_type, arms=arms, size=32)
    observation, info = env.reset(seed=3)
    assert observation in env.observation_space
    observation, *_ = env.step(env.action_space.sample())
    assert observation in env.observation_space
    assert isinstance(info["task"], str if arms == 1 else tuple)
    env.close()


def test_a_state_is_what_its_names_say():
    env = TableEnv("environment_state_agent_pos", num_things=2)
    observation, _ = env.reset(seed=5)
    agent = dict(zip(STATE_NAMES, observation["agent_pos"], strict=True))
    world = dict(zip(environment_names(2), observation["environment_state"], strict=True))
    scene = env.episode.scene
    assert (agent["finger_x"], agent["finger_y"]) == pytest.approx(scene.starts[0], abs=1e-6)
    for i, thing in enumerate(scene.things):
        assert (world[f"thing_{i}_x"], world[f"thing_{i}_y"]) == pytest.approx((thing.x, thing.y), abs=1e-6)
        assert world[f"thing_{i}_{thing.colour}"] == world[f"thing_{i}_{thing.shape}"] == 1
        assert world[f"thing_{i}_radius"] == pytest.approx(thing.radius)
    assert (world["obstacle_x"], world["goal_y"]) == pytest.approx((scene.obstacle[0], scene.goal[1]))
    assert sum(observation["environment_state"] == 1) == 4


def test_the_same_seed_gives_the_same_episode_and_another_seed_another():
    first, again, other = TableEnv(), TableEnv(), TableEnv()
    a, b, c = (env.reset(seed=seed) for env, seed in ((first, 1), (again, 1), (other, 2)))
    assert np.array_equal(a[0], b[0])
    assert a[1]["task"] == b[1]["task"]
    assert not np.array_equal(a[0], c[0])
    action = first.action_space.sample()
    assert np.array_equal(first.step(action)[0], again.step(action)[0])


def test_an_expert_earns_the_reward_and_the_outcome_is_reported():
    env = TableEnv()
    _, info = env.reset(seed=0, options={"what": "reach", "how": "save"})
    expert, total, steps, done = Expert(env.episode.scene, env.episode.tasks[0]), 0.0, 0, False
    while not done:
        _, reward, terminated, truncated, info = env.step(expert_action(env, expert))
        total, steps, done = total + reward, steps + 1, terminated or truncated
    assert (total, terminated, info["is_success"]) == (1.0, True, True)
    outcome = info["outcome"]
    assert outcome["time"] == pytest.approx(steps / 20)
    assert outcome["chosen"] == env.episode.tasks[0].which
    assert 0 < outcome["energy"] < 5
    assert outcome["path"] > 0.1
    assert (outcome["collisions"] > 0) == (outcome["clearance"] < 0)


def test_resting_at_another_thing_ends_the_episode_without_success():
    env = TableEnv()
    env.reset(seed=0, options={"what": "reach"})
    task = env.episode.tasks[0]
    wrong = type(task)((task.which + 1) % 3)
    expert, done = Expert(env.episode.scene, wrong), False
    while not done:
        _, reward, done, truncated, info = env.step(expert_action(env, expert))
        assert not truncated
        assert reward == 0
    assert not info["is_success"]
    assert info["outcome"]["chosen"] == wrong.which


def test_an_arm_that_does_nothing_is_stopped_at_the_end_of_time():
    env = TableEnv()
    env.reset(seed=0)
    still = env.trials.tables.fingers[0, 0].astype(np.float32)
    for step in range(MAX_STEPS):
        _, _, terminated, truncated, info = env.step(still)
        assert (terminated, truncated) == (False, step == MAX_STEPS - 1)
    assert info["outcome"]["energy"] < 0.05


def test_a_given_episode_is_played():
    episode = sample_episode(np.random.default_rng(4), what="push", how="both", held_out=True)
    _, info = TableEnv().reset(options={"episode": episode})
    assert info["task"] == episode.told[0].text
    assert info["instruction"] == episode.told[0]


def test_mistakes_are_named():
    env = TableEnv()
    with pytest.raises(ValueError, match=r"step: expected reset\(\) to be called first"):
        env.step(np.zeros(2))
    env.reset(seed=0)
    with pytest.raises(ValueError, match="expected finite positions in metres, got nan"):
        env.step(np.array((np.nan, 0.3)))
    with pytest.raises(ValueError, match=r"action: expected positions of shape \[2\], got \[3\]"):
        env.step(np.zeros(3))
    with pytest.raises(
        ValueError, match="options: expected episode, or blocked, by, held_out, how, what, got x"
    ):
        env.reset(options={"x": 1})
    with pytest.raises(ValueError, match=r"obs_type: expected one of state, .* got 'smell'"):
        TableEnv("smell")
    with pytest.raises(ValueError, match="render_mode: expected None or 'rgb_array', got 'human'"):
        TableEnv(render_mode="human")
    with pytest.raises(ValueError, match="num_envs: expected at least 1, got 0"):
        TableVectorEnv(0)


@pytest.mark.parametrize("make", [TableEnv, lambda **options: TableVectorEnv(2, **options)])
def test_tables_that_cannot_be_are_refused_when_they_are_made(make):
    for options, said in (
        ({"arms": 3}, "arms: expected 1 to 2, got 3"),
        ({"num_things": 0}, "num_things: expected 1 to 4, got 0"),
        ({"num_things": 1, "arms": 2}, "num_things: expected one for each of 2 arms at least, got 1"),
        ({"size": 0}, "size: expected at least 1 pixel, got 0"),
    ):
        with pytest.raises(ValueError, match=said):
            make(**options)


def test_episodes_that_cannot_be_are_refused():
    env, many = TableEnv(num_things=2), TableVectorEnv(2, num_things=2)
    with pytest.raises(ValueError, match="what: expected reach, push, or None for any, got 'fly'"):
        env.reset(options={"what": "fly"})
    with pytest.raises(ValueError, match=r"how: expected plain, .*, or None for any, got 'fast'"):
        many.reset(options={"how": "fast"})
    episode = sample_episode(np.random.default_rng(0), num_things=3)
    said = "expected num_things=2 and arms=1, as the environment has, got 3 and 1"
    with pytest.raises(ValueError, match=f"episode 0: {said}"):
        env.reset(options={"episode": episode})
    fitting = sample_episode(np.random.default_rng(0), num_things=2)
    with pytest.raises(ValueError, match=f"episode 1: {said}"):
        many.reset(options={"episodes": [fitting, episode]})
    with pytest.raises(ValueError, match="options: expected an episode alone, got what beside it"):
        env.reset(options={"episode": fitting, "what": "push"})


def test_a_dead_table_is_reset_alone_and_the_others_go_on():
    many = TableVectorEnv(3)
    many.reset(seed=0, options={"what": "push"})
    with pytest.raises(ValueError, match=r"reset_mask: expected it alone .*, got what beside it"):
        many.reset(options={"reset_mask": np.ones(3, bool), "what": "reach"})
    with pytest.raises(ValueError, match=r"reset_mask: expected 3 booleans, got bool \[2\]"):
        many.reset(options={"reset_mask": np.ones(2, bool)})
    many.step(many.trials.tables.fingers[:, 0] + 0.02)
    before, spots = list(many.episodes), many.trials.tables.fingers[:, 0].copy()
    many.trials.tables.rates[1] = 1e11
    for _ in range(2):
        with pytest.raises(DeadSimulatorError, match=r"table 1: .* Reset this table") as caught:
            many.step(spots)
    mask = np.isin(np.arange(3), caught.value.rows)
    _, info = many.reset(options={"reset_mask": mask})
    assert [old == new for old, new in zip(before, many.episodes, strict=True)] == [True, False, True]
    assert many.episodes[1].tasks[0].what == "push"
    assert [outcome["time"] for outcome in info["outcome"]] == pytest.approx([0.05, 0, 0.05])
    *_, info = many.step(many.trials.tables.fingers[:, 0])
    assert [outcome["time"] for outcome in info["outcome"]] == pytest.approx([0.1, 0.05, 0.1])
    with pytest.raises(ValueError, match="after a reset of all tables, got it first"):
        TableVectorEnv(3).reset(options={"reset_mask": mask})


def test_many_tables_are_as_many_single_ones():
    rng = np.random.default_rng(9)
    episodes = [sample_episode(rng) for _ in range(5)]
    many, singles = TableVectorEnv(5), [TableEnv() for _ in range(5)]
    together, _ = many.reset(seed=0, options={"episodes": episodes})
    apart = [
        env.reset(options={"episode": episode})[0] for env, episode in zip(singles, episodes, strict=True)
    ]
    assert np.array_equal(together, np.stack(apart))
    many.action_space.seed(0)
    for _ in range(10):
        actions = many.action_space.sample()
        together, rewards, *_ = many.step(actions)
        apart = [env.step(action) for env, action in zip(singles, actions, strict=True)]
        assert np.array_equal(together, np.stack([one[0] for one in apart]))
        assert np.array_equal(rewards, [one[1] for one in apart])
    assert together in many.observation_space


def test_a_table_whose_episode_ended_begins_anew_by_itself():
    many = TableVectorEnv(3, "environment_state_agent_pos")
    many.reset(seed=0)
    first = list(many.episodes)
    for _ in range(MAX_STEPS):
        still = many.trials.tables.fingers[:, 0]
        *_, truncated, _ = many.step(still)
    assert truncated.all()
    observation, rewards, terminated, truncated, info = many.step(still)
    assert not (terminated | truncated).any()
    assert all(old != new for old, new in zip(first, many.episodes, strict=True))
    assert info["outcome"][0]["time"] == 0
    assert observation["agent_pos"].shape == (3, len(STATE_NAMES))
    assert (rewards == 0).all()


def test_the_pages_show_what_the_first_episode_is_told():
    _, info = TableEnv().reset(seed=0, options={"what": "push", "how": "avoid"})
    root = Path(__file__).resolve().parents[3]
    for page in ("docs/table.md", "src/torchfilm/systems/diffusion_policy/README.md"):
        text = (root / page).read_text(encoding="utf-8")
        assert re.search(rf'info\["task"\].*# "{info["task"]}"', text), page
