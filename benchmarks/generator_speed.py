"""What does it cost to make gamma and beta: a Linear per site, one fused head, other heads, tables?

The shape is that of a diffusion-policy U-Net: 12 sites of 256 to 1024 channels, a time step (256 numbers)
and an observation (128) behind a Mish; and, for launches, 24 sites of 64 channels on a condition of 64.
Ratios are to one Mish and one Linear per site, which is checked to compute the same.

- fused: one head for all sites.
- lowrank:64, shared: other heads; they are other functions.
- classes: head="table", a row for each class.
- separable: the time step from a table, plus the observation, encoded once per observation; exact.
- all_steps: all 100 steps made at once for an observation; per step.
- encoded_anew: a whole loop, an observation encoded and then 10 or 100 steps, to one Linear per site at each,
  which is given its condition encoded.

    python benchmarks/generator_speed.py        (two minutes of one core; `--device cuda` where there is one)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import torchfilm as tf
from measuring import against, arguments, clock_of, in_turn, repeated, save

POLICY = (256, 256, 512, 512, 1024, 1024, 1024, 1024, 512, 512, 256, 256)
SMALL = (64,) * 24
STEPS = 100
Calls = Mapping[str, Callable[[], object]]


def one_by_one(generator: Any) -> nn.ModuleList:
    """A Linear for each site, with the weights of a fused head."""
    rows = [2 * channels for channels in generator.sites.values()]
    layers = [nn.Linear(generator.cond_dim, n) for n in rows]
    weights = generator.head.weight.split(rows), generator.head.bias.split(rows)
    with torch.no_grad():
        for layer, weight, bias in zip(layers, *weights, strict=True):
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return nn.ModuleList(layers)


class Separate(nn.Module):
    """A Mish and a Linear for each site, with the weights of a fused head."""

    def __init__(self, generator: tf.Generator) -> None:
        super().__init__()
        self.layers = one_by_one(generator)

    def forward(self, z: Tensor) -> list[tuple[Tensor, Tensor]]:
        made = []
        for layer in self.layers:
            delta, beta = layer(nn.functional.mish(z)).chunk(2, dim=-1)
            made.append((1 + delta, beta))
        return made


def error(made: Mapping[str, tf.Modulation], expected: list[tuple[Tensor, Tensor]]) -> float:
    """The largest difference in gamma or beta."""
    pairs = [(m.gamma, gamma) for m, (gamma, _) in zip(made.values(), expected, strict=True)]
    pairs += [(m.beta, beta) for m, (_, beta) in zip(made.values(), expected, strict=True)]
    return max(float((one - other).abs().max()) for one, other in pairs)


def often(calls: Calls, device: str, rounds: int, repeats: int = 20) -> dict[str, float]:
    """Median seconds of one call, each measured over some in a row: the shortest take microseconds."""
    several = {name: repeated(call, repeats) for name, call in calls.items()}
    seconds = in_turn(several, rounds, clock_of(device))
    return {name: s / repeats for name, s in seconds.items()}


def encoded_anew(
    separable: tf.SeparableTable, seen: Tensor, separate: Callable[[], object], device: str, rounds: int
) -> dict[str, dict[str, float]]:
    """The ratio of whole loops by their number of steps, the observation encoded in each."""

    def loop(steps: int) -> None:
        rest = separable.encode({"seen": seen})
        for step in range(steps):
            separable(step, rest)

    found = {}
    for n in (10, STEPS):
        ways = {"separate": repeated(separate, n), "separable": functools.partial(loop, n)}
        found[str(n)] = against("separate", ways, rounds, clock=clock_of(device))["separable"]
    return found


@torch.inference_mode()
def policy(batch: int, device: str, rounds: int) -> dict[str, object]:
    """Time step and observation, 12 sites."""
    both = tf.Several(
        {"time": tf.Scalars(1, 256, min_period=6.2832, max_period=62832.0), "seen": tf.Vector(128)}
    )
    both = both.to(device).eval()
    sites = {f"block{i}": channels for i, channels in enumerate(POLICY)}
    with torch.inference_mode(mode=False):
        generators = {
            head: tf.Generator(both.dim, sites, head=head, trunk=("mish",), init="default", device=device)
            for head in ("linear", "lowrank:64", "shared")
        }
        table = tf.Generator(STEPS, sites, head="table", init="default", device=device)
        separate = Separate(generators["linear"]).to(device)
    steps = torch.arange(STEPS, device=device)[:, None]
    separable = tf.SeparableTable(both, generators["linear"], "time", steps)
    seen = torch.randn(batch, 128, device=device)
    z = both({"time": steps[37:38].expand(batch, 1), "seen": seen})
    rest, classes = separable.encode({"seen": seen}), torch.full((batch,), 37, device=device)
    ready = separable.steps(rest)
    errors = {
        "fused": error(generators["linear"](z), separate(z)),
        "separable": error(separable(37, rest), separate(z)),
    }
    seconds = often(
        {
            "separate": lambda: separate(z),
            "fused": lambda: generators["linear"](z),
            "lowrank:64": lambda: generators["lowrank:64"](z),
            "shared": lambda: generators["shared"](z),
            "classes": lambda: table(classes),
            "separable": lambda: separable(37, rest),
            "looked_up": lambda: ready[37],
        },
        device,
        rounds,
    )
    once = often(
        {"encode": lambda: separable.encode({"seen": seen}), "all_steps": lambda: separable.steps(rest)},
        device,
        max(3, rounds // 4),
        repeats=1,
    )
    return {
        "batch": batch,
        "largest_error": errors,
        "microseconds": {name: 1e6 * s for name, s in (seconds | once).items()},
        "ratio": {name: s / seconds["separate"] for name, s in seconds.items()}
        | {"all_steps_per_step": once["all_steps"] / STEPS / seconds["separate"]},
        "encoded_anew": encoded_anew(separable, seen, lambda: separate(z), device, rounds),
        "parameters": {
            "separate": sum(p.numel() for p in separate.parameters()),
            **{name: sum(p.numel() for p in g.parameters()) for name, g in generators.items()},
            "separable_rows": separable.rows.numel(),
        },
    }


@torch.inference_mode()
def small(batch: int, device: str, rounds: int) -> dict[str, object]:
    """24 sites of 64 channels on 64 numbers: launches decide."""
    with torch.inference_mode(mode=False):
        sites = {f"block{i}": channels for i, channels in enumerate(SMALL)}
        generator = tf.Generator(64, sites, trunk=("mish",), init="default", device=device)
        separate = Separate(generator).to(device)
    z = torch.randn(batch, 64, device=device)
    seconds = often({"separate": lambda: separate(z), "fused": lambda: generator(z)}, device, rounds)
    return {
        "batch": batch,
        "largest_error": {"fused": error(generator(z), separate(z))},
        "microseconds": {name: 1e6 * s for name, s in seconds.items()},
        "ratio": {"fused": seconds["fused"] / seconds["separate"]},
    }


def main() -> None:
    given = arguments(__doc__, rounds=15).parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    measured = {
        "policy": [policy(batch, given.device, given.rounds) for batch in (1, 64)],
        "small": [small(batch, given.device, given.rounds) for batch in (1, 64)],
    }
    numbers = {"precision": "float32", "rounds": given.rounds, **measured}
    save("generator_speed", numbers, device=given.device)


if __name__ == "__main__":
    main()
