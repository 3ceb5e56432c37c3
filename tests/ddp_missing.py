"""Run by torchrun: conditions that are missing on one process and not on the other."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import torchfilm as tf
from torchfilm.training.distributed import joined

ROWS = 3  # per process


class Net(nn.Module):
    """A generator and what it modulates, in one module."""

    def __init__(self) -> None:
        super().__init__()
        conditions = {"kind": tf.Maybe(tf.Classes(11, 7)), "words": tf.Maybe(tf.Tokens(7, "attention"))}
        self.conditions = tf.Several(conditions, "concat")
        self.generator = tf.Generator(self.conditions.dim, {"here": 5}, trunk=(2, "silu"))
        self.layer = nn.Linear(3, 5)

    def forward(self, x: torch.Tensor, cond: dict) -> torch.Tensor:
        m = self.generator(self.conditions(cond))["here"]
        return m.gamma * self.layer(x) + m.beta


def gradients(model: nn.Module, x: torch.Tensor, cond: dict) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(x, cond).square().mean().backward()
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters()}


def own(value: torch.Tensor, rank: int) -> torch.Tensor:
    return value[ROWS * rank : ROWS * (rank + 1)]


def error(net: Net, ddp: nn.Module, masks: dict[str, list[bool]], *, nothing_on: int | None = None) -> float:
    """Return the largest difference between the gradients of two processes and those of one on all rows."""
    rank = dist.get_rank()
    torch.manual_seed(5)
    x, words = torch.randn(2 * ROWS, 3).double(), torch.randn(2 * ROWS, 4, 7).double()
    kinds, real = torch.randint(11, (2 * ROWS,)), torch.rand(2 * ROWS, 4) < 0.7
    present = {name: torch.tensor(mask) for name, mask in masks.items()}
    whole = {
        "kind": tf.Masked(kinds, present["kind"]),
        "words": tf.Masked((words, real), present["words"]),
    }
    part: dict = {
        "kind": tf.Masked(own(kinds, rank), own(present["kind"], rank)),
        "words": tf.Masked((own(words, rank), own(real, rank)), own(present["words"], rank)),
    }
    if nothing_on == rank:
        part = {"kind": None}
    together, alone = gradients(ddp, own(x, rank), part), gradients(net, x, whole)
    return max(float((together[name] - alone[name]).abs().max()) for name in alone)


def main(out: Path) -> None:
    torch.manual_seed(3)
    net = Net().double()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.normal_(std=0.5)
    with joined(torch.device("cpu")) as ranks:
        ddp = DistributedDataParallel(net)
        yes, no = [True] * ROWS, [False] * ROWS
        some, others = [True, False, True], [False, True, False]
        found = {
            "masks": error(net, ddp, {"kind": some + others, "words": others + yes}),
            "one has none": error(net, ddp, {"kind": no + some, "words": yes + yes}),
            "all dropped on one": error(net, ddp, {"kind": no + yes, "words": no + yes}),
            "None on one": error(net, ddp, {"kind": no + some, "words": no + yes}, nothing_on=0),
        }
        every = ranks.gather(found)
        if ranks.first:
            worst = {case: max(each[case] for each in every) for case in found}
            (out / "found.json").write_text(json.dumps(worst))
        del ddp  # before its group: else freeing it may wait for a thread that waits for the interpreter


if __name__ == "__main__":
    main(Path(sys.argv[1]))
