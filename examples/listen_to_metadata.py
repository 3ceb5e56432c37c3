"""Condition a trained ResNet on metadata: one network, many thermal cameras.

A camera shows a disc of some temperature with a brightness gain * temperature + offset. The network was
trained for gain 1 and offset 0, and stays frozen. Other cameras write both into their metadata, for FiLM.

    python examples/listen_to_metadata.py
"""

import torch
from torch import Tensor, nn

import torchfilm as tf


class Block(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)
        self.conv2, self.bn2 = nn.Conv2d(channels, channels, 3, 1, 1), nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))).relu()


def pictures(batch: int, spread: float) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 1, 16, 16], gain and offset [B, 2], and the temperature of the disc [B, 1]."""
    temperature, metadata = torch.rand(batch, 1), torch.tensor([1.0, 0.0]) + spread * torch.randn(batch, 2)
    axis, place = torch.linspace(-1, 1, 16), torch.rand(batch, 2, 1, 1) - 0.5
    disc = (axis[:, None] - place[:, 0]).square() + (axis - place[:, 1]).square() < 0.2
    gain, offset = metadata[:, :, None, None].unbind(1)
    return (gain * disc * (1 + temperature[:, :, None]) + offset)[:, None], metadata, temperature


def train(model: nn.Module, steps: int, spread: float) -> None:
    optimiser = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        x, metadata, temperature = pictures(32, spread)
        loss = ((model(x, cond=metadata) if spread else model(x)) - temperature).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def main() -> None:
    torch.manual_seed(0)
    stem = nn.Sequential(nn.Conv2d(1, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
    tail = nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 1)
    resnet = nn.Sequential(stem, Block(16), Block(16), *tail)
    train(resnet, 300, 0.0)
    tf.freeze_base(tf.condition(resnet, r"0\.1|\d\.bn[12]", tf.Vector(2), trunk=(32, "silu")))
    for name, spread in {"its own camera": 0.0, "other cameras": 0.3, "the same, listening": 0.3}.items():
        if name.endswith("listening"):
            train(resnet, 300, spread)
        x, metadata, temperature = pictures(500, spread)
        error = (resnet(x, cond=metadata) - temperature).abs().mean().item()
        print(f"{name}: {error:.2f} off; a blind guess is 0.25 off")


if __name__ == "__main__":
    main()
