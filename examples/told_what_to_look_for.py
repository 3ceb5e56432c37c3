"""A ViT is told what to look for: where in the picture is the colour that was asked for?

Four coloured squares, one in each corner. The picture alone does not say which one is meant; FiLM in the
middle of each block says it.

    python examples/told_what_to_look_for.py
"""

import torch
from torch import Tensor, nn

import torchfilm as tf

COLOURS = {"red": (1, 0, 0), "green": (0, 1, 0), "blue": (0, 0, 1), "yellow": (1, 1, 0)}


class ViT(nn.Module):
    """16 patches, two blocks, the mean of the tokens."""

    def __init__(self, width: int = 32, classes: int = 4) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.places = nn.Parameter(0.02 * torch.randn(16, width))
        block = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(block, 2, enable_nested_tensor=False)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.places
        return self.head(self.encoder(tokens).mean(dim=1))


def scenes(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 3, 16, 16], the colour that is asked for [B], and its corner [B]."""
    order = torch.rand(batch, 4).argsort(dim=1)  # which colour is in which corner
    squares = torch.tensor(list(COLOURS.values()), dtype=torch.float)[order]
    pictures = squares.transpose(1, 2).reshape(batch, 3, 2, 2).repeat_interleave(8, 2).repeat_interleave(8, 3)
    asked = torch.randint(4, (batch,))
    return pictures + 0.1 * torch.randn(batch, 3, 16, 16), asked, (order == asked[:, None]).int().argmax(1)


def main() -> None:
    torch.manual_seed(0)
    vit = tf.condition(ViT(), r"encoder\.layers\.\d\.norm2", tf.Classes(4, dim=16))
    optimiser = torch.optim.Adam(vit.parameters(), lr=3e-3)
    for _ in range(400):
        pictures, asked, corner = scenes(32)
        loss = nn.functional.cross_entropy(vit(pictures, cond=asked), corner)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    pictures, asked, corner = scenes(500)
    right = (vit(pictures, cond=asked).argmax(1) == corner).float().mean().item()
    print(f"{right:.0%} right; without the question 25 %")
    for i, name in enumerate(COLOURS):
        print(f"{name}: corner {int(vit(pictures[:1], cond=torch.tensor([i])).argmax())}")


if __name__ == "__main__":
    main()
