"""What does listening cost, FiLM against the alternatives at the same sites of the same network?

A residual network of the size of ResNet-18 at 224 pixels; the condition is 16 tokens of 512 numbers; after its
4 stages or its 8 blocks. Each fusion as it is, and each with as many parameters as FiLM has.

    python benchmarks/fusion_speed.py
"""

import argparse
import time

import torch
from torch import Tensor, nn

import torchfilm as tf
from measuring import save
from torchfilm.comparison import Row

WIDTHS, COND, TOKENS = (64, 128, 256, 512), 512, 16
FUSIONS = ("film", "scale", "bias", "gate", "concat", "low_rank", "cross_attention")


class Block(nn.Module):
    """Two 3x3 convolutions with BatchNorm beside a skip."""

    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(out)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(out)
        self.skip = nn.Sequential()
        if stride > 1 or channels != out:
            self.skip = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        return (y + self.skip(x)).relu()


class ResNet(nn.Module):
    """Four stages of two blocks, 11.7 million parameters."""

    def __init__(self, widths: tuple[int, ...] = WIDTHS, classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, widths[0], 7, 2, 3, bias=False),
            nn.BatchNorm2d(widths[0]),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
        )
        before = (widths[0], *widths)
        self.stages = nn.Sequential(
            *(
                nn.Sequential(Block(before[i], out, 1 if i == 0 else 2), Block(out, out, 1))
                for i, out in enumerate(widths)
            )
        )
        self.head = nn.Linear(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.stages(self.stem(x)).mean((2, 3)))


def sites(model: nn.Module, number: int) -> tf.Sites:
    """The output of each stage, or of each block."""
    blocks = {4: "1", 8: "[01]"}[number]
    found = [
        tf.find(model, rf"stages\.{i}\.{blocks}", dim=1, features=width) for i, width in enumerate(WIDTHS)
    ]
    return sum(found[1:], found[0])


def listening(fusion: str, number: int, **options: object) -> nn.Module:
    """The network with a fusion at 4 or 8 sites, its heads no longer zero."""
    torch.manual_seed(0)
    pooling = None if fusion == "cross_attention" else "mean"
    network = ResNet().eval()
    model = tf.condition(
        network, sites(network, number), tf.Tokens(COND, pooling=pooling), fusion=fusion, **options
    )
    with torch.no_grad():
        for parameter in tf.conditioning(model).generator.parameters():
            parameter.normal_(std=0.02)
    return model


def measured(number: int, rounds: int, *, matched: bool) -> dict[str, object]:
    """All fusions at 4 or 8 sites, batch 1; matched: each with about FiLM's number of parameters."""
    models = {"film": listening("film", number)}
    sizes = {"match_params": models["film"]} if matched else {}
    for fusion in FUSIONS[1:]:
        models[fusion] = listening(fusion, number, **sizes)
    batch = (torch.rand(1, 3, 224, 224), (torch.rand(1, TOKENS, COND), torch.ones(1, TOKENS) > 0))
    found = tf.compare(models, batch, rounds=rounds, clock=time.process_time)
    return {
        "film_adds_of_what_cross_attention_adds": found.added_time("film", "cross_attention"),
        **{row.name: row_numbers(row) for row in found.rows},
    }


def row_numbers(row: Row) -> dict[str, object]:
    """What the result file keeps of a row."""
    return {
        "ms": round(row.milliseconds, 3),
        "quartiles_ms": [round(ms, 3) for ms in row.quartiles],
        "ratio": round(row.ratio, 4),
        "parameters": row.parameters,
        "added": row.added,
        "gflop": round(row.flops / 1e9, 4),
        "kept_mb": round(row.kept / 1e6, 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=40)
    given = parser.parse_args()
    torch.set_num_threads(1)
    numbers = {
        f"{number} sites{', parameters matched' if matched else ''}": measured(
            number, given.rounds, matched=matched
        )
        for number in (4, 8)
        for matched in (False, True)
    }
    save("fusion_speed", {"rounds": given.rounds, "tokens": TOKENS, "cond": COND, **numbers})


if __name__ == "__main__":
    main()
