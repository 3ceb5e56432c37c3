"""Named runs of visual reasoning: the paper's, the laptop's, a tiny one, baselines and ablations."""

import difflib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Literal

from torchfilm.systems.visual_reasoning.baselines import BaselineConfig, Kind
from torchfilm.systems.visual_reasoning.data import Curriculum
from torchfilm.systems.visual_reasoning.model import ReasonerConfig
from torchfilm.training.config import TrainConfig


@dataclass(frozen=True)
class Feed:
    """How questions come to training: how many of a scene at a time, and which ones at the start.

    By default each scene in turn is asked one question, drawn from all of its own. The paper goes through all
    questions in random order instead: there each comes once in an epoch, here some come again before others.
    """

    questions_per_scene: int = 1
    curriculum: Curriculum = field(default_factory=Curriculum)


@dataclass(frozen=True)
class Recipe:
    """One named run: the network, how it is trained, and in which order questions come."""

    config: ReasonerConfig | BaselineConfig
    training: TrainConfig
    feed: Feed = field(default_factory=Feed)
    trained: Literal["all", "generator"] = "all"
    """"generator": only what reads the question learns (fine-tuning); what sees keeps its weights and its
    BatchNorm's averages."""


PAPER_TRAINING = TrainConfig(
    steps=80 * 10_937,
    batch_size=64,
    optimiser="adam_l2",
    lr=3e-4,
    weight_decay=1e-5,
    decay="all",
    grad_clip=None,
    warmup_steps=0,
    schedule="constant",
    ema=None,
    evaluate_steps=10_937,
    best="accuracy",
)
"""80 epochs of 699,989 questions (Perez et al. 2018, section 2.2); the best of the epochs counts."""

LAPTOP_TRAINING = TrainConfig(
    minutes=15,
    batch_size=128,
    optimiser="muon",
    outputs=("classifier.answer",),
    lr=3e-3,
    betas=(0.9, 0.95),
    weight_decay=1e-2,
    cooldown=0.35,
    ema=0.999,
    precision="bfloat16",
    compile=True,
)

LAPTOP_FEED = Feed(questions_per_scene=2, curriculum=Curriculum(start=0.067))

LAPTOP = ReasonerConfig(
    word_dim=64,
    encoder_width=128,
    bag_of_words=True,
    input="maps",
    input_channels=20,
    input_height=8,
    input_width=12,
    margins=(1, 0, 1, 0),
    stem_kernel=1,
    blocks=5,
    channels=64,
    dilations=(1, 2, 3, 1, 2),
    coordinates_in_stem=False,
    projection=128,
    pooling="max_and_mean",
    hidden=256,
    initial_weights="torch",
    identity_noise=0.1,
    local_start=True,
    gamma_offset=0.5,
    generator_std=0.1,
)
"""The paper's architecture at a size for two cores, with a start that finds out soon what words mean."""

LAPTOP_LARGE = replace(LAPTOP, projection=256, hidden=512)
"""The same with a wider classifier, to which a trained laptop network can grow (`growth.py`)."""

LAPTOP_LARGE_TRAINING = replace(LAPTOP_TRAINING, minutes=100)
"""By which the shipped network was trained."""

TINY = replace(
    LAPTOP, word_dim=8, encoder_width=16, blocks=2, channels=8, dilations=(1, 2), projection=16, hidden=16
)


def _baseline(kind: Kind) -> Recipe:
    """A baseline with the laptop's sizes, data, optimiser and budget."""
    return Recipe(BaselineConfig(kind), replace(LAPTOP_TRAINING, outputs=("classifier.3",)), LAPTOP_FEED)


RECIPES: dict[str, Recipe] = {
    "paper": Recipe(ReasonerConfig(), PAPER_TRAINING),
    "paper_pixels": Recipe(
        ReasonerConfig(input="pixels", input_channels=3, input_height=224, input_width=224), PAPER_TRAINING
    ),
    "laptop": Recipe(LAPTOP, LAPTOP_TRAINING, LAPTOP_FEED),
    "laptop_large": Recipe(LAPTOP_LARGE, LAPTOP_LARGE_TRAINING, LAPTOP_FEED),
    "laptop_lstm": _baseline("lstm"),
    "laptop_cnn_lstm": _baseline("cnn_lstm"),
    "laptop_sa": _baseline("stacked_attention"),
    "laptop_rn": _baseline("relation_network"),
    "tiny": Recipe(
        TINY,
        TrainConfig(steps=100, batch_size=64, warmup_steps=10, checkpoint_seconds=None, checkpoint_steps=20),
        LAPTOP_FEED,
    ),
}


@dataclass(frozen=True)
class Ablation:
    """One row of the paper's tables 2 and 3, for any base: what changes, and what the paper measured."""

    change: Callable[[ReasonerConfig], ReasonerConfig]
    paper_accuracy: float
    """Percent on CLEVR's validation split, one run each; of the unchanged network five, +- 0.4."""


def _fields(**changes: object) -> Callable[[ReasonerConfig], ReasonerConfig]:
    """A change that sets fields, whatever the base."""
    return lambda config: replace(config, **changes)  # type: ignore[arg-type]


def _film_first(count: Callable[[int], int]) -> Callable[[ReasonerConfig], ReasonerConfig]:
    """A change that leaves FiLM only in the first count(number of blocks) blocks."""
    return lambda config: replace(config, filmed_blocks=tuple(range(1, max(0, count(config.blocks)) + 1)))


NO_COORDINATES = {
    "coordinates_in_stem": False,
    "coordinates_in_blocks": False,
    "coordinates_in_classifier": False,
}

ABLATIONS: dict[str, Ablation] = {
    "unchanged": Ablation(_fields(), 97.4),
    "beta_zero": Ablation(_fields(emit=("gamma",)), 96.9),
    "gamma_one": Ablation(_fields(emit=("beta",)), 95.9),
    "gamma_sigmoid": Ablation(_fields(bound="sigmoid", gamma_offset=None), 95.9),
    "gamma_tanh": Ablation(_fields(bound="tanh", gamma_offset=None), 96.3),
    "gamma_exp": Ablation(_fields(bound="exp", gamma_offset=None), 96.3),
    "after_relu2": Ablation(_fields(placement="after_relu2"), 97.7),
    "after_conv2": Ablation(_fields(placement="after_conv2"), 97.1),
    "before_conv1": Ablation(_fields(placement="before_conv1"), 95.0),
    "after_residual": Ablation(_fields(placement="after_residual"), 96.6),
    "no_film_in_last_block": Ablation(_film_first(lambda blocks: blocks - 1), 96.8),
    "no_film_in_last_two_blocks": Ablation(_film_first(lambda blocks: blocks - 2), 96.5),
    "film_in_first_block_only": Ablation(_film_first(lambda blocks: 1), 97.3),
    "no_film": Ablation(_film_first(lambda blocks: 0), 21.4),
    "only_1x1_no_coordinates": Ablation(
        _fields(kernel_size=1, stem_kernel=1, dilations=(1,), **NO_COORDINATES), 95.3
    ),
    "no_residual": Ablation(_fields(residual=False), 94.0),
    "no_batch_norm": Ablation(_fields(batch_norm=False), 93.7),
    "blocks_1": Ablation(_fields(blocks=1), 93.5),
    "blocks_2": Ablation(_fields(blocks=2), 97.1),
    "blocks_3": Ablation(_fields(blocks=3), 96.7),
    "blocks_5": Ablation(_fields(blocks=5), 97.4),
    "blocks_6": Ablation(_fields(blocks=6), 97.7),
    "blocks_7": Ablation(_fields(blocks=7), 97.4),
    "blocks_8": Ablation(_fields(blocks=8), 97.6),
    "blocks_12": Ablation(_fields(blocks=12), 96.9),
}
"""Raw pixels, the remaining row of table 2 (97.6), are the recipe `paper_pixels`."""


def ablate(recipe: Recipe, name: str) -> Recipe:
    """Return the recipe with one change of the paper's tables 2 and 3 (a name of ABLATIONS), trained alike.

    Raises ValueError on an unknown name, or on a baseline, which has nothing to ablate.
    """
    if name not in ABLATIONS:
        near = difflib.get_close_matches(name, ABLATIONS, n=3, cutoff=0)
        raise ValueError(f"Ablation: expected a name of ABLATIONS, got {name!r}. Nearest: {', '.join(near)}.")
    if not isinstance(recipe.config, ReasonerConfig):
        raise ValueError(
            f"Ablation {name!r}: expected a FiLM recipe, got the baseline {recipe.config.kind!r}. "
            "Start from 'laptop' or 'paper'."
        )
    return replace(recipe, config=ABLATIONS[name].change(recipe.config))
