"""The benchmarks of others: what they report is ours, and what is missing is said in one line."""

import sys

import numpy as np
import pytest

pytest.importorskip("gymnasium")

import gymnasium
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers import RecordEpisodeStatistics

from torchfilm.data.outside import MT10, PUSHT, Told, metaworld, metaworld_expert, pusht


@pytest.mark.filterwarnings("ignore")  # of pygame and pymunk
def test_push_t_is_told_checked_and_judged():
    pytest.importorskip("gym_pusht")
    env = pusht("environment_state_agent_pos")
    observation, info = env.reset(seed=0)
    assert info["task"] == PUSHT
    assert not info["is_success"]
    assert {key: np.shape(value) for key, value in observation.items()} == {
        "agent_pos": (2,),
        "environment_state": (16,),
    }
    _, reward, terminated, truncated, info = env.step(np.array((256.0, 256.0)))
    assert 0 <= reward <= 1
    assert not terminated
    assert not truncated
    assert info["is_success"] is False
    with pytest.raises(ValueError, match=r"action: expected \[2\] finite numbers, got \[nan, 0\.0\]"):
        env.step(np.array((np.nan, 0.0)))
    env.close()


@pytest.mark.filterwarnings("ignore")
def test_push_t_moves_the_same_for_the_same_seed():
    pytest.importorskip("gym_pusht")
    seen = []
    for _ in range(2):
        env = pusht()
        first, _ = env.reset(seed=4)
        seen.append(np.concatenate([first, env.step(np.array((100.0, 300.0)))[0]]))
    assert np.array_equal(*seen)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["reach-v3", "drawer-close-v3"])
def test_meta_worlds_experts_succeed(name):
    pytest.importorskip("metaworld")
    env, expert = metaworld(name, seed=1), metaworld_expert(name)
    observation, info = env.reset(seed=1)
    assert info["task"] == MT10[name]
    for _ in range(200):
        observation, _, _, _, info = env.step(expert(observation))
        if info["is_success"]:
            break
    assert info["is_success"]


def told_to_stay() -> Told:
    """A world of gymnasium's own, told something: what wraps and stacks environments has to take it."""
    return Told(gymnasium.make("MountainCarContinuous-v0", max_episode_steps=3), "stay")


def test_what_is_told_can_be_wrapped_and_stacked():
    env = RecordEpisodeStatistics(told_to_stay())
    assert env.unwrapped.spec.id == "MountainCarContinuous-v0"
    assert env.spec.additional_wrappers[0].kwargs == {"task": "stay"}
    env.reset(seed=0)
    for _ in range(3):
        *_, truncated, info = env.step(np.zeros(1))
    assert truncated
    assert (info["task"], info["episode"]["l"], info["is_success"]) == ("stay", 3, False)
    both = SyncVectorEnv([told_to_stay, told_to_stay])
    _, info = both.reset(seed=0)
    assert info["task"].tolist() == ["stay", "stay"]
    *_, info = both.step(np.zeros((2, 1), np.float32))
    assert info["is_success"].tolist() == [False, False]


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [("gym_pusht", "pusht", pusht), ("metaworld", "metaworld", lambda: metaworld("reach-v3"))],
)
def test_a_missing_package_is_one_line(package, extra, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    said = rf"needs {package.replace('_', '-')}: pip install 'torchfilm\[{extra}\]'"
    with pytest.raises(ValueError, match=said) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_mistakes_are_named():
    assert len(MT10) == 10
    for call in (metaworld, metaworld_expert):
        with pytest.raises(ValueError, match=r"name: expected one of reach-v3, .* got 'fly-v3'"):
            call("fly-v3")
    with pytest.raises(ValueError, match=r"obs_type: expected one of state, .* got 'smell'"):
        pusht("smell")
