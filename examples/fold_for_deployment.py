"""Fold a condition into the weights: a conditioned network becomes a plain one, of plain classes.

For a robot with one instruction, or a camera with one setting, the condition is fixed once the network is
deployed. Then FiLM costs nothing, and the device needs neither generator nor this library.

    python examples/fold_for_deployment.py
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


def listening() -> nn.Module:
    """A conditioned network; random heads stand for trained ones, which start as the identity."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 32, 3), Block(32), Block(32), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    tf.condition(model, r"[12]\.bn\d", tf.Vector(64))
    with torch.no_grad():
        for parameter in tf.conditioning(model).generator.parameters():
            parameter.normal_(std=0.05)
    return model.eval()


def main() -> None:
    model, x, instructions = listening(), torch.rand(2, 3, 32, 32), torch.randn(2, 64)
    plain, report = tf.fold(model, cond=instructions[:1], fuse_norms=True, inputs=(x,))
    print(report)
    print("classes of others than torch:", [str(m) for m in plain.modules() if "film" in type(m).__module__])
    with torch.no_grad():
        for name, cond in {"the same": instructions[[0, 0]], "another": instructions[[1, 1]]}.items():
            change = (model(x, cond=cond) - plain(x)).norm() / plain(x).norm()
            print(f"{name} instruction: outputs are {change.item():.0e} apart")
    with tf.folded(model, cond=instructions[1:]):  # in place, and exactly restored after the block
        print("in place:", tuple(model(x).shape))


if __name__ == "__main__":
    main()
