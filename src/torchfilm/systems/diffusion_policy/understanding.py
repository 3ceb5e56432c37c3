"""Understand instructions before acting on them: which thing is meant, what to do with it, and how.

Demonstrations know what their instructions mean. A network that is asked for that, without a single action,
learns words and where to look at a tenth of the price of the diffusion that follows: what binds "the small
red ball" to one of three things is then there before the first action is denoised.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.blocks.text import real_words
from torchfilm.conditions import Tokens
from torchfilm.systems.diffusion_policy.data import Told, Windows
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy, Reasoning
from torchfilm.systems.diffusion_policy.reasoning import Read
from torchfilm.training import Draw, EpochOrder, Loss

LOOKED = WHICH, WHERE = "which", "where"
"""Names of the labels that are answered by where the encoder looks, and not from the words alone."""

TURNED = THING, FINGER = "thing's way", "finger's way"
"""Names of the answers to which way the thing goes, and the finger."""

Turns = Callable[[Int[np.ndarray, " batch"], Int[np.ndarray, " batch"]], Int[np.ndarray, "batch 2"]]
"""Of episodes and of their frames, counted through all: which way the thing goes, and the finger; an index
into `ways_round`, -1 where there is no way left."""


@dataclass(frozen=True)
class Asked:
    """What is seen and heard, and what it means: labels by name, one class per row."""

    observations: Float[Tensor, "batch steps size"]
    reasoning: dict[str, object]
    labels: dict[str, Int[Tensor, " batch"]]
    turns: Int[Tensor, "batch 2"] | None = None


class Questions:
    """Batches of episodes, each once per epoch, seen at their beginning or, every other one, at any frame.

    Words are left out by chance, so that no meaning hangs on one turn of phrase: what is said in a sentence
    that training never says is then understood more often.

    Args:
        windows: of the recordings.
        labels: by name one class for each episode.
        silence: share of the words that are left out, 0 to below 1; of each text one is kept.
        turns: which way thing and finger go.
    """

    def __init__(
        self,
        windows: Windows,
        labels: Mapping[str, Int[Tensor, " episodes"]],
        silence: float = 0.0,
        turns: Turns | None = None,
    ) -> None:
        self._windows, self._labels, self._silence, self._turns = windows, dict(labels), silence, turns
        self._order = EpochOrder(len(windows.recordings.starts) - 1)

    def __call__(self, draw: Draw) -> Asked:
        """Return this process's share of the batch of one step."""
        episodes = self._order.indices(draw)
        starts = self._windows.recordings.starts
        rng = draw.rng()
        share = rng.random(draw.batch_size)[draw.share()]
        share[::2] = 0
        first, last = starts[episodes], starts[episodes + 1]
        frames = first + np.floor(share * (last - first)).astype(np.int64)
        batch = self._windows.at(frames)
        turns = None if self._turns is None else torch.from_numpy(self._turns(episodes, frames))
        rows = torch.from_numpy(episodes)
        labels = {name: classes[rows] for name, classes in self._labels.items()}
        return Asked(batch.observations, self._partly(batch.reasoning, rng), labels, turns)

    def _partly(self, heard: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
        """What is heard, its words thinned out."""
        return {
            name: thinned(value, self._silence, rng) if isinstance(value, tuple) else value
            for name, value in heard.items()
        }


def thinned(read: Read, share: float, rng: np.random.Generator) -> Read:
    """Return texts in which each word is left out with the chance `share`; of each one word stays."""
    tokens, lengths = read
    chances = torch.from_numpy(rng.random(tokens.shape)).masked_fill(~real_words(tokens, lengths), -1.0)
    kept = (chances >= share) | (chances == chances.amax(dim=1, keepdim=True))
    order = (~kept).int().argsort(dim=1, stable=True)
    lengths = kept.sum(dim=1)
    moved = tokens.gather(1, order).masked_fill(~real_words(tokens, lengths), 0)
    return Told(moved[:, : int(lengths.max())], lengths)


class Understanding(nn.Module):
    """A policy that is asked what an instruction means; the answers' own layers are thrown away afterwards.

    "which" and "where" are answered by the encoder's attention over things and over spots, all others from
    the reasoning vector.

    Args:
        policy: with the encoder "things", if there are labels "which" and "where".
        classes: how many classes each label has, by name.
    """

    def __init__(self, policy: DiffusionPolicy, classes: Mapping[str, int]) -> None:
        super().__init__()
        if policy.reasoning is None:
            raise ValueError("Understanding: expected a policy that hears something, got one without words.")
        self.policy = policy
        self.answers = nn.ModuleDict(
            {name: nn.Linear(policy.reasoning.dim, n) for name, n in classes.items() if name not in LOOKED}
        )

    def forward(
        self, asked: Asked
    ) -> dict[str, tuple[Float[Tensor, "batch classes"], Int[Tensor, " batch"]]]:
        """Return the logits of each answer by name, and what is right; -1 where nothing is."""
        z = self.policy.reason(asked.reasoning, len(asked.observations))
        assert z is not None
        assert self.policy.reasoning is not None
        whole = Tokens(self.policy.reasoning.dim)(z) if isinstance(z, tuple) else z
        found = {name: answer(whole) for name, answer in self.answers.items()}
        if asked.labels.keys() & LOOKED:
            looked = zip(LOOKED, self.policy.attention(asked.observations, z), strict=True)
            found |= {name: logits for name, logits in looked if name in asked.labels}
        answered = {name: (logits, asked.labels[name]) for name, logits in found.items()}
        if asked.turns is not None:
            answered |= self._ways(asked, asked.turns, z)
        return answered

    def _ways(self, asked: Asked, turns: Tensor, z: Reasoning) -> dict[str, tuple[Tensor, Tensor]]:
        """Which way thing and finger go, for someone who knows thing and place, and the way of the other."""
        shares = [
            functional.one_hot(asked.labels[name], classes).to(asked.observations)
            for name, classes in zip(LOOKED, self.policy.looks, strict=True)
        ]
        choices = self.policy.ways(asked.observations, z, *shares, turn=turns[:, 0].clamp(min=0))
        return {
            name: (choice.logits, turn)
            for name, choice, turn in zip(TURNED, choices, turns.unbind(dim=1), strict=True)
        }


def understanding_loss(model: nn.Module, asked: Asked) -> Loss:
    """Return the sum of the cross-entropies in nats, and the share of right answers by label."""
    answers = model(asked)
    losses, right = [], {}
    for name, (logits, label) in answers.items():
        count = (label >= 0).sum().clamp(min=1)
        losses.append(functional.cross_entropy(logits, label, ignore_index=-1, reduction="sum") / count)
        right[name] = ((logits.argmax(dim=1) == label).sum() / count).detach()
    return Loss(torch.stack(losses).sum(), len(asked.observations), right)
