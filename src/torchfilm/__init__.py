"""Condition any PyTorch network on anything, with FiLM: gamma * x + beta."""

from .functional import film as film
from .functional import gated_residual as gated_residual
from .generator import Generator as Generator
from .modulation import Modulation as Modulation
