"""What the benchmarks share: the same script measures on the CPU and on an accelerator, and says which."""

import importlib
import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1] / "benchmarks"))  # no package

generator_speed = importlib.import_module("generator_speed")
library_tables = importlib.import_module("library_tables")
measuring = importlib.import_module("measuring")

ON_ANY_DEVICE = ("folding_speed", "layer_speed", "conditioning_speed", "generator_speed", "fusion_speed")


@pytest.mark.parametrize("name", ON_ANY_DEVICE)
def test_the_script_takes_a_device(name: str, monkeypatch, capsys):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit):
        module.main()
    assert "--device" in capsys.readouterr().out


def test_on_a_cpu_the_processors_seconds_count():
    assert measuring.clock_of("cpu") is time.process_time


def test_on_an_accelerator_the_clock_is_read_after_all_work(monkeypatch):
    done = []
    monkeypatch.setattr(torch.accelerator, "synchronize", done.append)
    monkeypatch.setattr(time, "perf_counter", lambda: 7.0 + len(done))
    assert measuring.clock_of("cuda")() == 8.0
    assert done == ["cuda"]


def test_results_of_a_device_are_a_file_of_their_own_with_its_name(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    module = SimpleNamespace(get_device_name=lambda device: f"a fast {device.type}")
    monkeypatch.setattr(torch, "get_device_module", lambda device: module)
    measuring.save("how_fast", {"a": 1}, device="cuda")
    measuring.save("how_fast", {"a": 2})
    found = json.loads((tmp_path / "how_fast_cuda.json").read_text())
    assert found["machine"].startswith("a fast cuda, ")
    assert (found["clock"], found["a"]) == ("time", 1)
    found = json.loads((tmp_path / "how_fast.json").read_text())
    assert "shared cores" in found["machine"]
    assert (found["clock"], found["a"]) == ("CPU time", 2)


def test_a_benchmark_runs_on_the_device_it_is_given():
    found = generator_speed.small(1, "cpu", rounds=1)
    assert found["largest_error"]["fused"] < 1e-5


def test_rows_over_their_limit_are_shown():
    ratio = {"median": 9.0}
    one = {"compiled_over_relu": ratio, "fused_over_relu": ratio}
    found = {
        "film_and_relu": {"a shape": {"forward": one, "forward_and_backward": one}},
        "conditional_norms": {"GroupNorm (64, 2)": {"forward_and_backward": {"ours_over_norm": ratio}}},
    } | dict.fromkeys(("machine", "torch", "date", "command"), "x")
    table = library_tables.library_speed({"layer_speed": found})
    assert "| film + ReLU / ReLU, compiled | a shape | 1.35 | 9 |" in table
    assert "| forward and backward, eager | a shape | 1.35 | 9 |" in table
    assert "| norm + FiLM / norm, forward and backward | GroupNorm (64, 2) | 1.10 | 9 |" in table
