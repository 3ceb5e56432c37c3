"""A diffusion U-Net with classes and guidance: draw a bar in the column that was asked for.

The network knows nothing of time or classes; `condition` tells it both at the norm of each block. Half of the
training labels are drawn at random, so it hesitates; `guide` exaggerates the class while drawing.

    python examples/diffusion_with_guidance.py
"""

import torch
from torch import Tensor, nn

import torchfilm as tf


def block(channels: int, out: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(channels, out, 3, 1, 1), nn.GroupNorm(4, out), nn.SiLU())


class UNet(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down = block(1, width)
        self.low = nn.Sequential(nn.AvgPool2d(2), *block(width, width), nn.Upsample(scale_factor=2))
        self.up = nn.Sequential(*block(2 * width, width), nn.Conv2d(width, 1, 3, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.up(torch.cat([high := self.down(x), self.low(high)], dim=1))


@torch.no_grad()
def draw(unet: nn.Module, column: Tensor, scale: float) -> Tensor:
    x = torch.randn(len(column), 1, 8, 8)
    for time in torch.linspace(0, 0.8, 5):
        cond = {"time": time.expand(len(column), 1), "column": column}
        x = x + 0.2 * tf.guide(unet, x, cond=cond, scale={"column": scale})
    return x


def main() -> None:
    torch.manual_seed(0)
    cond = tf.Several({"time": tf.Scalars(1, 32), "column": tf.Maybe(tf.Classes(4, 32), dropout=0.5)})
    unet = tf.condition(UNet(), r"down\.1|low\.2|up\.1", cond, trunk=(64, "silu"))
    optimiser = torch.optim.Adam(unet.parameters(), lr=3e-3)
    for _ in range(250):
        column, t, noise = torch.randint(4, (32,)), torch.rand(32, 1, 1, 1), torch.randn(32, 1, 8, 8)
        bars = (torch.arange(8) // 2 == column[:, None, None, None]).float().expand(-1, 1, 8, -1)
        said = torch.where(torch.rand(32) < 0.5, torch.randint(4, (32,)), column)
        made = unet((1 - t) * noise + t * bars, cond={"time": t[:, :, 0, 0], "column": said})
        loss = (made - (bars - noise)).square().mean()  # flow matching
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    for scale in (0.0, 1.0, 3.0):
        column = torch.arange(4).repeat(100)
        brightest = draw(unet.eval(), column, scale).mean(2).reshape(-1, 4, 2).mean(2).argmax(1)
        print(f"scale {scale}: {(brightest == column).float().mean().item():.0%} in the column asked for")


if __name__ == "__main__":
    main()
