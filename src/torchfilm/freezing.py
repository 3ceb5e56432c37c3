"""What is frozen of a network while only its conditioning trains; known by the objects, not by their names.

Names change where others wrap a block afterwards: `torch.compile`, `nn.Sequential(block)`, `weight_norm`.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.utils import parametrize


class Frozen:
    """The parameters that were trained before, and the norms whose statistics stay as they are.

    Copied and pickled with the network, it knows the modules of the copy.
    """

    def __init__(self) -> None:
        self.parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
        self.norms: dict[str, tuple[nn.Module, bool]] = {}

    def freeze(self, root: nn.Module) -> None:
        """Freeze all but the child `film`, what is frozen already aside."""
        ours = "film."  # an encoder's norms go on learning with it
        for name, module in root.named_modules():
            if f"{name}.".startswith(ours):
                continue
            if isinstance(module, _NormBase) and module.running_mean is not None:
                self.norms.setdefault(name, (module, module.training == root.training))
            for key, parameter in module.named_parameters(recurse=False):
                if parameter.requires_grad:
                    parameter.requires_grad = False
                    self.parameters.append((module, key, parameter))

    def rest(self, root: nn.Module) -> None:
        """Put the norms into evaluation mode, also those that took the place of one."""
        modules = dict(root.named_modules())
        for name, (norm, _) in self.norms.items():
            norm.eval()
            if isinstance(now := modules.get(name), _NormBase):
                now.eval()

    def thaw(self, root: nn.Module) -> None:
        """Let everything train again that did before, also what took its place in the same module."""
        for module, key, parameter in self.parameters:
            now = module._parameters.get(key)
            for one in (parameter, *([] if now is None else [now]), *_originals(module, key)):
                one.requires_grad = True
        modules = dict(root.named_modules())
        for name, (norm, follows) in self.norms.items():
            for one in (norm, *([modules[name]] if isinstance(modules.get(name), _NormBase) else [])):
                one.train(root.training and follows)


def _originals(module: Any, key: str) -> list[Tensor]:
    """Return what a tensor of a module is computed from, where it is parametrised."""
    if not parametrize.is_parametrized(module, key):
        return []
    return list(module.parametrizations[key].parameters(recurse=False))
