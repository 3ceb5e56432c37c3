"""What FiLM is compared with, behind the same batches: LSTM, CNN+LSTM, stacked attention, relation network.

Johnson et al. 2017 (CLEVR, arXiv 1612.06890, section 4) for the first three, Santoro et al. 2017 (arXiv
1706.01427) for the relation network, Yang et al. 2016 (arXiv 1511.02274) for stacked attention.
"""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as functional
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchfilm.blocks.text import WordEncoder
from torchfilm.blocks.vision import PIXEL_STEM_STRIDE, FeatureStem, PixelStem, coordinate_maps

Kind = Literal["lstm", "cnn_lstm", "stacked_attention", "relation_network"]


@dataclass(frozen=True)
class BaselineConfig:
    """Every choice of a baseline; fields of the same name mean the same as in `ReasonerConfig`."""

    kind: Kind
    vocabulary: int = 93
    word_dim: int = 64
    encoder_width: int = 128
    """Width of the LSTM that reads the question."""

    input: Literal["features", "maps", "pixels"] = "maps"
    input_channels: int = 20
    input_height: int = 8
    input_width: int = 12
    stem_kernel: int = 3

    channels: int = 64
    """Maps of the stem, which sees the coordinates."""
    attention: int = 128
    """Stacked attention: width in which words and cells meet."""
    hops: int = 2
    """Stacked attention: how often it looks."""
    pair_width: int = 128
    """Relation network: width of the four layers that see each pair of cells."""
    pair_stride: int = 2
    """Relation network: cells are averaged over squares of this side first; pairs grow with its 4th power."""
    hidden: int = 256
    answers: int = 32

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the stem's maps."""
        stride = PIXEL_STEM_STRIDE if self.input == "pixels" else 1
        return self.input_height // stride, self.input_width // stride


class Baseline(nn.Module):
    """A baseline that answers questions about pictures, with the `forward` of `VisualReasoner`."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = WordEncoder(config.vocabulary, config.word_dim, config.encoder_width, cell="lstm")
        join = None if config.kind == "lstm" else JOINS[config.kind](config)
        self.stem = None if join is None else _build_stem(config)
        self.join = join
        self.classifier = nn.Sequential(
            nn.Linear(config.encoder_width if join is None else join.width, config.hidden),
            nn.BatchNorm1d(config.hidden),
            nn.ReLU(),
            nn.Linear(config.hidden, config.answers),
        )

    def forward(
        self,
        images: Float[Tensor, "scenes channels height width"],
        questions: Int[Tensor, "batch time"],
        lengths: Int[Tensor, " batch"],
        scene_index: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch answers"]:
        """Return the logits of each question about its picture: images[scene_index[b]], or images[b]."""
        return self.answer(self.encoder(questions, lengths), images, scene_index)

    def answer(
        self,
        z: Float[Tensor, "batch width"],
        images: Float[Tensor, "scenes channels height width"],
        scene_index: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch answers"]:
        """Return the logits for questions that are read already; this part compiles as one function."""
        if self.stem is None or self.join is None:
            return self.classifier(z)
        maps = self.stem(images)
        if scene_index is not None:
            maps = maps.index_select(0, scene_index)
        return self.classifier(self.join(z, maps))


class Concatenation(nn.Module):
    """CNN+LSTM: the maps, max-pooled over 2 x 2 cells, beside the question's vector (Johnson et al. 2017)."""

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        height, width = config.grid
        self.width = config.encoder_width + config.channels * (height // 2) * (width // 2)

    def forward(
        self, z: Float[Tensor, "batch width"], maps: Float[Tensor, "batch channels height width_"]
    ) -> Float[Tensor, "batch joint"]:
        """Return both, one after the other."""
        return torch.cat([z, functional.max_pool2d(maps, 2).flatten(1)], dim=1)


class StackedAttention(nn.Module):
    """Look at the picture several times, each time where the question and the last look point.

    Yang et al. 2016, eq. 15 to 22:
    p = softmax over cells of w . tanh(A v + B u),  u <- u + sum of p v,  with u = the question at first.
    """

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.width = config.attention
        self.see = nn.Conv2d(config.channels, config.attention, 1)
        self.ask = nn.Linear(config.encoder_width, config.attention)
        self.cells = nn.ModuleList(nn.Linear(self.width, self.width, bias=False) for _ in range(config.hops))
        self.query = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(config.hops))
        self.score = nn.ModuleList(nn.Linear(self.width, 1) for _ in range(config.hops))

    def forward(
        self, z: Float[Tensor, "batch width"], maps: Float[Tensor, "batch channels height width_"]
    ) -> Float[Tensor, "batch joint"]:
        """Return what the last look has gathered, the question with it."""
        v = self.see(maps).flatten(2).transpose(1, 2)
        u = self.ask(z)
        for cells, query, score in zip(self.cells, self.query, self.score, strict=True):
            weights = score(torch.tanh(cells(v) + query(u)[:, None])).softmax(dim=1)
            u = u + (weights * v).sum(dim=1)
        return u


class RelationNetwork(nn.Module):
    """Sum over all pairs of cells of one small network that sees both cells and the question.

    joint = sum over i, j of g(o_i, o_j, z), o = a cell's maps and its place (Santoro et al. 2017, eq. 1).
    The first layer of g is linear in its three inputs, so each is projected once and not once per pair.
    """

    places: Tensor

    def __init__(self, config: BaselineConfig) -> None:
        super().__init__()
        self.width = config.pair_width
        self.stride = config.pair_stride
        height, width = (side // self.stride for side in config.grid)
        self.register_buffer("places", coordinate_maps(height, width)[None], persistent=False)
        self.first = nn.Linear(config.channels + 2, self.width, bias=False)
        self.second = nn.Linear(config.channels + 2, self.width, bias=False)
        self.ask = nn.Linear(config.encoder_width, self.width)
        self.layers = nn.ModuleList(nn.Linear(self.width, self.width) for _ in range(3))

    def forward(
        self, z: Float[Tensor, "batch width"], maps: Float[Tensor, "batch channels height width_"]
    ) -> Float[Tensor, "batch joint"]:
        """Return the sum over pairs, divided by their number so that its size does not depend on the grid."""
        pooled = functional.avg_pool2d(maps, self.stride)
        objects = torch.cat([pooled, self.places.expand(len(pooled), -1, -1, -1).to(pooled.dtype)], dim=1)
        objects = objects.flatten(2).transpose(1, 2)
        pairs = self.first(objects)[:, :, None] + self.second(objects)[:, None] + self.ask(z)[:, None, None]
        pairs = pairs.relu()
        for layer in self.layers:
            pairs = layer(pairs).relu()
        return pairs.mean(dim=(1, 2))


JOINS: dict[str, type[Concatenation] | type[StackedAttention] | type[RelationNetwork]] = {
    "cnn_lstm": Concatenation,
    "stacked_attention": StackedAttention,
    "relation_network": RelationNetwork,
}


def _build_stem(config: BaselineConfig) -> nn.Module:
    """The same stems as FiLM's, coordinates included."""
    if config.input == "pixels":
        return PixelStem(config.input_channels, config.channels, batch_norm=True)
    return FeatureStem(
        config.input_channels, config.channels, config.stem_kernel, grid=config.grid, batch_norm=True
    )
