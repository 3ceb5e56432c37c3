"""Tell a policy something in one's own words, and see what it understood, did, and what its layers heard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from torchfilm.data.table.scenes import Scene
from torchfilm.data.table.tasks import Task
from torchfilm.data.table.trials import Outcome, Trials
from torchfilm.modulation import Modulation
from torchfilm.systems.diffusion_policy.inspect_figures import heard_by_site
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.reasoning import INSTRUCTION, Vocabulary
from torchfilm.systems.diffusion_policy.rollouts import observed, track
from torchfilm.systems.diffusion_policy.running import SPOTS


@dataclass(frozen=True)
class Told:
    """What came of one instruction.

    Attributes:
        text: as it was told.
        task: what was understood, without the manner; `outcome` is judged by it.
        things: how much each thing was meant, shares of 1.
        places: the same for where to; None is nowhere, a thing that is reached.
        outcome: how it went.
        joints: [steps, 2] radians.
        positions: [steps, things, 2] metres.
        heard: γ and β [1, channels] by site, in the order of the computation.
    """

    text: str
    task: Task
    things: list[float]
    places: Mapping[str | None, float]
    outcome: Outcome
    joints: Float[np.ndarray, "steps 2"]
    positions: Float[np.ndarray, "steps things 2"]
    heard: Mapping[str, Modulation]


def tell(policy: Policy, scene: Scene, texts: Sequence[str]) -> list[Told]:
    """Play a scene once for each text, all together.

    Args:
        policy: with the encoder "things", over states of the table; it is reset.
        scene: with one arm.
        texts: one or more.

    Raises:
        ValueError: for unknown words, an empty text, or a policy that hears no words, or does not say what it
            looks at.
    """
    heard = heard_by_site(policy.network, texts)
    tasks, things, places = _understood(policy, scene, texts)
    tracks = track(policy, [scene] * len(texts), tasks, texts)
    return [
        Told(
            text=text,
            task=tasks[row],
            things=things[row].tolist(),
            places=dict(zip(SPOTS, places[row].tolist(), strict=True)),
            outcome=tracks[row].outcome,
            joints=tracks[row].state[:, :2],
            positions=tracks[row].things,
            heard={site: modulation[row : row + 1] for site, modulation in heard.items()},
        )
        for row, text in enumerate(texts)
    ]


@torch.no_grad()
def _understood(
    policy: Policy, scene: Scene, texts: Sequence[str]
) -> tuple[list[Task], Float[Tensor, "texts things"], Float[Tensor, "texts spots"]]:
    """What is looked at in the first moment: the task for each text, and the shares behind it."""
    network = policy.network
    trials = Trials([scene], [[Task(0)]])
    seen = observed(trials, trials.running)[:, None].expand(len(texts), network.config.observations, -1)
    words = Vocabulary(network.config.vocabulary)(list(texts))
    z = network.reason({INSTRUCTION: words}, len(texts))
    assert z is not None
    things, spots = (logits.softmax(dim=-1) for logits in network.attention(seen, z))
    possible = spots.clone()
    possible[:, SPOTS.index("obstacle")] = 0
    tasks = []
    for which, spot in zip(things.argmax(-1).tolist(), possible.argmax(-1).tolist(), strict=True):
        place = SPOTS[spot]
        tasks.append(Task(which) if place is None else Task(which, "push", place=place))
    return tasks, things, spots
