"""The networks that the benchmarks of the library condition: own code, random weights and statistics."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchfilm as tf
from fusion_speed import ResNet, awake


class Residual(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a plain skip."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        return functional.relu(x + self.bn2(self.conv2(y)), inplace=True)


class ViTBlock(nn.Module):
    """Attention and a perceptron, each behind a LayerNorm and beside a skip."""

    def __init__(self, width: int = 768, heads: int = 12) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        heads = self.qkv(self.norm1(x)).view(batch, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        read = functional.scaled_dot_product_attention(*heads.unbind())
        x = x + self.proj(read.transpose(1, 2).reshape(batch, tokens, width))
        return x + self.fc2(functional.gelu(self.fc1(self.norm2(x))))


def residual_blocks() -> nn.Module:
    """Four blocks of 128 channels: the network of the FiLM paper behind its stem."""
    return nn.Sequential(*(Residual(128) for _ in range(4)))


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str, tuple[int, ...]]] = {
    "4 residual blocks": (residual_blocks, r"\d\.bn2", (128, 14, 14)),
    "ResNet-18": (ResNet, r"stages\.\d\.\d\.bn2", (3, 224, 224)),
    "ViT block": (ViTBlock, "norm1|norm2|proj|fc2", (197, 768)),
}
"""How each is built, where it is conditioned, and the shape of a sample.

The ViT block's norms and the ends of its branches listen, as in adaLN.
"""


def built(name: str, device: str = "cpu") -> nn.Module:
    """A network in evaluation with random statistics, the same at each call."""
    torch.manual_seed(0)
    model = NETWORKS[name][0]().eval().to(device)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.normal_(std=0.1)
        elif key.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model


def conditioned(name: str, cond_dim: int, device: str = "cpu", **options: Any) -> nn.Module:
    """The network, conditioned at its sites, its heads no longer zero."""
    return awake(tf.condition(built(name, device), NETWORKS[name][1], tf.Vector(cond_dim), **options))
