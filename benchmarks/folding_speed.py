"""What does a condition cost once it is folded, tabulated, or rewritten?

Networks: batch 1, each against the unconditioned network whose BatchNorm torch has merged into the
convolutions. Generators: a table's row against one Linear per site. Every folded network is checked against
the conditioned one first.

    python benchmarks/folding_speed.py        (`--device cuda` where there is one)
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

import torchfilm as tf
from measuring import against, arguments, clock_of, save
from speed_networks import NETWORKS, built, conditioned
from torchfilm.dataflow import conv_norm_pairs

GENERATORS = {
    "4 sites of 128, condition 64": (4, 128, 64),
    "8 sites of 128, condition 512": (8, 128, 512),
    "24 sites of 512, condition 512": (24, 512, 512),
}


def merged(name: str, device: str) -> nn.Module:
    """The unconditioned network with each BatchNorm merged into its convolution by torch's own function."""
    model = built(name, device)
    for first, second in conv_norm_pairs(model):
        parent, _, child = first.rpartition(".")
        pair: Any = model.get_submodule(first), model.get_submodule(second)
        fused = fuse_conv_bn_eval(*pair)
        setattr(model.get_submodule(parent), child, fused)
        parent, _, child = second.rpartition(".")
        setattr(model.get_submodule(parent), child, nn.Identity())
    return model


def folded(name: str, rounds: int, cond_dim: int, device: str) -> dict[str, object]:
    """Milliseconds and ratios of the ways to run one network, and how exact folding was.

    Each way has weights of its own: what is called twice a round finds its weights in the cache more often.
    """
    plain, live = built(name, device), conditioned(name, cond_dim, device)
    base, again = merged(name, device), merged(name, device)
    x, cond = torch.randn(1, *NETWORKS[name][2], device=device), torch.randn(1, cond_dim, device=device)
    result, report = tf.fold(live, cond=cond, fuse_norms=True, inputs=(x,))
    assert report.error is not None
    assert report.error < 1e-4, report
    ways = {
        "merged": lambda: base(x),
        "unconditioned": lambda: plain(x),
        "conditioned": lambda: live(x, cond=cond),
        "folded": lambda: result(x),
        "merged again": lambda: again(x),
    }
    found = against("merged", ways, rounds, clock=clock_of(device))
    return {
        "sites": len(report),
        "output_error": report.error,
        "largest_site_error": max(entry.error for entry in report),
        **found,
    }


def generators(sites: int, channels: int, cond_dim: int, rounds: int, device: str) -> dict[str, object]:
    """A table, asked by an int and by a tensor of indices, against a Linear per site and the fused head."""
    model = nn.Sequential(*(nn.Linear(1, channels) for _ in range(sites))).to(device)
    tf.condition(model, r"\d+", tf.Vector(cond_dim))
    heads = nn.ModuleList(nn.Linear(cond_dim, 2 * channels) for _ in range(sites)).to(device)
    fused = tf.conditioning(model).generator
    z, index = torch.randn(1, cond_dim, device=device), torch.tensor([7], device=device)
    table = tf.conditioning(tf.tabulate(model, torch.randn(100, cond_dim, device=device))).generator
    ways: dict[str, Callable[[], object]] = {
        "a Linear per site": lambda: [head(z).chunk(2, dim=-1) for head in heads],
        "one fused head": lambda: fused(z),
        "table, int": lambda: table(7),
        "table, tensor": lambda: table(index),
    }
    return dict(against("a Linear per site", ways, rounds, calls=50, clock=clock_of(device)))


def main() -> None:
    parser = arguments(__doc__, rounds=40)
    parser.add_argument("--cond-dim", type=int, default=64)
    given = parser.parse_args()
    torch.set_num_threads(1)
    with torch.inference_mode():
        networks = {name: folded(name, given.rounds, given.cond_dim, given.device) for name in NETWORKS}
        tables = {name: generators(*sizes, given.rounds, given.device) for name, sizes in GENERATORS.items()}
    save(
        "folding_speed",
        {
            "rounds": given.rounds,
            "cond_dim": given.cond_dim,
            "batch": 1,
            "networks": networks,
            "generators": tables,
        },
        device=given.device,
    )


if __name__ == "__main__":
    main()
