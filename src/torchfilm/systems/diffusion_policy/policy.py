"""Act with a trained policy: observations in, one action at a time out, and instructions in between."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from torchfilm.several import Masked
from torchfilm.systems.diffusion_policy.data import rows_of
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy
from torchfilm.systems.diffusion_policy.reasoning import INSTRUCTION, Vocabulary, check_finite


class Policy:
    """One arm or many at once, each with its own instruction; predicts a chunk and executes part of it.

    Args:
        network: a trained policy, in evaluation mode.
        guidance: beyond 1 the instruction is exaggerated, at twice the cost; see `DiffusionPolicy.sample`.
        steps: of the denoising; default: the config's.
        execution: how many actions of a chunk are executed before the next is planned; default: the
            config's. Fewer cost more and correct earlier what goes astray.
        seed: of the noise that chunks start from.

    Raises:
        ValueError: for an execution beyond the end of a chunk.

    Example:
        policy = Policy(load())
        policy.reset(["push the red ball to the goal and avoid the obstacle"])
        action = policy.act(observation[None])
    """

    def __init__(
        self,
        network: DiffusionPolicy,
        *,
        guidance: float = 1.0,
        steps: int | None = None,
        execution: int | None = None,
        seed: int = 0,
    ) -> None:
        self.network, self.guidance, self.steps = network, guidance, steps
        config = network.config if execution is None else replace(network.config, execution=execution)
        self.execution = config.execution
        self._words = Vocabulary(network.config.vocabulary)
        self._noise = torch.Generator().manual_seed(seed)
        self._heard: dict[str, Any] = {}
        self._texts: list[str | None] = []
        self._history = torch.empty(0)
        self._seen = torch.empty(0, dtype=torch.bool)
        self._chunks = torch.empty(0)
        self._used = torch.empty(0, dtype=torch.int64)

    def reset(
        self, instructions: list[str | None], vectors: Mapping[str, Float[Tensor, "batch n"]] | None = None
    ) -> None:
        """Begin anew: forget observations and planned actions.

        Args:
            instructions: one for each arm; None for an arm that is told nothing.
            vectors: what else is heard, by name, as the config's `vectors` say.

        Raises:
            ValueError: for a text without words, an unknown word, or vectors that are not finite or unknown.
        """
        config, count = self.network.config, len(instructions)
        heard = self._read(list(instructions), dict(vectors or {}))
        self._texts, self._heard = list(instructions), heard
        self._history = torch.zeros(count, config.observations, config.observation)
        self._seen = torch.zeros(count, dtype=torch.bool)
        self._chunks = torch.zeros(count, config.horizon, config.action)
        self._used = torch.full((count,), config.horizon)

    def set_instruction(self, instruction: str | None, *, row: int = 0, flush: bool = True) -> None:
        """Tell an arm something else, in mid-episode.

        Args:
            instruction: as in `reset`.
            row: which arm.
            flush: forget the actions that are planned, so that the very next one obeys; False lets them be
                executed first, which is smoother and comes up to `execution` steps late.

        Raises:
            ValueError: as `reset`; the policy then goes on as before.
        """
        texts = [*self._texts]
        texts[row] = instruction
        vectors = {name: value for name, value in self._heard.items() if name != INSTRUCTION}
        self._heard = self._read(texts, vectors)
        self._texts = texts
        if flush:
            self._used[row] = self.network.config.horizon

    def sense(self, name: str, value: Float[Tensor, "batch n"]) -> None:
        """Give the newest reading of a sensor, one row for each arm; heard from the next chunk on."""
        vectors = {key: held for key, held in self._heard.items() if key != INSTRUCTION} | {name: value}
        self._heard = self._read(self._texts, vectors)

    def act(
        self, observations: Float[Tensor, "rows size"], rows: Tensor | None = None
    ) -> Float[Tensor, "rows action"]:
        """Return the next action of each arm, or of the arms `rows`, after seeing their observations.

        Raises ValueError before `reset`, and for observations that are not finite or of another size.
        """
        chosen = torch.arange(len(self._seen)) if rows is None else rows
        self._see(observations, chosen)
        now = self.network.config.observations - 1
        due = chosen[self._used[chosen] >= self.execution]
        if len(due):
            self._chunks[due] = self._plan(due)
            self._used[due] = 0
        actions = self._chunks[chosen, now + self._used[chosen]]
        self._used[chosen] += 1
        return actions

    def _plan(self, rows: Tensor) -> Float[Tensor, "rows horizon action"]:
        heard = self._of(rows)
        return self.network.sample(
            self._history[rows], heard, guidance=self.guidance, steps=self.steps, generator=self._noise
        )

    def _of(self, rows: Tensor) -> dict[str, Any]:
        """What these rows hear."""
        found: dict[str, Any] = {}
        for name, value in self._heard.items():
            if isinstance(value, Masked):
                inner = rows_of({name: value.value}, rows)[name]
                found[name] = Masked(inner, value.present[rows]) if value.present is not None else inner
            else:
                found[name] = value[rows]
        return found

    def _read(self, texts: list[str | None], vectors: dict[str, Any]) -> dict[str, Any]:
        known = dict(self.network.config.vectors)
        for name, value in vectors.items():
            if name not in known:
                raise ValueError(
                    f"policy: expected vectors among {list(known)}, got {name!r}. "
                    f"Train with it, or leave it out."
                )
            check_finite(name, value)
        heard = dict(vectors)
        present = torch.tensor([text is not None for text in texts], dtype=torch.bool)
        if bool(present.any()):
            filler = next(text for text in texts if text is not None)
            read = self._words([filler if text is None else text for text in texts])
            heard[INSTRUCTION] = Masked(read, present)
        return heard

    def _see(self, observations: Tensor, rows: Tensor) -> None:
        if len(self._seen) == 0:
            raise ValueError("policy: expected reset() to be called first, with the instructions.")
        if observations.shape != (len(rows), self._history.shape[2]):
            raise ValueError(
                f"policy: expected observations ({len(rows)}, {self._history.shape[2]}), one row for each "
                f"arm, got {tuple(observations.shape)}."
            )
        check_finite("observations", observations)
        observations = observations.to(self._history.dtype)
        fresh = rows[~self._seen[rows]]
        self._history[rows] = self._history[rows].roll(-1, dims=1)
        self._history[rows, -1] = observations
        if len(fresh):
            first = observations[~self._seen[rows]]
            self._history[fresh] = first[:, None].expand(-1, self._history.shape[1], -1)
            self._seen[fresh] = True
