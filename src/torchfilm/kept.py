"""Constants that stay in a folded network, where weights could not take them.

The class of the module is swapped, as for conditioning, but what its slot holds are buffers of the module
itself, `kept_gamma` and so on: they move and are saved with it, and nothing makes them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.applying import Kept
from torchfilm.fusion import Fusion
from torchfilm.injection import attach
from torchfilm.sites import Site
from torchfilm.slots import slot_of


@dataclass(frozen=True, eq=False)
class Margin:
    """The value of `Border`: what each channel is padded with, [C]."""

    border: Tensor


class Border:
    """Pad by one number per channel, where a layer's own padding would put zeros.

    A layer that reads gamma * x + beta between zeros reads what x between -beta / gamma would have been: so
    gamma and beta go into its weights, and its border becomes this one.

    Args:
        amounts: as `torch.nn.functional.pad` takes them, last axis first.
    """

    def __init__(self, amounts: list[int]) -> None:
        self.amounts = amounts

    def build(self, cond_dim: int, sites: Any) -> nn.Module:
        """Raise: a border is made by folding, not generated."""
        raise NotImplementedError

    def apply(
        self, x: Float[Tensor, "batch channels ..."], value: Margin, dim: int, site: str
    ) -> Float[Tensor, "batch channels ..."]:
        """Return x with a border of the value."""
        pairs = list(zip(self.amounts[::2], self.amounts[1::2], strict=True))[::-1]
        first = x.ndim - len(pairs)
        sizes = [size + sum(pairs[i - first]) if i >= first else size for i, size in enumerate(x.shape)]
        border = value.border.to(x.dtype).view(-1, *[1] * len(pairs))
        padded = border.expand(sizes).clone()
        inside = [slice(pair[0], pair[0] + x.shape[first + i]) for i, pair in enumerate(pairs)]
        padded[(..., *inside)] = x
        return padded


def keeps(module: nn.Module) -> bool:
    """Tell whether a module applies a constant that a fold kept."""
    return isinstance(slot_of(module), Kept)


def keep(model: nn.Module, site: Site, fusion: Fusion, value: Any) -> None:
    """Let the module of a site apply a constant from now on; its class is swapped for that.

    Raises:
        ValueError: for a value that is no dataclass of tensors.
    """
    if not dataclasses.is_dataclass(value):
        raise ValueError(
            f"fold, site '{site.name}': expected the value of {type(fusion).__name__} to be a dataclass of "
            f"tensors, got {type(value).__name__}.\nGive the fusion a method fold(value) -> Modulation."
        )
    attach(model, site.name, Kept(model.get_submodule(site.name), site, fusion, value))
