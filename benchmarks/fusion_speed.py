"""What does listening cost, FiLM against the alternatives at the same sites of the same network?

A residual network of the size of ResNet-18 at 224 pixels; its condition is 16 tokens of 512 numbers; sites
are the 4 stages or the 8 blocks. Each fusion as it is, and each with as many parameters as FiLM has.

Two answers: whole passes, and the time inside of them that goes into the condition (its encoder, the
generator and the sites), by a stopwatch around these. The stopwatch leaves out what the root does with a
condition, and what sites change in the layers beside them. Where neighbours disturb the machine, whole passes
differ by more than what is added: their ratio wants many rounds.

    python benchmarks/fusion_speed.py        (`--device cuda` where there is one)
"""

import functools
import statistics
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import torchfilm as tf
from measuring import arguments, by_kernels, clock_of, in_one_place, kernels_for, samples, save
from torchfilm.comparison import Row
from torchfilm.costs import num_parameters
from torchfilm.fusion import resolve

WIDTHS, COND, TOKENS = (64, 128, 256, 512), 512, 16
FUSIONS: dict[str, tuple[str, dict[str, str]]] = {
    "film": ("film", {}),
    "film_of_rank_64": ("film", {"head": "lowrank:64"}),
    **{name: (name, {}) for name in ("scale", "bias", "gate", "concat", "low_rank", "cross_attention")},
}

BY_KERNELS = "film_by_kernels"


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


class Stopwatch:
    """Seconds inside of what it is put around."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.seconds, self.clock = 0.0, clock

    def __call__(self, function: Callable, *args: object) -> object:
        start = self.clock()
        result = function(*args)
        self.seconds += self.clock() - start
        return result


class Timed(nn.Module):
    """A module with a stopwatch around it."""

    def __init__(self, module: nn.Module, watch: Stopwatch) -> None:
        super().__init__()
        self.module, self.watch, self.dim = module, watch, COND

    def forward(self, *args: Any) -> Any:
        return self.watch(self.module, *args)


class TimedFusion:
    """A fusion with a stopwatch around its generator and its sites."""

    def __init__(self, fusion: tf.Fusion, watch: Stopwatch) -> None:
        self.fusion, self.watch = fusion, watch

    def build(self, cond_dim: int, sites: dict[str, int]) -> nn.Module:
        return Timed(self.fusion.build(cond_dim, sites), self.watch)

    def apply(self, *args: Any) -> Any:
        return self.watch(self.fusion.apply, *args)


def listening(
    name: str,
    number: int,
    watch: Stopwatch | None = None,
    match_params: int | None = None,
    device: str = "cpu",
) -> nn.Module:
    """The network with a fusion at 4 or 8 sites, its heads no longer zero."""
    torch.manual_seed(0)
    fusion, options = FUSIONS[name]
    match_params = None if fusion == "film" else match_params
    encoder: nn.Module = tf.Tokens(COND, pooling=None if fusion == "cross_attention" else "mean")
    network = ResNet().eval().to(device)
    way: Any = resolve(fusion, match_params=match_params, **options)
    if watch is not None:
        encoder, way = Timed(encoder, watch), TimedFusion(way, watch)
    return awake(tf.condition(network, sites(network, number), encoder, fusion=way))


def awake(model: nn.Module) -> nn.Module:
    """The conditioned network with heads that are no longer zero."""
    with torch.no_grad():
        for parameter in tf.conditioning(model).generator.parameters():
            parameter.normal_(std=0.02)
    return model


def inputs(batch: int, device: str) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """Pictures and their tokens, all of them real."""
    pictures = torch.rand(batch, 3, 224, 224, device=device)
    tokens = torch.rand(batch, TOKENS, COND, device=device)
    return pictures, (tokens, torch.ones(batch, TOKENS, device=device) > 0)


class ByKernels(nn.Module):
    """The network with the kernels on."""

    def __init__(self, model: nn.Module, kernels: Any) -> None:
        super().__init__()
        self.module, self.kernels = model, kernels

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return by_kernels(functools.partial(self.module, *args, **kwargs), self.kernels)()


def compared(target: int | None) -> list[str]:
    """All, or one of each kind where the number of parameters is given."""
    return [name for name, (_, options) in FUSIONS.items() if target is None or not options]


def inside(number: int, batch: int, rounds: int, target: int | None, device: str) -> dict[str, Any]:
    """Milliseconds of a pass that go into the condition, fusions in turn: median and quartiles."""
    kernels = kernels_for(device)
    by = [] if kernels is None else [BY_KERNELS]
    watch = Stopwatch(clock_of(device))
    models = {
        name: listening("film" if name == BY_KERNELS else name, number, watch, target, device)
        for name in (*compared(target), *by)
    }
    in_one_place(*models.values())

    def passed(model: nn.Module) -> None:
        pictures, tokens = inputs(batch, device)
        model(pictures, cond=tokens)

    calls = {name: functools.partial(passed, model) for name, model in models.items()}
    calls |= {name: by_kernels(calls[name], kernels) for name in by}
    with torch.no_grad():
        seconds = samples(calls, rounds, clock=lambda: watch.seconds, shuffled=True)
    quartiles = {
        name: statistics.quantiles([1000 * one for one in times], n=4) for name, times in seconds.items()
    }
    found = {f"{name}_ms": [round(quartile, 3) for quartile in times] for name, times in quartiles.items()}
    attention = quartiles["cross_attention"][1]
    ratios = {f"{name}_to_cross_attention": quartiles[name][1] / attention for name in ("film", *by)}
    return found | {name: round(ratio, 3) for name, ratio in ratios.items()}


def whole(number: int, rounds: int, target: int | None, device: str) -> dict[str, Any]:
    """All fusions at 4 or 8 sites, batch 1."""
    kernels = kernels_for(device)
    models = {name: listening(name, number, None, target, device) for name in compared(target)}
    by = {} if kernels is None else {BY_KERNELS: ByKernels(listening("film", number, device=device), kernels)}
    in_one_place(*models.values(), *(one.module for one in by.values()))
    found = tf.compare(models | by, inputs(1, device), rounds=rounds, clock=clock_of(device))
    added = {
        f"{name}_to_cross_attention": found.added_time(name, "cross_attention") for name in ("film", *by)
    }
    return {row.name: row_numbers(row) for row in found.rows} | {
        name: round(ratio, 3) for name, ratio in added.items()
    }


def row_numbers(row: Row) -> dict[str, Any]:
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
    given = arguments(__doc__, rounds=40).parse_args()
    torch.set_num_threads(1)
    numbers: dict[str, object] = {}
    for number in (4, 8):
        generator = tf.conditioning(listening("film", number)).generator
        for kind, target in {"": None, ", parameters matched": num_parameters(generator)}.items():
            numbers[f"{number} sites{kind}"] = {
                "inside_batch_1": inside(number, 1, given.rounds, target, given.device),
                "inside_batch_8": inside(number, 8, max(given.rounds // 4, 3), target, given.device),
                "whole_batch_1": whole(number, given.rounds, target, given.device),
            }
    numbers = {"rounds": given.rounds, "tokens": TOKENS, "cond": COND, **numbers}
    save("fusion_speed", numbers, device=given.device)


if __name__ == "__main__":
    main()
