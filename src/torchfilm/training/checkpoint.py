"""Checkpoints written whole or not at all: safetensors and JSON, no pickle.

RUN/checkpoints/step_0001200/weights.safetensors     the module's state dict
                             ema.safetensors         its average (where there is one)
                             best.safetensors        those of the best evaluation (where the config asks)
                             optimiser.safetensors   PARAMETER/SLOT, as conv.weight/exp_avg
                             state.json              counters, and the SHA-256 of each file above
                             state.sha256            that of state.json
RUN/checkpoints/latest                               the name of the newest complete folder

A checkpoint is written into a folder of another name, flushed to the disk, and renamed; so a folder named
`step_...` is complete, whatever killed the process.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_bytes
from safetensors.torch import save as save_bytes
from torch import Tensor, nn

from torchfilm.reading import DAMAGED, intact, sketched
from torchfilm.writing import whole

FORMAT = 1
Config = TypeVar("Config")
Module = TypeVar("Module", bound=nn.Module)


class CheckpointError(ValueError):
    """A checkpoint that is missing, damaged, or does not fit the module."""


@dataclass(frozen=True)
class Checkpoint:
    """What one checkpoint folder holds: named tensors per file (`weights`, `optimiser`...), counters."""

    tensors: Mapping[str, Mapping[str, Tensor]]
    state: Mapping[str, Any]


def write_checkpoint(folder: Path, checkpoint: Checkpoint, *, keep: int = 2) -> Path:
    """Write `folder`/step_XXXXXXX for state["step"], point `latest` to it, keep the newest `keep`."""
    target = folder / f"step_{checkpoint.state['step']:07d}"
    partial = folder / f"partial_{target.name}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("partial_*"):
            shutil.rmtree(leftover)
        _fill(partial, checkpoint)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        newest = newest_checkpoint(folder)
        kept = f"{newest} is whole: resume from it." if newest else "There is none before it."
        message = f"Checkpoint {target} could not be written: {error.strerror}. {kept}"
        raise CheckpointError(message) from error
    replaced = folder / f"partial_replaced_{target.name}"
    if target.exists():  # the same step again
        target.rename(replaced)
    partial.rename(target)
    replace_file(folder / "latest", target.name.encode())
    shutil.rmtree(replaced, ignore_errors=True)
    for old in sorted(folder.glob("step_*"))[:-keep]:
        if old != target:
            shutil.rmtree(old)
    return target


def _fill(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir()
    digests = {}
    for name, tensors in checkpoint.tensors.items():
        content = _safetensors(tensors)
        digests[f"{name}.safetensors"] = hashlib.sha256(content).hexdigest()
        _write(folder / f"{name}.safetensors", content)
    state = {"format": FORMAT, **checkpoint.state, "sha256": digests}
    content = json.dumps(state, indent=1).encode()
    _write(folder / "state.json", content)
    _write(folder / "state.sha256", hashlib.sha256(content).hexdigest().encode())
    _sync_folder(folder)


def _safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The file's content; tied tensors are written once per name, in the plain layout."""
    return save_bytes({key: value.detach().cpu().contiguous().clone() for key, value in tensors.items()})


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint that `latest` names, else the newest complete folder, else None."""
    with suppress(OSError, ValueError):  # none, or not what was written
        named = folder / (folder / "latest").read_text(encoding="utf-8").strip()
        if named != folder and named.is_dir():
            return named
    return max(folder.glob("step_*"), default=None)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read one checkpoint folder, every byte checked against its digest; that of an older state has none.

    Raises CheckpointError for a missing, cut or altered file; the message names the checkpoint before it.
    """
    try:
        content, own = (folder / "state.json").read_bytes(), folder / "state.sha256"
        if own.is_file() and own.read_bytes() != hashlib.sha256(content).hexdigest().encode():
            raise ValueError(f"{len(content)} bytes whose SHA-256 is not that in {own.name}")
        state = json.loads(content)
        digests = dict(state["sha256"])
    except (OSError, ValueError, *DAMAGED) as error:
        raise _damaged(folder, "state.json", f"{type(error).__name__}: {error}") from error
    if state.get("format") != FORMAT:
        raise CheckpointError(
            f"Checkpoint {folder}: expected format {FORMAT}, got {state.get('format')}. "
            "It was written by another version of torchfilm; read it with that version."
        )
    tensors = {}
    for name, digest in digests.items():
        try:
            content = (folder / name).read_bytes()
        except OSError as error:
            raise _damaged(folder, name, f"{type(error).__name__}") from error
        if hashlib.sha256(content).hexdigest() != digest:
            raise _damaged(folder, name, f"{len(content)} bytes whose SHA-256 is not the recorded one")
        tensors[name.removesuffix(".safetensors")] = load_bytes(content)
    return Checkpoint(tensors, state)


def save_weights(path: str | Path, tensors: Mapping[str, Tensor]) -> None:
    """Write named tensors as one safetensors file, whole or not at all."""
    replace_file(Path(path), _safetensors(tensors))


def load_weights(path: str | Path, module: nn.Module) -> None:
    """Load a safetensors file into the module; keys, shapes, dtypes are checked before any is changed."""
    copy_state(module, _read_weights(Path(path)), where=str(path))


def load_built(description: Path, build: Callable[[], Module], weights: Path) -> Module:
    """Return what `build` makes of a description, with these weights: sizes are compared before it is made.

    Raises CheckpointError for a description of which nothing can be made, and for weights that do not fit.
    """
    tensors = _read_weights(weights)
    with intact(description, "the fields of a network", "Was it edited?", CheckpointError), sketched():
        sketch = build()
    check_fit(sketch.state_dict(), tensors, where=str(weights))
    module = build()
    copy_state(module, tensors, where=str(weights))
    return module


def _read_weights(path: Path) -> dict[str, Tensor]:
    try:
        return load_bytes(path.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"Weights: expected a safetensors file at {path}, found none.") from error
    except SafetensorError as error:
        raise CheckpointError(
            f"Weights {path}: expected a safetensors file, got {path.stat().st_size} bytes of another kind "
            f"({error}). Was the copy cut short?"
        ) from error


@torch.no_grad()
def copy_state(module: nn.Module, tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Copy named tensors into the module in place; CheckpointError, and no change, if they do not fit."""
    own = module.state_dict()
    check_fit(own, tensors, where=where)
    for name, value in own.items():
        value.copy_(tensors[name])


def check_fit(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], *, where: str) -> None:
    """Raise CheckpointError unless both have the same names, shapes and dtypes."""
    problems = [f"missing     {name} {tuple(own[name].shape)}" for name in own if name not in tensors]
    problems += [f"unexpected  {name} {tuple(tensors[name].shape)}" for name in tensors if name not in own]
    for name in own:
        if name in tensors:
            expected = (tuple(own[name].shape), own[name].dtype)
            got = (tuple(tensors[name].shape), tensors[name].dtype)
            if expected != got:
                problems.append(f"differs     {name}: the module has {expected}, the file {got}")
    if problems:
        shown = "\n".join(f"  {line}" for line in problems[:8])
        more = f"\n  ... and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError(
            f"Weights {where} do not fit the module ({len(problems)} of {len(own)} tensors):\n{shown}{more}\n"
            "Build the module with the config that the weights were trained with."
        )


def replace_file(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, flushed to the disk."""
    try:
        with whole(path) as part:
            _write(part, content)
    except OSError as error:
        raise OSError(error.errno, f"could not be written: {error.strerror}", str(path)) from error
    _sync_folder(path.resolve().parent)


def write_json(path: Path, content: Any) -> Path:
    """Write plain values as `replace_file` does, and return the path."""
    replace_file(path, (json.dumps(content, indent=1) + "\n").encode())
    return path


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file; CheckpointError, with the file's name, if there is none."""
    try:
        return dict(json.loads(path.read_bytes()))
    except (ValueError, *DAMAGED) as error:
        raise CheckpointError(
            f"{path}: expected a JSON object, got something else ({error}). Was the copy cut short?"
        ) from error


def read_config(path: Path, entry: str, build: Callable[..., Config]) -> Config:
    """Build a config of one entry of a JSON file, as `asdict` gave it: tuples are lists there.

    Raises CheckpointError, with the file's name, if there is no such entry, or it has other fields or values.
    """
    content = read_json(path)
    if entry not in content:
        raise CheckpointError(
            f"{path}: expected an entry {entry!r}, got {', '.join(content) or 'none at all'}. "
            "Is it the folder of something trained, and has its training finished?"
        )
    remedy = "Is it a run of another system?"
    with intact(path, f"the fields of {entry!r}", remedy, CheckpointError):
        return build(**{name: _tuples(value) for name, value in dict(content[entry]).items()})


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[Any]]) -> Path:
    """Write a table with a header as CSV, whole or not at all, in a folder that is made if need be."""
    content = io.StringIO(newline="")
    writer = csv.writer(content)
    writer.writerow(header)
    writer.writerows(rows)
    replace_file(path, content.getvalue().encode())
    return path


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except PermissionError:  # Windows opens no folders
        return
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _damaged(folder: Path, name: str, what: str) -> CheckpointError:
    earlier = sorted(other.name for other in folder.parent.glob("step_*") if other.name < folder.name)
    remedy = (
        f"Delete the folder and resume to go on from {earlier[-1]}." if earlier else "No earlier one is left."
    )
    return CheckpointError(
        f"Checkpoint {folder} is damaged: {name} is not what was written ({what}). {remedy}"
    )
