"""A diffusion policy that listens: a U-Net over action chunks, modulated by reasoning in every block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from torchfilm.blocks.unet1d import ConditionalUnet1d, Convolution, Placement
from torchfilm.fusion import Film, Matched, resolve
from torchfilm.modulation import Modulation
from torchfilm.systems.diffusion_policy.normalisation import MinMax
from torchfilm.systems.diffusion_policy.observing import (
    Choice,
    FlatEncoder,
    Layout,
    Listened,
    Seen,
    ThingsEncoder,
)
from torchfilm.systems.diffusion_policy.reasoning import build_reasoning
from torchfilm.systems.diffusion_policy.schedule import (
    Prediction,
    Random,
    Sampler,
    noise_like,
    sampling_schedule,
)

Place = Literal["encoder", "condition", "blocks"]
Reasoning = Float[Tensor, "batch z"] | tuple[Float[Tensor, "batch words z"], Bool[Tensor, "batch words"]]
"""One vector for each sample; for cross-attention one for each word, and which words are real."""
Values = dict[str, dict[str, Any]]
"""What listens has heard: by place and site, a Modulation or what else the fusion applies."""


@dataclass(frozen=True)
class PolicyConfig:
    """What a policy is made of; the defaults are the original's U-Net (Chi et al. 2023) over a flat state."""

    observation: int = 20
    """Numbers of one observation."""
    action: int = 2
    observations: int = 2
    """How many observations the policy sees, the last one included."""
    horizon: int = 16
    """How many actions are predicted, from that of the first observation on."""
    execution: int = 8
    """How many of them are executed before the next prediction, from that of the last observation on."""

    widths: tuple[int, ...] = (256, 512, 1024)
    kernel_size: int = 5
    groups: int = 8
    step_dim: int = 256
    emit: tuple[Literal["gamma", "beta"], ...] = ("gamma", "beta")
    placement: Placement = "after_activation"
    start: Literal["original", "identity"] = "original"

    encoder: Literal["none", "flat", "things"] = "none"
    """"none": the flattened observations are the condition; else an encoder, to which "encoder" refers."""
    encoder_width: int = 128
    things: tuple[int, int, int] | None = None
    """The layout of the state for the encoder "things": numbers of the arm, things, numbers of each."""
    landmarks: tuple[tuple[float, float], ...] = ()
    """Fixed positions in metres that the encoder "things" can go to, beside those in the state."""
    solids: tuple[float, ...] = ()
    """Radii in metres of the first further positions of the state, which the encoder "things" goes round."""
    relative: bool = False
    """Actions are predicted from the finger's last position (as `things` says) and not from the origin."""

    vocabulary: tuple[str, ...] = ()
    vectors: tuple[tuple[str, int], ...] = ()
    """Name and size of what else is heard: sensors, thoughts of a language model."""
    reasoning: int = 128
    """Numbers that each of them contributes to the reasoning vector."""
    dropout: float = 0.1
    """Share of the training samples from which a condition is kept, so that guidance and silence work."""
    listens: tuple[Place, ...] = ("encoder", "blocks")
    """What the reasoning vector modulates: the layers of the observation encoder, the condition vector in
    front of the network (as the released DiffusionVLA), every block of the U-Net by its own gamma, beta."""
    fusion: str = "film"
    """How it does that: a name of `torchfilm.fusion.FUSIONS`."""
    head: str = "linear"
    """Of FiLM's generators; "lowrank:R" costs a fraction of the parameters."""
    matched: bool = False
    """Choose the fusion's inner width so that it adds as many parameters as FiLM would at the same places."""

    train_steps: int = 100
    prediction: Prediction = "epsilon"
    sampler: Sampler = "ddim"
    sample_steps: int = 10

    def __post_init__(self) -> None:
        if not 1 <= self.execution <= self.horizon - self.observations + 1:
            raise ValueError(
                f"PolicyConfig: expected an execution of 1 to horizon - observations + 1 = "
                f"{self.horizon - self.observations + 1}, got {self.execution}."
            )
        if "encoder" in self.listens and self.encoder == "none" and self.conditions:
            raise ValueError(
                "PolicyConfig: expected an encoder that can listen, got listens with 'encoder' and "
                "encoder='none'. Use encoder='flat', or listens=('blocks',)."
            )
        if (self.encoder == "things" or self.relative) and self.things is None:
            raise ValueError(
                "PolicyConfig: expected `things`, the layout of the state, for the encoder 'things' and for "
                "relative actions, got None. The table's is (6, 3, 12)."
            )
        if self.encoder == "things" and self.action != 2:
            raise ValueError(
                f"PolicyConfig: expected actions of 2 numbers, positions on the table, for the encoder "
                f"'things', got {self.action}. Use encoder='flat'."
            )

    @property
    def conditions(self) -> bool:
        """Whether there is anything to listen to."""
        return bool(self.vocabulary or self.vectors)


@dataclass(frozen=True)
class Prepared:
    """What is the same for all denoising steps of a chunk.

    Attributes:
        condition: what the generators of the U-Net read.
        injected: what the blocks hear, by name.
        heading: the unit vector along which the U-Net acts; None: along the axes of the actions.
    """

    condition: Float[Tensor, "batch cond"]
    injected: dict[str, Any] | None
    heading: Float[Tensor, "batch 2"] | None = None

    def turned(self, actions: Float[Tensor, "batch time 2"], *, back: bool = False) -> Tensor:
        """Return actions along and across the heading, or `back` from there."""
        if self.heading is None:
            return actions
        cos, sin = self.heading[:, None, 0], self.heading[:, None, 1]
        sin = -sin if back else sin
        x, y = actions.unbind(dim=-1)
        return torch.stack([cos * x + sin * y, cos * y - sin * x], dim=-1)


class DiffusionPolicy(nn.Module):
    """Predict chunks of actions by denoising; the reasoning vector z says which, what and how.

        c = encoder(o; FiLM(z)),  prediction = U-Net(a_k, k, c),
        in block l: y = gamma_l(z) * (gamma_l(k, c) * f_l + beta_l(k, c)) + beta_l(z)

    gamma_l(z) and beta_l(z) are the identity at the start: a policy that has learned something already
    keeps it when it begins to listen. `prepare` once per observation, `denoise` for each step.
    """

    def __init__(self, config: PolicyConfig) -> None:
        super().__init__()
        self.config = config
        self.scale = MinMax(config.observation)
        steps = (config.horizon,) if config.relative else ()  # each its own range: see fit_scales
        self.action_scale = MinMax(*steps, config.action)
        self.encoder = _build_encoder(config)
        dim = config.observations * config.observation if self.encoder is None else self.encoder.dim
        self.unet = ConditionalUnet1d(
            config.action,
            dim,
            widths=config.widths,
            step_dim=config.step_dim,
            convolution=Convolution(config.kernel_size, config.groups),
            emit=config.emit,
            placement=config.placement,
            start=config.start,
        )
        self.reasoning = (
            build_reasoning(
                config.vocabulary,
                dict(config.vectors),
                config.reasoning,
                config.dropout,
                word_by_word=config.fusion == "cross_attention",
            )
            if config.conditions
            else None
        )
        film = config.fusion in ("film", "scale", "bias", "gate")
        options: dict[str, Any] = {"head": config.head} if film else {}
        self.fusion = resolve(config.fusion, **options)
        self._table: tuple[Any, Tensor] | None = None
        self.listeners = nn.ModuleDict()
        if self.reasoning is not None:
            for place, sites in self._places(dim).items():
                self.listeners[place] = self._listener(self.reasoning.dim, sites)

    def reason(self, conditions: Mapping[str, Any], batch: int) -> Reasoning | None:
        """Return the reasoning vectors of what is heard, by name; None for a policy that hears nothing.

        What lacks, or is None, is replaced by a learned null. Raises ValueError for another number of rows
        than one, or one for each of the batch.
        """
        if self.reasoning is None:
            return None
        z = self.reasoning(dict(conditions))
        rows = z[0].shape[0] if isinstance(z, tuple) else z.shape[0] if z.ndim > 1 else 1
        if not torch.compiler.is_compiling() and rows not in (1, batch):
            raise ValueError(
                f"DiffusionPolicy: expected conditions of 1 row, or of {batch}, one for each sample, got "
                f"{rows} rows. Give each sample its own, or one for all."
            )
        if isinstance(z, tuple):
            tokens, mask = z
            return tokens.expand(batch, -1, -1), mask.expand(batch, -1)
        return z.expand(batch, -1)

    def prepare(
        self, observations: Float[Tensor, "batch steps size"], conditions: Mapping[str, Any]
    ) -> Prepared:
        """Look at the observations as the reasoning says, and make what it tells the blocks.

        Raises ValueError for observations of another size, or that are not finite.
        """
        self._check(observations)
        return self.look(observations, self.listen(self.reason(conditions, observations.shape[0])))

    def listen(self, z: Reasoning | None) -> Values:
        """Return what reasoning vectors tell everything that listens; it is the same until they change."""
        return {} if z is None else {place: listen(z) for place, listen in self.listeners.items()}

    def look(self, observations: Float[Tensor, "batch steps size"], heard: Values) -> Prepared:
        """Return what `prepare` does, for what was heard in hand."""
        scaled = self.scale(observations)
        if self.encoder is None:
            seen = Seen(scaled.flatten(1))
        else:
            seen = self.encoder(observations, scaled, Listened(self.fusion, heard.get("encoder")))
        condition = Listened(self.fusion, heard.get("condition"))(seen.features, "condition")
        return Prepared(condition, heard.get("blocks"), seen.heading)

    def attention(
        self, observations: Float[Tensor, "batch steps size"], z: Reasoning
    ) -> tuple[Float[Tensor, "batch things"], Float[Tensor, "batch spots"]]:
        """Return the logits of which thing the encoder looks at, and of where it sees it go.

        Raises ValueError for an encoder that does not choose.
        """
        encoder, heard = self._choosing(z)
        return encoder.attention(observations, heard)

    def ways(
        self,
        observations: Float[Tensor, "batch steps size"],
        z: Reasoning,
        things: Float[Tensor, "batch things"],
        spots: Float[Tensor, "batch spots"],
        turn: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Choice, Choice]:
        """Return which ways the thing could take, and the finger, for shares of what is looked at.

        turn: the index of the way that the thing takes; default: the one that is chosen. Raises ValueError
        for an encoder that does not choose.
        """
        encoder, heard = self._choosing(z)
        return encoder.ways(observations, things, spots, heard, turn)

    @property
    def looks(self) -> tuple[int, int]:
        """Among how many things, and how many spots, the encoder "things" chooses."""
        assert isinstance(self.encoder, ThingsEncoder)
        return self.encoder.layout.things, self.encoder.spot.num_embeddings

    def _choosing(self, z: Reasoning) -> tuple[ThingsEncoder, Listened]:
        """The encoder, and what it hears."""
        if not isinstance(self.encoder, ThingsEncoder):
            raise ValueError(
                f"DiffusionPolicy.attention: expected encoder='things', got {self.config.encoder!r}, which "
                f"looks at everything alike."
            )
        values = self.listeners["encoder"](z) if "encoder" in self.listeners else None
        return self.encoder, Listened(self.fusion, values)

    def denoise(
        self, noisy: Float[Tensor, "batch time action"], step: Int[Tensor, " batch"], prepared: Prepared
    ) -> Float[Tensor, "batch time action"]:
        """Return the prediction (noise or clean actions, as the config says) for scaled noisy actions."""
        return self._denoised(noisy, self.unet.modulations(step, prepared.condition), prepared)

    def forward(
        self,
        noisy: Float[Tensor, "batch time action"],
        step: Int[Tensor, " batch"],
        observations: Float[Tensor, "batch steps size"],
        conditions: Mapping[str, Any],
    ) -> Float[Tensor, "batch time action"]:
        """Return what `denoise` does after `prepare`: a training step as one graph."""
        return self.denoise(noisy, step, self.prepare(observations, conditions))

    @property
    def turns(self) -> bool:
        """Whether the network acts along a heading: then all actions have one scale and no offset."""
        return isinstance(self.encoder, ThingsEncoder)

    def scaled_actions(
        self, actions: Float[Tensor, "batch time action"], observations: Tensor
    ) -> Float[Tensor, "batch time action"]:
        """Return actions as the network predicts them, -1..1."""
        return self.action_scale(actions - self.origin(observations))

    def origin(self, observations: Float[Tensor, "batch steps size"]) -> Float[Tensor, "batch 1 action"]:
        """Return where the predicted actions are counted from."""
        if not self.config.relative or self.config.things is None:
            return observations.new_zeros(observations.shape[0], 1, self.config.action)
        end = self.config.things[0]
        return observations[:, -1:, end - self.config.action : end]

    @torch.no_grad()
    def sample(
        self,
        observations: Float[Tensor, "batch steps size"],
        conditions: Mapping[str, Any],
        *,
        guidance: float = 1.0,
        steps: int | None = None,
        sampler: Sampler | None = None,
        generator: Random = None,
    ) -> Float[Tensor, "batch horizon action"]:
        """Return chunks of actions in their own unit, from noise.

        Args:
            observations: the last ones, oldest first, in their own units.
            conditions: what is heard, by name.
            guidance: 1 listens as trained; beyond, what the conditions change is exaggerated
                (`torchfilm.guide`, in output space): twice the cost.
            steps, sampler: default: the config's.
            generator: of the noise.
        """
        self._check(observations)
        told = [conditions] if guidance == 1.0 else [conditions, {}]
        heard = [self.listen(self.reason(one, len(observations))) for one in told]
        options: dict[str, Any] = {"steps": steps, "sampler": sampler, "generator": generator}
        return self.chunk(observations, *heard, guidance=guidance, **options)

    @torch.no_grad()
    def chunk(
        self,
        observations: Float[Tensor, "batch steps size"],
        heard: Values,
        blank: Values | None = None,
        *,
        guidance: float = 1.0,
        steps: int | None = None,
        sampler: Sampler | None = None,
        generator: Random = None,
    ) -> Float[Tensor, "batch horizon action"]:
        """Return what `sample` does, for what was heard in hand; with guidance also for hearing nothing."""
        config = self.config
        schedule = sampling_schedule(
            config.train_steps, config.prediction, sampler or config.sampler, steps or config.sample_steps
        )
        asked = [self.look(observations, one) for one in (heard, blank) if one is not None]
        table = self._step_table(schedule.timesteps)
        rows = [self.unet.condition_rows(one.condition) for one in asked]
        x = noise_like(observations, (config.horizon, config.action), generator)
        for row, step in zip(table, schedule.timesteps, strict=True):
            modulations = [self.unet.generator.of_raw(row + own) for own in rows]
            found = [self._denoised(x, *one) for one in zip(modulations, asked, strict=True)]
            predicted = found[0] if guidance == 1.0 else found[1] + guidance * (found[0] - found[1])
            x = schedule.step(predicted, step, x, generator=generator).prev_sample
        return self.action_scale.inverse(x) + self.origin(observations)

    def _listener(self, dim: int, sites: Mapping[str, int]) -> nn.Module:
        """What makes the values of these sites from the reasoning."""
        if not self.config.matched:
            return self.fusion.build(dim, sites)
        with torch.device("meta"):
            target = sum(p.numel() for p in Film(head=self.config.head).build(dim, sites).parameters())
        return Matched(self.fusion, target).build(dim, sites)

    def _denoised(self, x: Tensor, modulations: Mapping[str, Modulation], prepared: Prepared) -> Tensor:
        """What the U-Net predicts along the heading, turned back."""
        y = self.unet.denoise(prepared.turned(x), modulations, fusion=self.fusion, injected=prepared.injected)
        return prepared.turned(y, back=True)

    def _step_table(self, steps: Int[Tensor, " steps"]) -> Float[Tensor, "steps rows"]:
        """What steps on the CPU contribute to gamma and beta: kept until weights or steps change."""
        made_from = [*self.unet.step_encoder.parameters(), *self.unet.generator.parameters()]
        key = (steps.tolist(), [(weight.data_ptr(), weight._version) for weight in made_from])
        if self._table is None or self._table[0] != key:
            self._table = key, self.unet.step_rows(steps.to(made_from[0].device))
        return self._table[1]

    def _places(self, dim: int) -> dict[str, dict[str, int]]:
        """The sites that listen, by place."""
        encoder = {} if self.encoder is None else self.encoder.sites
        every: dict[str, dict[str, int]] = {
            "encoder": encoder,
            "condition": {"condition": dim},
            "blocks": self.unet.sites,
        }
        return {place: every[place] for place in every if place in self.config.listens and every[place]}

    def _check(self, observations: Tensor) -> None:
        expected = (self.config.observations, self.config.observation)
        if observations.ndim != 3 or tuple(observations.shape[1:]) != expected:
            raise ValueError(
                f"DiffusionPolicy: expected observations (batch, {expected[0]}, {expected[1]}), got "
                f"{tuple(observations.shape)}. Axes are (batch, steps, numbers), the last step is now."
            )
        learning = self.training and torch.is_grad_enabled() and not observations.is_cpu
        if torch.compiler.is_compiling() or learning:  # where the loop looks at the loss, and waits once
            return
        if not observations.isfinite().all():
            raise ValueError(
                f"DiffusionPolicy: expected finite observations, got "
                f"{int((~observations.isfinite()).sum())} numbers that are not. Look at the sensors: a "
                f"policy that acts on NaN moves anywhere."
            )


def _build_encoder(config: PolicyConfig) -> FlatEncoder | ThingsEncoder | None:
    steps, size, width = config.observations, config.observation, config.encoder_width
    if config.encoder == "flat":
        return FlatEncoder(steps, size, width)
    if config.encoder == "things":
        assert config.things is not None
        return ThingsEncoder(Layout(*config.things), steps, size, width, config.landmarks, config.solids)
    return None
