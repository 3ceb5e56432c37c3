"""Condition any PyTorch network on anything, with FiLM: gamma * x + beta.

    >>> import torch, torchfilm as tf
    >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8), torch.nn.ReLU())
    >>> model = tf.condition(model, "1", tf.Vector(16))
    >>> y = model(torch.rand(2, 3, 9, 9), cond=torch.rand(2, 16))

These are the names; help(torchfilm.condition), and so on, shows shapes, errors and an example of each.

Condition a network
    condition find preset Site Sites using unconditioned remove conditioning Conditioning
    freeze_base unfreeze_base checkpoint_context save load Fusion

Conditions
    Vector Classes Scalars Tokens Several Maybe Masked

Layers
    FiLM DenseFiLM AdaLNZero AdaRMSNorm
    ConditionalBatchNorm1d ConditionalBatchNorm2d ConditionalBatchNorm3d ConditionalGroupNorm
    ConditionalInstanceNorm1d ConditionalInstanceNorm2d ConditionalInstanceNorm3d
    ConditionalLayerNorm ConditionalRMSNorm

Generators
    Generator GeneratorOptions ComposedGenerator build_generator SeparableTable tabulate

Is the condition heard?
    doctor Diagnosis heard Hearing sensitivity

Look and edit
    Modulation Modulations modulations record Recording edit sweep summarise Summary
    save_modulations load_modulations

Guide, fold, compare
    guide fold folded FoldReport compare Comparison concat_as_shift

Modules beside these: torchfilm.functional, torchfilm.converters, torchfilm.native, torchfilm.plot.
"""

import importlib
from typing import TYPE_CHECKING, Any

from . import converters as converters
from . import functional as functional
from . import native as native
from . import version
from .adapter import freeze_base, load, save, unfreeze_base
from .adaptive import AdaLNZero, AdaRMSNorm
from .checkpointing import checkpoint_context
from .comparison import Comparison, compare
from .concatenation import concat_as_shift
from .conditions import Classes, Scalars, Tokens, Vector
from .doctor import Diagnosis, doctor
from .filling import Conditioning
from .fold_report import FoldReport
from .folding import fold, folded
from .fusion import Fusion
from .generator import ComposedGenerator, Generator, build_generator
from .generator_options import GeneratorOptions
from .guidance import guide
from .heard import heard
from .heard_report import Hearing
from .injection import condition, conditioning, remove, unconditioned, using
from .inspection import Recording, edit, record, sweep
from .layers import DenseFiLM, FiLM
from .modulation import Modulation
from .modulations import Modulations, load_modulations, modulations, save_modulations
from .norms import (
    ConditionalBatchNorm1d,
    ConditionalBatchNorm2d,
    ConditionalBatchNorm3d,
    ConditionalGroupNorm,
    ConditionalInstanceNorm1d,
    ConditionalInstanceNorm2d,
    ConditionalInstanceNorm3d,
    ConditionalLayerNorm,
    ConditionalRMSNorm,
)
from .presets import preset
from .sensitivity import sensitivity
from .several import Masked, Maybe, Several
from .sites import Site, Sites, find
from .summary import Summary, summarise
from .tables import SeparableTable
from .tabulation import tabulate

__version__ = version.VERSION

if TYPE_CHECKING:
    from . import plot as plot
else:

    def __getattr__(name: str) -> Any:
        """Import `torchfilm.plot`, which needs matplotlib, when it is asked for."""
        if name != "plot":
            raise AttributeError(f"module 'torchfilm' has no attribute {name!r}")
        from .extras import MissingError

        try:
            return importlib.import_module("torchfilm.plot")
        except MissingError as error:  # help() and whatever goes through a module expect no other error
            raise AttributeError(str(error)) from error


__all__ = [
    "AdaLNZero",
    "AdaRMSNorm",
    "Classes",
    "Comparison",
    "ComposedGenerator",
    "ConditionalBatchNorm1d",
    "ConditionalBatchNorm2d",
    "ConditionalBatchNorm3d",
    "ConditionalGroupNorm",
    "ConditionalInstanceNorm1d",
    "ConditionalInstanceNorm2d",
    "ConditionalInstanceNorm3d",
    "ConditionalLayerNorm",
    "ConditionalRMSNorm",
    "Conditioning",
    "DenseFiLM",
    "Diagnosis",
    "FiLM",
    "FoldReport",
    "Fusion",
    "Generator",
    "GeneratorOptions",
    "Hearing",
    "Masked",
    "Maybe",
    "Modulation",
    "Modulations",
    "Recording",
    "Scalars",
    "SeparableTable",
    "Several",
    "Site",
    "Sites",
    "Summary",
    "Tokens",
    "Vector",
    "build_generator",
    "checkpoint_context",
    "compare",
    "concat_as_shift",
    "condition",
    "conditioning",
    "doctor",
    "edit",
    "find",
    "fold",
    "folded",
    "freeze_base",
    "guide",
    "heard",
    "load",
    "load_modulations",
    "modulations",
    "preset",
    "record",
    "remove",
    "save",
    "save_modulations",
    "sensitivity",
    "summarise",
    "sweep",
    "tabulate",
    "unconditioned",
    "unfreeze_base",
    "using",
]


def __dir__() -> list[str]:
    return [*__all__, "__version__", "converters", "functional", "native", "plot"]
