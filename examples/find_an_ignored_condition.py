"""Find a condition that is ignored: before training with doctor(), after it with heard().

The most frequent complaint about conditioned networks is that they ignore the condition; the loss does not
say so. Here gamma and beta stand in front of an InstanceNorm, which takes them out again.

    python examples/find_an_ignored_condition.py
"""

import torch
from torch import Tensor, nn

import torchfilm as tf


def network() -> nn.Sequential:
    torch.manual_seed(0)
    features = nn.Sequential(nn.Conv2d(1, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.ReLU())
    return nn.Sequential(*features, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 1))


def batch() -> tuple[Tensor, Tensor, Tensor]:
    """Pictures, a loudness that was asked for from 0 to 4, and the answer, which is the loudness."""
    loudness = torch.randint(5, (64,))
    return torch.randn(64, 1, 8, 8), loudness, loudness.float()[:, None]


def train(model: nn.Module) -> None:
    optimiser = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        x, loudness, answer = batch()
        loss = (model(x, cond=loudness) - answer).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()


def squared(output: Tensor, answer: Tensor) -> Tensor:
    return (output - answer).square().mean(dim=1)


def main() -> None:
    for site, what in {"0": "FiLM at the convolution", "1": "FiLM at the norm"}.items():
        model = tf.condition(network(), site, tf.Classes(5, dim=16))
        x, loudness, _ = batch()
        print(f"--- {what}, before training:")
        print(tf.doctor(model, x, cond=loudness))
        train(model)
        print(f"--- {what}, after training:")
        print(tf.heard(model, [batch() for _ in range(4)], loss=squared).words)


if __name__ == "__main__":
    main()
