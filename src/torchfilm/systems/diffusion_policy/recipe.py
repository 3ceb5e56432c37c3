"""Named runs of the diffusion policy: the paper's, the laptop's, and a tiny one."""

from dataclasses import dataclass, replace

from torchfilm.data.table.scenes import OBSTACLE_RADIUS, PLACES
from torchfilm.systems.diffusion_policy.model import PolicyConfig
from torchfilm.training.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """One named run: the network, how it is trained, and from how many demonstrations."""

    config: PolicyConfig
    training: TrainConfig
    demonstrations: int
    understanding: TrainConfig | None = None
    """How the words are learned first, from what the instructions mean; None: with the actions alone."""


LAPTOP = PolicyConfig(
    observation=46,
    execution=2,
    widths=(32, 64),
    kernel_size=3,
    step_dim=32,
    start="identity",
    encoder="things",
    encoder_width=96,
    things=(6, 3, 12),
    landmarks=tuple(PLACES.values()),
    solids=(OBSTACLE_RADIUS + 0.012,),
    relative=True,
    reasoning=64,
    prediction="sample",
    train_steps=100,
    sample_steps=5,
)
"""State of the table; two levels at a size for one core.

It looks again after every second action and not after eight: a thing that is pushed slides off in 0.4 s.
"""

LAPTOP_TRAINING = TrainConfig(
    minutes=13,
    batch_size=64,
    lr=2e-3,
    betas=(0.9, 0.98),
    weight_decay=1e-3,
    grad_clip=1.0,
    warmup_steps=200,
    schedule="linear",
    cooldown=0.5,
    ema=0.998,
)

UNDERSTANDING = TrainConfig(
    steps=1200,
    batch_size=256,
    lr=3e-3,
    betas=(0.9, 0.98),
    weight_decay=1e-2,
    grad_clip=1.0,
    warmup_steps=100,
    cooldown=0.5,
    ema=None,
    checkpoint_seconds=None,
    tensorboard=False,
)
"""Words, things and ways alone, no actions: about two minutes, which with those of acting make fifteen."""

PAPER_TRAINING = TrainConfig(
    steps=300_000,
    batch_size=256,
    lr=1e-4,
    betas=(0.95, 0.999),
    weight_decay=1e-6,
    decay="all",
    grad_clip=None,
    warmup_steps=500,
    schedule="cosine",
    ema=0.9999,
)
"""AdamW with a cosine, at the rate and the decay of Chi et al. 2023, appendix, table 7.

The paper trains 4500 epochs (section 5.2) of Push-T's 200 demonstrations (table 3), its code 5000 of 90."""

RECIPES: dict[str, Recipe] = {
    "tiny": Recipe(
        replace(LAPTOP, widths=(8, 16), encoder_width=16, reasoning=8, step_dim=8, sample_steps=4),
        TrainConfig(steps=100, batch_size=64, warmup_steps=10, checkpoint_seconds=None),
        50,
    ),
    "laptop": Recipe(LAPTOP, LAPTOP_TRAINING, 40_000, UNDERSTANDING),
    "paper": Recipe(
        PolicyConfig(observation=46, listens=("blocks",)),
        PAPER_TRAINING,
        6000,
    ),
}
