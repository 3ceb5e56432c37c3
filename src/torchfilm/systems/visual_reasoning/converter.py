"""Checkpoints of the original FiLM system (Perez et al. 2018), renamed for `VisualReasoner`.

    python -m torchfilm.systems.visual_reasoning.converter film.pt vocab.json FOLDER

The original keeps two state dicts: `program_generator_state` reads the question, `execution_engine_state`
looks at the picture. Nothing is recomputed: the rows of the generator's head (gamma, then beta, block after
block) and the place of the coordinates (after the channels, x before y) are the same here.
"""

import argparse
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from torchfilm.blocks.vision import PIXEL_STEM_LAYERS
from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.reading import intact
from torchfilm.systems.visual_reasoning.bundle import Bundle
from torchfilm.systems.visual_reasoning.model import ReasonerConfig, VisualReasoner

CONV = ("weight", "bias")
STATISTICS = ("running_mean", "running_var")
COUNTER = "num_batches_tracked"
GENERATOR_NAMES = {
    "encoder_embed.weight": "encoder.embedding.weight",
    "encoder_rnn.weight_ih_l0": "encoder.rnn.weight_ih_l0",
    "encoder_rnn.weight_hh_l0": "encoder.rnn.weight_hh_l0",
    "encoder_rnn.bias_ih_l0": "encoder.rnn.bias_ih_l0",
    "encoder_rnn.bias_hh_l0": "encoder.rnn.bias_hh_l0",
    "decoder_linear.weight": "generator.head.weight",
    "decoder_linear.bias": "generator.head.bias",
}
CLASSIFIER_LAYERS = {
    "0": "project.conv",
    "1": "project_norm",
    "5": "hidden",
    "6": "hidden_norm",
    "8": "answer",
}
PIXEL_KERNEL = 4
"""Side of the stem's kernels over pixels; over features it is 3."""

STATES = ("program_generator_state", "execution_engine_state")
PAPER_OPTIONS: dict[str, Any] = {
    "gamma_option": "linear",
    "gamma_baseline": 1,
    "use_gamma": 1,
    "use_beta": 1,
    "use_coords": 1,
    "condition_method": "bn-film",
    "module_residual": 1,
    "classifier_downsample": "maxpoolfull",
}
"""Options of the original (the checkpoint's `args`) that change the answers and that no weight shows."""

OF_THE_RUN = ("vocabulary", "word_dim", "encoder_width", "input", "input_channels", "input_height")
OF_THE_RUN += ("input_width", "blocks", "channels", "projection", "hidden", "answers")
OF_THE_START = ("initial_weights", "identity_noise", "local_start", "generator_std")
"""Fields that a converted run may have otherwise than the paper's: its sizes, and how training starts."""


def convert(checkpoint: Path, vocabulary: Path, out: Path) -> Bundle:
    """Write what eval and ask read into the new folder `out`, from the original's checkpoint, and return it.

    checkpoint: the .pt file of the original's training; plain tensors, texts and numbers are read of it, and
    no code is run. vocabulary: the vocab.json of its preprocessing. The sizes come from the weights.

    Raises ValueError for a file of another kind, a run with other layers than the paper's, a vocabulary of
    another size, or a folder that is already a bundle.
    """
    if (out / "config.json").exists():
        raise ValueError(f"{out}: expected a new folder, found a config.json there. Choose another name.")
    content = _read(checkpoint)
    with intact(checkpoint, "the original's two state dicts and args", "Only model_type FiLM converts."):
        generator, network = (_bare(content[name]) for name in STATES)
        options = content.get("args")
        config = _config_of(generator, network, options if isinstance(options, Mapping) else {})
        state = from_original(generator, network, config)
    words = Vocabulary.load(vocabulary)
    sizes = len(words.questions), len(words.answers)
    if sizes != (config.vocabulary, config.answers):
        raise ValueError(
            f"{vocabulary}: expected {config.vocabulary} words and {config.answers} answers as in the "
            f"checkpoint, got {sizes[0]} and {sizes[1]}. Give the vocab.json of its preprocessing."
        )
    model = VisualReasoner(config)
    model.load_state_dict(state)
    bundle = Bundle("paper_pixels" if config.input == "pixels" else "paper", model.eval(), words, None)
    bundle.save(out)
    return bundle


def _read(checkpoint: Path) -> Mapping[str, Any]:
    try:
        content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    except (OSError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"{checkpoint}: expected a checkpoint of plain tensors, texts and numbers, got {reason} "
            "Load it where you trust it, and save its two state dicts and args again."
        ) from error
    missing = [name for name in STATES if not isinstance(content, Mapping) or not content.get(name)]
    if missing:
        raise ValueError(
            f"{checkpoint}: expected a checkpoint of the original, found no {' and no '.join(missing)}. "
            "Only model_type FiLM converts."
        )
    return content


def _config_of(
    generator: Mapping[str, Tensor], network: Mapping[str, Tensor], options: Mapping[str, Any]
) -> ReasonerConfig:
    """The config with the sizes of these weights; the picture's size is in the options, or the paper's."""
    different = {
        name: options[name]
        for name, paper in PAPER_OPTIONS.items()
        if name in options and options[name] != paper
    }
    if different:
        name = next(iter(different))
        raise ValueError(
            f"Original checkpoint: expected a run with {name}={PAPER_OPTIONS[name]!r} as the paper's, got "
            f"{different[name]!r}. Only the paper's layout converts by renaming."
        )
    needed = ("encoder_embed.weight", "encoder_rnn.weight_hh_l0")
    missing = [name for name in needed if name not in generator]
    layers = ("stem.0.weight", "classifier.0.weight", "classifier.5.weight", "classifier.8.weight")
    missing += [name for name in layers if name not in network]
    if missing:
        raise ValueError(f"Original checkpoint: missing {_some(missing)}. Is it the paper's FiLM?")
    stem = network["stem.0.weight"].shape
    pixels = stem[-1] == PIXEL_KERNEL
    side = 224 if pixels else 14
    told = options.get("feature_dim") or (0, side, side)
    _, height, width = (int(size) for size in (told.split(",") if isinstance(told, str) else told))
    embedding = generator["encoder_embed.weight"].shape
    return ReasonerConfig(
        vocabulary=embedding[0],
        word_dim=embedding[1],
        encoder_width=generator["encoder_rnn.weight_hh_l0"].shape[1],
        input="pixels" if pixels else "features",
        input_channels=stem[1] if pixels else stem[1] - 2,
        input_height=height,
        input_width=width,
        blocks=sum(name.endswith(".conv1.weight") for name in network),
        channels=stem[0],
        projection=network["classifier.0.weight"].shape[0],
        hidden=network["classifier.5.weight"].shape[0],
        answers=network["classifier.8.weight"].shape[0],
    )


def from_original(
    generator_state: Mapping[str, Tensor], network_state: Mapping[str, Tensor], config: ReasonerConfig
) -> dict[str, Tensor]:
    """Return the state dict of `VisualReasoner(config)` that computes what the original's two state dicts do.

    config: the paper's, with the vocabulary and sizes of the run: `ReasonerConfig()`, or with
    `input="pixels"` and 3 x 224 x 224 for raw pixels. Counters of BatchNorm, which old checkpoints lack, are
    0. A prefix "module." or "function_modules." is dropped.

    Raises ValueError, naming them, for entries that are missing, unknown or of another shape.
    """
    _check_layout(config)
    names = {**GENERATOR_NAMES, **_network_names(config)}
    given = _bare(generator_state) | _bare(network_state)
    missing, unknown = sorted(names.keys() - given.keys()), sorted(given.keys() - names.keys())
    if missing or unknown:
        raise ValueError(
            f"Original checkpoint: missing {_some(missing)}; unknown {_some(unknown)}. "
            "Pass the generator's state first and the network's second, with the ReasonerConfig of the run "
            "(input, number of blocks, which of them are FiLM-ed)."
        )
    with torch.device("meta"):
        expected = VisualReasoner(config).state_dict()
    wrong = [
        f"{theirs} is {tuple(given[theirs].shape)}, expected {tuple(expected[ours].shape)}"
        for theirs, ours in names.items()
        if given[theirs].shape != expected[ours].shape
    ]
    if wrong:
        raise ValueError(
            f"Original checkpoint: shapes do not fit: {_some(wrong)}. "
            "Give the ReasonerConfig of the run: vocabulary, widths, answers, coordinates."
        )
    counters = {name: torch.tensor(0) for name in expected if name.endswith(COUNTER)}
    return {ours: given[theirs] for theirs, ours in names.items()} | counters


def _bare(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state without prefixes and counters."""
    return {
        re.sub(r"^(module\.|function_modules\.)+", "", name): value
        for name, value in state.items()
        if not name.endswith(COUNTER)
    }


def _check_layout(config: ReasonerConfig) -> None:
    """Raise ValueError for a config whose original has other layers than ours."""
    paper = ReasonerConfig()
    for field in fields(config):
        name = field.name
        if name not in OF_THE_RUN + OF_THE_START and getattr(config, name) != getattr(paper, name):
            raise ValueError(
                f"Original checkpoint: expected {name}={getattr(paper, name)!r} as in the paper's network, "
                f"got {getattr(config, name)!r}. Only the paper's layout converts by renaming."
            )


def _network_names(config: ReasonerConfig) -> dict[str, str]:
    """Original name -> our name for stem, blocks and classifier."""
    layers = {"stem.0": "stem.conv.conv", "stem.1": "stem.norm"}
    if config.input == "pixels":  # conv, norm and ReLU take three numbers a layer
        layers = {f"stem.{3 * layer}": f"stem.convs.{layer}" for layer in range(PIXEL_STEM_LAYERS)}
        layers |= {f"stem.{3 * layer + 1}": f"stem.norms.{layer}" for layer in range(PIXEL_STEM_LAYERS)}
    layers |= {f"classifier.{number}": f"classifier.{ours}" for number, ours in CLASSIFIER_LAYERS.items()}
    names = {
        f"{theirs}.{part}": f"{ours}.{part}"
        for theirs, ours in layers.items()
        for part in (CONV + STATISTICS if "norm" in ours else CONV)
    }
    for index in range(config.blocks):
        theirs, ours = f"{index}", f"blocks.block{index + 1}"
        names |= {f"{theirs}.input_proj.{part}": f"{ours}.project.conv.{part}" for part in CONV}
        names |= {f"{theirs}.conv1.{part}": f"{ours}.conv.conv.{part}" for part in CONV}
        names |= {f"{theirs}.bn1.{part}": f"{ours}.norm.{part}" for part in STATISTICS}
    return names


def _some(items: Sequence[str], most: int = 5) -> str:
    """The first few of a list, for a message."""
    if not items:
        return "nothing"
    rest = f" and {len(items) - most} more" if len(items) > most else ""
    return ", ".join(items[:most]) + rest


def main() -> None:
    """Convert; an error is one line and exit code 2."""
    parser = argparse.ArgumentParser(
        prog="python -m torchfilm.systems.visual_reasoning.converter",
        description="Turn a checkpoint of the original FiLM system into a folder for eval and ask.",
    )
    parser.add_argument("checkpoint", type=Path, help="the .pt file of the original's training")
    parser.add_argument("vocabulary", type=Path, help="the vocab.json of its preprocessing")
    parser.add_argument("out", type=Path, help="the new folder")
    given = parser.parse_args()
    try:
        convert(given.checkpoint, given.vocabulary, given.out)
    except (ValueError, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
