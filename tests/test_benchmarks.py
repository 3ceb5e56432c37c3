"""What the benchmarks share: the same script measures on the CPU and on an accelerator, and says which."""

import gc
import importlib
import json
import sys
import time
import weakref
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


def test_what_a_forward_pass_keeps_is_freed_after_it_was_counted():
    x = torch.randn(2, 3, requires_grad=True)
    there = weakref.ref(x)
    assert importlib.import_module("layer_speed").saved(torch.relu, [x]) == 1
    del x
    gc.collect()
    assert there() is None


ABOUT = dict.fromkeys(("machine", "torch", "date", "command"), "x")


def test_rows_over_their_limit_are_marked():
    ratio = {"median": 9.0}
    one = {"compiled_over_relu": ratio, "fused_over_relu": ratio}
    passes = {"forward": one, "forward_and_backward": one}
    found = ABOUT | {
        "film_and_relu": {"a shape": {**passes, "four_in_one_graph": passes}},
        "conditional_norms": {"GroupNorm (64, 2)": {"forward_and_backward": {"ours_over_norm": ratio}}},
    }
    table = library_tables.library_speed({"layer_speed": found})
    assert "| film + ReLU / ReLU, compiled | a shape | 1.35 | 9.00 | **no** |" in table
    assert "| film + ReLU / ReLU, forward and backward, eager | a shape | 1.35 | 9.00 | **no** |" in table
    what = "film + ReLU / ReLU, forward and backward, compiled, four in one graph"
    assert f"| {what} | a shape | 1.35 | 9.00 | **no** |" in table
    what = "GroupNorm + FiLM / GroupNorm, batch 64, forward and backward"
    assert f"| {what} | GroupNorm (64, 2) | 1.10 | 9.00 | **no** |" in table


@pytest.mark.parametrize(
    ("ratio", "cells"), [(1.0202, "1.0202 | **no**"), (1.02, "1.02 | yes"), (0.997, "0.997 | yes")]
)
def test_a_limit_is_judged_by_the_number_before_it_is_rounded(ratio: float, cells: str):
    ways = {"folded": {"ratio": ratio}, "merged again": {"ratio": 1.05}}
    table = library_tables.library_speed({"folding_speed": ABOUT | {"networks": {"a net": ways}}})
    assert f"| folded / unconditioned, its norms folded | a net, batch 1 | 1.02 | {cells} |" in table
    assert "| (the same network twice) | a net, batch 1 | – | 1.05 | – |" in table
    assert "- folding_speed.py, medians of the ratios within a round" in table


def test_added_time_is_shown_by_the_stopwatch_and_by_whole_passes():
    inside = {"film_to_cross_attention": 0.1, "film_by_kernels_to_cross_attention": 0.05}
    one = {
        "inside_batch_1": inside,
        "inside_batch_8": inside,
        "whole_batch_1": {"film_to_cross_attention": 0.3},
    }
    table = library_tables.library_speed({"fusion_speed": ABOUT | {"4 sites": one}})
    what = "added time, FiLM / cross-attention"
    assert f"| {what}, by a stopwatch | 4 sites, batch 1 | 0.20 | 0.100 | yes |" in table
    assert f"| {what}, whole passes | 4 sites, batch 1 | 0.20 | 0.300 | **no** |" in table
    assert "fusion_speed.py, by the stopwatch ratios of medians, by whole passes medians of" in table


def test_limits_are_shown_with_least_and_most_and_how_many_hold():
    inside = {"film_to_cross_attention": 0.1, "film_by_kernels_to_cross_attention": 0.05}
    one = {
        "inside_batch_1": inside,
        "inside_batch_8": inside | {"film_to_cross_attention": 0.2004},
        "whole_batch_1": {"film_by_kernels_to_cross_attention": 0.3},
    }
    table = library_tables.library_limits({"fusion_speed": ABOUT | {"4 sites": one}})
    what = "| added time, FiLM / cross-attention"
    assert f"{what}, by a stopwatch | 0.20 | 0.100 to 0.2004 (**1 of 2**) | 0.0500 to 0.0500 (all) |" in table
    assert f"{what}, whole passes | 0.20 | – | 0.300 to 0.300 (**0 of 1**) |" in table
    assert library_tables.library_limits({}) == library_tables.PENDING


def test_a_tabulated_generator_is_shown_with_and_without_the_encoding_of_its_observation():
    loops = {"10": {"ratio": 0.215}, "100": {"ratio": 0.03}}
    one = {"batch": 3, "ratio": {"separable": 0.015}, "encoded_anew": loops}
    table = library_tables.library_speed({"generator_speed": ABOUT | {"policy": [one]}})
    assert (
        "observation encoded before | 12 sites of a policy's U-Net, batch 3 | 0.02 | 0.0150 | yes |" in table
    )
    assert "encoded anew every 10 steps | 12 sites of a policy's U-Net, batch 3 | – | 0.215 | – |" in table
    assert "encoded anew every 100 steps | 12 sites of a policy's U-Net, batch 3 | – | 0.0300 | – |" in table


@pytest.mark.parametrize("name", library_tables.FILES)
def test_what_is_shown_by_kernels_is_shown_without_them_and_limits_name_all_their_cases(name: str):
    found = json.loads((measuring.RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    rows = list(library_tables.FILES[name][0](found))
    plain = {(what, case) for what, case, _, _ in rows}
    assert {(what.removesuffix(library_tables.KERNELS), case) for what, case, _, _ in rows} <= plain, (
        "a way that wins is not shown alone"
    )
    limited = {what for what, _, limit, _ in rows if limit is not None}
    assert not limited & {what for what, _, limit, _ in rows if limit is None}
