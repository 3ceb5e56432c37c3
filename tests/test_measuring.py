"""What a results file says about how it was measured."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))

accuracy = importlib.import_module("accuracy")
measuring = importlib.import_module("measuring")


def test_a_command_is_told_without_the_paths_of_this_machine(tmp_path) -> None:
    given = ["laptop", str(tmp_path), "--data", "elsewhere", "--minutes", "15", "--label", "FiLM"]
    told = measuring.public(given, ("--data",))
    assert told == "laptop RUN --data DIR --minutes 15 --label FiLM"


def test_the_threads_in_use_are_told(monkeypatch) -> None:
    for threads, words in ((1, "; one thread"), (2, "; 2 threads")):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert measuring.machine().endswith(words)


@pytest.mark.parametrize(("load", "warned"), [(0.5, False), (1000.0, True)])
def test_a_busy_machine_is_warned_of(load, warned, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(measuring.os, "getloadavg", lambda: (load, 0.0, 0.0))
    measuring.save("speed", {"ms": 1.0}, "speed.py")
    assert ("measured under a load of 1000.0" in capsys.readouterr().err) == warned
    assert json.loads((tmp_path / "speed.json").read_text())["ms"] == 1.0


def test_a_run_tells_its_seed_steps_and_minutes(tmp_path) -> None:
    newest = tmp_path / "checkpoints" / "step_0000700"
    newest.mkdir(parents=True)
    (newest / "state.json").write_text(json.dumps({"counters": {"seconds": 903.0, "step": 700}}))
    (tmp_path / "config.json").write_text(json.dumps({"train": {"seed": 3}}))
    assert accuracy.training(tmp_path, None, None) == {"seed": 3, "steps": 700, "minutes": 15.1}
    assert accuracy.training(tmp_path, 248.0, None)["minutes"] == 248
    assert accuracy.training(None, None, 2) == {"seed": 2, "steps": None, "minutes": None}
