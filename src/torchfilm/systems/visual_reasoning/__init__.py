"""FiLM for visual reasoning: a network that answers questions about pictures (Perez et al. 2018)."""

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as functional
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.systems.visual_reasoning.baselines import Baseline as Baseline
from torchfilm.systems.visual_reasoning.baselines import BaselineConfig as BaselineConfig
from torchfilm.systems.visual_reasoning.data import Batch as Batch
from torchfilm.systems.visual_reasoning.model import ReasonerConfig as ReasonerConfig
from torchfilm.systems.visual_reasoning.model import VisualReasoner as VisualReasoner
from torchfilm.systems.visual_reasoning.recipe import ABLATIONS as ABLATIONS
from torchfilm.systems.visual_reasoning.recipe import RECIPES as RECIPES
from torchfilm.systems.visual_reasoning.recipe import Recipe as Recipe
from torchfilm.systems.visual_reasoning.recipe import ablate as ablate
from torchfilm.training import Loss
from torchfilm.training.checkpoint import load_built, read_config

SHIPPED = Path(__file__).parent / "checkpoint"


def build(config: ReasonerConfig | BaselineConfig) -> VisualReasoner | Baseline:
    """Return the untrained network of a config: FiLM or a baseline."""
    return Baseline(config) if isinstance(config, BaselineConfig) else VisualReasoner(config)


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Return the mean cross-entropy of the answers, in nats, with the accuracy (0..1) beside it."""
    logits = model(batch.images, batch.questions, batch.lengths, batch.scene_index).float()
    right = (logits.argmax(dim=1) == batch.answers).float().mean()
    return Loss(
        functional.cross_entropy(logits, batch.answers), len(batch.answers), {"accuracy": right.detach()}
    )


@torch.no_grad()
def predict(model: nn.Module, observation: Batch) -> Float[Tensor, "batch answers"]:
    """Return the probability of each answer; the answers in the observation are not read."""
    training = model.training
    model.eval()
    try:
        logits = model(
            observation.images, observation.questions, observation.lengths, observation.scene_index
        )
    finally:
        model.train(training)
    return logits.float().softmax(dim=1)


def load(path: Path | str | None = None) -> VisualReasoner | Baseline:
    """Return a trained network in evaluation mode from its folder; None: the shipped checkpoint.

    The folder holds `weights.safetensors` and `config.json`, whose entry "network" are the config's fields
    (`describe` writes them). Raises ValueError if the folder or one of the two is missing or does not fit.
    """
    folder = SHIPPED if path is None else Path(path)
    description = folder / "config.json"
    if not description.is_file():
        which = "the shipped checkpoint" if path is None else "a trained network"
        raise ValueError(
            f"visual_reasoning: expected {which} in {folder}, found no config.json there. "
            "Train one with `torchfilm train visual_reasoning` and give its folder."
        )
    config = read_config(description, "network", _config)
    return load_built(description, lambda: build(config), folder / "weights.safetensors").eval()


def describe(config: ReasonerConfig | BaselineConfig) -> dict[str, Any]:
    """Return a config as plain values for JSON."""
    return dataclasses.asdict(config)


def _config(**fields: Any) -> ReasonerConfig | BaselineConfig:
    """The config that `describe` gave these fields of."""
    return BaselineConfig(**fields) if "kind" in fields else ReasonerConfig(**fields)
