"""Checkpoints of the original FiLM system (Perez et al. 2018), renamed for `VisualReasoner`.

The original keeps two state dicts: `program_generator_state` reads the question, `execution_engine_state`
looks at the picture. Nothing is recomputed: the rows of the generator's head (gamma, then beta, block after
block) and the place of the coordinates (after the channels, x before y) are the same here.
"""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from torchfilm.blocks.vision import PIXEL_STEM_LAYERS
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


def from_original(
    generator_state: Mapping[str, Tensor], network_state: Mapping[str, Tensor], config: ReasonerConfig
) -> dict[str, Tensor]:
    """Return the state dict of `VisualReasoner(config)` that computes what the original's two state dicts do.

    config: the paper's, with the vocabulary, sizes and placement of the run: `ReasonerConfig()`, or with
    `input="pixels"` and 3 x 224 x 224 for raw pixels. Counters of BatchNorm, which old checkpoints lack, are
    0. A prefix "module." or "function_modules." is dropped.

    Raises ValueError, naming them, for entries that are missing, unknown or of another shape.
    """
    _check_layout(config)
    names = {**GENERATOR_NAMES, **_network_names(config)}
    given = {
        re.sub(r"^(module\.|function_modules\.)+", "", name): value
        for state in (generator_state, network_state)
        for name, value in state.items()
        if not name.endswith(COUNTER)
    }
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


def _check_layout(config: ReasonerConfig) -> None:
    """Raise ValueError for a config whose original has other layers than ours."""
    plain = ReasonerConfig()
    for field in ("batch_norm", "filmed_blocks", "emit", "bag_of_words"):
        if getattr(config, field) != getattr(plain, field):
            raise ValueError(
                f"Original checkpoint: expected {field}={getattr(plain, field)!r} as in the paper's network, "
                f"got {getattr(config, field)!r}. Only the paper's layout converts by renaming."
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
