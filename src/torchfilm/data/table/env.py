"""The table as a gymnasium environment, one or many at a time.

Actions are positions: where each finger should go, in metres, in its arm's own view, 20 times a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .episodes import Episode, sample_episode
from .model import FPS
from .observations import OBS_TYPES, Observer, require_gymnasium
from .render import Renderer
from .scenes import X_RANGE, Y_RANGE
from .trials import MAX_STEPS, Outcome, Trials

gymnasium = require_gymnasium()

_LOW, _HIGH = np.array((X_RANGE[0], Y_RANGE[0]), np.float32), np.array((X_RANGE[1], Y_RANGE[1]), np.float32)


class TableEnv(gymnasium.Env):
    """One table; one or two arms, each with its own instruction.

    An action is a position [2] in metres, or [2, 2] for two arms; beyond the bounds of the action space it
    means the edge of the table. The reward is 1 in the step in which an arm succeeds (halved for two). An
    episode is terminated when every arm has done its task or chosen another thing, and truncated after
    `MAX_STEPS` steps.

    `info` has `task` (the instruction; a tuple for two arms), `is_success`, `outcome` (a dict, or a tuple of
    them: the fields of `Outcome`, with chosen -1 where there was none), and `instruction` with its parts.

    Importing this module makes it known as "torchfilm/Table-v0";
    `gymnasium.make("torchfilm.data.table.env:torchfilm/Table-v0")` imports it.

    Args:
        obs_type: "state" (one vector), "environment_state_agent_pos" (a dict of two), "pixels", or
            "pixels_agent_pos" (a dict); with two arms each has a first axis of two.
        num_things: 1 to 4, and one for each arm.
        arms: 1 or 2.
        size: width and height of pictures in pixels.
        render_mode: None or "rgb_array".

    Raises:
        ValueError: for anything else.

    Example:
        env = TableEnv()
        observation, info = env.reset(seed=0)
        observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": FPS}  # noqa: RUF012

    def __init__(
        self,
        obs_type: str = "state",
        *,
        num_things: int = 3,
        arms: int = 1,
        size: int = 96,
        render_mode: str | None = None,
    ) -> None:
        if render_mode not in (None, "rgb_array"):
            raise ValueError(f"render_mode: expected None or 'rgb_array', got {render_mode!r}")
        self.render_mode = render_mode
        self._size, self._num_things, self._arms = size, num_things, arms
        self._renderer: Renderer | None = None
        self._observer = Observer(obs_type, arms, num_things, size)
        self.observation_space = self._observer.space
        self.action_space = _actions(arms)
        self.trials: Trials | None = None
        self.episode: Episode | None = None

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin an episode; `options={"episode": ...}` gives it, else it is drawn, by `options` as keywords.

        The keywords are those of `sample_episode`: what, how, by, blocked, held_out. Raises ValueError for
        others, for a keyword beside an episode, and for an episode with other arms or things than the table.
        """
        super().reset(seed=seed)
        given, sizes = dict(options or {}), (self._num_things, self._arms)
        episode = given.pop("episode", None)
        if episode is not None and given:
            raise ValueError(f"options: expected an episode alone, got {', '.join(sorted(given))} beside it")
        drawn = _drawn(self.np_random, given, *sizes) if episode is None else _fitting([episode], *sizes)[0]
        self.episode = drawn
        self.trials = Trials([self.episode.scene], [self.episode.tasks])
        return self._observation(), self._info(self.trials.outcomes(0))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict]:
        """Move for 0.05 s towards the position `action`.

        Raises ValueError for an action that is not finite or before `reset`; DeadSimulatorError if the
        physics fails.
        """
        if self.trials is None:
            raise ValueError("step: expected reset() to be called first")
        before = self.trials.outcomes(0)
        targets = _shaped(action, (self._arms, 2))
        self.trials.step(targets[None])
        after = self.trials.outcomes(0)
        late = any(_late(outcome) for outcome in after)
        done = all(outcome.done for outcome in after)
        return (
            self._observation(),
            _reward(before, after),
            done and not late,
            done and late,
            self._info(after),
        )

    def render(self) -> NDArray[np.uint8] | None:
        """The table from above, [size, size, 3], where `render_mode` is "rgb_array"."""
        if self.render_mode is None or self.trials is None:
            return None
        if self._renderer is None:
            self._renderer = self._observer.renderer or Renderer(self._size)
        tables = self.trials.tables
        return self._renderer(self.trials.scenes[0], tables.joints[0], tables.things[0])

    def close(self) -> None:
        """Give back what pictures need."""
        for renderer in (self._renderer, self._observer.renderer):
            if renderer is not None:
                renderer.close()

    def _observation(self) -> Any:
        assert self.trials is not None
        found = self._observer(self.trials, np.array([0]))
        return {key: value[0] for key, value in found.items()} if isinstance(found, dict) else found[0]

    def _info(self, outcomes: Sequence[Outcome]) -> dict[str, Any]:
        assert self.episode is not None
        return {key: value[0] for key, value in _infos([self.episode], [outcomes]).items()}


class TableVectorEnv(gymnasium.vector.VectorEnv):
    """Many tables stepped together on one core; the fast way to gather episodes.

    As `TableEnv`, with a first axis for the tables. A table whose episode ended begins a new one in the next
    step, whose action for it is ignored (gymnasium's NEXT_STEP). With the same seed, table i has the episodes
    of the i-th child of that seed, whatever the others do.

    A `DeadSimulatorError` names the `rows` that can no longer be stepped; nothing has moved then, and `reset`
    with a `reset_mask` gives these tables, and no others, a new episode.
    """

    metadata = {  # noqa: RUF012
        "render_modes": [],
        "render_fps": FPS,
        "autoreset_mode": gymnasium.vector.AutoresetMode.NEXT_STEP,
    }

    def __init__(
        self, num_envs: int, obs_type: str = "state", *, num_things: int = 3, arms: int = 1, size: int = 96
    ) -> None:
        if num_envs < 1:
            raise ValueError(f"num_envs: expected at least 1, got {num_envs}")
        self.num_envs = num_envs
        self._num_things, self._arms = num_things, arms
        self._observer = Observer(obs_type, arms, num_things, size)
        self.single_observation_space = self._observer.space
        self.single_action_space = _actions(arms)
        batched = gymnasium.vector.utils.batch_space
        self.observation_space = batched(self.single_observation_space, num_envs)
        self.action_space = batched(self.single_action_space, num_envs)
        self.trials: Trials | None = None
        self._rngs: dict[int, np.random.Generator] = {}
        self._options: dict[str, Any] = {}
        self.episodes: list[Episode] = []

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict]:
        """Begin an episode on each table; `options`, kept for later ones, are those of `TableEnv.reset`.

        `options={"episodes": [...]}` gives the first episodes. `options={"reset_mask": [N] booleans}` begins
        an episode on these tables alone, with the options that were kept.
        """
        given = dict(options or {})
        mask = given.pop("reset_mask", None)
        rows = np.arange(self.num_envs) if mask is None else self._masked(mask, given)
        if seed is not None or self.trials is None:
            seeds = np.random.SeedSequence(seed).spawn(self.num_envs)
            self._rngs |= {row: np.random.default_rng(seeds[row]) for row in rows.tolist()}
        if mask is None:
            self._begin_all(given)
        else:
            for row in rows.tolist():
                self._begin(row)
        return self._answer()

    def step(self, actions: Any) -> tuple[Any, NDArray, NDArray, NDArray, dict]:
        """Move all tables for 0.05 s; tables that had ended begin anew.

        Raises ValueError and DeadSimulatorError as `TableEnv.step`; nothing has moved then.
        """
        if self.trials is None:
            raise ValueError("step: expected reset() to be called first")
        trials = self.trials
        before = [trials.outcomes(row) for row in range(self.num_envs)]
        targets = _shaped(actions, (self.num_envs, self._arms, 2))
        over, running = np.flatnonzero(trials.done), trials.running
        if len(running):
            trials.step(targets[running], running)
        for row in over.tolist():
            self._begin(row)
        after = [trials.outcomes(row) for row in range(self.num_envs)]
        rewards = np.array([_reward(b, a) for b, a in zip(before, after, strict=True)])
        rewards[over] = 0
        late = np.array([any(_late(o) for o in outcome) for outcome in after])
        observation, info = self._answer(after)
        return observation, rewards, trials.done & ~late, trials.done & late, info

    def _begin_all(self, options: dict[str, Any]) -> None:
        """Begin with the episodes in `options`, or with drawn ones, and keep the other options."""
        sizes, first = (self._num_things, self._arms), options.pop("episodes", None)
        if first is not None and len(first) != self.num_envs:
            raise ValueError(f"episodes: expected one for each of {self.num_envs} tables, got {len(first)}")
        rows = range(self.num_envs)
        drawn = [_drawn(self._rngs[row], options, *sizes) for row in rows] if first is None else first
        self.episodes, self._options = _fitting(drawn, *sizes), options
        self.trials = Trials([e.scene for e in self.episodes], [e.tasks for e in self.episodes])

    def _begin(self, row: int) -> None:
        """Begin another episode on one table."""
        assert self.trials is not None
        self.episodes[row] = _drawn(self._rngs[row], self._options, self._num_things, self._arms)
        self.trials.put(row, self.episodes[row].scene, self.episodes[row].tasks)

    def _masked(self, mask: Any, others: dict[str, Any]) -> NDArray[np.intp]:
        """The tables to reset. Raises ValueError for another mask, with other options, or as the first."""
        chosen = np.asarray(mask)
        if self.trials is None or others:
            raise ValueError(
                "reset_mask: expected it alone and after a reset of all tables, got "
                + (f"{', '.join(sorted(others))} beside it" if others else "it first")
            )
        if chosen.shape != (self.num_envs,) or chosen.dtype != np.bool_:
            raise ValueError(
                f"reset_mask: expected {self.num_envs} booleans, got {chosen.dtype} {list(chosen.shape)}"
            )
        return np.flatnonzero(chosen)

    def close_extras(self, **kwargs: Any) -> None:
        """Give back what pictures need."""
        if self._observer.renderer is not None:
            self._observer.renderer.close()

    def _answer(self, outcomes: Sequence[Sequence[Outcome]] | None = None) -> tuple[Any, dict]:
        assert self.trials is not None
        rows = np.arange(self.num_envs)
        known = outcomes or [self.trials.outcomes(row) for row in range(self.num_envs)]
        infos = _infos(self.episodes, known)
        return self._observer(self.trials, rows), infos | {"is_success": np.array(infos["is_success"])}


def _actions(arms: int) -> Any:
    low, high = (_LOW, _HIGH) if arms == 1 else (np.stack([_LOW] * arms), np.stack([_HIGH] * arms))
    return gymnasium.spaces.Box(low, high, dtype=np.float32)


def _drawn(rng: np.random.Generator, options: dict[str, Any], num_things: int, arms: int) -> Episode:
    known = {"what", "how", "by", "blocked", "held_out"}
    if set(options) - known:
        raise ValueError(
            f"options: expected episode, or {', '.join(sorted(known))}, got {', '.join(sorted(options))}"
        )
    return sample_episode(rng, num_things=num_things, arms=arms, **options)


def _fitting(episodes: Sequence[Episode], num_things: int, arms: int) -> list[Episode]:
    """The episodes, checked for the sizes that the spaces were made for."""
    for row, episode in enumerate(episodes):
        sizes = len(episode.scene.things), len(episode.scene.starts)
        if sizes != (num_things, arms):
            raise ValueError(
                f"episode {row}: expected num_things={num_things} and arms={arms}, as the environment has, "
                f"got {sizes[0]} and {sizes[1]}"
            )
    return list(episodes)


def _shaped(actions: Any, shape: tuple[int, ...]) -> NDArray[np.float64]:
    """Actions with an axis for the arms, also for one."""
    array = np.asarray(actions, np.float64)
    wanted = shape if shape[-2] > 1 else (*shape[:-2], shape[-1])
    if array.shape != wanted:
        raise ValueError(f"action: expected positions of shape {list(wanted)}, got {list(array.shape)}")
    return array.reshape(shape)


def _reward(before: Sequence[Outcome], after: Sequence[Outcome]) -> float:
    return sum(a.success and not b.success for b, a in zip(before, after, strict=True)) / len(after)


def _late(outcome: Outcome) -> bool:
    return outcome.done and not outcome.success and outcome.time >= MAX_STEPS / FPS


def _infos(episodes: Sequence[Episode], outcomes: Sequence[Sequence[Outcome]]) -> dict[str, list]:
    def one(values: Sequence[Any]) -> Any:
        return values[0] if len(values) == 1 else tuple(values)

    return {
        "task": [one([told.text for told in episode.told]) for episode in episodes],
        "instruction": [one(episode.told) for episode in episodes],
        "is_success": [all(o.success for o in outcome) for outcome in outcomes],
        "outcome": [one([_plain(o) for o in outcome]) for outcome in outcomes],
    }


def _plain(outcome: Outcome) -> dict[str, Any]:
    """The fields, with a number for "none chosen": gymnasium stacks what it finds by its type."""
    return outcome.to_dict() | {"chosen": -1 if outcome.chosen is None else outcome.chosen}


gymnasium.register(
    "torchfilm/Table-v0",
    entry_point="torchfilm.data.table.env:TableEnv",
    vector_entry_point="torchfilm.data.table.env:TableVectorEnv",
)


__all__ = ["OBS_TYPES", "TableEnv", "TableVectorEnv"]
