"""The systems built with torchfilm, one room each, all with the same furniture."""

from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import nn

from torchfilm.systems import diffusion_policy, visual_reasoning


@runtime_checkable
class System(Protocol):
    """What every system's module offers."""

    RECIPES: dict[str, Any]
    """Named runs, frozen dataclasses with `.config`: tiny, laptop, paper, ..."""

    def build(self, config: Any) -> nn.Module:
        """Return the untrained network of a config."""
        ...

    def loss(self, model: nn.Module, batch: Any) -> Any:
        """Return the loss of one batch."""
        ...

    def predict(self, model: nn.Module, observation: Any) -> Any:
        """Return what the network concludes from one observation."""
        ...

    def load(self, path: Path | str | None = None) -> nn.Module:
        """Return a trained network; None: the shipped checkpoint, where there is one."""
        ...


SYSTEMS: dict[str, System] = {"diffusion_policy": diffusion_policy, "visual_reasoning": visual_reasoning}
