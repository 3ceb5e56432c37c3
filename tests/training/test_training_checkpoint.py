from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

import pytest
import torch
from torch import nn

from torchfilm.training import CheckpointError, load_weights, save_weights
from torchfilm.training.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    read_checkpoint,
    read_json,
    write_checkpoint,
    write_json,
)


def checkpoint(step: int) -> Checkpoint:
    weights = {"a": torch.arange(6.0).reshape(2, 3) + step, "n": torch.tensor(step)}
    layouts = {
        "c": torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
        "b": torch.ones(3).bfloat16(),
    }
    return Checkpoint({"weights": weights, "optimiser": layouts}, {"step": step, "note": [0.1, step]})


def test_what_is_written_is_read(tmp_path: Path) -> None:
    written = checkpoint(12)
    folder = write_checkpoint(tmp_path, written)
    assert folder.name == "step_0000012"
    found = read_checkpoint(folder)
    assert found.state["note"] == [0.1, 12]
    assert found.tensors.keys() == written.tensors.keys()
    for name, tensors in written.tensors.items():
        assert found.tensors[name].keys() == tensors.keys()
        assert all(torch.equal(found.tensors[name][k], v) for k, v in tensors.items())
        assert all(found.tensors[name][k].dtype == v.dtype for k, v in tensors.items())


def test_the_newest_ones_are_kept_and_no_pickle_is_among_them(tmp_path: Path) -> None:
    for step in (5, 10, 99, 100):
        write_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000099", "step_0000100"]
    assert newest_checkpoint(tmp_path) == tmp_path / "step_0000100"
    assert {p.suffix for p in tmp_path.rglob("*") if p.is_file()} == {".safetensors", ".json", ".sha256", ""}


def test_a_write_cut_short_leaves_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path, checkpoint(5))

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("torchfilm.training.checkpoint._sync_folder", full)
        with pytest.raises(
            CheckpointError, match=r"could not be written: No space left .*step_0000005 is whole"
        ):
            write_checkpoint(tmp_path, checkpoint(6))
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_checkpoint(newest).state["step"] == 5
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005"]
    (tmp_path / "partial_step_0000006").mkdir()  # what a kill in the middle leaves
    write_checkpoint(tmp_path, checkpoint(7))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005", "step_0000007"]


def test_a_file_that_cannot_be_written_is_named_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_json(tmp_path / "report.json", {"n": 1})

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torchfilm.training.checkpoint.os.fsync", full)
    with pytest.raises(OSError, match=r"could not be written: No space left .*report\.json"):
        write_json(path, {"n": 2})
    assert read_json(path) == {"n": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, checkpoint(5), keep=1)
    other = Checkpoint({"weights": {"z": torch.ones(1)}}, {"step": 5})
    assert set(read_checkpoint(write_checkpoint(tmp_path, other, keep=1)).tensors) == {"weights"}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step_0000005"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone", "no state", "half state", "flipped state"])
def test_a_damaged_checkpoint_is_refused_and_the_one_before_named(tmp_path: Path, damage: str) -> None:
    write_checkpoint(tmp_path, checkpoint(5))
    folder = write_checkpoint(tmp_path, checkpoint(6))
    file, state = folder / "weights.safetensors", folder / "state.json"
    content = file.read_bytes()
    if damage == "cut":
        file.write_bytes(content[:-3])
    elif damage == "flipped":
        file.write_bytes(content[:-3] + bytes([content[-3] ^ 1]) + content[-2:])
    elif damage == "gone":
        file.unlink()
    elif damage == "no state":
        state.unlink()
    elif damage == "flipped state":
        state.write_bytes(state.read_bytes().replace(b'"step": 6', b'"step": 7'))
    else:
        state.write_bytes(state.read_bytes()[:40])
    name = r"state\.json" if "state" in damage else r"weights\.safetensors"
    with pytest.raises(
        CheckpointError, match=rf"step_0000006 is damaged: {name} .*go on from step_0000005\."
    ):
        read_checkpoint(folder)
    shutil.rmtree(folder)  # the remedy of the message
    newest = newest_checkpoint(tmp_path)
    assert newest is not None
    assert read_checkpoint(newest).state["step"] == 5


def test_a_checkpoint_of_before_its_state_had_a_digest_is_read(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(5))
    (folder / "state.sha256").unlink()
    assert read_checkpoint(folder).state["step"] == 5


@pytest.mark.parametrize("content", ["[]", '{"format": 1}', '{"format": 1, "sha256": [3]}', "[" * 100_000])
def test_a_state_of_another_kind_is_named(tmp_path: Path, content: str) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(5))
    (folder / "state.json").write_text(content)
    (folder / "state.sha256").unlink()
    with pytest.raises(
        CheckpointError, match=r"step_0000005 is damaged: state\.json is not what was written"
    ):
        read_checkpoint(folder)


@pytest.mark.parametrize("content", [b"\xff", b"x" * 5000, b"\0", b"", b"step_0000009"])
def test_where_the_pointer_is_damaged_the_newest_checkpoint_is_found(tmp_path: Path, content: bytes) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(5))
    (tmp_path / "latest").write_bytes(content)
    assert newest_checkpoint(tmp_path) == folder


def test_where_the_system_opens_no_folders_everything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = os.open

    def as_windows(path: str | Path, *more: int, **named: int) -> int:
        if Path(path).is_dir():
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *more, **named)

    monkeypatch.setattr("torchfilm.training.checkpoint.os.open", as_windows)
    assert read_json(write_json(tmp_path / "a.json", {"n": 1})) == {"n": 1}
    assert read_checkpoint(write_checkpoint(tmp_path, checkpoint(5))).state["step"] == 5


def test_a_damaged_only_checkpoint_has_no_earlier_one_to_name(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(6))
    (folder / "optimiser.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"optimiser\.safetensors .* No earlier one is left"):
        read_checkpoint(folder)


def test_another_format_is_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, checkpoint(6))
    state = folder / "state.json"
    state.write_text(state.read_text().replace('"format": 1', '"format": 7'))
    (folder / "state.sha256").write_text(hashlib.sha256(state.read_bytes()).hexdigest())
    with pytest.raises(
        CheckpointError, match=r"expected format 1, got 7\. It was written by another version"
    ):
        read_checkpoint(folder)


def test_weights_go_through_a_file_unchanged(tmp_path: Path) -> None:
    one, other = nn.Linear(3, 5), nn.Linear(3, 5)
    save_weights(str(tmp_path / "w.safetensors"), one.state_dict())
    load_weights(str(tmp_path / "w.safetensors"), other)
    assert torch.equal(one.weight, other.weight)
    assert torch.equal(one.bias, other.bias)
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


def test_weights_that_do_not_fit_are_listed_and_nothing_is_changed(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    save_weights(path, {"weight": torch.ones(5, 2), "scale": torch.ones(3)})
    module = nn.Linear(3, 5)
    before = module.weight.detach().clone()
    with pytest.raises(CheckpointError, match="do not fit the module") as caught:
        load_weights(path, module)
    for line in (
        r"missing     bias (5,)",
        r"unexpected  scale (3,)",
        "the module has ((5, 3), torch.float32)",
    ):
        assert line in str(caught.value)
    assert torch.equal(module.weight, before)


def test_a_file_that_is_no_weights_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(CheckpointError, match=r"expected a safetensors file at .*w\.safetensors, found none"):
        load_weights(path, nn.Linear(2, 3))
    path.write_bytes(b"hello, I am no tensor")
    with pytest.raises(CheckpointError, match=r"got 21 bytes of another kind .*Was the copy cut short\?"):
        load_weights(path, nn.Linear(2, 3))
