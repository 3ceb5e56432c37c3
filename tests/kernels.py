"""What the tests of the kernels share: what they are given, and what they must give."""

from __future__ import annotations

import shutil
import sysconfig
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

import torchfilm as tf

needs_compiler = pytest.mark.skipif(
    not any(shutil.which(name) for name in ("g++", "clang++", "c++"))
    or not Path(sysconfig.get_paths()["include"], "Python.h").is_file(),
    reason="there is no C++ compiler, or there are no headers of Python",
)


class Counted:
    """The kernels, and the names of functions that took what they were given."""

    def __init__(self, kernels: ModuleType) -> None:
        self.kernels = kernels
        self.taken: list[str] = []

    def __getattr__(self, name: str) -> Callable[..., object]:
        return self.counting(getattr(self.kernels, name))

    def counting(self, function: Callable[..., object]) -> Callable[..., object]:
        """The function, whose name is noted where it gives anything."""

        def counted(*arguments: object) -> object:
            found = function(*arguments)
            self.taken += [] if found is None else [function.__name__]
            return found

        return counted


def results(way, *leaves: Tensor, seed: int = 5) -> list[Tensor]:
    """What it gives and the gradients of the leaves, for the same random gradient of the output."""
    leaves = tuple(leaf.detach().clone(memory_format=torch.preserve_format) for leaf in leaves)
    y = way(*(leaf.requires_grad_() for leaf in leaves))
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, weight)]


def agree(way, *leaves: Tensor) -> None:
    """The kernels in float32 give what the plain path gives in float64, to float32's rounding."""
    for one, exact in zip(
        results(way, *leaves), results(way, *(leaf.double() for leaf in leaves)), strict=True
    ):
        close(one, exact)


def close(found: Tensor, exact: Tensor) -> None:
    """Found in float32, it is what is exact in float64, to float32's rounding."""
    assert found.dtype is torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=2e-5, atol=2e-6 * float(exact.abs().max()))


LAYOUTS = {
    "images": ((2, 3, 5, 7), 1, torch.contiguous_format),
    "one image": ((1, 19, 5, 7), 1, torch.contiguous_format),
    "channels last": ((3, 37, 5, 7), 1, torch.channels_last),
    "volumes": ((2, 3, 5, 7, 11), 1, torch.contiguous_format),
    "volumes, channels last": ((2, 3, 5, 7, 11), 1, torch.channels_last_3d),
    "sequences": ((2, 5, 2500), 1, torch.contiguous_format),
    "tokens": ((3, 131, 7), -1, torch.contiguous_format),
    "wide tokens": ((2, 6, 2100), -1, torch.contiguous_format),
    "vectors": ((3, 19), 1, torch.contiguous_format),
    "vectors of images": ((3, 19, 1, 1), 1, torch.contiguous_format),
}


def sizes_of(rows: str, batch: int, channels: int) -> tuple[int, ...]:
    """Of a modulation: a row for each sample, or one for all of them."""
    return {"each": (batch, channels), "all": (channels,), "one row": (1, channels)}[rows]


def given(name: str, rows: str) -> tuple[Tensor, Tensor, Tensor, int]:
    shape, dim, memory = LAYOUTS[name]
    sizes = sizes_of(rows, shape[0], shape[dim])
    x = torch.randn(shape).contiguous(memory_format=memory)
    return x, torch.randn(sizes), torch.randn(sizes), dim


NORMS = {
    "group": (nn.GroupNorm(3, 12), (5, 12, 3, 7)),
    "group, one channel each": (nn.GroupNorm(12, 12), (5, 12, 21)),
    "group without affine": (nn.GroupNorm(3, 12, affine=False), (5, 12, 3, 7)),
    "long": (nn.GroupNorm(2, 6), (2, 6, 2500)),
    "of four": (nn.GroupNorm(4, 24), (3, 24, 4)),
    "of eight": (nn.GroupNorm(4, 24), (3, 24, 2, 4)),
    "of sixteen": (nn.GroupNorm(4, 24), (3, 24, 16)),
    "instance": (nn.InstanceNorm2d(6), (5, 6, 3, 7)),
    "instance with affine": (nn.InstanceNorm2d(6, affine=True), (5, 6, 3, 7)),
    "layer": (nn.LayerNorm(7), (5, 11, 7)),
    "layer of more positions than are summed in one go": (nn.LayerNorm(5), (2, 131, 5)),
    "layer without affine": (nn.LayerNorm(7, elementwise_affine=False), (5, 11, 7)),
    "layer without bias": (nn.LayerNorm(7, bias=False), (5, 2, 3, 7)),
    "wide layer": (nn.LayerNorm(2100), (2, 3, 2100)),
    "rms": (nn.RMSNorm(7), (5, 11, 7)),
    "rms with its own epsilon, without affine": (
        nn.RMSNorm(7, eps=1e-3, elementwise_affine=False),
        (5, 11, 7),
    ),
}


def conditional(name: str) -> tuple[nn.Module, Tensor, list[Tensor]]:
    """A conditional norm of a trained one, features apart from zero, and the trained parameters."""
    norm, shape = NORMS[name]
    for parameter in norm.parameters():
        nn.init.normal_(parameter, 1.0)
    layer = getattr(tf, f"Conditional{type(norm).__name__}").from_norm(norm, cond_dim=2)
    return layer, 3 * torch.randn(shape) + 20, list(norm.parameters())
