"""The usual sites of families of networks, by the names that their code gives to modules."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection
from dataclasses import dataclass

from torch import nn

from torchfilm.channels import channels
from torchfilm.naming import check_choice

Told = int | Callable[[str, nn.Module], int | None]


@dataclass(frozen=True)
class Preset:
    """The usual sites of a family of networks, by the names that the family's code gives to modules.

    Args:
        patterns: regular expressions for whole names; the first that matches anything is taken. Its group
            "site", where it has one, is the name of the site: that of a module with such a part.
        dim: the axis of the channels, where the type of the modules does not tell.
        features: the number of channels at the output, where the type does not tell.
    """

    patterns: tuple[str, ...]
    dim: int | None = None
    features: Told | None = None

    def among(self, names: Collection[str]) -> list[str]:
        """Return the names of the sites among those of a network; none where nothing matches."""
        for pattern in self.patterns:
            matches = list(filter(None, map(re.compile(pattern).fullmatch, names)))
            if matches:
                return [match.groupdict().get("site", match[0]) for match in matches]
        return []


def _of_its_last(name: str, block: nn.Module) -> int | None:
    """Return how many channels the last part of a block has that tells, in the order of their making."""
    widths = (channels(part, "output")[0] for part in reversed([*block.modules()]))
    return next((width for width in widths if width is not None), None)


PRESETS: dict[str, Preset] = {
    # The last norm of each residual block.
    "resnet": Preset(
        (
            r"(.*\.)?layer\d+\.\d+\.bn3",
            r"(.*\.)?layer\d+\.\d+\.bn2",
            r"(.*\.)?stages\.\d+\.layers\.\d+\.layer\.2\.normalization",
            r"(.*\.)?stages\.\d+\.layers\.\d+\.layer\.1\.normalization",
        )
    ),
    # The middle of each block: the norm between attention and MLP. Blocks in stages may have channels first.
    "vit": Preset(
        (
            r"(?!.*stages\.)(.*\.)?blocks\.\d+\.norm2",
            r"(.*\.)?layers?\.\d+\.layernorm_after",
            r"(.*\.)?encoder_layer_\d+\.ln_2",
        ),
        dim=-1,
    ),
    # The norm at the end of each block.
    "bert": Preset((r"(.*\.)?layer\.\d+\.output\.LayerNorm",)),
    # The norm that each MLP reads; its class is the family's own, so the axis is said here.
    "llama": Preset((r"(.*\.)?layers\.\d+\.post_attention_layernorm",), dim=-1),
    # The second norm of each residual block, where diffusion networks hear their time step.
    "unet": Preset((r"(.*\.)?resnets\.\d+\.norm2",)),
    # The norm that each MLP reads, after the one that hears the time step.
    "dit": Preset((r"(.*\.)?transformer_blocks\.\d+\.norm3",)),
    # Each MBConv block behind its addition, as in RT-1 (Brohan et al. 2022, section 5.1, arXiv 2212.06817).
    # Convolutions of the stem and the head may have such names too, but no such parts.
    "efficientnet": Preset(
        (
            r"(?P<site>(.*\.)?encoder\.blocks\.\d+)\.projection",
            r"(?P<site>(.*\.)?features\.\d+\.\d+)\.block",
            r"(?P<site>(.*\.)?blocks\.\d+\.\d+)\.bn1",
        ),
        dim=1,
        features=_of_its_last,
    ),
}


def preset(name: str) -> Preset:
    """Return the usual sites of a family of networks: `condition(model, preset("resnet"), ...)`.

    Those of "llama" are norms of a class that `fold` does not know: it needs leftover="constant". To fold
    into weights alone, condition r".*mlp\\.down_proj" instead. It gets a bias then,
    which `from_pretrained` drops, since the configuration has none there.

    Those of "efficientnet" are the blocks themselves, in transformers, torchvision and timm. RT-1 has one
    more FiLM, behind its 1x1 convolution: `find(model, preset("efficientnet")) + find(model, "proj")`.

    Raises:
        ValueError: for a name that is not in `PRESETS`.

    Example:
        >>> preset("llama").dim
        -1
    """
    other = "For other networks give a regular expression that matches the names of their modules."
    check_choice("preset:", name, [*PRESETS], remedy=other)
    return PRESETS[name]
