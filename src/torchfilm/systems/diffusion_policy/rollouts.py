"""Let a policy act on the table, and measure what comes of it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from torchfilm.data.table.episodes import Episode
from torchfilm.data.table.playing import play
from torchfilm.data.table.trials import Outcome, Trials
from torchfilm.systems.diffusion_policy.policy import Policy


class Arms:
    """A policy as an actor of `play`: every arm of every table with its own instruction, in one batch."""

    def __init__(self, policy: Policy, arms: int) -> None:
        self._policy, self._arms = policy, arms

    def __call__(self, trials: Trials, rows: NDArray[np.intp]) -> NDArray[np.float64]:
        """Targets [rows, arms, 2] in metres."""
        seen = np.concatenate((trials.state[rows], trials.environment[rows]), axis=-1)
        places = (rows[:, None] * self._arms + np.arange(self._arms)).reshape(-1)
        flat = torch.from_numpy(seen.reshape(len(places), -1).astype(np.float32))
        actions = self._policy.act(flat, torch.from_numpy(places.astype(np.int64)))
        return actions.numpy().astype(np.float64).reshape(len(rows), self._arms, -1)


def roll_out(
    policy: Policy, episodes: Sequence[Episode], texts: Sequence[str | None] | None = None
) -> list[Outcome]:
    """Play all episodes together and return how each went, for every arm in turn.

    Args:
        policy: is reset with the instructions.
        episodes: with the same numbers of arms and things.
        texts: what to say instead, one for each arm of each episode; it is judged by what was meant.
    """
    arms = len(episodes[0].told)
    told: list[str | None] = [one.text for episode in episodes for one in episode.told]
    if texts is not None:
        told = list(texts)
    policy.reset(told)
    scenes, tasks = [e.scene for e in episodes], [e.tasks for e in episodes]
    return [one for outcome in play(scenes, tasks, Arms(policy, arms)) for one in outcome]
