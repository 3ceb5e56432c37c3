"""Weights of other implementations: the U-Nets of diffusion_policy and of lerobot, as a `ConditionalUnet1d`.

Both have the same equations under other names. What differs from here is named once: gamma is raw (1 is not
added to it), the rows of each block's Linear are [gamma of C, beta of C], and Mish stands in front of it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from torchfilm.blocks.unet1d import ConditionalUnet1d, Convolution

_STEP = "diffusion_step_encoder."
_LEAVES = {
    "conv1.block.0": "first.conv",
    "conv1.block.1": "first.norm",
    "conv2.block.0": "second.conv",
    "conv2.block.1": "second.norm",
    "residual_conv": "shortcut",
}
_ORIGINAL = {"blocks.0.block": "conv1.block", "blocks.1.block": "conv2.block", ".2.conv.": ".2."}


def from_original_unet(state: Mapping[str, Tensor]) -> ConditionalUnet1d:
    """Return the U-Net of a state dict of diffusion_policy's `ConditionalUnet1D` or lerobot's.

    Sizes are read from the weights, but for the groups of the norms, which leave no trace: 8 there, and here.
    A prefix in front of all names ("model.", "diffusion.unet.") is found by itself; entries without it
    (normalisers, image encoders) are left aside. Both kinds of modulation load: scale and shift, and, with
    cond_predict_scale=False, the shift alone.

    Args:
        state: names and tensors, as `torch.load(..., weights_only=True)` or safetensors give them.

    Raises:
        ValueError: for a state dict of something else, one with local conditioning (which is added there,
            not FiLM), or one that is not whole.

    Example:
        unet = from_original_unet(torch.load("unet.pt", weights_only=True))
    """
    named = _renamed(state)
    levels = 1 + max((int(key.split(".")[1]) for key in named if key.startswith("down_modules.")), default=-1)
    if levels == 0 or "final_conv.1.weight" not in named or f"{_STEP}1.weight" not in named:
        raise ValueError(
            f"from_original_unet: expected the names of diffusion_policy's or lerobot's U-Net "
            f"(diffusion_step_encoder, down_modules, mid_modules, up_modules, final_conv), got "
            f"{', '.join(sorted(named)[:3])}, ... Pass the policy's state dict itself."
        )
    if any(key.startswith("local_cond_encoder.") for key in named):
        raise ValueError(
            "from_original_unet: expected a U-Net with global conditioning, got one with local_cond_encoder. "
            "Local conditions are added there, not modulated; this U-Net has no place for them."
        )
    widths = tuple(len(named[f"down_modules.{i}.0.conv1.block.0.weight"]) for i in range(levels))
    first = named["down_modules.0.0.cond_encoder.1.weight"]
    step_dim = named[f"{_STEP}1.weight"].shape[1]
    unet = ConditionalUnet1d(
        named["final_conv.1.weight"].shape[0],
        first.shape[1] - step_dim,
        widths=widths,
        step_dim=step_dim,
        convolution=Convolution(named["down_modules.0.0.conv1.block.0.weight"].shape[2]),
        emit=("gamma", "beta") if len(first) == 2 * widths[0] else ("beta",),
    ).to(first.dtype)
    _fill(unet, named)
    return unet


def _renamed(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The entries of the U-Net under lerobot's names, without what stands in front of them."""
    marked = next((key for key in state if f"{_STEP}1.weight" in key), "")
    prefix = marked[: marked.index(_STEP)] if marked else ""
    named = {}
    for key, value in state.items():
        if key.startswith(prefix):
            short = key[len(prefix) :]
            for old, new in _ORIGINAL.items():
                short = short.replace(old, new)
            named[short] = value
    return named


def _fill(unet: ConditionalUnet1d, named: Mapping[str, Tensor]) -> None:
    """Put the weights where they belong; everything is looked up before anything changes."""
    places = {f"down{i}_{j}": f"down_modules.{i}.{j}" for i in range(len(unet.widths)) for j in range(2)}
    places |= {f"mid_{j}": f"mid_modules.{j}" for j in range(2)}
    places |= {f"up{i}_{j}": f"up_modules.{i}.{j}" for i in range(len(unet.up)) for j in range(2)}
    wanted = {f"step_encoder.{i}": f"{_STEP}{i}" for i in (1, 3)}
    wanted |= {f"down.{i}": f"down_modules.{i}.2" for i in range(len(unet.down))}
    wanted |= {f"up.{i}": f"up_modules.{i}.2" for i in range(len(unet.up))}
    wanted |= {
        "last.conv": "final_conv.0.block.0",
        "last.norm": "final_conv.0.block.1",
        "out": "final_conv.1",
    }
    for name, place in places.items():
        wanted |= {f"blocks.{name}.{ours}": f"{place}.{theirs}" for theirs, ours in _LEAVES.items()}
    found: dict[str, Tensor] = {}
    for part in ("weight", "bias"):
        rows = [named.get(f"{places[name]}.cond_encoder.1.{part}") for name in unet.sites]
        if any(row is None for row in rows):
            raise ValueError(_missing([f"{places[n]}.cond_encoder.1.{part}" for n in unet.sites], named))
        found[f"generator.head.{part}"] = torch.cat([row for row in rows if row is not None])
    own = unet.state_dict()
    lookup = {f"{ours}.{p}": f"{theirs}.{p}" for ours, theirs in wanted.items() for p in ("weight", "bias")}
    expected = {ours: theirs for ours, theirs in lookup.items() if ours in own}
    if any(theirs not in named for theirs in expected.values()):
        raise ValueError(_missing(list(expected.values()), named))
    found |= {ours: named[theirs] for ours, theirs in expected.items()}
    unet.load_state_dict(found)


def _missing(names: list[str], named: Mapping[str, Tensor]) -> str:
    lacking = [name for name in names if name not in named]
    return (
        f"from_original_unet: expected a whole U-Net, got one without {', '.join(lacking[:3])}"
        f"{' and others' if len(lacking) > 3 else ''}. Was the file cut off, or split into parts?"
    )
