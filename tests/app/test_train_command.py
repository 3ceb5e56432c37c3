"""`torchfilm train` in processes of its own: killed and resumed, and two at once under torchrun."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from torchfilm.app import cli
from torchfilm.data.clevr.features import write_features
from torchfilm.data.clevr.generate import generate_dataset
from torchfilm.systems.visual_reasoning.bundle import Sight, load_bundle, save_sight
from torchfilm.systems.visual_reasoning.perception import Perception, PerceptionConfig
from torchfilm.systems.visual_reasoning.recipe import RECIPES

COMMAND = [sys.executable, "-m", "torchfilm.app.cli"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m", "torchfilm.app.cli"]


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> list[str]:
    """The command's options but for --steps and --out: a dataset of 16 scenes, eyes of random weights."""
    root = tmp_path_factory.mktemp("command")
    for split, scenes in (("train", 11), ("val", 5)):
        generate_dataset(root / "data", split, scenes, seed=2, workers=1, questions_per_scene=7)
    torch.manual_seed(3)
    config = PerceptionConfig((4, 6, 8), num_blocks=1)
    save_sight(root / "eyes", Sight(config, Perception(config).eval()))
    options = ["train", "visual_reasoning", "--recipe", "tiny", "--data", str(root / "data")]
    return [*options, "--perception", str(root / "eyes")]


def environment() -> dict[str, str]:
    """Of a process that computes as this one does: with as many threads."""
    return {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}


def learned(run: Path) -> dict[str, torch.Tensor]:
    newest = max((run / "checkpoints").glob("step_*"))
    files = [*newest.glob("*.safetensors"), run / "model" / "weights.safetensors"]
    return {f"{file.name}/{name}": value for file in files for name, value in load_file(file).items()}


def told(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "items_per_second")} for line in lines]


def test_a_killed_command_goes_on_to_the_bit(given, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert cli.main([*given, "--steps", "100", "--out", str(whole)]) == 0
    command = [*given, "--steps", "100", "--out", str(broken)]
    with subprocess.Popen([*COMMAND, *command], env=environment(), stderr=subprocess.DEVNULL) as process:
        while process.poll() is None and not (broken / "checkpoints" / "step_0000040").is_dir():
            time.sleep(0.002)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the command ended before it could be killed"
    assert not (broken / "model").exists()
    assert cli.main([*command, "--resume"]) == 0
    expected, found = learned(whole), learned(broken)
    assert found.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    assert told(broken) == told(whole)


def test_human_questions_fine_tune_the_generator_of_a_trained_network(given, tmp_path):
    first, second, data = tmp_path / "first", tmp_path / "second", given[given.index("--data") + 1]
    assert cli.main([*given, "--steps", "2", "--out", str(first)]) == 0
    asked = json.loads((Path(data) / "questions" / "CLEVR_train_questions.json").read_text())["questions"]
    humans = [{key: one[key] for key in ("question", "image_filename", "answer", "split")} for one in asked]
    for one in humans[:6]:
        one["question"] = one["question"].replace("?", " buddy?")
    humans[7]["question"] = humans[7]["question"].replace("?", " pal?")
    (tmp_path / "CLEVR-Humans-train.json").write_text(json.dumps({"questions": humans}))
    options = ["--data", str(tmp_path), "--images", data, "--cache", str(tmp_path / "cache")]
    options += ["--start", str(first), "--generator-only", "--steps", "2", "--out", str(second)]
    assert cli.main([*given[:4], *options]) == 0
    before, after = load_bundle(first), load_bundle(second)
    words = list(before.vocabulary.questions)
    assert list(after.vocabulary.questions) == [*words, "buddy"]
    assert len(after.network.encoder.embedding.weight) == len(words) + 1
    for name, value in before.network.classifier.state_dict().items():
        assert torch.equal(after.network.classifier.state_dict()[name], value), name
    new, old = (bundle.network.encoder.rnn.weight_hh_l0 for bundle in (after, before))
    assert not torch.equal(new, old)


def test_the_papers_recipe_trains_on_features_that_lie_elsewhere(given, tmp_path, monkeypatch, capsys):
    sizes = {"word_dim": 5, "encoder_width": 7, "blocks": 2, "channels": 8, "projection": 11, "hidden": 13}
    sizes |= {"input_channels": 3, "input_height": 4, "input_width": 6}
    paper = RECIPES["paper"]
    training = replace(paper.training, batch_size=8, evaluate_steps=2, tensorboard=False)
    small = replace(paper, config=replace(paper.config, **sizes), training=training)
    monkeypatch.setitem(RECIPES, "paper", small)
    rng = np.random.default_rng(0)
    for split, scenes in (("train", 11), ("val", 5)):
        write_features(tmp_path / f"{split}_features.h5", rng.normal(size=(scenes, 3, 4, 6)))
    data, run = given[given.index("--data") + 1], tmp_path / "run"
    there = ["--data", data, "--features", str(tmp_path), "--json"]
    assert cli.main(["train", "--recipe", "paper", "--steps", "3", "--out", str(run), *there]) == 0
    trained = json.loads(capsys.readouterr().out)
    measured = [line["accuracy"] for line in told(run) if line["split"] == "evaluate"]
    assert len(measured) == 2
    assert trained["accuracy"] == max(measured)
    assert cli.main(["eval", "visual_reasoning", str(run), "--split", "val", *there]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["recipe"], found["n"]) == ("paper", trained["n"])
    assert found["accuracy"] == pytest.approx(trained["accuracy"])
    assert cli.main(["eval", "visual_reasoning", str(run), "--split", "val", "--data", data]) == 2
    assert "Name their folder with --features" in capsys.readouterr().err
    ablated = [
        "eval",
        "--experiment",
        "ablations",
        "--only",
        "gamma_one",
        "--recipe",
        "paper",
        "--steps",
        "2",
    ]
    assert cli.main([*ablated, "--out", str(tmp_path / "ablated"), *there]) == 0
    assert set(json.loads(capsys.readouterr().out)["settings"]) == {"unchanged", "gamma_one"}


def test_two_processes_under_torchrun_have_the_losses_of_one(given, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    assert cli.main([*given, "--steps", "4", "--out", str(one)]) == 0
    command = [*TORCHRUN, *given, "--steps", "4", "--out", str(two), "--json"]
    ended = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=600, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert json.loads(ended.stdout)["steps"] == 4
    # Sums in another order differ in the last of float32's 24 bits; four steps of Adam let that grow.
    for line, other in zip(told(one), told(two), strict=True):
        assert other.keys() == line.keys()
        if line["split"] == "train":
            assert other["loss"] == pytest.approx(line["loss"], rel=2e-5)
            assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-3)
            assert other["accuracy"] == pytest.approx(line["accuracy"], abs=0.01)
