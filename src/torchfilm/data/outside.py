"""Worlds of others, as benchmarks: Push-T (gym-pusht) and the ten tasks of Meta-World's MT10.

Thin: gymnasium environments as their packages make them, with the instruction in `info["task"]`, success in
`info["is_success"]` as `TableEnv` has them, actions checked, and one line that says how to get a package that
is missing. In Meta-World most scenes give their task away, so that a policy can succeed without listening:
measure the wrong instruction too.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchfilm.extras import needed

MT10 = {
    "reach-v3": "reach the goal",
    "push-v3": "push the puck to the goal",
    "pick-place-v3": "pick up the puck and place it at the goal",
    "door-open-v3": "open the door",
    "drawer-open-v3": "open the drawer",
    "drawer-close-v3": "close the drawer",
    "button-press-topdown-v3": "press the button from above",
    "peg-insert-side-v3": "insert the peg into the hole at the side",
    "window-open-v3": "open the window",
    "window-close-v3": "close the window",
}
"""Task of Meta-World -> instruction."""

PUSHT = "push the T block onto its goal"
"""The instruction of Push-T."""


def _needed(package: str, name: str, extra: str) -> Any:
    """A module of others, or one line that says how to get it (ValueError)."""
    import importlib

    quiet = "PYGAME_HIDE_SUPPORT_PROMPT"
    before = os.environ.get(quiet)
    os.environ[quiet] = "1"  # pygame greets on stdout
    try:
        with needed(f"this benchmark needs {name}", extra):
            return importlib.import_module(package)
    finally:
        if before is None:
            del os.environ[quiet]
        else:
            os.environ[quiet] = before


gymnasium = _needed("gymnasium", "gymnasium", "robots")


class Told(gymnasium.Wrapper, gymnasium.utils.RecordConstructorArgs):
    """Adds an instruction to an environment of others; made by `pusht` and `metaworld`.

    A wrapper as gymnasium's own; `info` has `task` (the instruction) and `is_success` besides.
    """

    def __init__(self, env: Any, task: str) -> None:
        gymnasium.utils.RecordConstructorArgs.__init__(self, task=task)
        gymnasium.Wrapper.__init__(self, env)
        self.task = task

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin an episode."""
        observation, info = self.env.reset(seed=seed, options=options)
        return self._checked(observation), {**info, "task": self.task, "is_success": False}

    def step(self, action: NDArray[Any]) -> tuple[Any, float, bool, bool, dict]:
        """One step. Raises ValueError for an action of another shape or that is not finite."""
        given = np.asarray(action, np.float32)
        if given.shape != self.action_space.shape or not np.isfinite(given).all():
            raise ValueError(
                f"action: expected {list(self.action_space.shape)} finite numbers, got {given.tolist()}"
            )
        observation, reward, terminated, truncated, info = self.env.step(given)
        success = bool(info.get("is_success", info.get("success", False)))
        more = {**info, "task": self.task, "is_success": success}
        return self._checked(observation), float(reward), bool(terminated), bool(truncated), more

    def _checked(self, observation: Any) -> Any:
        parts = observation.values() if isinstance(observation, dict) else [observation]
        if not all(np.isfinite(np.asarray(part)).all() for part in parts):
            raise RuntimeError(
                f"the simulator of {self.task!r} gave an observation that is not finite: reset it"
            )
        return observation


def pusht(obs_type: str = "state", size: int = 96) -> Told:
    """Push-T: a round finger pushes a T onto its place; 10 steps a second, at most 300.

    Observations and actions are the package's: positions in [0, 512]; "state" is finger, block and angle [5],
    "environment_state_agent_pos" has the T's eight corners [16] and the finger [2]. Success is a coverage of
    95 %; the reward is the coverage.

    Raises ValueError where gym-pusht is missing, or for another `obs_type`.

    Example: `observation, info = pusht().reset(seed=0)`
    """
    known = ("state", "environment_state_agent_pos", "pixels", "pixels_agent_pos")
    if obs_type not in known:
        raise ValueError(f"obs_type: expected one of {', '.join(known)}, got {obs_type!r}")
    _needed("gym_pusht", "gym-pusht", "pusht")
    sizes = {"observation_width": size, "observation_height": size}
    env = gymnasium.make("gym_pusht/PushT-v0", obs_type=obs_type, disable_env_checker=True, **sizes)
    return Told(env, PUSHT)


def metaworld(name: str, seed: int = 0, render_mode: str | None = None) -> Told:
    """One task of Meta-World's MT10: a Sawyer arm, [39] numbers seen, [4] answered, at most 500 steps.

    Raises ValueError where Meta-World is missing, or for a name that is not in `MT10`.

    Example: `observation, info = metaworld("door-open-v3").reset(seed=0)`
    """
    if name not in MT10:
        raise ValueError(f"name: expected one of {', '.join(MT10)}, got {name!r}")
    _needed("metaworld", "metaworld", "metaworld")
    options = {"render_mode": render_mode, "disable_env_checker": True}
    return Told(gymnasium.make("Meta-World/MT1", env_name=name, seed=seed, **options), MT10[name])


def metaworld_expert(name: str) -> Any:
    """Meta-World's scripted policy for a task: a callable from an observation [39] to an action [4].

    Raises ValueError as `metaworld`.
    """
    if name not in MT10:
        raise ValueError(f"name: expected one of {', '.join(MT10)}, got {name!r}")
    policies = _needed("metaworld.policies", "metaworld", "metaworld")
    policy = policies.ENV_POLICY_MAP[name]()

    def answer(observation: NDArray[Any]) -> NDArray[np.float32]:
        return np.clip(np.asarray(policy.get_action(observation), np.float32), -1, 1)

    return answer
