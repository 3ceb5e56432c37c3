"""Diffusion policies with FiLM (Chi et al. 2023), and with a reasoning vector injected by FiLM."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.systems.diffusion_policy.data import Batch as Batch
from torchfilm.systems.diffusion_policy.model import DiffusionPolicy as DiffusionPolicy
from torchfilm.systems.diffusion_policy.model import PolicyConfig as PolicyConfig
from torchfilm.systems.diffusion_policy.recipe import RECIPES as RECIPES
from torchfilm.systems.diffusion_policy.recipe import Recipe as Recipe
from torchfilm.systems.diffusion_policy.schedule import noise_schedule
from torchfilm.training import Loss
from torchfilm.training.checkpoint import load_built, read_config

SHIPPED = Path(__file__).parent / "checkpoint"


def build(config: PolicyConfig) -> DiffusionPolicy:
    """Return the untrained policy of a config."""
    return DiffusionPolicy(config)


def loss(model: nn.Module, batch: Batch) -> Loss:
    """Return the mean squared error of the predicted noise, or of the actions, as the config says.

    Each chunk gets its own diffusion step and noise; `distance` beside it is not weighted by anything.
    """
    assert isinstance(model, DiffusionPolicy)
    config = model.config
    clean = model.scaled_actions(batch.actions, batch.observations)
    noise = torch.randn_like(clean)
    step = torch.randint(config.train_steps, (len(clean),), device=clean.device)
    noisy = noise_schedule(config.train_steps, config.prediction).add_noise(clean, noise, step)
    predicted = model(noisy, step, batch.observations, batch.reasoning)
    target = noise if config.prediction == "epsilon" else clean
    return Loss(functional.mse_loss(predicted.float(), target), len(clean))


@torch.no_grad()
def predict(model: nn.Module, observation: Batch) -> Float[Tensor, "batch horizon action"]:
    """Return chunks of actions in their own unit; the actions in the batch are not read."""
    assert isinstance(model, DiffusionPolicy)
    training = model.training
    model.eval()
    try:
        return model.sample(observation.observations, observation.reasoning)
    finally:
        model.train(training)


def load(path: Path | str | None = None) -> DiffusionPolicy:
    """Return a trained policy in evaluation mode from its folder; None: the shipped checkpoint.

    The folder holds `weights.safetensors` (the normalisation with it) and `config.json`, whose entry
    "network" are the config's fields. Raises ValueError if one is missing or does not fit.
    """
    folder = SHIPPED if path is None else Path(path)
    folder = folder / "model" if (folder / "model" / "config.json").is_file() else folder
    description = folder / "config.json"
    if not description.is_file():
        which = "the shipped checkpoint" if path is None else "a trained policy"
        raise ValueError(
            f"diffusion_policy: expected {which} in {folder}, found no config.json there. "
            "Train one with `torchfilm train diffusion_policy` and give its folder."
        )
    config = read_config(description, "network", PolicyConfig)
    return load_built(description, lambda: build(config), folder / "weights.safetensors").eval()


def describe(config: PolicyConfig) -> dict[str, Any]:
    """Return a config as plain values for JSON."""
    return dataclasses.asdict(config)
