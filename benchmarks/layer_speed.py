"""What does FiLM cost beside a ReLU, and conditional norms beside the norms?

    python benchmarks/layer_speed.py        (`--device cuda` where there is one)

Every way runs in one process, in turn. A ratio is to the ReLU or the norm alone, run eagerly: `median` over
the rounds of the ratio within a round, and `fastest` call to fastest call, which neighbours on the machine
disturb least (they empty the caches, and with cold ones ten small calls cost as much as a pass over the
features). `compiled` takes torch.compile(fullgraph=True), and so does `relu_compiled`, the ReLU alone: what
is between it and the eager ReLU is the compiler's on this machine, not FiLM's. `four_in_one_graph` has four
features, and a graph that takes all of them: entering one costs 20 us, a tenth of a ReLU of 6 MB, and a
network is entered once. `kernels` is `fused`, or `ours`, with the kernels of `torchfilm.native` on, where
there is a compiler to build them.
"""

import statistics
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import torchfilm as tf
import torchfilm.functional as F
from measuring import arguments, by_kernels, clock_of, kernels_for, samples, save

Way = Callable[..., Any]
Result = TypeVar("Result")


def ratios(
    ways: Mapping[str, Callable[[], object]], base: str, rounds: int, device: str
) -> dict[str, dict[str, float]]:
    """Each way's seconds against those of `base`, in another order in each round.

    What a way frees, the next one finds or has to ask the system for anew.
    """
    seconds = samples(ways, rounds, clock=clock_of(device), warm_ups=2, shuffled=True)
    found = {
        f"{name}_over_{base}": {
            "median": round(statistics.median(a / b for a, b in zip(times, seconds[base], strict=True)), 3),
            "fastest": round(min(times) / min(seconds[base]), 3),
        }
        for name, times in seconds.items()
        if name != base
    }
    own = {"median": 1e6 * statistics.median(seconds[base]), "fastest": 1e6 * min(seconds[base])}
    return {f"{base}_us": {name: round(value, 1) for name, value in own.items()}, **found}


def training(way: Way, leaves: list[Tensor], weights: list[Tensor]) -> Callable[[], object]:
    """One forward and backward pass, with a weight for each output."""

    def call() -> None:
        for leaf in leaves:
            leaf.grad = None
        torch.autograd.backward(way(*leaves), weights)

    return call


def answering(way: Way, leaves: list[Tensor]) -> Callable[[], object]:
    """One forward pass without a graph."""

    def call() -> None:
        with torch.no_grad():
            way(*leaves)

    return call


def saved(way: Way, leaves: list[Tensor]) -> float:
    """Bytes that a forward pass keeps for the backward pass beyond its inputs, over the bytes of x."""
    given, kept = {leaf.untyped_storage().data_ptr() for leaf in leaves}, {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # with its graph, an output that a node saves would hold that node for ever

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        way(*leaves)
    return sum(size for place, size in kept.items() if place not in given) / leaves[0].nbytes


def calls_of(
    ways: Mapping[str, Way], ours: str, call_of: Callable[[Way], Callable[[], Result]], device: str
) -> dict[str, Callable[[], Result]]:
    """A call of each way, and of `ours` with the kernels on."""
    calls = {name: call_of(way) for name, way in ways.items()}
    kernels = kernels_for(device)
    if kernels is not None:
        calls["kernels"] = by_kernels(call_of(ways[ours]), kernels)
    return calls


def passes(
    ways: Mapping[str, Way], ours: str, leaves: list[Tensor], base: str, rounds: int, device: str
) -> dict:
    """Forward without a graph, and forward and backward, against `base`; each third leaf is of features."""
    weights = [torch.randn_like(x) for x in leaves[::3]]
    both: dict[str, Callable[[Way], Callable[[], object]]] = {
        "forward": lambda way: answering(way, leaves),
        "forward_and_backward": lambda way: training(way, leaves, weights),
    }
    return {
        name: ratios(calls_of(ways, ours, one, device), base, rounds, device) for name, one in both.items()
    }


def measured(
    ways: Mapping[str, Way], ours: str, leaves: list[Tensor], base: str, rounds: int, device: str
) -> dict:
    """The passes of each way, and what is kept between forward and backward."""
    kept = calls_of(ways, ours, lambda way: lambda: saved(way, leaves), device)
    return {
        **passes(ways, ours, leaves, base, rounds, device),
        "saved_beyond_inputs": {name: round(call(), 3) for name, call in kept.items()},
    }


def each_of_four(way: Way) -> Way:
    """The way applied to four features, each with a gamma and a beta."""
    return lambda *leaves: [way(*leaves[i : i + 3]) for i in range(0, 12, 3)]


def film_and_relu(
    shape: tuple[int, ...], dim: int, memory: torch.memory_format, rounds: int, device: str
) -> dict:
    """film + ReLU against a ReLU: naive, fused in eager, fused and compiled, by kernels."""

    def naive(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        each = (*gamma.shape, *[1] * (x.ndim - 2)) if dim == 1 else (len(gamma), 1, gamma.shape[1])
        return torch.relu(gamma.view(each) * x + beta.view(each))

    def fused(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return F.film(x, gamma, beta, dim, activation="relu")

    def relu(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        return torch.relu(x)

    def compiled(way: Way) -> Way:
        return torch.compile(way, fullgraph=True, dynamic=False)

    def leaves() -> list[Tensor]:
        values = [torch.randn(shape).contiguous(memory_format=memory), torch.randn(rows), torch.randn(rows)]
        return [value.to(device).requires_grad_() for value in values]

    rows = (shape[0], shape[dim])
    torch.compiler.reset()
    ways: dict[str, Way] = {
        "relu": relu,
        "naive": naive,
        "fused": fused,
        "compiled": compiled(fused),
        "relu_compiled": compiled(relu),
    }
    of_four = {
        "relu": each_of_four(relu),
        "fused": each_of_four(fused),
        "compiled": compiled(each_of_four(fused)),
        "relu_compiled": compiled(each_of_four(relu)),
    }
    four = [leaf for _ in range(4) for leaf in leaves()]
    return {
        **measured(ways, "fused", leaves(), "relu", rounds, device),
        "four_in_one_graph": passes(of_four, "fused", four, "relu", rounds, device),
    }


def norms(
    kind: type[nn.Module], sizes: tuple[int, ...], shape: tuple[int, ...], rounds: int, device: str
) -> dict:
    """A trained norm's conditional form, with a ready modulation, against the norm."""
    norm = kind(*sizes, **({"affine": True} if kind is nn.InstanceNorm2d else {})).to(device)
    layer = getattr(tf, f"Conditional{kind.__name__}").from_norm(norm, cond_dim=1)
    dim = layer.film.dim
    rows = (shape[0], shape[dim])
    leaves = [torch.randn(size, device=device).requires_grad_() for size in (shape, rows, rows)]
    each = (*rows, *[1] * (len(shape) - 2)) if dim != -1 else (rows[0], 1, rows[1])

    ways: dict[str, Way] = {
        "norm": lambda x, gamma, beta: norm(x),
        "naive": lambda x, gamma, beta: gamma.view(each) * norm(x) + beta.view(each),
        "ours": lambda x, gamma, beta: layer(x, modulation=tf.Modulation(gamma, beta)),
    }
    return measured(ways, "ours", leaves, "norm", rounds, device)


def main() -> None:
    given = arguments(__doc__, rounds=31).parse_args()
    last_two: Any = given.rounds, given.device
    torch.set_num_threads(1)
    torch.manual_seed(0)
    plain, last = torch.contiguous_format, torch.channels_last
    activations = {
        "NCHW (64, 128, 14, 14)": ((64, 128, 14, 14), 1, plain),
        "NHWC (64, 128, 14, 14)": ((64, 128, 14, 14), 1, last),
        "NCHW (16, 256, 56, 56)": ((16, 256, 56, 56), 1, plain),
        "tokens (32, 197, 768)": ((32, 197, 768), -1, plain),
    }
    normed = {
        "GroupNorm (64, 128, 14, 14)": (nn.GroupNorm, (32, 128), (64, 128, 14, 14)),
        "GroupNorm (64, 512, 16)": (nn.GroupNorm, (32, 512), (64, 512, 16)),
        "GroupNorm (1, 128, 14, 14)": (nn.GroupNorm, (32, 128), (1, 128, 14, 14)),
        "InstanceNorm2d (64, 128, 14, 14)": (nn.InstanceNorm2d, (128,), (64, 128, 14, 14)),
        "LayerNorm (32, 197, 768)": (nn.LayerNorm, (768,), (32, 197, 768)),
        "LayerNorm (1, 197, 768)": (nn.LayerNorm, (768,), (1, 197, 768)),
        "RMSNorm (32, 197, 768)": (nn.RMSNorm, (768,), (32, 197, 768)),
        "RMSNorm (1, 197, 768)": (nn.RMSNorm, (768,), (1, 197, 768)),
    }
    save(
        "layer_speed",
        {
            "precision": "float32",
            "rounds": given.rounds,
            "film_and_relu": {name: film_and_relu(*case, *last_two) for name, case in activations.items()},
            "conditional_norms": {name: norms(*case, *last_two) for name, case in normed.items()},
        },
        device=given.device,
    )


if __name__ == "__main__":
    main()
