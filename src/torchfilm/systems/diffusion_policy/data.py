"""Windows of demonstrations: what was seen, what was done then, and what was said."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from torchfilm.training import Draw


class Told(NamedTuple):
    """Words of each text, and how many they are, which is read on the CPU."""

    tokens: Int[Tensor, "batch time"] | Float[Tensor, "batch time dim"]
    lengths: Int[Tensor, " batch"]

    on_cpu = ("lengths",)


@dataclass(frozen=True)
class Batch:
    """Windows: `observations` [batch, steps, size], `actions` [batch, horizon, action], in their units.

    `reasoning` has by name what the policy hears: ("instruction": tokens and lengths), vectors [batch, n].
    """

    observations: Float[Tensor, "batch steps size"]
    actions: Float[Tensor, "batch horizon action"]
    reasoning: dict[str, Any]


@dataclass(frozen=True, eq=False)
class Recordings:
    """Demonstrations as a policy learns from them.

    Attributes:
        observations: [frames, size].
        actions: [frames, action]; action i was done after observation i.
        starts: [episodes + 1]; the frames of episode e are starts[e] to starts[e + 1].
        heard: by name one row per episode: (tokens [episodes, time], lengths [episodes]) or [episodes, n].
    """

    observations: Float[Tensor, "frames size"]
    actions: Float[Tensor, "frames action"]
    starts: Int[np.ndarray, " episodes_and_end"]
    heard: Mapping[str, Any]

    def __post_init__(self) -> None:
        if len(self.observations) != len(self.actions) or self.starts[-1] != len(self.actions):
            raise ValueError(
                f"Recordings: expected one action per observation and an end to the last episode, got "
                f"{len(self.observations)} observations, {len(self.actions)} actions and the end "
                f"{int(self.starts[-1])}."
            )


class Windows:
    """Batches of windows, drawn by chance; edges are padded by repetition, as the original.

    The window of frame t has the observations t - steps + 1 to t and the actions from t - steps + 1 on.

    Args:
        recordings: what to learn from.
        steps, horizon: observations and actions of a window.
        balance: 0 draws all frames evenly, 1 all episodes, however long: a frame of an episode of n frames
            has the weight n^-balance. Slow episodes have many frames that say the same.
        beginnings: share of the draws, 0 to below 1, that are first frames of episodes, where it is decided
            which way to go.
    """

    def __init__(
        self,
        recordings: Recordings,
        steps: int,
        horizon: int,
        balance: float = 0.0,
        beginnings: float = 0.0,
    ) -> None:
        self.recordings, self.steps, self.horizon = recordings, steps, horizon
        lengths = np.diff(recordings.starts)
        self._episode = np.repeat(np.arange(len(lengths)), lengths)
        weights = lengths[self._episode] ** -float(balance)
        weights *= (1 - beginnings) / weights.sum()
        weights[recordings.starts[:-1]] += beginnings / len(lengths)
        self._shares = np.cumsum(weights) / weights.sum()

    def __len__(self) -> int:
        return len(self._episode)

    def __call__(self, draw: Draw) -> Batch:
        """Return this process's share of the batch of one step."""
        chances = draw.rng().random(draw.batch_size)[draw.share()]
        return self.at(np.searchsorted(self._shares, chances, side="right"))

    def at(self, frames: Int[np.ndarray, " batch"]) -> Batch:
        """Return the windows of these frames."""
        recordings, episode = self.recordings, self._episode[frames]
        first, last = recordings.starts[episode][:, None], recordings.starts[episode + 1][:, None] - 1
        begin = frames[:, None] - self.steps + 1
        seen = np.clip(begin + np.arange(self.steps), first, last)
        done = np.clip(begin + np.arange(self.horizon), first, last)
        return Batch(
            recordings.observations[torch.from_numpy(seen)],
            recordings.actions[torch.from_numpy(done)],
            rows_of(recordings.heard, torch.from_numpy(episode)),
        )


def rows_of(heard: Mapping[str, Any], rows: Int[Tensor, " batch"]) -> dict[str, Any]:
    """Return the rows of what is heard; words are cut to the longest text among them."""
    found: dict[str, Any] = {}
    for name, value in heard.items():
        if isinstance(value, tuple):
            tokens, lengths = value[0][rows], value[1][rows]
            found[name] = Told(tokens[:, : int(lengths.max())], lengths)
        else:
            found[name] = value[rows]
    return found
