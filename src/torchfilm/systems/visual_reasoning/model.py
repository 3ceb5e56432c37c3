"""The FiLM network for visual reasoning: a question scales and shifts the maps of a convolutional network.

Perez et al. 2018 (arXiv 1709.07871). The generator reads the question and gives gamma and beta for every
block; the network looks at the picture through them and answers.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchfilm import Generator, Modulation
from torchfilm.blocks.residual import ListeningBlock, Placement
from torchfilm.blocks.text import WordEncoder
from torchfilm.blocks.vision import PIXEL_STEM_STRIDE, FeatureStem, GridConv, PixelStem


@dataclass(frozen=True)
class ReasonerConfig:
    """Every choice of the FiLM network; the defaults are the paper's run on ResNet features.

    The paper's ablations (table 2) are single fields: `emit`, `bound`, `placement`, `filmed_blocks`,
    `residual`, `batch_norm`, `kernel_size`, `coordinates_in_*`.
    The laptop recipe's start is four: `identity_noise`, `local_start`, `gamma_offset`, `generator_std`.
    """

    vocabulary: int = 93
    """Words known, with <NULL>, <START>, <END>, <UNK>."""
    word_dim: int = 200
    encoder_width: int = 4096
    """Width of the GRU that reads the question."""
    bag_of_words: bool = False
    """Add 0.3 x the sum of a second vector per word to the GRU's last state."""

    input: Literal["features", "maps", "pixels"] = "features"
    """What comes in: given features, the maps of a frozen perception, or pixels in 0..1."""
    input_channels: int = 1024
    input_height: int = 14
    input_width: int = 14
    margins: tuple[int, int, int, int] = (0, 0, 0, 0)
    """Cells at the top, bottom, left and right of features or maps that are not looked at."""
    stem_kernel: int = 3
    """Kernel of the stem's convolution over features or maps (odd)."""

    blocks: int = 4
    channels: int = 128
    kernel_size: int = 3
    """Kernel of each block's second convolution (odd)."""
    dilations: tuple[int, ...] = (1,)
    """Dilation of that convolution, block by block, from the start again when the tuple ends."""
    context: bool = False
    """Let every cell of a block see the maximum of the block's input over the grid (not in the paper)."""
    residual: bool = True
    batch_norm: bool = True
    """BatchNorm everywhere: stem, blocks, classifier."""
    coordinates_in_stem: bool = True
    coordinates_in_blocks: bool = True
    coordinates_in_classifier: bool = True

    placement: Placement = "after_batchnorm"
    filmed_blocks: tuple[int, ...] | None = None
    """Numbers (from 1) of the blocks that listen; None: all."""
    emit: tuple[Literal["gamma", "beta"], ...] = ("gamma", "beta")
    """What the question decides; the other stays at gamma = 1 or beta = 0."""
    bound: Literal["sigmoid", "tanh", "exp"] | None = None

    projection: int = 512
    """Maps of the classifier's 1x1 convolution, before the global pool."""
    pooling: Literal["max", "mean", "max_and_mean"] = "max"
    """Over the whole grid; the paper's is "max". The mean (times the root of the cells) helps counting."""
    hidden: int = 1024
    answers: int = 32

    initial_weights: Literal["kaiming", "torch"] = "kaiming"
    """Start of convolutions and linear layers: kaiming uniform as the original, or PyTorch's default."""
    identity_noise: float | None = None
    """None: the blocks' 1x1 convolutions start as the others. A number: identity + noise x that, bias 0."""
    local_start: bool = False
    """Start as a network of single cells: outer taps, weights of coordinates and of context at 0."""
    gamma_offset: float | None = None
    """What is added to the generator's (bounded) gamma; None: 1 without a bound and 0 with one."""
    generator_std: float | None = None
    """None: the generator's head starts as the other linear layers. A number: its weights' std, bias 0."""

    def __post_init__(self) -> None:
        known = range(1, self.blocks + 1)
        if self.filmed_blocks is not None and not set(self.filmed_blocks) <= set(known):
            raise ValueError(
                f"ReasonerConfig: expected filmed_blocks among {list(known)}, got {self.filmed_blocks}. "
                "Blocks are numbered from 1; None means all."
            )
        if self.kernel_size % 2 == 0 or self.stem_kernel % 2 == 0:
            raise ValueError(
                f"ReasonerConfig: expected odd kernel_size and stem_kernel, got {self.kernel_size} and "
                f"{self.stem_kernel}. An even kernel would change the size of the grid."
            )
        height, width = self.grid
        if min(self.margins) < 0 or min(height, width) < 1 or (self.input == "pixels" and any(self.margins)):
            raise ValueError(
                f"ReasonerConfig: expected margins that leave cells of {self.input_height}x"
                f"{self.input_width}, and none over pixels, got {self.margins} over {self.input}. "
                "They are (top, bottom, left, right), in cells of features or maps."
            )
        if self.input == "pixels" and (
            self.input_height % PIXEL_STEM_STRIDE or self.input_width % PIXEL_STEM_STRIDE
        ):
            raise ValueError(
                f"ReasonerConfig: expected pictures with sides divisible by {PIXEL_STEM_STRIDE}, "
                f"got {self.input_height}x{self.input_width}. Resize them or choose other sizes."
            )

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the maps that the blocks see."""
        stride = PIXEL_STEM_STRIDE if self.input == "pixels" else 1
        top, bottom, left, right = self.margins
        return self.input_height // stride - top - bottom, self.input_width // stride - left - right

    @property
    def sites(self) -> dict[str, int]:
        """Name and channels of each place that listens, in order: "block1", "block2", ..."""
        listening = (
            range(1, self.blocks + 1) if self.filmed_blocks is None else sorted(set(self.filmed_blocks))
        )
        return {f"block{number}": self.channels for number in listening}


class Reasoned(NamedTuple):
    """What the network concludes, and the maps it pooled to conclude it, zero in the config's margins."""

    logits: Float[Tensor, "batch answers"]
    pooled_from: Float[Tensor, "batch projection height width"]


class Classifier(nn.Module):
    """From the last maps to answers: [1x1 - BN - ReLU], pool over the grid, [linear - BN - ReLU], linear."""

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        grid = config.grid if config.coordinates_in_classifier else None
        norm = config.batch_norm
        self.project = GridConv(config.channels, config.projection, kernel_size=1, grid=grid)
        self.project_norm = nn.BatchNorm2d(config.projection) if norm else nn.Identity()
        width = config.projection * (2 if config.pooling == "max_and_mean" else 1)
        self.hidden = nn.Linear(width, config.hidden)
        self.hidden_norm = nn.BatchNorm1d(config.hidden) if norm else nn.Identity()
        self.answer = nn.Linear(config.hidden, config.answers)
        self.pooling = config.pooling

    def forward(self, x: Float[Tensor, "batch channels height width"]) -> Reasoned:
        """Return the answers' logits and the maps before the pool."""
        maps = self.project_norm(self.project(x)).relu()
        pooled = []
        if self.pooling in ("max", "max_and_mean"):
            pooled.append(maps.amax(dim=(2, 3)))
        if self.pooling in ("mean", "max_and_mean"):
            pooled.append(maps.mean(dim=(2, 3)) * math.sqrt(maps.shape[2] * maps.shape[3]))
        joined = torch.cat(pooled, dim=1)
        return Reasoned(self.answer(self.hidden_norm(self.hidden(joined)).relu()), maps)


class VisualReasoner(nn.Module):
    """Answer questions about pictures; gamma and beta of every block are made from the question.

    `forward` is features -> encode -> modulations -> reason; each step is a method of its own, so that a
    picture is looked at once for many questions, a question read once for many pictures, and gamma and beta
    can be edited in between.
    """

    def __init__(self, config: ReasonerConfig) -> None:
        super().__init__()
        self.config = config
        sites = config.sites
        self.encoder = WordEncoder(
            config.vocabulary, config.word_dim, config.encoder_width, bag_of_words=config.bag_of_words
        )
        self.generator = (
            Generator(
                config.encoder_width,
                sites,
                bound=config.bound,
                emit=config.emit,
                init="default",
                gamma_offset=config.gamma_offset,
                init_std=config.generator_std,
            )
            if sites
            else None
        )
        self.stem = _build_stem(config)
        self.blocks = nn.ModuleDict(
            {
                name: ListeningBlock(
                    config.channels,
                    kernel_size=config.kernel_size,
                    dilation=config.dilations[index % len(config.dilations)],
                    placement=config.placement if name in sites else None,
                    residual=config.residual,
                    batch_norm=config.batch_norm,
                    context=config.context,
                    grid=config.grid if config.coordinates_in_blocks else None,
                )
                for index, name in enumerate(f"block{number + 1}" for number in range(config.blocks))
            }
        )
        self.classifier = Classifier(config)
        self._start()

    def features(
        self, images: Float[Tensor, "scenes channels height width"]
    ) -> Float[Tensor, "scenes c h w"]:
        """Return the stem's maps, one row per picture. images: as `config.input` says.

        Raises ValueError on another size than the config's.
        """
        expected = (self.config.input_channels, self.config.input_height, self.config.input_width)
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(
                f"VisualReasoner: expected {self.config.input} (scenes, {', '.join(map(str, expected))}), "
                f"got {tuple(images.shape)}. Axes are (scenes, channels, height, width); "
                "other sizes need another ReasonerConfig."
            )
        top, _, left, _ = self.config.margins
        height, width = self.config.grid
        if any(self.config.margins):
            images = images[:, :, top : top + height, left : left + width]
        # Channels last from here on: the layout that bfloat16 convolutions prefer; the values stay the same.
        return self.stem(images.contiguous(memory_format=torch.channels_last))

    def encode(
        self, questions: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch d"]:
        """Return one vector per question. questions: word ids; lengths: words, <START> and <END> counted."""
        return self.encoder(questions, lengths)

    @torch.compiler.disable()  # compiled with the blocks, it makes them keep ReLU's masks, which costs more
    def modulations(self, z: Float[Tensor, "batch d"]) -> dict[str, Modulation]:
        """Return gamma and beta [batch, channels] of each block that listens: "block1", "block2", ..."""
        return {} if self.generator is None else self.generator(z)

    def reason(
        self,
        features: Float[Tensor, "scenes channels height width"],
        modulations: Mapping[str, Modulation],
        scene_index: Int[Tensor, " batch"] | None = None,
    ) -> Reasoned:
        """Look at the features through gamma and beta and answer.

        scene_index: the row of features that each row of the modulations is about; None: the same row.
        Everything before the first FiLM is then computed once per scene, its BatchNorm over the scenes.
        """
        x, rows = features, scene_index
        for name, block in self.blocks.items():
            x = block(x, modulations.get(name), rows)
            if name in modulations:
                rows = None
        logits, maps = self.classifier(x)
        top, bottom, left, right = self.config.margins
        maps = functional.pad(maps, (left, right, top, bottom))
        return Reasoned(logits, maps) if rows is None else Reasoned(logits[rows], maps[rows])

    def forward(
        self,
        images: Float[Tensor, "scenes channels height width"],
        questions: Int[Tensor, "batch time"],
        lengths: Int[Tensor, " batch"],
        scene_index: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch answers"]:
        """Return the logits of each question about its picture: images[scene_index[b]], or images[b]."""
        modulations = self.modulations(self.encode(questions, lengths))
        return self.reason(self.features(images), modulations, scene_index).logits

    def generator_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of what reads the question: the encoder and the head that emits gamma and beta."""
        yield from self.encoder.parameters()
        if self.generator is not None:
            yield from self.generator.parameters()

    def network_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of what looks at the picture: stem, blocks, classifier."""
        for part in (self.stem, self.blocks, self.classifier):
            yield from part.parameters()

    @torch.no_grad()
    def _start(self) -> None:
        """Set the initial weights as the config says."""
        config = self.config
        if config.initial_weights == "kaiming":
            for module in self.modules():
                if isinstance(module, nn.Conv2d | nn.Linear):
                    nn.init.kaiming_uniform_(module.weight)
            if self.generator is not None and config.generator_std is None:
                nn.init.kaiming_uniform_(self.generator.head.get_parameter("weight"))
        if config.identity_noise is not None:
            for block in self.blocks.values():
                _start_near_identity(block, config.identity_noise)
        if config.local_start:
            _start_local(self)


def _start_local(model: VisualReasoner) -> None:
    """Make every cell mind its own: zero where a convolution looks beside it or at where it is."""
    for block in model.blocks.values():
        assert isinstance(block, ListeningBlock)
        block.project.conv.weight[:, block.project.channels :].zero_()
        taps = block.conv.conv.weight
        height, width = taps.shape[2:]
        own = taps[:, :, height // 2, width // 2] * math.sqrt(height * width)
        taps.zero_()
        taps[:, :, height // 2, width // 2] = own
        if block.context is not None:
            block.context.weight.zero_()
    model.classifier.project.conv.weight[:, model.classifier.project.channels :].zero_()


def _build_stem(config: ReasonerConfig) -> nn.Module:
    """The stem for what the config says comes in."""
    if config.input == "pixels":
        return PixelStem(config.input_channels, config.channels, batch_norm=config.batch_norm)
    return FeatureStem(
        config.input_channels,
        config.channels,
        config.stem_kernel,
        grid=config.grid if config.coordinates_in_stem else None,
        batch_norm=config.batch_norm,
    )


def _start_near_identity(block: nn.Module, noise: float) -> None:
    """Make a block's 1x1 convolution pass its input on: identity + noise x its present weights, bias 0."""
    assert isinstance(block, ListeningBlock)
    conv = block.project.conv
    conv.weight.mul_(noise)
    channels = torch.arange(conv.out_channels)
    conv.weight[channels, channels, 0, 0] += 1
    if conv.bias is not None:
        conv.bias.zero_()
    if block.context is not None:
        block.context.weight.mul_(noise)
