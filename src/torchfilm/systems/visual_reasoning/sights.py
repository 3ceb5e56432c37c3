"""Train the perception on the labels of scenes without questions, and let it see whole splits once.

The stem is trained on scenes that no question is asked about (a split of its own), as the paper's ResNet was
on ImageNet. What it sees of a split is kept beside the split's decoded images.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from torchfilm.data.clevr.caches import drop_older, read_rows, write_rows
from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.data.clevr.json_stream import Progress
from torchfilm.systems.visual_reasoning.bundle import Sight, frozen
from torchfilm.systems.visual_reasoning.perception import (
    NUM_MAPS,
    STRIDE,
    Perception,
    PerceptionConfig,
    mirrored,
    object_labels,
    perception_accuracy,
    perception_loss,
)
from torchfilm.training import Draw, EpochOrder, Loss, TrainConfig, TrainResult, train
from torchfilm.training.folder import digest

HEIGHT, WIDTH = 64, 96
HELD_OUT = 1000
PERCEPTION_TRAINING = TrainConfig(
    minutes=30,
    batch_size=64,
    lr=2e-3,
    weight_decay=0.05,
    cooldown=0.5,
    ema=0.998,
    precision="bfloat16",
    compile=True,
)


@dataclass(frozen=True, eq=False)
class Labelled:
    """Images uint8 [N, H, W, 3], and what stands in each cell (`perception.object_labels`)."""

    images: np.ndarray
    attributes: np.ndarray
    places: np.ndarray

    @staticmethod
    def of(folder: ClevrFolder, split: str, number: int | None = None) -> Labelled:
        """The split's first `number` scenes; None: all."""
        images = folder.images(split, HEIGHT, WIDTH)[:number]
        return Labelled(images, *object_labels(islice(folder.scenes(split), len(images)), HEIGHT, WIDTH))

    def rows(self, rows: np.ndarray | slice) -> tuple[Tensor, Tensor, Tensor]:
        """Images uint8 [rows, 3, H, W], attributes and places."""
        images = torch.from_numpy(np.array(self.images[rows]))
        return (
            images.permute(0, 3, 1, 2),
            torch.from_numpy(self.attributes[rows]),
            torch.from_numpy(self.places[rows]),
        )


class LabelledBatches:
    """Batches for training the perception: every scene once per epoch, half of them mirrored."""

    def __init__(self, labelled: Labelled) -> None:
        self.labelled = labelled
        self.order = EpochOrder(len(labelled.images))

    def __call__(self, draw: Draw) -> tuple[Tensor, Tensor, Tensor]:
        """Images, attributes and places of this process's share of the batch."""
        flips = torch.from_numpy(draw.rng().random(draw.batch_size) < 0.5)[draw.share()]
        return mirrored(*self.labelled.rows(self.order.indices(draw)), flips)


def sight_loss(perception: nn.Module, batch: tuple[Tensor, Tensor, Tensor]) -> Loss:
    """The perception's loss on one batch."""
    images, attributes, places = batch
    raw = perception(images.contiguous(memory_format=torch.channels_last))
    return Loss(perception_loss(raw, attributes, places), len(images))


def train_sight(
    folder: ClevrFolder,
    split: str,
    out: Path,
    *,
    held_out: str | None = None,
    training: TrainConfig = PERCEPTION_TRAINING,
    config: PerceptionConfig | None = None,
    resume: bool = False,
) -> tuple[Sight, TrainResult]:
    """Train a perception on the object labels of a split, in the run folder `out`.

    held_out: the split whose first 1000 scenes it is measured on; None: not measured.
    """
    config = config or PerceptionConfig()
    torch.manual_seed(training.seed)
    network = Perception(config).to("cuda" if torch.cuda.is_available() else "cpu")
    network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    labelled = Labelled.of(folder, split)
    exam = None if held_out is None else Labelled.of(folder, held_out, HELD_OUT)
    result = train(
        network,
        sight_loss,
        LabelledBatches(labelled),
        training,
        out,
        evaluate=None if exam is None else lambda module: sight_accuracy(module, exam),
        resume=resume,
        extra_config={
            "recipe": "perception",
            "split": split,
            "data": {
                "held_out": held_out,
                "objects": {
                    name: digest(one.attributes, one.places)
                    for name, one in ((split, labelled), (held_out, exam))
                    if one is not None
                },
            },
            "widths": config.widths,
            "blocks": config.num_blocks,
        },
    )
    return Sight(config, frozen(network)), result


def sight_accuracy(perception: nn.Module, exam: Labelled) -> dict[str, float]:
    """Shares of cells and objects that are right (`perception_accuracy`) on held-out scenes."""
    device = next(perception.parameters()).device
    raw = []
    with torch.inference_mode():
        for start in range(0, len(exam.images), 100):
            images, _, _ = exam.rows(slice(start, start + 100))
            raw.append(perception(images.to(device)).cpu())
    _, attributes, places = exam.rows(slice(None))
    found = perception_accuracy(torch.cat(raw), attributes, places)
    return {name.replace(" (cells)", "").replace(" ", "_"): value for name, value in found.items()}


def split_maps(sight: Sight, images: np.ndarray, progress: Progress | None = None) -> np.ndarray:
    """What the perception sees of all images of a split, float16 [N, 20, H / 8, W / 8].

    images: uint8 [N, H, W, 3] as `ClevrFolder.images` gives them, a map of a file: what was seen is kept in a
    file beside it, and read from there the next time.
    """
    source = Path(str(getattr(images, "filename", "")))
    kept = source.with_name(f"maps-{sight.digest}-{source.stem}.npy")
    if not kept.is_file():
        number, height, width = images.shape[:3]
        shape = (number, NUM_MAPS, height // STRIDE, width // STRIDE)
        write_rows(kept, np.float16, shape, lambda rows: _see_all(sight.network, images, rows, progress))
        drop_older(kept)
    return read_rows(kept)


def _see_all(perception: Perception, images: np.ndarray, rows: np.ndarray, progress: Progress | None) -> None:
    number = len(images)
    network = perception.to("cuda" if torch.cuda.is_available() else "cpu")
    device = next(network.parameters()).device
    with torch.inference_mode():
        for start in range(0, number, 128):
            pixels = torch.from_numpy(np.array(images[start : start + 128])).to(device)
            rows[start : start + 128] = network.maps(pixels.permute(0, 3, 1, 2)).cpu().numpy()
            if progress is not None:
                progress(min(start + 128, number), number)
