"""What a policy looks at when it is told something: which thing, and where to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from torchfilm.data.table.scenes import PLACES, Scene
from torchfilm.data.table.tasks import Task
from torchfilm.data.table.trials import Trials
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.rollouts import observed
from torchfilm.systems.diffusion_policy.thinking import describe_scene

SPOTS = (None, "obstacle", "goal", *PLACES)
"""Where a thing may have to go, in the order of the encoder "things": nowhere, in the state, landmarks."""


@dataclass(frozen=True)
class Looks:
    """What is looked at, one row for each text: shares that sum to 1.

    Attributes:
        things: of the things.
        spots: of where to, as `SPOTS` has them; nowhere for a thing that is reached.
    """

    things: Float[Tensor, "texts things"]
    spots: Float[Tensor, "texts spots"]

    def tasks(self) -> list[Task]:
        """What that means, without a manner; a thing never goes to the obstacle."""
        possible = self.spots.clone()
        possible[:, SPOTS.index("obstacle")] = 0
        found = []
        for which, spot in zip(self.things.argmax(-1).tolist(), possible.argmax(-1).tolist(), strict=True):
            place = SPOTS[spot]
            found.append(Task(which) if place is None else Task(which, "push", place=place))
        return found


@torch.no_grad()
def looks_of(policy: Policy, scenes: Sequence[Scene], texts: Sequence[str]) -> Looks:
    """What is looked at in the first moment of each scene.

    Args:
        policy: with the encoder "things", over states of the table.
        scenes: with one arm; one for each text.
        texts: what is said.

    Raises:
        ValueError: for unknown words, an empty text, or a policy that hears no words, or looks at everything.
    """
    if not policy.reads:
        raise ValueError("looks_of: expected a policy that hears words, got one that hears none.")
    z, network = policy.reason(texts, [describe_scene(scene) for scene in scenes]), policy.network
    trials = Trials(scenes, [[Task(0)]] * len(scenes))
    seen = observed(trials, trials.running)[:, None].expand(-1, network.config.observations, -1)
    found = network.attention(seen.to(network.unet.out.weight), z)
    things, spots = (logits.softmax(dim=-1).cpu() for logits in found)
    return Looks(things, spots)
