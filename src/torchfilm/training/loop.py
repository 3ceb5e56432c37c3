"""One plain resumable loop: a module, a loss of a batch, batches by index; on one process or several."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from torchfilm.reading import intact

from .batches import Batches, Draw, GlobalRandomState, seed_everything, to_device
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    check_fit,
    copy_state,
    load_weights,
    newest_checkpoint,
    read_checkpoint,
    save_weights,
    write_checkpoint,
)
from .config import TrainConfig
from .distributed import Ranks, data_parallel, joined, local_device, synced_batch_norm
from .folder import RunFolderError, alone_in, describe, open_folder, write_description
from .interruption import Interrupted, StopRequest
from .metrics import Events, Mean, MetricsFile, ProgressLine
from .nonfinite import NonFiniteError, find_at_rest, find_in_step
from .optimisers import WeightAverage, build_optimiser, optimiser_tensors, restore_optimiser


@dataclass(frozen=True)
class Loss:
    """Loss of one batch: `value` is the mean over its `items`, `metrics` are further such means.

    The metrics have the same names in every process. Under several, `items` weighs each process's share.
    """

    value: Tensor
    items: int = 1
    metrics: Mapping[str, Tensor | float] = field(default_factory=dict)


LossFunction = Callable[[nn.Module, Any], Loss]
Evaluate = Callable[[nn.Module], Mapping[str, float]]


@dataclass(frozen=True)
class TrainResult:
    """What a finished run comes to; the module now holds the weights in `weights`.

    They are the last (the average with EMA), or with the config's `best` those of the best evaluation, which
    is then the one given here.
    """

    steps: int
    seconds: float
    weights: Path
    train: Mapping[str, float]
    evaluation: Mapping[str, float]


def train(
    module: nn.Module,
    loss: LossFunction,
    batches: Batches,
    config: TrainConfig,
    out: str | Path,
    *,
    evaluate: Evaluate | None = None,
    resume: bool = False,
    extra_config: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train the module in place, each part in the mode (train or eval) it has; write the run into `out`.

    `loss(module, batch)` gives a `Loss`; `batches(draw)` the batch of a step; `evaluate(module)` is
    called with the averaged weights, in eval mode, without gradients, on rank 0, at the config's
    intervals and at the end. `extra_config` (plain JSON) is stored in config.json and must be the same
    when the run is resumed.

    Under torchrun every process takes its share of the same global batch; the loss is that of one
    process.

    Raises RunFolderError (another run or process in `out`, another config), CheckpointError (damaged, or of
    another module), NonFiniteError (a NaN or infinity: step and layer named), Interrupted (Ctrl-C, SIGTERM:
    an exit with 130, checkpoint written).
    """
    out, device = Path(out), local_device(next(module.parameters()).device)
    module.to(device)
    with ExitStack() as stack:
        ranks = stack.enter_context(joined(device))
        if config.batch_size < ranks.world_size:
            raise ValueError(
                f"train: expected batch_size >= {ranks.world_size}, one item for each process, "
                f"got {config.batch_size}. Use a larger batch or fewer processes."
            )
        description = describe(config, extra_config)
        open_folder(out, description, resume=resume)
        ranks.wait()  # all have looked before one writes
        if refused := ranks.gather(_refused(stack, out) if ranks.first else None)[0]:
            raise refused
        stack.enter_context(GlobalRandomState())
        if ranks.world_size > 1:
            stack.enter_context(synced_batch_norm(module))
        if ranks.first and not resume:
            write_description(out, description)
        run = _Run(module, loss, batches, config, out, ranks)
        stack.callback(run.close)
        run.restore()
        if config.compile:
            stack.callback(setattr, module, "_compiled_call_impl", None)
            module.compile()
        return run.loop(evaluate, stack.enter_context(StopRequest()))


def _refused(stack: ExitStack, out: Path) -> Exception | None:
    """Keep the folder for this run as long as the stack lasts; return what speaks against it."""
    try:
        stack.enter_context(alone_in(out))
    except (RunFolderError, OSError) as error:
        return error
    return None


class _LossModule(nn.Module):
    """Module and loss as one, so that DDP sees the whole computation."""

    def __init__(
        self, module: nn.Module, loss: LossFunction, config: TrainConfig, device: torch.device
    ) -> None:
        super().__init__()
        self.module = module
        self._loss = loss
        self._autocast = config.precision == "bfloat16"
        self._device_type = device.type

    def forward(self, batch: Any) -> Loss:
        context = torch.autocast(self._device_type, torch.bfloat16) if self._autocast else nullcontext()
        with context:
            result = self._loss(self.module, batch)
        if not isinstance(result, Loss) or result.value.ndim:
            got = type(result).__name__
            if isinstance(result, Loss):
                got = f"value of shape {tuple(result.value.shape)}"
            raise ValueError(
                f"train: expected loss(module, batch) to give a Loss with a scalar value, got {got}."
            )
        return result


@dataclass
class _Counters:
    """What goes on counting over resumes; all of it is in each checkpoint's state.json."""

    step: int = 0
    seconds: float = 0.0
    logged_seconds: float = 0.0
    checkpointed_seconds: float = 0.0
    evaluated_step: int = 0
    evaluated_seconds: float = 0.0
    train: dict[str, float] = field(default_factory=dict)
    evaluation: dict[str, float] = field(default_factory=dict)
    best: dict[str, float] = field(default_factory=dict)


class _Run:
    """The state of a run, and the things done once per step."""

    def __init__(
        self,
        module: nn.Module,
        loss: LossFunction,
        batches: Batches,
        config: TrainConfig,
        out: Path,
        ranks: Ranks,
    ) -> None:
        self.start = time.monotonic()
        self.module, self.batches, self.config, self.out, self.ranks = module, batches, config, out, ranks
        self.device = next(module.parameters()).device
        self.loss_module: nn.Module = _LossModule(module, loss, config, self.device)
        self.computes: nn.Module = self.loss_module
        if ranks.world_size > 1:
            self.computes = data_parallel(self.loss_module)
        self.optimiser = build_optimiser(module, config)
        self.trained = [p for group in self.optimiser.param_groups for p in group["params"]]
        self.average = WeightAverage(module, config.ema) if config.ema is not None else None
        self.best: Mapping[str, Tensor] = {}
        self.counters = _Counters()
        self.window = Mean()
        self.progress_line = ProgressLine(shown=ranks.first)
        self.metrics: MetricsFile | None = None
        self.events: Events | None = None

    def restore(self) -> None:
        """Go on from the newest checkpoint, or write the first one; then open the metrics at its place."""
        newest = newest_checkpoint(self.out / "checkpoints")
        size = 0
        if newest is not None:
            remedy = "Was it written by another version of torchfilm? Resume with that one."
            with intact(newest, "the state of a run", remedy, CheckpointError):
                size = self._read(newest)
        self.start -= self.counters.seconds
        if self.ranks.first:
            self.metrics = MetricsFile(self.out / "metrics.jsonl", size=size)
            wanted = self.config.tensorboard
            self.events = Events(self.out / "tensorboard", wanted=wanted, step=self.counters.step)
        if newest is None:
            self.checkpoint()

    def _read(self, newest: Path) -> int:
        """Take everything from a checkpoint; return where the metrics ended."""
        checkpoint = read_checkpoint(newest)
        state, tensors = checkpoint.state, checkpoint.tensors
        self.counters = _Counters(**state["counters"])
        self.window = Mean(state["window"])
        if self.average is not None:
            check_fit(self.module.state_dict(), tensors["ema"], where=str(newest / "ema.safetensors"))
        copy_state(self.module, tensors["weights"], where=str(newest / "weights.safetensors"))
        restore_optimiser(self.module, self.optimiser, tensors["optimiser"])
        if self.average is not None:
            for name, value in tensors["ema"].items():
                self.average.tensors[name].copy_(value)
            self.average.updates = state["step"]
        self.best = tensors.get("best", {})
        return int(state["metrics_bytes"])

    def loop(self, evaluate: Evaluate | None, stop: StopRequest) -> TrainResult:
        """Steps until the budget is spent; checkpoints and evaluations where they are due."""
        config, counters = self.config, self.counters
        written, asked = counters.step, False
        while True:
            if self.ranks.world_size == 1:  # several processes agree in each step
                asked, counters.seconds = stop.asked, time.monotonic() - self.start
            progress = config.progress(counters.step, counters.seconds)
            if progress >= 1.0:
                return self._finish(evaluate, unwritten=written != counters.step)
            due = self._due(config.checkpoint_steps, config.checkpoint_seconds, counters.checkpointed_seconds)
            if (due or asked) and written != counters.step:
                self.checkpoint()
                written = counters.step
            if asked:
                message = f"stopped at step {counters.step}; to go on, run the same command with --resume"
                self.progress_line.say(message)
                raise Interrupted(counters.step, message)
            due = self._due(config.evaluate_steps, config.evaluate_seconds, counters.evaluated_seconds)
            if due and evaluate is not None and counters.evaluated_step != counters.step:
                self._evaluate(evaluate)
            asked = self._step(progress, stop)

    def _due(self, steps: int | None, seconds: float | None = None, since: float = 0.0) -> bool:
        """Whether this step is one of every so many, or so many seconds have passed."""
        counters = self.counters
        by_steps = steps is not None and counters.step > 0 and counters.step % steps == 0
        return by_steps or (seconds is not None and counters.seconds - since >= seconds)

    def _step(self, progress: float, stop: StopRequest) -> bool:
        """Take one step, which waits for the device once; whether any of several processes is to stop."""
        config, counters, ranks = self.config, self.counters, self.ranks
        draw = Draw(counters.step, config.seed, progress, config.batch_size, ranks.rank, ranks.world_size)
        seed_everything(config.seed, counters.step, ranks.rank)
        batch = to_device(self.batches(draw), self.device)
        self.optimiser.zero_grad(set_to_none=True)
        seed_everything(config.seed, counters.step, ranks.rank)
        result: Loss = self.computes(batch)
        loss, items, asked, seconds = result.value, result.items, stop.asked, counters.seconds
        means: Sequence[Tensor | float] = [loss, *result.metrics.values()]
        if ranks.world_size > 1:  # DDP divides by the number of processes, whatever their shares
            items, asked, seconds, *means = self._over_all(items, means, asked=asked)
            loss = loss * (torch.full_like(items, result.items * ranks.world_size) / items).to(loss.dtype)
        loss.backward()
        limit = config.grad_clip if config.grad_clip is not None else math.inf
        norm = nn.utils.clip_grad_norm_(self.trained, limit)
        norm, items, asked, counters.seconds, *means = _numbers([norm, items, asked, seconds, *means])
        values = dict(zip(("loss", *result.metrics), means, strict=True))
        if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
            self._stop_at_nonfinite(batch, values["loss"], norm)
        rate = config.learning_rate(counters.step, progress)
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        if self.average is not None:
            self.average.update()
        counters.step += 1
        self.window.add({**values, "grad_norm": norm, "lr": rate}, items)
        if self._due(config.log_steps):
            self._log()
        self.progress_line.update(progress, counters.step, counters.seconds, items, values)
        return bool(asked)

    def _over_all(self, items: int, means: Sequence[Tensor | float], *, asked: bool) -> tuple[Tensor, ...]:
        """Items, votes to stop, rank 0's clock, and means over the global batch: on the device, unread."""
        wide = [m.detach().double() if isinstance(m, Tensor) else m for m in means]
        sums = [mean * items if items else 0.0 for mean in wide]
        seconds = time.monotonic() - self.start if self.ranks.first else 0.0
        total = self.ranks.total([items, asked, seconds, *sums], self.device)
        return (*total[:3], *(total[3:] / total[0]))

    def _log(self) -> None:
        counters = self.counters
        elapsed = max(counters.seconds - counters.logged_seconds, 1e-9)
        values = {**self.window.result(), "items_per_second": self.window.items / elapsed}
        counters.train = values
        counters.logged_seconds = counters.seconds
        self.window = Mean()
        self._write("train", values)

    def _write(self, split: str, values: Mapping[str, float]) -> None:
        if self.metrics is not None and self.events is not None:
            step, seconds = self.counters.step, round(self.counters.seconds, 3)
            self.metrics.write({"split": split, "step": step, "seconds": seconds, **values})
            self.events.write(split, step, values)

    def _evaluate(self, evaluate: Evaluate) -> None:
        """Rank 0 evaluates the averaged weights; weights, modes and random state are afterwards as before."""
        self.counters.evaluated_step = self.counters.step
        self.counters.evaluated_seconds = self.counters.seconds
        if not self.ranks.first:
            return
        modes = [(m, m.training) for m in self.module.modules()]
        if self.average is not None:
            self.average.swap()
        try:
            self.module.eval()
            # Eagerly: graphs of evaluation's modes and shapes would be compiled for it alone.
            eager = torch.compiler.set_stance("force_eager")
            with torch.no_grad(), GlobalRandomState(), eager:
                values = {name: float(value) for name, value in evaluate(self.module).items()}
            self._keep_if_best(values)
        finally:
            for m, mode in modes:
                m.training = mode
            if self.average is not None:
                self.average.swap()
        self.counters.evaluation = values
        self._write("evaluate", values)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in list(values.items())[:4])
        self.progress_line.say(f"evaluated at step {self.counters.step}: {shown}")

    def _keep_if_best(self, values: dict[str, float]) -> None:
        """Hold on to the module's present weights if no evaluation has found better ones."""
        name = self.config.best
        if name is None:
            return
        if name not in values:
            raise ValueError(
                f"train: expected evaluate to give best={name!r}, got {', '.join(values) or 'nothing'}. "
                "Set TrainConfig.best to one of these, or to None."
            )
        if values[name] > self.counters.best.get(name, -math.inf):
            self.counters.best = values
            self.best = {key: value.detach().clone() for key, value in self.module.state_dict().items()}

    def checkpoint(self) -> None:
        """Write the whole state at this step (rank 0)."""
        self.counters.checkpointed_seconds = self.counters.seconds
        if self.metrics is None:
            return
        tensors = {
            "weights": self.module.state_dict(),
            "optimiser": optimiser_tensors(self.module, self.optimiser),
        }
        if self.average is not None:
            tensors["ema"] = self.average.tensors
        if self.best:
            tensors["best"] = self.best
        state = {
            "step": self.counters.step,
            "counters": vars(self.counters),
            "window": self.window.state(),
            "metrics_bytes": self.metrics.size,
        }
        write_checkpoint(self.out / "checkpoints", Checkpoint(tensors, state), keep=self.config.keep)

    def _stop_at_nonfinite(self, batch: Any, loss: float, norm: float) -> NoReturn:
        config, counters, ranks = self.config, self.counters, self.ranks

        def again() -> bool:
            seed_everything(config.seed, counters.step, ranks.rank)
            value = self.loss_module(batch).value
            finite = bool(torch.isfinite(value))
            if all(ranks.gather(finite)):  # a synced norm needs all processes backward, or none
                torch.autograd.grad(value, self.trained, allow_unused=True)
            return finite

        at_rest = [found for found in ranks.gather(find_at_rest(self.module, batch)) if found]
        _, where = min(at_rest or ranks.gather(find_in_step(self.module, again)))
        newest = newest_checkpoint(self.out / "checkpoints")
        kept = f"The last good checkpoint is {newest}." if newest else "There is no checkpoint yet."
        raise NonFiniteError(
            f"Training stopped at step {counters.step}: loss {loss:.4g}, gradient norm {norm:.4g}. "
            f"First non-finite value: {where}. {kept} "
            "A lower lr, a smaller grad_clip or precision float32 may help.",
            step=counters.step,
            where=where,
        )

    def _finish(self, evaluate: Evaluate | None, *, unwritten: bool) -> TrainResult:
        """Last evaluation, checkpoint and weights; the module is left with the averaged or best weights."""
        if self.window.items:
            self._log()
        if evaluate is not None and self.counters.evaluated_step != self.counters.step:
            self._evaluate(evaluate)
            unwritten = True
        if unwritten:
            self.checkpoint()
        if self.average is not None:
            self.average.swap()
        weights = self.out / "weights.safetensors"
        if self.ranks.first:
            save_weights(weights, self.best or self.module.state_dict())
        self.ranks.wait()
        if self.config.best is not None:  # only rank 0 has evaluated
            load_weights(weights, self.module)
        counters = self.counters
        evaluation = counters.best or counters.evaluation
        return TrainResult(counters.step, counters.seconds, weights, counters.train, evaluation)

    def close(self) -> None:
        """Close files and the progress line, and let go of DDP, which must not outlive its process group.

        If it held the last reference, freeing it would join gloo's threads under the interpreter's lock,
        for which such a thread may be waiting to drop the tensor of the last collective.
        """
        self.computes = self.loss_module
        self.progress_line.close()
        for file in (self.metrics, self.events):
            if file is not None:
                file.close()


def _numbers(values: Sequence[Tensor | float]) -> list[float]:
    """The values as numbers; for those on a device it is waited for once."""
    values = [v.detach() if isinstance(v, Tensor) else v for v in values]
    there = [v.reshape(()) for v in values if isinstance(v, Tensor) and not v.is_cpu]
    read = iter(torch.stack(there).cpu().tolist() if there else [])
    return [next(read) if isinstance(v, Tensor) and not v.is_cpu else float(v) for v in values]
