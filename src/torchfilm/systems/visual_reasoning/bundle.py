"""What a training run leaves behind and everything else reads: network, words and perception in one folder.

    FOLDER/config.json              {"recipe": name, "network": its fields, "perception": its fields}
    FOLDER/weights.safetensors      the network's
    FOLDER/vocab.json               words, program tokens and answers, as the original's preprocessing writes
    FOLDER/perception.safetensors   for a network over maps: the frozen stem
    FOLDER/blind/                   optional: a network that does not see, reported beside; same words

A run's folder holds it under `model`; where a bundle is expected, the run's folder will do.
"""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning import SHIPPED, describe, load
from torchfilm.systems.visual_reasoning.baselines import Baseline, BaselineConfig
from torchfilm.systems.visual_reasoning.model import ReasonerConfig, VisualReasoner
from torchfilm.systems.visual_reasoning.perception import STRIDE, Perception, PerceptionConfig
from torchfilm.training import save_weights
from torchfilm.training.checkpoint import load_built, read_config, read_json, write_json


@dataclass(frozen=True, eq=False)
class Sight:
    """A trained perception with its config, in evaluation mode."""

    config: PerceptionConfig
    network: Perception

    @property
    def digest(self) -> str:
        """A short name of the weights, for caches: equal weights have equal digests."""
        whole = hashlib.sha256(repr(self.config).encode())
        for name, value in sorted(self.network.state_dict().items()):
            whole.update(name.encode())
            whole.update(np.ascontiguousarray(value.cpu().numpy()).tobytes())
        return whole.hexdigest()[:12]


@dataclass(frozen=True, eq=False)
class Bundle:
    """A trained network with all that it needs to be asked."""

    recipe: str
    network: VisualReasoner | Baseline
    vocabulary: Vocabulary
    sight: Sight | None

    @property
    def picture_size(self) -> tuple[int, int]:
        """Height and width of the pictures that it sees, in pixels; meaningless over given features."""
        return picture_size(self.network.config)

    def save(self, folder: Path) -> None:
        """Write the bundle's files; the weights come last, so that a folder with weights is complete."""
        folder.mkdir(parents=True, exist_ok=True)
        content = {"recipe": self.recipe, "network": describe(self.network.config)}
        if self.sight is not None:
            content["perception"] = asdict(self.sight.config)
            save_weights(folder / "perception.safetensors", self.sight.network.state_dict())
        write_json(folder / "config.json", content)
        self.vocabulary.save(folder / "vocab.json")
        save_weights(folder / "weights.safetensors", self.network.state_dict())


def picture_size(config: ReasonerConfig | BaselineConfig) -> tuple[int, int]:
    """Height and width in pixels of the pictures behind what a network of this config takes in."""
    stride = STRIDE if config.input == "maps" else 1
    return stride * config.input_height, stride * config.input_width


def find_bundle(path: Path | None) -> Path:
    """The bundle of a run's folder, or the folder itself; None: the one shipped with the package."""
    if path is None:
        return SHIPPED
    inside = path / "model"
    return inside if (inside / "config.json").is_file() else path


def load_bundle(path: Path | None = None) -> Bundle:
    """Read a run's folder or a bundle; None: the shipped one.

    Raises ValueError if it is not there or not complete.
    """
    folder = find_bundle(path)
    if (folder / "config.json").is_file() and not (folder / "weights.safetensors").is_file():
        raise ValueError(
            f"{folder}: expected a trained network, found no weights.safetensors. Has its training finished? "
            "Go on with `torchfilm train visual_reasoning ... --resume`."
        )
    network = load(folder if path is not None else None)
    sight = load_sight(folder) if network.config.input == "maps" else None
    recipe = str(read_json(folder / "config.json").get("recipe", ""))
    return Bundle(recipe, network, Vocabulary.load(folder / "vocab.json"), sight)


def load_blind(
    path: Path | None, beside: Path | None, vocabulary: Vocabulary
) -> VisualReasoner | Baseline | None:
    """The blind network in `path`, or the one in the folder `blind` of the bundle `beside`; None without.

    Raises ValueError if it was trained with other words than `vocabulary`.
    """
    folder = find_bundle(beside) / "blind" if path is None else find_bundle(path)
    if path is None and not (folder / "config.json").is_file():
        return None
    words = folder / "vocab.json"
    if words.is_file() and Vocabulary.load(words) != vocabulary:
        raise ValueError(
            f"{folder}: expected a blind network with the same vocabulary, got another one. "
            "Train both on the same split."
        )
    return load(folder)


def save_sight(folder: Path, sight: Sight) -> None:
    """Write a perception alone: config.json and perception.safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "config.json", {"recipe": "perception", "perception": asdict(sight.config)})
    save_weights(folder / "perception.safetensors", sight.network.state_dict())


def load_sight(path: Path | None = None) -> Sight:
    """Read the perception of a run's folder or a bundle, frozen; None: the shipped one.

    Raises ValueError if there is none.
    """
    folder = find_bundle(path)
    weights = folder / "perception.safetensors"
    if not weights.is_file() or not (folder / "config.json").is_file():
        raise ValueError(
            f"expected a trained perception in {folder}, found no "
            f"{'perception.safetensors' if (folder / 'config.json').is_file() else 'config.json'} there. "
            "Train one with `torchfilm train visual_reasoning --recipe perception`."
        )
    config = read_config(folder / "config.json", "perception", PerceptionConfig)
    network = load_built(folder / "config.json", lambda: Perception(config), weights)
    return Sight(config, frozen(network))


def frozen(network: Perception) -> Perception:
    """The perception in evaluation mode, its weights fixed."""
    for parameter in network.parameters():
        parameter.requires_grad = False
    return network.eval()
