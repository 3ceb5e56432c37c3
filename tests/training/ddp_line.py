"""Run by torchrun: train the line on two processes, one of which is told to stop on the way, and resume."""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_line import Line, Points, mean_error, squared_error, toy_config

from torchfilm.training import Draw, Interrupted, NonFiniteError, loop, synced_batch_norm, train
from torchfilm.training.distributed import Ranks, joined
from torchfilm.training.folder import alone_in

RANK = int(os.environ["RANK"])
outliving: list[int] = []


@contextmanager
def watched(device: torch.device) -> Iterator[Ranks]:
    """As `joined`, and counts the DDP modules that are there when a process group would be ended."""
    try:
        with joined(device) as ranks:
            yield ranks
    finally:
        outliving.append(sum(isinstance(one, DistributedDataParallel) for one in gc.get_objects()))


def threads_of_gloo() -> list[str]:
    """Names of this process's threads that belong to a process group, where the system tells them."""
    names = [thread.read_text().strip() for thread in Path("/proc/self/task").glob("*/comm")]
    return [name for name in names if "gloo" in name]


def synced_and_plain(kind: type[nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, float]:
    """Largest differences between a batch norm on two shares of a batch and a plain one on the whole."""
    torch.manual_seed(3)
    part = slice(0, 2) if RANK == 0 else slice(2, None)
    x, target = torch.randn(shape, dtype=dtype) * 3 + 50, torch.randn(shape, dtype=dtype)
    plain, synced = (kind(shape[1], momentum=0.3).to(dtype) for _ in range(2))
    nn.init.normal_(plain.weight)
    nn.init.normal_(plain.bias)
    synced.load_state_dict(plain.state_dict())
    whole, own = x.clone().requires_grad_(), x[part].clone().requires_grad_()
    expected = plain(whole)
    (expected * target).sum().backward()
    with synced_batch_norm(synced):
        got = synced(own)
    (got * target[part]).sum().backward()
    for p in synced.parameters():
        torch.distributed.all_reduce(p.grad)
    pairs = {"output": (expected[part], got), "input gradient": (whole.grad[part], own.grad)}
    pairs |= {
        f"{n} gradient": (p.grad, dict(synced.named_parameters())[n].grad)
        for n, p in plain.named_parameters()
    }
    pairs |= {n: (b, dict(synced.named_buffers())[n]) for n, b in plain.named_buffers()}
    return {name: float((a - b).detach().abs().max()) for name, (a, b) in pairs.items()}


def stop_and_resume(out: Path) -> int:
    """Rank 1 gets a SIGTERM at step 9; both stop, and the run goes on."""
    points = Points()

    def batches(draw: Draw) -> tuple[Tensor, Tensor]:
        if draw.step == 9 and RANK == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return points(draw)

    try:
        train(Line(), squared_error, batches, toy_config(log_steps=1), out, evaluate=mean_error)
    except Interrupted as stopped:
        train(Line(), squared_error, points, toy_config(log_steps=1), out, evaluate=mean_error, resume=True)
        return stopped.step
    return -1


def error_on_rank_one(out: Path, factor: float) -> str:
    """Rank 1's targets are multiplied at step 3: by nan, or by so much that its loss overflows."""
    points = Points()

    def batches(draw: Draw) -> tuple[Tensor, Tensor]:
        x, y = points(draw)
        return (x, y * factor) if draw.step == 3 and RANK == 1 else (x, y)

    try:
        train(Line(), squared_error, batches, toy_config(), out)
    except NonFiniteError as error:
        return f"{error.step}: {error.where}"
    return "no error"


def sums_of_steps(out: Path) -> int:
    """How often six steps of a network without norms sum over the processes, beside DDP's own sums."""
    module = Line()
    module.norm = nn.Identity()
    with mock.patch.object(torch.distributed, "all_reduce", wraps=torch.distributed.all_reduce) as summed:
        train(module, squared_error, Points(), toy_config(steps=6), out)
    return summed.call_count


def refused(out: Path) -> str:
    """Train where rank 0 alone finds out that it cannot be."""
    try:
        train(Line(), squared_error, Points(), toy_config(), out)
    except (ValueError, OSError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def main(out: Path) -> None:
    loop.joined = watched
    with joined(torch.device("cpu")) as ranks:
        errors = {
            "1d": synced_and_plain(nn.BatchNorm1d, (5, 3), torch.float64),
            "2d": synced_and_plain(nn.BatchNorm2d, (5, 3, 2, 7), torch.float64),
            "3d": synced_and_plain(nn.BatchNorm3d, (5, 3, 2, 7, 4), torch.float64),
            "2d float32": synced_and_plain(nn.BatchNorm2d, (5, 3, 2, 7), torch.float32),
        }
        stopped = stop_and_resume(out / "run")
        found = {"errors": errors, "stopped": stopped, "nan": error_on_rank_one(out / "nan", float("nan"))}
        found["overflow"] = error_on_rank_one(out / "overflow", 1e200)
        found["sums"] = sums_of_steps(out / "sums")
        found["outliving"] = outliving.copy()
        with alone_in(out / "locked") if RANK == 1 else nullcontext():
            found["locked"] = refused(out / "locked")
        (out / "file").touch()
        found["beneath a file"] = refused(out / "file" / "run")
        everything = ranks.gather(found)
    (out / f"threads_{RANK}.json").write_text(json.dumps(threads_of_gloo()))
    if RANK == 0:
        (out / "found.json").write_text(json.dumps(everything))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
