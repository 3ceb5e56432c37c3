"""Diffusion over action chunks by the schedulers of `diffusers`: noise, and its removal by DDPM or DDIM."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from torchfilm.extras import needed

Sampler = Literal["ddpm", "ddim"]
Prediction = Literal["epsilon", "sample"]
Random = torch.Generator | Sequence[torch.Generator] | None
"""Where noise comes from: one generator for all samples, one for each, or torch's own state."""


@functools.cache
def noise_schedule(train_steps: int, prediction: Prediction) -> Any:
    """The DDPM scheduler that adds the noise of training.

    As the original: cosine betas ("squaredcos_cap_v2"), small fixed variance, actions clipped to -1..1.
    Raises ValueError without the package `diffusers`.
    """
    return _kind("DDPMScheduler")(
        num_train_timesteps=train_steps,
        beta_schedule="squaredcos_cap_v2",
        variance_type="fixed_small",
        clip_sample=True,
        prediction_type=prediction,
    )


def sampling_schedule(train_steps: int, prediction: Prediction, sampler: Sampler, steps: int) -> Any:
    """A fresh scheduler with `steps` timesteps set: "ddpm" is the original's, "ddim" its fast one.

    Raises ValueError without the package `diffusers`, and for more steps than were trained.
    """
    if not 1 <= steps <= train_steps:
        raise ValueError(
            f"sampling: expected 1 to {train_steps} steps, the number trained with, got {steps}."
        )
    if sampler == "ddpm":
        schedule = _kind("DDPMScheduler").from_config(noise_schedule(train_steps, prediction).config)
    else:
        schedule = _kind("DDIMScheduler")(
            num_train_timesteps=train_steps,
            beta_schedule="squaredcos_cap_v2",
            clip_sample=True,
            set_alpha_to_one=True,
            steps_offset=0,
            prediction_type=prediction,
        )
    schedule.set_timesteps(steps)
    return schedule


def noise_like(samples: Tensor, shape: tuple[int, ...], generator: Random) -> Tensor:
    """Gaussian noise [len(samples), *shape], of their precision and on their device.

    It is drawn where the generator is, so one on the CPU gives the same numbers for every device.
    """
    whole = (len(samples), *shape)
    if isinstance(generator, Sequence):
        rows = [torch.randn(shape, generator=one, device=one.device) for one in generator]
        return torch.stack(rows).to(samples)
    device = samples.device if generator is None else generator.device
    return torch.randn(whole, generator=generator, device=device).to(samples)


def _kind(name: str) -> Any:
    with needed("diffusion policies need the schedulers of diffusers", "robots"):
        import diffusers
    return getattr(diffusers, name)
