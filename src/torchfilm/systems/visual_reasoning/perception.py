"""Seeing: a small convolutional stem, trained once on object labels, where the paper has ResNet-101.

Perez et al. feed FiLM with the features of a network that was trained on ImageNet and then frozen. Two cores
and 64 x 96 pixels have no such network, so the laptop recipe trains its own on the labels of *other* scenes:
for each cell of an 8 x 12 grid, is there an object, what are its attributes, where is it. The reasoning part
is then trained on answers alone, with this stem frozen.

What FiLM sees are 20 maps [N, 20, H / 8, W / 8]: objectness p, then p times the probability of each shape
(3), size (2), material (2) and colour (8), then p times the offset of the object's centre inside its cell (2,
in half cells, x to the right and y down) and p times its place on the ground (2: to the right and to the
front as the camera sees it, in units of 3, the half width of the table).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor, nn
from torch.nn import functional

STRIDE = 8
GROUPS: dict[str, tuple[str, ...]] = {
    "shape": ("cube", "sphere", "cylinder"),
    "size": ("large", "small"),
    "material": ("rubber", "metal"),
    "color": ("gray", "red", "blue", "green", "brown", "purple", "cyan", "yellow"),
}
PLACES = 4
NUM_MAPS = 1 + sum(len(values) for values in GROUPS.values()) + PLACES
TABLE = 3.0
RELEASED_WIDTH, RELEASED_HEIGHT = 480, 320


@dataclass(frozen=True)
class PerceptionConfig:
    """Widths of the stem at strides 2, 4 and 8, and the number of residual blocks at stride 8."""

    widths: tuple[int, int, int] = (32, 64, 96)
    num_blocks: int = 2


class Perception(nn.Module):
    """Images to maps of objects: uint8 or [0, 1] float [N, 3, H, W] to [N, 20, H / 8, W / 8].

    Trained on other scenes' labels (`perception_loss`), then frozen in evaluation mode.
    """

    def __init__(self, config: PerceptionConfig) -> None:
        super().__init__()
        half, quarter, eighth = config.widths
        self.trunk = nn.Sequential(
            _convolution(3, half, stride=2),
            _convolution(half, quarter, stride=2),
            _Residual(quarter),
            _convolution(quarter, eighth, stride=2),
            *(_Residual(eighth) for _ in range(config.num_blocks)),
            nn.Conv2d(eighth, NUM_MAPS, 1),
        )

    def forward(
        self, images: Float[Tensor, "N 3 H W"] | UInt8[Tensor, "N 3 H W"]
    ) -> Float[Tensor, "N 20 h w"]:
        """Return what each cell says of its object before any squashing: logits and places."""
        _check_size(images)
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        return self.trunk(scaled - 0.5).float()

    def maps(self, images: Float[Tensor, "N 3 H W"] | UInt8[Tensor, "N 3 H W"]) -> Float[Tensor, "N 20 h w"]:
        """Return what FiLM sees; each map is zero where there is no object."""
        return squash(self(images))


def squash(raw: Float[Tensor, "N 20 h w"]) -> Float[Tensor, "N 20 h w"]:
    """Turn logits into maps: objectness, objectness times probabilities, objectness times places."""
    objectness, *groups, places = raw.split([1, *(len(values) for values in GROUPS.values()), PLACES], dim=1)
    there = objectness.sigmoid()
    return torch.cat([there, *(there * group.softmax(1) for group in groups), there * places], dim=1)


def object_labels(
    scenes: Iterable[Mapping[str, Any]], height: int, width: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return for each cell what stands there, from scenes in CLEVR's format.

    Returns:
        attributes: int8 [N, 4, h, w], index of shape, size, material, colour; -1 where there is no object.
        places: float32 [N, 4, h, w], offset x, y in the cell in half cells, place right, front in units of 3.

    A cell that holds the centres of two objects shows the one nearer to the camera, as the image does.
    """
    rows, columns = height // STRIDE, width // STRIDE
    attributes, places = [], []
    for scene in scenes:
        attribute = np.full((len(GROUPS), rows, columns), -1, np.int8)
        place = np.zeros((PLACES, rows, columns), np.float32)
        right, front = (np.asarray(scene["directions"][name]) for name in ("right", "front"))
        for thing in sorted(scene["objects"], key=lambda thing: -thing["pixel_coords"][2]):
            x = thing["pixel_coords"][0] / RELEASED_WIDTH * columns
            y = thing["pixel_coords"][1] / RELEASED_HEIGHT * rows
            column, row = min(max(int(x), 0), columns - 1), min(max(int(y), 0), rows - 1)
            attribute[:, row, column] = [values.index(thing[name]) for name, values in GROUPS.items()]
            ground = np.asarray(thing["3d_coords"])
            place[:, row, column] = (
                2 * (x - column) - 1,
                2 * (y - row) - 1,
                ground @ right / TABLE,
                ground @ front / TABLE,
            )
        attributes.append(attribute)
        places.append(place)
    return np.stack(attributes), np.stack(places)


def perception_loss(
    raw: Float[Tensor, "N 20 h w"], attributes: Tensor, places: Float[Tensor, "N 4 h w"]
) -> Float[Tensor, ""]:
    """Return the sum of the losses: objectness in every cell, attributes and places where there is an object.

    Means over the pictures, in each over its cells, or over its objects (0 where it has none). So the mean
    over parts of a batch, weighted by their pictures, is that over the batch, however objects are spread.

    Args:
        raw: what `Perception.forward` returns.
        attributes: int [N, 4, h, w], -1 where there is no object.
        places: [N, 4, h, w].
    """
    objectness, *groups, place = raw.split([1, *(len(values) for values in GROUPS.values()), PLACES], dim=1)
    there = attributes[:, 0] >= 0
    loss = functional.binary_cross_entropy_with_logits(objectness[:, 0], there.float()) * 10
    of_objects = torch.zeros_like(raw[:, 0][there])
    for i, group in enumerate(groups):
        right = attributes[:, i][there].long()
        of_objects = of_objects + functional.cross_entropy(
            group.movedim(1, -1)[there], right, reduction="none"
        )
    difference = (place - places).movedim(1, -1)[there]
    apart = functional.smooth_l1_loss(difference, torch.zeros_like(difference), beta=0.1, reduction="none")
    objects = there.sum(dim=(1, 2), keepdim=True).expand_as(there)[there]
    return loss + ((of_objects + apart.mean(dim=1)) / objects).sum() / len(raw)


def mirrored(
    images: Tensor, attributes: Tensor, places: Tensor, which: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Mirror the samples in `which` (bool [N]), labels included: twice the scenes for nothing."""
    flip = which[:, None, None, None]
    sign = places.new_tensor([-1.0, 1.0, -1.0, 1.0])[None, :, None, None]
    return (
        torch.where(flip, images.flip(-1), images),
        torch.where(flip, attributes.flip(-1), attributes),
        torch.where(flip, sign * places.flip(-1), places),
    )


def perception_accuracy(raw: Tensor, attributes: Tensor, places: Tensor) -> dict[str, float]:
    """Return shares in [0, 1] of cells and of objects that are right, and the mean error of places."""
    objectness, *groups, place = raw.split([1, *(len(values) for values in GROUPS.values()), PLACES], dim=1)
    there = attributes[:, 0] >= 0
    scores = {"objectness": ((objectness[:, 0] > 0) == there).float().mean().item()}
    right = torch.ones_like(attributes[:, 0][there], dtype=torch.bool)
    for i, (name, group) in enumerate(zip(GROUPS, groups, strict=True)):
        hit = group.movedim(1, -1)[there].argmax(-1) == attributes[:, i][there]
        right &= hit
        scores[name] = hit.float().mean().item()
    scores["all four"] = right.float().mean().item()
    error = (place - places).movedim(1, -1)[there].abs().mean(0)
    scores["offset error (cells)"] = error[:2].mean().item() / 2
    scores["ground error"] = error[2:].mean().item() * TABLE
    return scores


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = _convolution(channels, channels)
        self.second = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        )

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(x + self.second(self.first(x)))


def _convolution(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels_in, channels_out, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(channels_out),
        nn.ReLU(),
    )


def _check_size(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % STRIDE or images.shape[3] % STRIDE:
        raise ValueError(
            f"Perception: expected images [N, 3, H, W] with H and W multiples of {STRIDE}, "
            f"got {tuple(images.shape)}.\n"
            f"Resize them to the size that the recipe names, 64 x 96 for 'laptop'."
        )
