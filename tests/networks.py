"""A network as others write it, for the tests of what conditions it."""

import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise


class Block(nn.Module):
    """A residual block, as others write it."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x, scale=1.0):
        return torch.relu(x + scale * self.bn(self.conv(x)))


class Net(nn.Module):
    """A small ResNet."""

    def __init__(self, blocks: int = 2):
        super().__init__()
        self.stem = nn.Conv2d(2, 3, 3)
        self.blocks = nn.ModuleList(Block(3) for _ in range(blocks))
        self.head = nn.Linear(3, 5)

    def forward(self, x):
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3)))

    def features(self, x):
        return self.blocks[0](self.stem(x))


SITES = r"blocks\.\d+\.bn"


def inputs(batch: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(batch, 2, 11, 7), torch.randn(batch, 13)


def conditioned(**options) -> nn.Module:
    """Return a trained network that listens."""
    model = tf.condition(Net(), SITES, tf.Vector(13), **options)
    randomise(model.film)
    return model.eval()
