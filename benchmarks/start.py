"""Which start of the generator learns fastest?

A picture of 12x12 holds four things of eight colours, one in each quarter, with noise; the condition is a
colour, the answer the quarter that its thing is in. A small residual network of random weights listens at
the norm of each of its three blocks, or at the end of their branches. Held-out pictures are asked every few
steps: the mean over the training says how fast, the last value how far.

    python benchmarks/start.py        (five minutes of one core)
"""

import statistics
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

import torchfilm as tf
from measuring import parser_of, save

BEHIND = "at the branch's end"
GATED = {"emit": ("gamma", "beta", "gate")}
STARTS: dict[str, dict[str, Any]] = {
    "identity: weights and biases zero": {},
    "as nn.Linear starts": {"init": "default"},
    "as nn.Linear starts, gamma around 0.5": {"init": "default", "gamma_offset": 0.5},
    "as nn.Linear starts, times a learned scale from zero": {"learned_scale": True},
    "identity, and a gate from 0, in front of the ReLU": {**GATED, "gate_start": 0.0},
    "identity, and a gate from 1, in front of the ReLU": {**GATED, "gate_start": 1.0},
    f"identity, {BEHIND}": {},
    f"identity, and a gate from 0, {BEHIND}": {**GATED, "gate_start": 0.0},
    f"identity, and a gate from 1, {BEHIND}": {**GATED, "gate_start": 1.0},
}
COLOURS, QUARTERS, SIDE, WIDTH, BLOCKS = 8, 4, 12, 16, 3
EVERY, HELD_OUT = 20, 500


class Block(nn.Module):
    """x + ReLU(BN(conv(x))), and a name for the end of the branch."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(WIDTH)
        self.end = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.end(self.norm(self.conv(x)).relu())


def network(start: str) -> nn.Module:
    """Pictures with two maps of coordinates in, four logits out; the sites listen to the colour."""
    site, where = ("end", {"dim": 1, "features": WIDTH}) if BEHIND in start else ("norm", {})
    stem = [nn.Conv2d(5, WIDTH, 3, padding=1), nn.ReLU()]
    end = [nn.AdaptiveMaxPool2d(1), nn.Flatten(), nn.Linear(WIDTH, QUARTERS)]
    model = nn.Sequential(*stem, *(Block() for _ in range(BLOCKS)), *end)
    return tf.condition(model, rf"\d\.{site}", tf.Classes(COLOURS, 32), **where, **STARTS[start])


def asked(number: int, random: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B, 5, 12, 12], the colour asked for, the quarter that it is in."""
    palette = torch.tensor([[i & 1, i >> 1 & 1, i >> 2] for i in range(COLOURS)]) * 2.0 - 1
    colours = torch.rand(number, COLOURS, generator=random).argsort(dim=1)[:, :QUARTERS]
    axis = torch.linspace(-1, 1, SIDE)
    pictures = 0.3 * torch.randn(number, 5, SIDE, SIDE, generator=random)
    pictures[:, 3], pictures[:, 4] = axis[:, None], axis
    where = torch.randint(SIDE // 2 - 1, (2, number, QUARTERS), generator=random)
    rows, half = torch.arange(number), SIDE // 2
    for quarter in range(QUARTERS):
        top, left = where[:, :, quarter] + half * torch.tensor([[quarter // 2], [quarter % 2]])
        for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
            pictures[rows, :3, top + i, left + j] = palette[colours[:, quarter]]
    answers = torch.randint(QUARTERS, (number,), generator=random)
    return pictures, colours[rows, answers], answers


def trained(start: str, seed: int, steps: int) -> list[float]:
    """The share right of held-out pictures, every few steps of Adam on batches of 64."""
    torch.manual_seed(seed)
    model, random = network(start), torch.Generator().manual_seed(seed)
    pictures, colours, answers = asked(HELD_OUT, torch.Generator().manual_seed(10_000))
    optimiser, right = torch.optim.Adam(model.parameters(), 5e-3), []
    for step in range(steps):
        x, colour, answer = asked(64, random)
        loss = functional.cross_entropy(model(x, cond=colour), answer)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % EVERY == 0:
            model.eval()
            with torch.no_grad():
                said = model(pictures, cond=colours).argmax(dim=1)
            right.append(float((said == answers).float().mean()))
            model.train()
    return right


def summary(values: list[float]) -> dict[str, float]:
    """Mean, least and most over the seeds."""
    found = {"mean": statistics.mean(values), "low": min(values), "high": max(values)}
    return {name: round(value, 4) for name, value in found.items()}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--seeds", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = {}
    for start in STARTS:
        curves = [trained(start, seed, given.steps) for seed in range(given.seeds)]
        over = [statistics.mean(curve) for curve in curves]
        rows[start] = {"on_average": summary(over), "at_the_end": summary([c[-1] for c in curves])}
    save("start", {"steps": given.steps, "seeds": given.seeds, "chance": 1 / QUARTERS, "rows": rows})


if __name__ == "__main__":
    main()
