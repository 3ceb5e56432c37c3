"""Let a policy act on the table, and measure what comes of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from torchfilm.data.table.episodes import Episode
from torchfilm.data.table.playing import Step, play
from torchfilm.data.table.scenes import Scene
from torchfilm.data.table.tasks import Task
from torchfilm.data.table.trials import Outcome, Trials, positions_of
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.thinking import describe_scene


@dataclass(frozen=True)
class Track:
    """One episode of one arm, step by step.

    Attributes:
        outcome: how it went.
        state: [steps, 6] `STATE_NAMES`.
        things: [steps, things, 2] metres.
    """

    outcome: Outcome
    state: NDArray[np.float32]
    things: NDArray[np.float32]


def observed(trials: Trials, rows: NDArray[np.intp]) -> Float[Tensor, "rows_times_arms size"]:
    """What a policy over states sees of these tables: arm and table in one vector, every arm in turn."""
    seen = np.concatenate((trials.state[rows], trials.environment[rows]), axis=-1)
    return torch.from_numpy(seen.reshape(-1, seen.shape[-1]).astype(np.float32))


class Arms:
    """A policy as an actor of `play`: every arm of every table with its own instruction, in one batch."""

    def __init__(self, policy: Policy, arms: int) -> None:
        self._policy, self._arms = policy, arms

    def __call__(self, trials: Trials, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Targets [rows, arms, 2] in metres."""
        places = (rows[:, None] * self._arms + np.arange(self._arms)).reshape(-1)
        actions = self._policy.act(observed(trials, rows), torch.from_numpy(places.astype(np.int64)))
        return actions.double().cpu().numpy().reshape(len(rows), self._arms, -1)


def roll_out(
    policy: Policy, episodes: Sequence[Episode], texts: Sequence[str | None] | None = None
) -> list[Outcome]:
    """Play all episodes together and return how each went, for every arm in turn.

    Args:
        policy: is reset with the instructions, and with the scenes in words for its readers.
        episodes: with the same numbers of arms and things.
        texts: what to say instead, one for each arm of each episode; it is judged by what was meant.
    """
    arms = len(episodes[0].told)
    told: list[str | None] = [one.text for episode in episodes for one in episode.told]
    views = [episode.scene.seen_by(arm) for episode in episodes for arm in range(arms)]
    policy.reset(told if texts is None else list(texts), scenes=[describe_scene(view) for view in views])
    scenes, tasks = [e.scene for e in episodes], [e.tasks for e in episodes]
    return [one for outcome in play(scenes, tasks, Arms(policy, arms)) for one in outcome]


def track(
    policy: Policy, scenes: Sequence[Scene], tasks: Sequence[Task], texts: Sequence[str]
) -> list[Track]:
    """Play one-armed episodes together, and keep where arm and things were at each step.

    Args:
        policy: is reset with the texts, and with the scenes in words for its readers.
        scenes, tasks: one for each text; the task is what it is judged by.
        texts: what is said.
    """
    state: list[list[NDArray]] = [[] for _ in texts]
    things: list[list[NDArray]] = [[] for _ in texts]

    def watch(step: Step) -> None:
        for row, arm, table in zip(step.rows.tolist(), step.state, step.environment, strict=True):
            state[row].append(arm[0])
            things[row].append(positions_of(table[0], len(scenes[row].things)))

    policy.reset(list(texts), scenes=[describe_scene(scene) for scene in scenes])
    outcomes = play(scenes, [[task] for task in tasks], Arms(policy, 1), watch)
    return [
        Track(outcome[0], np.array(arm), np.array(moved))
        for outcome, arm, moved in zip(outcomes, state, things, strict=True)
    ]
