"""One process or several under torchrun, with the same loss: ranks, agreed numbers, batch norm."""

from __future__ import annotations

import datetime
import importlib
import inspect
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`; rank 0 writes."""

    rank: int = 0
    world_size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def total(self, values: Sequence[Tensor | float], device: torch.device) -> Float[Tensor, " values"]:
        """Sum of each value over all processes, in float64: on the device, which is not waited for."""
        to = {"device": device, "dtype": torch.float64}
        summed = torch.stack(
            [v.reshape(()).to(**to) if isinstance(v, Tensor) else torch.full((), v, **to) for v in values]
        )
        dist.all_reduce(summed)
        return summed

    def gather(self, value: Any) -> list[Any]:
        """The value of each process, in the order of ranks."""
        if self.world_size == 1:
            return [value]
        found: list[Any] = [None] * self.world_size
        dist.all_gather_object(found, value)
        return found

    def wait(self) -> None:
        """Return when every process has come here."""
        if self.world_size > 1:
            dist.barrier()


def first_process() -> bool:
    """Whether this process writes and speaks: the only one, or rank 0 under torchrun."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """The process group that torchrun asks for (gloo on a CPU, NCCL on a GPU), or the one already there.

    The time limit of a collective is two hours, since rank 0 evaluates alone while the others wait.
    """
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size())
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Ranks()
        return
    # Its functions take the group of their import as a default: imported inside, they would keep the group,
    # and a thread of gloo that wants the interpreter while it ends aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=datetime.timedelta(hours=2))
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def local_device(device: torch.device) -> torch.device:
    """The device of this process: its own GPU under torchrun, else the given one."""
    if device.type == "cuda" and "LOCAL_RANK" in os.environ:
        return torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    return device


def data_parallel(module: nn.Module) -> nn.Module:
    """DDP around the module; buffers are sent round once, not before every step: they stay equal."""
    known = inspect.signature(nn.parallel.DistributedDataParallel).parameters
    keyword = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # torch 2.13
    options: dict[str, Any] = {keyword: False}
    return nn.parallel.DistributedDataParallel(module, **options)


class _GlobalNormalise(torch.autograd.Function):
    """xhat = (x - mean) / sqrt(var + eps), mean and var per channel over the batches of all processes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, inverse: Tensor, count: Tensor) -> Tensor:  # type: ignore[override]
        xhat = (x - _per_channel(mean, x)) * _per_channel(inverse, x)
        ctx.save_for_backward(xhat, inverse, count)
        return xhat

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        xhat, inverse, count = ctx.saved_tensors
        axes = _all_but_channels(dy)
        sums = torch.stack([dy.sum(axes), (dy * xhat).sum(axes)])
        dist.all_reduce(sums)
        mean_dy, mean_dy_xhat = sums[0] / count, sums[1] / count
        dx = dy - _per_channel(mean_dy, dy) - xhat * _per_channel(mean_dy_xhat, dy)
        return dx * _per_channel(inverse, dy), None, None, None


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    """[channels] in a shape that broadcasts with [batch, channels, ...]."""
    return values.view(1, -1, *[1] * (like.ndim - 2))


def _all_but_channels(x: Tensor) -> list[int]:
    return [axis for axis in range(x.ndim) if axis != 1]


def _global_statistics(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, summed squared deviation [channels], count [] of x [batch, channels, ...], all processes.

    Each process gives its own mean and deviations, merged as Chan et al. 1983 do: no difference of large
    sums.
    """
    axes = _all_but_channels(x)
    count = x.numel() / x.shape[1]
    mean = x.mean(axes) if count else x.new_zeros(x.shape[1])
    deviation = (x - _per_channel(mean, x)).square().sum(axes)
    own = torch.cat([mean, deviation, x.new_tensor([count])])
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    means, deviations, counts = torch.stack(found).split([x.shape[1], x.shape[1], 1], dim=1)
    total = counts.sum()
    mean = (counts * means).sum(0) / total
    return mean, (deviations + counts * (means - mean).square()).sum(0), total


class _Synced(nn.modules.batchnorm._BatchNorm):
    """Batch norm whose training statistics are those of the batches of all processes together."""

    def forward(self, input: Tensor) -> Tensor:
        """As batch norm's, over the whole batch; the sums are taken in float32 at least."""
        if not self.training:
            return super().forward(input)
        with torch.autocast(input.device.type, enabled=False):
            x = input if input.dtype == torch.float64 else input.float()
            with torch.no_grad():
                mean, deviation, count = _global_statistics(x.detach())
                self._track(mean, deviation / (count - 1).clamp_min(1))
            y = _GlobalNormalise.apply(x, mean, (deviation / count + self.eps).rsqrt(), count)
            if self.affine:
                y = y * _per_channel(self.weight, x) + _per_channel(self.bias, x)
        return y.to(input.dtype)

    def _track(self, mean: Tensor, variance: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


class SyncedBatchNorm1d(_Synced, nn.BatchNorm1d):
    """nn.BatchNorm1d over all processes."""


class SyncedBatchNorm2d(_Synced, nn.BatchNorm2d):
    """nn.BatchNorm2d over all processes."""


class SyncedBatchNorm3d(_Synced, nn.BatchNorm3d):
    """nn.BatchNorm3d over all processes."""


SYNCED: dict[type[nn.Module], Any] = {
    nn.BatchNorm1d: SyncedBatchNorm1d,
    nn.BatchNorm2d: SyncedBatchNorm2d,
    nn.BatchNorm3d: SyncedBatchNorm3d,
}


@contextmanager
def synced_batch_norm(module: nn.Module) -> Iterator[None]:
    """Inside, every batch norm of the module runs over all processes; keys and objects stay the same.

    torch.nn.SyncBatchNorm exists for GPUs only; this one runs on every backend. Another subclass of batch
    norm has a forward of its own that cannot be redirected: ValueError.
    """
    norms = [(n, m) for n, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for name, norm in norms:
        if type(norm) not in SYNCED and not isinstance(norm, nn.SyncBatchNorm | _Synced):
            raise ValueError(
                f"synced_batch_norm: expected nn.BatchNorm1d/2d/3d at {name!r}, got {type(norm).__name__}, "
                "which would use each process's own statistics. Put a plain nn.BatchNorm inside it, "
                "or train in one process."
            )
    chosen = [(norm, type(norm)) for _, norm in norms if type(norm) in SYNCED]
    for norm, kind in chosen:
        norm.__class__ = SYNCED[kind]
    try:
        yield
    finally:
        for norm, kind in chosen:
            norm.__class__ = kind
