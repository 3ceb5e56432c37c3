"""The benchmarks of others: what they report is ours, and what is missing is said in one line."""

import sys

import numpy as np
import pytest

from torchfilm.data.outside import MT10, PUSHT, metaworld, metaworld_expert, pusht


@pytest.mark.filterwarnings("ignore")  # of pygame and pymunk
def test_push_t_is_told_checked_and_judged():
    pytest.importorskip("gymnasium")
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
    pytest.importorskip("gymnasium")
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


@pytest.mark.parametrize(
    ("package", "call"), [("gym_pusht", pusht), ("metaworld", lambda: metaworld("reach-v3"))]
)
def test_a_missing_package_is_one_line(package, call, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ValueError, match=rf"needs {package.replace('_', '-')}: pip install") as caught:
        call()
    assert "\n" not in str(caught.value)


def test_mistakes_are_named():
    assert len(MT10) == 10
    for call in (metaworld, metaworld_expert):
        with pytest.raises(ValueError, match=r"name: expected one of reach-v3, .* got 'fly-v3'"):
            call("fly-v3")
    with pytest.raises(ValueError, match=r"obs_type: expected one of state, .* got 'smell'"):
        pusht("smell")
