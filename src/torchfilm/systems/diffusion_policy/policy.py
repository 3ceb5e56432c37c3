"""Act with a trained policy: observations in, one action at a time out, and instructions in between."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import ArrayLike
from torch import Tensor

from torchfilm.blocks.packing import pack_convolutions
from torchfilm.several import Masked
from torchfilm.systems.diffusion_policy.ears import Ears, Heard
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy, Reasoning, Values
from torchfilm.systems.diffusion_policy.reasoning import check_finite
from torchfilm.systems.diffusion_policy.thinking import Reader

Rows = Int[Tensor, " rows"] | Sequence[int] | np.ndarray


class Policy:
    """One arm or many at once, each with its own instruction; predicts a chunk and executes part of it.

    The noise that a chunk starts from depends on seed, arm, and how many chunks that arm has begun since its
    reset: the same episode has the same actions again, whatever other arms do. What is heard is made of
    words once, when it changes, and not for each chunk.

    Args:
        network: a trained policy, in evaluation mode, on any device.
        readers: what makes vectors of instructions, by the names of the network's `vectors`.
        guidance: beyond 1 the instruction is exaggerated, at twice the cost; see `DiffusionPolicy.sample`.
        steps: of the denoising; default: the config's.
        execution: how many actions of a chunk are executed before the next is planned; default: the
            config's. Fewer cost more and correct earlier what goes astray.
        seed: of the noise; 0 or more.
        pack: keep a second copy of the weights of wide convolutions, in the order in which a CPU reads them:
            faster, and equal to 1e-6. They are replaced in the network (`torchfilm.blocks.packing`), which
            trains, saves and loads as before.

    Raises:
        ValueError: for an execution beyond the end of a chunk, a negative seed, or readers that do not fit.

    Example:
        policy = Policy(load())
        policy.reset(["push the red ball to the goal and avoid the obstacle"])
        action = policy.act(observation[None])
    """

    def __init__(
        self,
        network: DiffusionPolicy,
        *,
        readers: Mapping[str, Reader] | None = None,
        guidance: float = 1.0,
        steps: int | None = None,
        execution: int | None = None,
        seed: int = 0,
        pack: bool = True,
    ) -> None:
        if seed < 0:
            raise ValueError(f"policy: expected a seed of 0 or more, got {seed}.")
        self.network, self.guidance, self.steps, self.seed = network, guidance, steps, seed
        config = network.config if execution is None else replace(network.config, execution=execution)
        self.execution = config.execution
        if pack:
            pack_convolutions(network.unet)
        self._ears = Ears(network.config, readers or {})
        self._heard: list[Heard] = []
        self._reasoned: Reasoning | None = None
        self._values: tuple[list[int], float, list[Values]] | None = None
        self._begin(0)

    @property
    def reads(self) -> bool:
        """Whether instructions are heard at all, as words or by readers."""
        return self._ears.reads

    @property
    def thoughts(self) -> dict[str, list[str | None]]:
        """What the readers wrote about each arm's instruction, by name; None for an arm told nothing."""
        return {name: [one.thoughts.get(name) for one in self._heard] for name in self._ears.readers}

    def reset(
        self,
        instructions: Sequence[str | None],
        vectors: Mapping[str, ArrayLike | Tensor | Masked | None] | None = None,
        *,
        scenes: Sequence[str] | None = None,
        rows: Rows | None = None,
    ) -> None:
        """Begin anew: forget observations, planned actions, and what was heard.

        Args:
            instructions: one for each arm; None for an arm that is told nothing.
            vectors: what else is heard, by name [arms, size], as the config's `vectors` say; None, absent, or
                `Masked` where it is missing.
            scenes: in words, one for each arm, for readers that ask for them.
            rows: which arms begin anew, as in a vector of environments; all else has one row for each of
                these. Default: all, however many there were.

        Raises:
            ValueError: for a text without words, an unknown word, vectors that are not finite, of another
                shape or unknown, or rows that are not there; the policy then goes on as before.
        """
        chosen = None if rows is None else self._rows(rows)
        heard = self._ears.hear(instructions, scenes, vectors)
        if chosen is None:
            self._begin(len(heard))
            self._heard = heard
        else:
            _check_count("instructions", len(heard), len(chosen))
            self._hears(dict(zip(chosen.tolist(), heard, strict=True)))
            self._seen[chosen], self._planned[chosen] = False, 0
            self._used[chosen] = self.network.config.horizon

    def set_instruction(
        self, instruction: str | None, *, row: int = 0, flush: bool = True, scene: str | None = None
    ) -> None:
        """Tell an arm something else, in mid-episode; its readers read it at once.

        Args:
            instruction: as in `reset`.
            row: which arm.
            flush: forget the actions that are planned, so that the very next one obeys; False lets them be
                executed first, which is smoother and comes up to `execution` steps late.
            scene: in words, as it stands now; default: as it was told before.

        Raises:
            ValueError: as `reset`; the policy then goes on as before.
        """
        self._rows([row])
        before = self._heard[row]
        scene = before.scene if scene is None else scene
        (after,) = self._ears.hear([instruction], None if scene is None else [scene])
        felt = {name: value for name, value in before.vectors.items() if name not in self._ears.readers}
        self._hears({row: replace(after, vectors={**felt, **after.vectors})})
        if flush:
            self._used[row] = self.network.config.horizon

    def sense(self, name: str, value: ArrayLike | Tensor | Masked | None) -> None:
        """Give the newest reading of a sensor [arms, size], heard from the next chunk on.

        None is a sensor that lacks, `Masked` one that some arms lack. Raises ValueError as `reset`.
        """
        self._check_begun()
        readings = self._ears.feel(name, value, len(self._heard))
        for row, reading in enumerate(readings):
            others = {key: held for key, held in self._heard[row].vectors.items() if key != name}
            felt = others if reading is None else {**others, name: reading}
            self._hears({row: replace(self._heard[row], vectors=felt)})

    @torch.no_grad()
    def reason(self, instructions: Sequence[str | None], scenes: Sequence[str] | None = None) -> Reasoning:
        """Return what the network would make of instructions, for one that hears; arms go on as before.

        Raises ValueError as `reset`.
        """
        return self._reason(self._ears.hear(instructions, scenes))

    @torch.no_grad()
    def act(
        self, observations: Float[Tensor, "rows size"] | np.ndarray, rows: Rows | None = None
    ) -> Float[Tensor, "rows action"]:
        """Return the next action of each arm, or of the arms `rows`, after seeing their observations.

        Raises ValueError before `reset`, for rows that are not there, and for observations that are not
        finite or of another size.
        """
        chosen = self._rows(range(len(self._heard)) if rows is None else rows)
        self._see(observations, chosen)
        now = self.network.config.observations - 1
        due = chosen[self._used[chosen] >= self.execution]
        if len(due):
            self._chunks[due] = self._plan(due)
            self._used[due], self._planned[due] = 0, self._planned[due] + 1
        actions = self._chunks[chosen, now + self._used[chosen]]
        self._used[chosen] += 1
        return actions

    def _begin(self, arms: int) -> None:
        """Make place for this many arms, which have seen and planned nothing."""
        config, like = self.network.config, self._like()
        self._history = like.new_zeros(arms, config.observations, config.observation)
        self._chunks = like.new_zeros(arms, config.horizon, config.action)
        self._seen = torch.zeros(arms, dtype=torch.bool)
        self._used = torch.full((arms,), config.horizon)
        self._planned = torch.zeros(arms, dtype=torch.int64)
        self._reasoned = self._values = None

    def _hears(self, rows: Mapping[int, Heard]) -> None:
        """Let these arms hear something else."""
        for row, heard in rows.items():
            self._heard[row] = heard
        self._reasoned = self._values = None

    def _plan(self, rows: Tensor) -> Float[Tensor, "rows horizon action"]:
        drawn = [
            np.random.SeedSequence((self.seed, row, number)).generate_state(1, np.uint64)
            for row, number in zip(rows.tolist(), self._planned[rows].tolist(), strict=True)
        ]
        random = [torch.Generator().manual_seed(int(state[0])) for state in drawn]
        return self.network.chunk(
            self._history[rows],
            *self._values_of(rows),
            guidance=self.guidance,
            steps=self.steps,
            generator=random,
        )

    def _values_of(self, rows: Tensor) -> list[Values]:
        """What these rows have heard and, with guidance, would have of nothing; kept until it changes."""
        key = rows.tolist()
        if self._values is None or self._values[:2] != (key, self.guidance):
            if self._reasoned is None:
                self._reasoned = self._reason(self._heard)
            heard = [_picked(self._reasoned, key)]
            if self.guidance != 1.0:
                heard.append(self.network.reason({}, len(key)))
            self._values = key, self.guidance, [self.network.listen(one) for one in heard]
        return self._values[2]

    def _reason(self, arms: Sequence[Heard]) -> Any:
        return self.network.reason(self._ears.conditions(arms, self._like()), len(arms))

    def _like(self) -> Tensor:
        """A tensor on the device and in the precision of the network."""
        return self.network.unet.out.weight

    def _check_begun(self) -> None:
        if not self._heard:
            raise ValueError("policy: expected reset() to be called first, with the instructions.")

    def _rows(self, rows: Rows | range) -> Int[Tensor, " rows"]:
        """Rows that are there, each once."""
        self._check_begun()
        found = torch.as_tensor(rows)
        if found.dtype == torch.bool:
            found = found.nonzero().squeeze(1)
        listed = found.tolist()
        if len(set(listed)) < len(listed) or not all(0 <= row < len(self._heard) for row in listed):
            raise ValueError(
                f"policy: expected rows of arms from 0 to {len(self._heard) - 1}, each once, got {listed}. "
                f"To have another number of arms reset all of them."
            )
        return found.to("cpu", torch.int64)

    def _see(self, observations: Tensor | np.ndarray, rows: Tensor) -> None:
        seen = torch.as_tensor(observations)
        if seen.shape != (len(rows), self._history.shape[2]):
            raise ValueError(
                f"policy: expected observations ({len(rows)}, {self._history.shape[2]}), one row for each "
                f"arm, got {tuple(seen.shape)}. Of one arm give observation[None]."
            )
        seen = seen.to(self._history)
        check_finite("observations", seen)
        self._history[rows] = self._history[rows].roll(-1, dims=1)
        self._history[rows, -1] = seen
        fresh = ~self._seen[rows]
        if bool(fresh.any()):
            self._history[rows[fresh]] = seen[fresh, None].expand(-1, self._history.shape[1], -1)
            self._seen[rows] = True


def _picked(z: Reasoning | None, rows: list[int]) -> Reasoning | None:
    return (z[0][rows], z[1][rows]) if isinstance(z, tuple) else None if z is None else z[rows]


def _check_count(what: str, found: int, expected: int) -> None:
    if found != expected:
        raise ValueError(f"policy: expected {expected} {what}, one for each of the rows, got {found}.")
