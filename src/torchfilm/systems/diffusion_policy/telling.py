"""Tell a policy something in one's own words, and see what it understood, did, and what its layers heard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from torchfilm.data.table.scenes import Scene
from torchfilm.data.table.tasks import Task
from torchfilm.data.table.trials import Outcome
from torchfilm.modulation import Modulation
from torchfilm.systems.diffusion_policy.inspect_figures import heard_by_site
from torchfilm.systems.diffusion_policy.looking import SPOTS, looks_of
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.rollouts import track


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
    scenes = [scene] * len(texts)
    looks = looks_of(policy, scenes, texts)
    tasks = looks.tasks()
    tracks = track(policy, scenes, tasks, texts)
    return [
        Told(
            text=text,
            task=tasks[row],
            things=looks.things[row].tolist(),
            places=dict(zip(SPOTS, looks.spots[row].tolist(), strict=True)),
            outcome=tracks[row].outcome,
            joints=tracks[row].state[:, :2],
            positions=tracks[row].things,
            heard={site: modulation[row : row + 1] for site, modulation in heard.items()},
        )
        for row, text in enumerate(texts)
    ]
