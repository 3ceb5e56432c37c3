"""How every benchmark here measures: in one process, in turn, on one thread, CPU seconds, medians, a file.

CPU seconds, because others may run on the machine: waiting does not count. A neighbour on the same core's
caches still does, so a ratio of two numbers taken in turn says more than either. With `--device cuda`,
seconds of the wall, each read when the device has nothing left to do.
"""

import argparse
import datetime
import functools
import itertools
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from torchfilm import native
from torchfilm.data.clevr.encoding import encode_questions
from torchfilm.data.clevr.generate import RECIPES
from torchfilm.data.clevr.questions import QuestionConfig, QuestionGenerator
from torchfilm.data.clevr.scenes import SceneConfig, sample_scene
from torchfilm.data.clevr.vocabulary import Vocabulary

Result = TypeVar("Result")
RESULTS = Path(__file__).parent / "results"


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """The parser of a benchmark, whose help is its docstring as it stands."""
    return argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)


def arguments(doc: str | None, rounds: int, rounds_help: str | None = None) -> argparse.ArgumentParser:
    """The parser of a benchmark that runs on any device: `--rounds` and `--device`."""
    parser = parser_of(doc)
    parser.add_argument("--rounds", type=int, default=rounds, help=rounds_help)
    parser.add_argument("--device", default="cpu", help="cpu, or cuda where there is one")
    return parser


def clock_of(device: str) -> Callable[[], float]:
    """CPU seconds; for an accelerator, where they say nothing, seconds of the wall after all its work."""
    if torch.device(device).type == "cpu":
        return time.process_time

    def after_all_is_done() -> float:
        torch.accelerator.synchronize(device)
        return time.perf_counter()

    return after_all_is_done


def samples(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    clock: Callable[[], float] = time.process_time,
    warm_ups: int = 1,
    shuffled: bool = False,
) -> dict[str, list[float]]:
    """Seconds of a call of each candidate in each round: all as a warm-up, then all in turn.

    shuffled: each round in another order.
    """
    for call in candidates.values():
        for _ in range(warm_ups):
            call()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    order, shuffle = list(candidates), random.Random(0).shuffle
    for _ in range(rounds):
        if shuffled:
            shuffle(order)
        for name in order:
            start = clock()
            candidates[name]()
            seconds[name].append(clock() - start)
    return seconds


def in_one_place(model: nn.Module, *others: nn.Module) -> None:
    """Let networks that are alike compute with the same tensors, those of the first.

    A network is up to a tenth faster or slower than its twin by where its weights lie in memory.
    """
    for other in others:
        theirs = dict(itertools.chain(other.named_parameters(), other.named_buffers()))
        for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
            if name in theirs and not name.startswith("film."):
                theirs[name].data = tensor.data


def in_turn(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, float]:
    """Median seconds of one call of each candidate, of the CPU unless another clock is given."""
    taken = samples(candidates, rounds, clock=clock)
    return {name: statistics.median(times) for name, times in taken.items()}


@functools.cache
def kernels_for(device: str) -> Any:
    """What `torchfilm.native` switches on, for a CPU; None on an accelerator and without a compiler."""
    if torch.device(device).type != "cpu":
        return None
    try:
        native.enable()
    except native.NativeError as error:
        print(error, file=sys.stderr)
    kernels = native.kernels
    native.disable()
    return kernels


def by_kernels(call: Callable[[], Result], kernels: Any) -> Callable[[], Result]:
    """The call with the kernels on."""

    def run() -> Result:
        native.kernels = kernels
        try:
            return call()
        finally:
            native.kernels = None

    return run


def repeated(call: Callable[[], object], times: int) -> Callable[[], None]:
    """The call so many times in a row, for what takes microseconds."""

    def run() -> None:
        for _ in range(times):
            call()

    return run


def against(
    base: str,
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, dict[str, float]]:
    """Milliseconds of one call of each candidate, and the ratio to the base: medians and quartiles.

    A ratio is taken within each round, of which each runs all candidates in another order: what slows the
    machine down for longer than a round slows both.
    """
    several = {name: repeated(call, calls) for name, call in candidates.items()}
    seconds = samples(several, rounds, clock=clock, shuffled=True)
    found = {}
    for name, times in seconds.items():
        ratios = [one / other for one, other in zip(times, seconds[base], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        found[name] = {
            "ms": round(1000 * statistics.median(times) / calls, 4),
            "ratio": round(middle, 4),
            "quartiles": [round(low, 4), round(high, 4)],
        }
    return found


def machine(device: str = "cpu") -> str:
    """The machine in words; an accelerator by its name."""
    if torch.device(device).type != "cpu":
        name = torch.get_device_module(device).get_device_name(torch.device(device))
        return f"{name}, one thread of {os.cpu_count()} cores beside it"
    capability = torch.backends.cpu.get_cpu_capability()
    threads = torch.get_num_threads()
    used = "one thread" if threads == 1 else f"{threads} threads"
    return f"{os.cpu_count()} shared cores, {_processor()}{platform.machine()} with {capability}; {used}"


def _processor() -> str:
    """The processor's name and a comma, where Linux tells it."""
    listed = Path("/proc/cpuinfo")
    lines = listed.read_text(encoding="utf-8").splitlines() if listed.is_file() else []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next((f"{name}, " for name in named), "")


def public(arguments: Sequence[str], places: Collection[str]) -> str:
    """A command line without the paths of this machine: DIR behind an option of `places`, else RUN."""
    hidden = {i + 1: "DIR" for i, argument in enumerate(arguments) if argument in places}
    hidden |= {i: "RUN" for i, one in enumerate(arguments) if i not in hidden and Path(one).exists()}
    return " ".join(hidden.get(i, argument) for i, argument in enumerate(arguments))


def commit() -> str:
    """What is checked out."""
    told = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return told.stdout.strip()


def evaluated(system: str, *options: str) -> dict[str, Any]:
    """What `torchfilm eval` says of a system."""
    torchfilm = Path(sys.executable).with_name("torchfilm")
    command = [torchfilm, "eval", system, *options, "--json"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def save(name: str, numbers: Mapping[str, Any], command: str = "", device: str = "cpu") -> None:
    """Write results/NAME.json: when, with what, on what, by which command; then the numbers.

    On another device than the CPU the file is NAME_DEVICE.json.

    command: what stands after "python benchmarks/", where paths are to be left out, or a whole `torchfilm`
        command; else what was typed.
    """
    cores, load = os.cpu_count() or 1, os.getloadavg()[0]
    if load > cores:
        print(f"{name}: measured under a load of {load:.1f} on {cores} cores; repeat it", file=sys.stderr)
    command = command or " ".join([f"{name}.py", *sys.argv[1:]])
    content = {
        "date": datetime.date.today().isoformat(),
        "commit": commit(),
        "torch": torch.__version__,
        "machine": machine(device),
        "clock": "CPU time" if torch.device(device).type == "cpu" else "time",
        "command": command if command.startswith("torchfilm ") else f"python benchmarks/{command}",
        **numbers,
    }
    text = json.dumps(content, indent=2) + "\n"
    RESULTS.mkdir(exist_ok=True)
    kind = torch.device(device).type
    (RESULTS / f"{name if kind == 'cpu' else f'{name}_{kind}'}.json").write_text(text, encoding="utf-8")
    print(text, end="")


def scenes(recipe: str, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """Fresh scenes of a recipe of `torchfilm data clevr`, with the keys that questions are made from."""
    config = SceneConfig(max_objects=RECIPES[recipe].max_objects)
    return [
        {
            **sample_scene(rng, config)[0],
            "split": "train",
            "image_index": i,
            "image_filename": f"CLEVR_train_{i:06d}.png",
        }
        for i in range(number)
    ]


def questions(recipe: str, number_of_scenes: int) -> tuple[Tensor, Tensor, Vocabulary]:
    """Fresh questions of a recipe, shuffled: words [N, places], padded with 0, lengths [N], all words."""
    config = QuestionConfig(questions_per_scene=RECIPES[recipe].questions_per_scene)
    made = scenes(recipe, number_of_scenes, np.random.default_rng(5))
    asked = QuestionGenerator(config).generate(made, np.random.default_rng(5))
    vocabulary = Vocabulary.build(asked)
    encoded = encode_questions(asked, vocabulary)
    rows = torch.randperm(len(encoded), generator=torch.Generator().manual_seed(0))
    tokens, lengths = (torch.from_numpy(part).long()[rows] for part in (encoded.tokens, encoded.lengths))
    return tokens, lengths, vocabulary
