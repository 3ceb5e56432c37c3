"""Condition any PyTorch network on anything, with FiLM: gamma * x + beta."""

from .conditions import Classes as Classes
from .conditions import Tokens as Tokens
from .conditions import Vector as Vector
from .fusion import Fusion as Fusion
from .generator import Generator as Generator
from .layers import ConditionalBatchNorm2d as ConditionalBatchNorm2d
from .layers import DenseFiLM as DenseFiLM
from .layers import FiLM as FiLM
from .modulation import Modulation as Modulation
