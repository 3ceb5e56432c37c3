"""The folder of a run (config, metrics, checkpoints, weights): never two runs in one."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from .checkpoint import newest_checkpoint, read_json, write_json
from .config import TrainConfig

FREE_TO_CHANGE = ("checkpoint_seconds", "checkpoint_steps", "keep", "tensorboard")
"""Fields that change nothing of what is learned: a resumed run may have them differently."""

LATER = "extra.data"
"""What a run learns from, and is measured on: not compared where an older version has not written it."""

_DEFAULTS = json.loads(json.dumps({field.name: field.default for field in fields(TrainConfig)}))


class RunFolderError(ValueError):
    """A run folder that holds another run, or none where one was to be resumed."""


def describe(config: TrainConfig, extra: Mapping[str, Any] | None) -> dict[str, Any]:
    """What config.json says: {"train": the config's fields, "extra": what the caller adds}."""
    return json.loads(json.dumps({"train": asdict(config), "extra": dict(extra or {})}))


def digest(*arrays: np.ndarray) -> str:
    """A short name of what arrays hold."""
    whole = hashlib.sha256()
    for array in arrays:
        whole.update(np.ascontiguousarray(array).data)
    return whole.hexdigest()[:12]


def started(out: str | Path) -> bool:
    """Whether there is a run in `out`, to go on with."""
    return (Path(out) / "config.json").is_file()


def no_run(out: Path) -> RunFolderError:
    """Return what to raise where there is none to go on with."""
    return RunFolderError(
        f"Resume: expected a run in {out}, found no config.json there. Start without resume (--resume)."
    )


def open_folder(out: Path, description: Mapping[str, Any], *, resume: bool) -> None:
    """Raise RunFolderError unless the run may start, or go on, in `out`; changes nothing."""
    if resume:
        if not started(out):
            raise no_run(out)
        _compare(out, read_json(out / "config.json"), description)
        return
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"Run folder: expected a new folder, got the file {out}. Choose another name.")
    names = ("config.json", "metrics.jsonl", "checkpoints", "weights.safetensors")
    if found := [name for name in names if (out / name).exists()]:
        newest = newest_checkpoint(out / "checkpoints")
        state = f"at {newest.name}" if newest else "without a checkpoint"
        raise RunFolderError(
            f"Run folder {out}: expected a new or empty one, found a run {state} ({', '.join(found)}). "
            "Go on with resume (--resume), or choose another folder; nothing was changed."
        )


@contextmanager
def alone_in(out: Path) -> Iterator[None]:
    """Make the folder, and keep other processes from training in it while the block lasts.

    The system ends this with the process, however it ends, and those that it forked. Where it has no such
    locks, none is taken.

    Raises:
        RunFolderError: where another process trains there.
    """
    out.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    folder = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunFolderError(
                f"Run folder {out}: expected no other process that trains there, found one. Wait for it, or "
                "stop it first (Ctrl-C: it writes a checkpoint); nothing was changed."
            ) from None
        except OSError:  # a file system without locks
            pass
        yield
    finally:
        with suppress(OSError):
            fcntl.flock(folder, fcntl.LOCK_UN)  # or what was forked meanwhile would keep it
        os.close(folder)


def write_description(out: Path, description: Mapping[str, Any]) -> None:
    """Write config.json into the folder, which is there."""
    write_json(out / "config.json", description)


def find_weights(out: str | Path) -> Path:
    """The weights file of a run: the finished run's, else its newest checkpoint's (best, EMA, last)."""
    out = Path(out)
    newest = newest_checkpoint(out / "checkpoints")
    candidates = [out / "weights.safetensors"]
    if newest:
        candidates += [newest / f"{name}.safetensors" for name in ("best", "ema", "weights")]
    for path in candidates:
        if path.is_file():
            return path
    raise RunFolderError(
        f"Weights: expected a run in {out}, found neither weights.safetensors nor a checkpoint."
    )


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two descriptions of plain values say differently: "train.lr" -> (before, now).

    A field of a training that the version before did not have yet was then what is its default now.
    """
    first, second = _flat(_filled(before)), _flat(now)
    return {
        name: (first.get(name, "absent"), second.get(name, "absent"))
        for name in sorted({*first, *second})
        if (name in first) != (name in second) or first.get(name) != second.get(name)
    }


def _compare(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    differing = [
        f"  {name}: {one!r} in the run, {other!r} now"
        for name, (one, other) in differences(before, now).items()
        if name not in {f"train.{n}" for n in FREE_TO_CHANGE}
        and not (one == "absent" and f"{name}.".startswith(f"{LATER}."))
    ]
    if differing:
        raise RunFolderError(
            f"Resume: the config differs from that of the run in {out}:\n" + "\n".join(differing) + "\n"
            "Resume with the run's own config and data, or start a new run in another folder. To train "
            "longer, begin the new run with these weights (--start, where the system has it)."
        )


def _filled(value: Any) -> Any:
    """Give every training in plain values all of TrainConfig's fields."""
    if not isinstance(value, Mapping):
        return value
    missing = _DEFAULTS if {"lr", "batch_size"} <= value.keys() else {}
    return {**missing, **{name: _filled(item) for name, item in value.items()}}


def _flat(value: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(value, dict):
        return {name: value}
    return {
        k: v for key, item in value.items() for k, v in _flat(item, f"{name}.{key}" if name else key).items()
    }
