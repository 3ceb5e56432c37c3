"""FiLM against the alternatives: parameters, FLOPs, latency, memory and the task's score, side by side.

All is measured on the same batch, in one process and in turn, so that a slow moment of the machine meets
every candidate; and on the network without its conditioning too, which is what the ratios are relative to.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchfilm.injection import conditioning, film_of, unconditioned
from torchfilm.naming import Entries, check_size
from torchfilm.restoring import fresh, in_mode, product_by_product, same_chance, unchanged
from torchfilm.scoring import Score, Scored, scored_by, scored_of
from torchfilm.sharding import check_whole
from torchfilm.signatures import signature_of
from torchfilm.sites import check_network
from torchfilm.writing import in_columns, in_digits

Batch = Sequence[Any] | Mapping[str, Any]


@dataclass(frozen=True)
class Row:
    """What one network costs and reaches.

    Args:
        name: its key in what was compared.
        parameters: how many it has, base included.
        added: how many of them are the conditioning's, its encoder of the condition included.
        flops: of one forward pass over the batch. Only products count (matrices, convolutions, attention):
            what is done number by number, as FiLM itself, is free here and not in milliseconds; so are the
            products of int8 layers and of kernels of your own.
        milliseconds: median of a forward pass over the batch, in eval mode without gradients.
        quartiles: of the same.
        ratio: to the network without conditioning, median of the ratios within a round.
        kept: bytes that a forward pass in training keeps for the backward pass, parameters not counted; in
            eval mode where a batch norm cannot be trained on the batch, which has one value per channel.
        score: the task's, where it was asked for.
        gain: score minus that of the first network compared, on the same samples.
    """

    name: str
    parameters: int
    added: int
    flops: int
    milliseconds: float
    quartiles: tuple[float, float]
    ratio: float
    kept: int
    score: Scored | None = None
    gain: Scored | None = None


@dataclass(frozen=True)
class Comparison(Entries[Row]):
    """What `compare` found; `print` shows a table, `torchfilm.plot.comparison` draws it.

    Args:
        rows: one for each network; the first is the reference of ratios.
        rounds: how often each was timed.
        device: where.
    """

    rows: tuple[Row, ...]
    rounds: int
    device: str

    def _by_name(self) -> dict[str, Row]:
        """Return the rows by the names of the networks."""
        return {row.name: row for row in self.rows}

    def added_time(self, name: str, other: str) -> float:
        """Return the time that one adds to the reference as a part of what the other adds, by their ratios.

        Raises:
            ValueError: for names that there are not, and where the other adds nothing, as the reference.
        """
        one, added = self[name].ratio - 1, self[other].ratio - 1
        if not added:
            reference = self.rows[0].name
            raise ValueError(
                f"Comparison.added_time: expected a network that adds time to the reference '{reference}', "
                f"got '{other}'.\nGive the name of one that is conditioned."
            )
        return one / added

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return asdict(self)

    def __repr__(self) -> str:
        """Show the table, and what its columns mean."""
        head = ("", "parameters", "added", "GFLOP", "added", "ms", "[middle half]", "time", "kept MB")
        scored = any(row.score for row in self.rows)
        lines = [[*head, "score", "gain"] if scored else [*head]]
        for row in self.rows:
            scores = ["-" if one is None else str(one) for one in (row.score, row.gain)]
            lines.append([*self._costs(row), *(scores if scored else [])])
        return "\n".join([in_columns(lines, right=True), "", self._legend()])

    def _legend(self) -> str:
        base = self.rows[0].name
        costs = (
            f"ms: median [middle half] of {self.rounds} passes; time: x {base}; "
            f"kept MB: kept for the backward pass in training"
        )
        named = [row for row in self.rows if row.score]
        if not named:
            return costs
        seeds = {len(row.score.by_seed) for row in named if row.score}
        over = "seeds and samples" + (", of one seed over samples alone" if 1 in seeds else "")
        if seeds == {1}:
            over = "samples; what another seed would change is not in it"
        return f"{costs}\nscore: mean [95 % interval over {over}]; gain: score minus that of {named[0].name}"

    def _costs(self, row: Row) -> list[str]:
        base, (low, high) = self.rows[0].flops, row.quartiles
        ms, *middle = in_digits(row.milliseconds, low, high, apart=(high - low) / 2)
        return [
            row.name,
            f"{row.parameters:,}",
            f"{row.added / max(row.parameters - row.added, 1):+.2%}" if row.added else "-",
            *in_digits(row.flops / 1e9),
            f"{(row.flops - base) / max(base, 1):+.2%}" if row is not self.rows[0] else "-",
            ms,
            f"[{', '.join(middle)}]",
            *in_digits(row.ratio),
            *in_digits(row.kept / 1e6),
        ]


def compare(
    models: Mapping[str, nn.Module | Iterable[nn.Module]],
    batch: Batch,
    *,
    score: Score | None = None,
    rounds: int = 30,
    seed: int = 0,
    clock: Callable[[], float] = time.perf_counter,
) -> Comparison:
    """Measure parameters, FLOPs, time, memory and score of several networks, side by side.

    Args:
        models: name to network; several networks of one name are the same one trained from several seeds:
            the score is over all of them, the costs are those of the first. Where the first of all is
            conditioned, the reference of ratios is that network without its conditioning, as a row of its
            own, "unconditioned"; else the first itself.
        batch: (x, cond) to call model(x, cond=cond), or a mapping of keyword arguments. Several inputs are
            (x, t, cond) or, as for `heard`, ((x, t), cond); one that is a tuple itself is (((a, b),), cond).
            The same for all: a condition that each network's own encoder reads, as (tokens, mask) for
            `Tokens`.
        score: model -> one number, or one for each sample of a fixed set (which makes gains paired). `Scored`
            says what its interval is.
        rounds: how many timed passes each, in turn and each round in another order, after one that is not
            timed.
        seed: of the orders of the rounds.
        clock: seconds; `time.process_time` where others use the machine.

    Raises:
        ValueError: for no networks, one that FSDP2 has sharded, no rounds, a second "unconditioned", a batch
            that a network is not called with, and for scores of no samples or of different numbers of them,
            NaN or infinite ones.

    Example:
        >>> from torchfilm.conditions import Vector
        >>> from torchfilm.injection import condition
        >>> def network():
        ...     return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3))
        >>> models = {name: condition(network(), "0", Vector(7), fusion=name) for name in ("film", "concat")}
        >>> comparison = compare(models, (torch.rand(2, 3, 11, 11), torch.rand(2, 7)), rounds=3)
        >>> comparison["film"].added, comparison["concat"].added
        (128, 128)
    """
    if not isinstance(models, Mapping | nn.ModuleDict):
        raise ValueError(
            f"compare: expected networks by name, got a {type(models).__name__}.\n"
            f"Give {{'film': model, ...}}, also for a single one."
        )
    seeds = {
        str(name): [one] if isinstance(one, nn.Module) or not isinstance(one, Iterable) else list(one)
        for name, one in models.items()
    }
    for model in itertools.chain(*seeds.values()):
        check_network(model)
        check_whole("compare", model)
    none = next((f" for '{name}'" for name, trained in seeds.items() if not trained), "")
    if not models or none:
        raise ValueError(
            f"compare: expected at least one network{none}, got none.\nGive {{'film': model, ...}}."
        )
    check_size("compare: rounds", rounds, "Give rounds=30.")
    if not isinstance(batch, Sequence | Mapping) or not batch:
        got = "nothing" if isinstance(batch, Sequence | Mapping) else _kind(batch)
        raise ValueError(
            f"compare: expected a batch (x, cond), or a mapping of keyword arguments, got {got}.\n"
            f"The condition is its last entry: compare(models, (x, z))."
        )
    candidates = [_Candidate(name, trained[0], batch) for name, trained in seeds.items()]
    if candidates[0].conditioned:
        if "unconditioned" in models:
            raise ValueError(
                "compare: expected no network named 'unconditioned' beside a conditioned one, got one.\n"
                "That network without its conditioning is measured in any case; leave this one out."
            )
        candidates.insert(0, dataclasses.replace(candidates[0], name="unconditioned", plain=True))
    trained = [model for networks in seeds.values() for model in networks]
    with in_mode(*trained, training=False), same_chance():
        times = _in_turn(candidates, rounds, clock, np.random.default_rng(seed))
        scores = scored_by(seeds, score) if score else {}
        first, scored = next(iter(seeds)), {}
        for name, found in scores.items():
            scored[name] = {"score": scored_of(found)}
            if name != first:
                scored[name]["gain"] = scored_of(found, scores[first])
        base = times[candidates[0].name]
        rows = tuple(_row(one, times[one.name], base, scored.get(one.name, {})) for one in candidates)
    tensors = (*candidates[0].model.parameters(), *candidates[0].model.buffers())
    return Comparison(rows, rounds, str(tensors[0].device) if tensors else "cpu")


@dataclass(frozen=True)
class _Candidate:
    """A network, or the one inside of a conditioned network, and what it is called with."""

    name: str
    model: nn.Module
    batch: Batch
    plain: bool = False

    @property
    def conditioned(self) -> bool:
        return film_of(self.model) is not None

    @property
    def parameters(self) -> tuple[int, int]:
        """Return the number of parameters, and how many of them condition and do nothing else."""
        film: set[nn.Module] = {conditioning(self.model)} if self.conditioned else set()
        base = {p: None for _, part in self.model.named_modules(film) for p in part.parameters(recurse=False)}
        plain, total = (sum(p.numel() for p in parameters) for parameters in (base, self.model.parameters()))
        return (plain, 0) if self.plain else (total, total - plain)

    def active(self) -> AbstractContextManager[None]:
        return unconditioned(self.model) if self.plain else nullcontext()

    def ready(self) -> _Candidate:
        """Return the same with a batch of its own, for one call: what that writes, no other one reads."""
        return dataclasses.replace(self, batch=fresh(self.batch))

    def __call__(self) -> Any:
        if isinstance(self.batch, Mapping):
            return self.model(**self.batch)
        *inputs, cond = self.batch
        if len(inputs) == 1 and type(inputs[0]) is tuple:
            inputs = list(inputs[0])
        try:
            return self.model(*inputs, cond=cond)
        except TypeError as error:
            if self._fits(inputs):
                raise
            kinds = [_kind(value) for value in self.batch]
            raise ValueError(
                f"compare: expected a batch (*inputs, cond) that fits '{self.name}', got {kinds}: {error}.\n"
                f"All but the last are inputs, the last is the condition: (x, z), without a target; an input "
                f"that is a tuple itself is (((a, b),), z)."
            ) from error

    def _fits(self, inputs: Sequence[Any]) -> bool:
        """Whether the network's own forward takes as many inputs."""
        try:
            signature_of(self.model.forward).bind_partial(*inputs)
        except TypeError:
            return False
        except ValueError:  # a forward without a signature, as one written in C++
            return True
        return len(inputs) > 0


def _row(
    candidate: _Candidate, times: Sequence[float], base: Sequence[float], scored: Mapping[str, Scored]
) -> Row:
    low, median, high = np.quantile(times, [0.25, 0.5, 0.75]).tolist()
    with candidate.active():
        return Row(
            candidate.name,
            *candidate.parameters,
            flops=_flops(candidate),
            milliseconds=1000 * median,
            quartiles=(1000 * low, 1000 * high),
            ratio=float(np.median(np.divide(times, base))),
            kept=_kept(candidate),
            **scored,
        )


def _in_turn(
    candidates: Sequence[_Candidate], rounds: int, clock: Callable[[], float], rng: np.random.Generator
) -> dict[str, list[float]]:
    """Return the seconds of each: what ran just before, and left what in the caches, is another each time."""
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    models = [one.model for one in candidates]
    devices = {t.device for model in models for t in itertools.chain(model.parameters(), model.buffers())}
    for turn in range(rounds + 1):
        for i in rng.permutation(len(candidates)):
            candidate = candidates[i]
            call = candidate.ready()
            with candidate.active(), torch.no_grad(), same_chance():
                _wait(devices)
                start = clock()
                call()
                _wait(devices)
                took = clock() - start
            seconds[candidate.name] += [took] if turn else []
    return seconds


def _wait(devices: Iterable[torch.device]) -> None:
    for device in devices:
        if device.type not in ("cpu", "meta"):
            torch.accelerator.synchronize(device)


def _kind(value: Any) -> str:
    return f"a Tensor {tuple(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _flops(candidate: _Candidate) -> int:
    from torch.utils.flop_counter import FlopCounterMode  # brings in Triton where that is installed

    counter = FlopCounterMode(display=False, custom_mapping=_PRODUCTS)
    call = candidate.ready()
    with torch.no_grad(), same_chance(), sdpa_kernel(SDPBackend.MATH), product_by_product(), counter:
        call()
    return counter.get_total_flops()


def _of_first(first: Sequence[int], *others: Any, **options: Any) -> int:
    return 2 * math.prod(first)


def _of_second(added: Sequence[int], second: Sequence[int], third: Sequence[int], **options: Any) -> int:
    return 2 * math.prod((*second, *third[2:]))


def _of_pairs(x: Sequence[int], *others: Any, out_shape: Sequence[int], **options: Any) -> int:
    return 2 * math.prod((*out_shape, x[-1]))


def _of_three(*given: Any, **options: Any) -> int:
    shapes, axes = [list(shape) for shape in given[:3]], given[3:6]
    for shape, missing in zip(shapes, axes, strict=True):
        for axis in sorted(missing):
            shape.insert(axis, 1)
    return 2 * math.prod(torch.broadcast_shapes(*shapes))


_PRODUCTS: dict[Any, Callable[..., int]] = {
    torch.ops.aten.mv: _of_first,
    torch.ops.aten.dot: _of_first,
    torch.ops.aten.vdot: _of_first,
    torch.ops.aten.addmv: _of_second,
    torch.ops.aten.addbmm: _of_second,
    torch.ops.aten._euclidean_dist: _of_pairs,
    torch.ops.aten._cdist_forward: _of_pairs,
    torch.ops.aten._trilinear: _of_three,
}
"""Products of operations that torch's counter leaves out, by shapes; `nn.Bilinear` is `_trilinear`."""


def _kept(candidate: _Candidate) -> int:
    """Return the bytes that training keeps; in eval mode where a batch norm finds too few to train on."""
    with unchanged(candidate.model), in_mode(candidate.model, training=True):
        try:
            return _held(candidate)
        except ValueError:
            candidate.model.eval()
            return _held(candidate)


def _held(candidate: _Candidate) -> int:
    """Sum the storages that the graph of a forward pass holds, each once, without those of the model."""
    tensors = (*candidate.model.parameters(), *candidate.model.buffers())
    own = {_memory(t)[0] for t in tensors}
    untrainable = any(t.is_inference() for t in tensors)  # made in inference mode: no graph, nothing kept
    packed: list[Callable[[], Tensor | None]] = []

    def pack(tensor: Tensor) -> Tensor:
        kept = tensor.detach()  # with its graph, an output that a node saves would hold that node for ever
        packed.append(weakref.ref(kept))
        return kept

    hook: Any = torch.compiler.disable(pack)  # compiled, it would be once for each length of the list
    watched = torch.autograd.graph.saved_tensors_hooks(hook, lambda tensor: tensor)
    with torch.inference_mode(mode=untrainable), torch.enable_grad(), watched:
        output = candidate.ready()()
    # What a branch kept that has no part in the output is freed already.
    kept = dict(_memory(one) for find in packed if (one := find()) is not None)
    del output
    return sum(size for place, size in kept.items() if place not in own)


def _memory(tensor: Tensor) -> tuple[int, int]:
    """Return where a tensor is and how many bytes are there; one that is made of others is its own place."""
    storage = tensor.untyped_storage()
    try:
        return storage.data_ptr(), storage.nbytes()
    except RuntimeError:
        return id(tensor), tensor.nbytes
