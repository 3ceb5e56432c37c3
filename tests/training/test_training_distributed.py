from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from toy_line import Line, Points, mean_error, squared_error, told, toy_config

from torchfilm.training import synced_batch_norm, train

SCRIPT = Path(__file__).with_name("ddp_line.py")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """The script on two processes: its folder, and what each rank found."""
    out = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "0"]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", str(SCRIPT), str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600, check=False)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return out, json.loads((out / "found.json").read_text())


def test_two_processes_give_the_losses_and_weights_of_one(
    tmp_path: Path, two: tuple[Path, list[dict[str, Any]]]
) -> None:
    train(Line(), squared_error, Points(), toy_config(log_steps=1), tmp_path / "run", evaluate=mean_error)
    one_told, two_told = told(tmp_path / "run"), told(two[0] / "run")
    assert len(one_told) == 28
    assert [line.keys() for line in two_told] == [line.keys() for line in one_told]
    for one, other in zip(one_told, two_told, strict=True):
        assert other == {
            k: v if isinstance(v, str) else pytest.approx(v, rel=1e-9, abs=1e-12) for k, v in one.items()
        }
    one_weights = load_file(tmp_path / "run" / "weights.safetensors")
    two_weights = load_file(two[0] / "run" / "weights.safetensors")
    for name, value in one_weights.items():
        torch.testing.assert_close(two_weights[name], value, rtol=1e-9, atol=1e-12)


def test_a_signal_to_one_process_stops_both_at_the_same_step(two: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["stopped"] for found in two[1]] == [10, 10]


def test_a_step_sums_over_the_processes_once_beside_the_gradients(
    two: tuple[Path, list[dict[str, Any]]],
) -> None:
    assert [found["sums"] for found in two[1]] == [6, 6]


def test_no_ddp_module_outlives_its_process_group(two: tuple[Path, list[dict[str, Any]]]) -> None:
    # Freed last, it waits for a thread of gloo that may wait for the interpreter: one run of eight hung.
    assert [found["outliving"] for found in two[1]] == [[0, 0, 0, 0, 0]] * 2


def test_no_thread_outlives_its_process_group(two: tuple[Path, list[dict[str, Any]]]) -> None:
    # One that asks for the interpreter while it ends aborts the process: one run of some hundred did.
    assert [json.loads((two[0] / f"threads_{rank}.json").read_text()) for rank in (0, 1)] == [[], []]


def test_a_nan_in_one_process_is_named_by_both(two: tuple[Path, list[dict[str, Any]]]) -> None:
    assert [found["nan"] for found in two[1]] == ["3: the batch, in batch[1]"] * 2
    assert [found["overflow"] for found in two[1]] == [
        "3: the loss function: every module's output is finite"
    ] * 2


def test_what_the_first_process_is_refused_ends_both_alike(two: tuple[Path, list[dict[str, Any]]]) -> None:
    locked, beneath = ([found[key] for found in two[1]] for key in ("locked", "beneath a file"))
    expected = f"RunFolderError: Run folder {two[0] / 'locked'}: expected no other process that trains there"
    assert locked[0].startswith(expected)
    assert locked[1] == locked[0]
    assert beneath[0].startswith("NotADirectoryError: [Errno 20]")
    assert beneath[1] == beneath[0]


@pytest.mark.parametrize("kind", ["1d", "2d", "3d", "2d float32"])
def test_batch_norm_over_two_shares_is_batch_norm_over_the_batch(
    kind: str, two: tuple[Path, list[dict[str, Any]]]
) -> None:
    for found in two[1]:
        assert len(found["errors"][kind]) == 7
        assert max(found["errors"][kind].values()) < (1e-5 if "float32" in kind else 1e-12), found["errors"]


def test_a_norm_that_cannot_be_synced_is_refused_and_the_others_are_untouched() -> None:
    class Own(nn.BatchNorm2d):
        pass

    module = nn.Sequential(nn.BatchNorm1d(3), Own(3))
    with (
        pytest.raises(ValueError, match=r"expected nn\.BatchNorm1d/2d/3d at '1', got Own"),
        synced_batch_norm(module),
    ):
        pass
    assert type(module[0]) is nn.BatchNorm1d


def test_after_synchronisation_the_classes_are_the_old_ones() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm3d(2))
    keys = list(module.state_dict())
    with synced_batch_norm(module):
        assert type(module[1]) is not nn.BatchNorm3d
        assert list(module.state_dict()) == keys
    assert [type(m) for m in module] == [nn.BatchNorm1d, nn.BatchNorm3d]
