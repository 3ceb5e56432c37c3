"""A U-Net over sequences whose residual blocks are modulated by diffusion step and condition."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchfilm.absorption import absorbed
from torchfilm.conditions import Scalars
from torchfilm.functional import film
from torchfilm.fusion import Fusion
from torchfilm.generator import Generator
from torchfilm.modulation import Modulation
from torchfilm.tables import raw_of_others

Placement = Literal["after_activation", "before_activation"]

_SHORTEST, _LONGEST = 2 * math.pi, 2e4 * math.pi  # periods: frequencies 1 to 1e-4, per step


class Convolved(nn.Module):
    """Convolution, group norm, Mish; FiLM behind the Mish or, absorbed by the norm, in front of it."""

    def __init__(self, channels_in: int, channels: int, kernel_size: int, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(channels_in, channels, kernel_size, padding=kernel_size // 2)
        self.norm = nn.GroupNorm(groups, channels)
        self.activation = nn.Mish()

    def forward(self, x: Float[Tensor, "batch c t"]) -> Float[Tensor, "batch d t"]:
        """Return mish(norm(conv(x)))."""
        return self.activation(self.norm(self.conv(x)))

    def modulated(self, x: Tensor, modulation: Modulation, placement: Placement, site: str) -> Tensor:
        """Return the same, modulated at `placement`: gamma * y + beta, times the gate where there is one."""
        x, m = self.conv(x), modulation
        if placement == "after_activation":
            return film(self.activation(self.norm(x)), m.gamma, m.beta, gate=m.gate, site=site)
        y = absorbed(nn.GroupNorm, self.norm, x, m)
        if y is None:
            y = film(self.norm(x), m.gamma, m.beta, gate=m.gate, site=site)
        return self.activation(y)


class ResidualBlock1d(nn.Module):
    """Two convolutions beside a shortcut; the first one is modulated: y = f2(FiLM(f1(x))) + shortcut(x)."""

    def __init__(
        self, channels_in: int, channels: int, kernel_size: int, groups: int, placement: Placement
    ) -> None:
        super().__init__()
        self.first = Convolved(channels_in, channels, kernel_size, groups)
        self.second = Convolved(channels, channels, kernel_size, groups)
        self.shortcut = (
            nn.Identity() if channels_in == channels else nn.Conv1d(channels_in, channels, kernel_size=1)
        )
        self.placement: Placement = placement

    def forward(
        self,
        x: Float[Tensor, "batch c t"],
        modulation: Modulation,
        *,
        site: str = "",
        fusion: Fusion | None = None,
        value: Any = None,
    ) -> Float[Tensor, "batch d t"]:
        """Return the block's output; `value` is what else is injected behind the modulation, by `fusion`."""
        y = self.first.modulated(x, modulation, self.placement, site)
        if fusion is not None:
            y = fusion.apply(y, value, 1, site)
        return self.second(y) + self.shortcut(x)


@dataclass(frozen=True)
class Convolution:
    """What all convolutions of a U-Net share."""

    kernel_size: int = 5
    """Odd."""
    groups: int = 8
    """Of the group norm behind it; divides every width."""


class ConditionalUnet1d(nn.Module):
    """Predict what the noise of a sequence is, given the diffusion step and a condition.

    The U-Net of diffusion policies (Chi et al. 2023, arXiv 2303.04137): per level two residual blocks and a
    stride of two on the way down, two blocks in the middle, and the way up with the skipped features beside;
    every block is modulated by its own gamma(l), beta(l), made from condition and step together:

        c = [step_encoder(k), condition],  [gamma_l, beta_l] = W_l mish(c) + b_l,  y = gamma_l f1(x) + beta_l

    gamma is raw there, so about 0 at the start (`start="original"`); with `start="identity"` it is 1 + a
    number that starts at 0, and the network begins as if it were not conditioned.

    mish acts on each number alone and W is linear, so what the step and the condition contribute is
    separable, exactly: `step_rows` for a whole schedule once, `condition_rows` once per observation, and
    their sum for each step of the denoising.

    Args:
        channels: numbers per element of the sequence, A.
        cond_dim: size of the condition.
        widths: channels of each level, down; lengths are divisible by 2^(levels - 1).
        step_dim: size of the encoded diffusion step.
        convolution: kernel and groups of the norms, the same everywhere.
        emit: what is made from the condition; ("beta",) is the original with cond_predict_scale=False.
        placement: behind norm and activation, as the original, or between the two, as Perez et al. 2018.
        start: as above.

    Raises:
        ValueError: for widths that the groups do not share evenly, and an even kernel.

    Example:
        >>> unet = ConditionalUnet1d(2, 40, widths=(16, 32), step_dim=8)
        >>> unet(torch.rand(3, 16, 2), torch.tensor([0, 50, 99]), torch.rand(3, 40)).shape
        torch.Size([3, 16, 2])
    """

    def __init__(
        self,
        channels: int,
        cond_dim: int,
        *,
        widths: Sequence[int] = (256, 512, 1024),
        step_dim: int = 256,
        convolution: Convolution = Convolution(),
        emit: tuple[Literal["gamma", "beta"], ...] = ("gamma", "beta"),
        placement: Placement = "after_activation",
        start: Literal["original", "identity"] = "original",
    ) -> None:
        super().__init__()
        kernel_size, groups = convolution.kernel_size, convolution.groups
        _check(widths, kernel_size, groups)
        self.widths, self.cond_dim, self.step_dim = tuple(widths), cond_dim, step_dim
        self.step_encoder = nn.Sequential(
            Scalars(1, step_dim, min_period=_SHORTEST, max_period=_LONGEST),
            nn.Linear(step_dim, 4 * step_dim),
            nn.Mish(),
            nn.Linear(4 * step_dim, step_dim),
        )
        plan = _plan(channels, self.widths)
        self.sites = {name: width for name, (_, width) in plan.items()}
        raw = start == "original"
        self.generator = Generator(
            step_dim + cond_dim,
            self.sites,
            trunk=("mish",),
            emit=emit,
            init="default" if raw else "identity",
            gamma_offset=0.0 if raw and "gamma" in emit else None,
        )
        self.blocks = nn.ModuleDict(
            {name: ResidualBlock1d(*pair, kernel_size, groups, placement) for name, pair in plan.items()}
        )
        self.down = nn.ModuleList(nn.Conv1d(w, w, 3, stride=2, padding=1) for w in self.widths[:-1])
        self.up = nn.ModuleList(
            nn.ConvTranspose1d(w, w, 4, stride=2, padding=1) for w in reversed(self.widths[:-1])
        )
        self.last = Convolved(self.widths[0], self.widths[0], kernel_size, groups)
        self.out = nn.Conv1d(self.widths[0], channels, kernel_size=1)

    def forward(
        self,
        x: Float[Tensor, "batch time channels"],
        step: Int[Tensor, " batch"],
        condition: Float[Tensor, "batch cond"],
        *,
        fusion: Fusion | None = None,
        injected: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch time channels"]:
        """Return the prediction for noisy sequences, their diffusion steps (0, 1, ...) and conditions."""
        return self.denoise(x, self.modulations(step, condition), fusion=fusion, injected=injected)

    def modulations(
        self, step: Int[Tensor, " batch"], condition: Float[Tensor, "batch cond"]
    ) -> dict[str, Modulation]:
        """Return gamma and beta of every block for diffusion steps (0, 1, ...) and conditions."""
        return self.generator(torch.cat([self._encoded(step), condition], dim=-1))

    def denoise(
        self,
        x: Float[Tensor, "batch time channels"],
        modulations: Mapping[str, Modulation],
        *,
        fusion: Fusion | None = None,
        injected: Mapping[str, Any] | None = None,
    ) -> Float[Tensor, "batch time channels"]:
        """Return the prediction for the modulations of all blocks by name.

        injected: what else each block listens to, behind its modulation: a Modulation, composed with the
        block's own, or a value of `fusion`. A block without one is left alone.

        Raises ValueError for a length that is not divisible by 2^(levels - 1).
        """
        if x.shape[1] % 2 ** len(self.down):
            raise ValueError(
                f"ConditionalUnet1d: expected sequences [batch, time, channels] with a time divisible by "
                f"{2 ** len(self.down)}, got {tuple(x.shape)}.\n"
                f"Each of the {len(self.down)} strides halves it: pad the sequence, or use fewer widths."
            )

        def block(name: str, x: Tensor) -> Tensor:
            m, value = modulations[name], None if injected is None else injected.get(name)
            if isinstance(value, Modulation):
                return self.blocks[name](x, value.compose(m), site=name)
            other = None if value is None else fusion
            return self.blocks[name](x, m, site=name, fusion=other, value=value)

        x, skipped = x.transpose(1, 2), []
        for level in range(len(self.widths)):
            x = block(f"down{level}_1", block(f"down{level}_0", x))
            skipped.append(x)
            if level < len(self.down):
                x = self.down[level](x)
        x = block("mid_1", block("mid_0", x))
        for level, rise in enumerate(self.up):
            x = torch.cat([x, skipped.pop()], dim=1)  # the features of the first level are not used again
            x = rise(block(f"up{level}_1", block(f"up{level}_0", x)))
        return self.out(self.last(x)).transpose(1, 2)

    def step_rows(self, steps: Int[Tensor, " steps"]) -> Float[Tensor, "steps rows"]:
        """Return what diffusion steps contribute to all rows of gamma and beta, without any condition."""
        encoded = self._encoded(steps)
        nothing = encoded.new_zeros(1, self.step_dim + self.cond_dim)
        padded = torch.cat([encoded, encoded.new_zeros(steps.shape[0], self.cond_dim)], dim=-1)
        return self.generator.raw(padded) - self.generator.raw(nothing)

    def condition_rows(self, condition: Float[Tensor, "batch cond"]) -> Float[Tensor, "batch rows"]:
        """Return what conditions contribute to all rows, biases included; the rest is `step_rows`."""
        return raw_of_others(self.generator, condition, 0, self.step_dim)

    def _encoded(self, step: Int[Tensor, " batch"]) -> Float[Tensor, "batch d"]:
        """Encode steps in float32 or wider, and go on in the precision of the weights."""
        dtype = self.out.weight.dtype
        features = self.step_encoder[0](step[:, None].to(torch.promote_types(dtype, torch.float32)))
        return self.step_encoder[1:](features.to(dtype))


def _plan(channels: int, widths: Sequence[int]) -> dict[str, tuple[int, int]]:
    """Channels in and out of each block by name, in the order of the computation."""
    plan: dict[str, tuple[int, int]] = {}
    for level, width in enumerate(widths):
        plan |= {f"down{level}_0": (channels, width), f"down{level}_1": (width, width)}
        channels = width
    plan |= {"mid_0": (channels, channels), "mid_1": (channels, channels)}
    for level, width in enumerate(reversed(widths[:-1])):
        plan |= {f"up{level}_0": (2 * channels, width), f"up{level}_1": (width, width)}
        channels = width
    return plan


def _check(widths: Sequence[int], kernel_size: int, groups: int) -> None:
    if not widths or any(width < 1 or width % groups for width in widths) or kernel_size % 2 == 0:
        raise ValueError(
            f"ConditionalUnet1d: expected widths divisible by groups={groups} and an odd kernel_size, "
            f"got {tuple(widths)} and {kernel_size}.\n"
            f"The paper's are (256, 512, 1024), 8 groups and a kernel of 5."
        )
