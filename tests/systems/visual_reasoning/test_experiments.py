import csv
import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_exam import small_exam, small_network

from torchfilm.data.clevr.files import ClevrFolder
from torchfilm.data.clevr.generate import generate_dataset
from torchfilm.systems.visual_reasoning.exam import predict
from torchfilm.systems.visual_reasoning.experiments import (
    ablation_table,
    data_size_curve,
    described,
    paper_ablations,
    sources,
)
from torchfilm.systems.visual_reasoning.recipe import RECIPES
from torchfilm.systems.visual_reasoning.running import Material
from torchfilm.training import TrainConfig
from torchfilm.training.series import run_all


def describe(setting: float) -> dict[str, float]:
    return {"setting": setting}


class Recorder:
    """A training that notes what it was asked for and may be killed once."""

    def __init__(self, killed_at: int | None = None) -> None:
        self.calls: list[tuple] = []
        self.killed_at = killed_at

    def __call__(self, setting: float, seed: int, folder: Path) -> dict[str, float]:
        assert folder.is_dir()
        if len(self.calls) == self.killed_at:
            self.killed_at = None
            raise KeyboardInterrupt
        self.calls.append((setting, seed))
        return {"accuracy": setting + seed / 100, "minutes": 3.0}


def test_a_stopped_series_goes_on_where_it_was(tmp_path) -> None:
    run = Recorder(killed_at=3)
    settings = {"plain": 0.5, "gamma_one": 0.4}
    with pytest.raises(KeyboardInterrupt):
        run_all(settings, run, tmp_path, describe=describe, seeds=(0, 1))
    found = run_all(settings, run, tmp_path, describe=describe, seeds=(0, 1))
    assert run.calls == [(0.5, 0), (0.4, 0), (0.5, 1), (0.4, 1)], "each is trained once"
    assert [r["accuracy"] for r in found["gamma_one"]] == pytest.approx([0.4, 0.41])
    assert run_all(settings, run, tmp_path, describe=describe, seeds=(0, 1)) == found
    assert len(run.calls) == 4


def test_the_result_of_another_setting_is_refused_before_anything_is_run(tmp_path) -> None:
    run = Recorder()
    short, long = ({"train": {"steps": steps, "lr": 0.1}, "network": "film"} for steps in (2, 9999))
    first = run_all({"a": 0.5}, run, tmp_path, describe=lambda _: short)
    assert run_all({"a": 0.5}, run, tmp_path, describe=lambda _: short) == first
    pattern = (
        r"a.seed_0 has a run of another setting: train\.steps: expected 9999, got 2\..*or delete the folder"
    )
    with pytest.raises(ValueError, match=pattern):
        run_all({"new": 0.1, "a": 0.5}, run, tmp_path, describe=lambda _: long)
    assert run.calls == [(0.5, 0)]
    (tmp_path / "a" / "seed_0" / "result.json").unlink()
    with pytest.raises(ValueError, match="expected 9999, got 2"):  # a run that was stopped is one too
        run_all({"a": 0.5}, run, tmp_path, describe=lambda _: long)


def test_the_result_of_a_version_without_a_field_had_its_default(tmp_path) -> None:
    training = asdict(TrainConfig(steps=2))
    older = {name: value for name, value in training.items() if name not in ("optimiser", "outputs")}
    first = run_all({"a": 0.5}, Recorder(), tmp_path, describe=lambda _: {"stages": {"train": older}})
    assert (
        run_all({"a": 0.5}, Recorder(), tmp_path, describe=lambda _: {"stages": {"train": training}}) == first
    )
    other = training | {"optimiser": "muon"}
    with pytest.raises(ValueError, match=r"stages\.train\.optimiser: expected 'muon', got 'adamw'"):
        run_all({"a": 0.5}, Recorder(), tmp_path, describe=lambda _: {"stages": {"train": other}})


def test_a_result_that_nobody_knows_the_setting_of_is_refused(tmp_path) -> None:
    run_all({"a": 0.5}, Recorder(), tmp_path, describe=describe)
    (tmp_path / "a" / "seed_0" / "setting.json").unlink()
    with pytest.raises(ValueError, match=r"expected setting\.json beside result\.json, found none.*Delete"):
        run_all({"a": 0.5}, Recorder(), tmp_path, describe=describe)


def test_a_setting_says_budget_network_words_and_questions(tmp_path) -> None:
    generate_dataset(tmp_path, "train", 3, seed=2, workers=1, questions_per_scene=4)
    generate_dataset(tmp_path, "val", 3, seed=3, workers=1, questions_per_scene=4)
    folder = ClevrFolder(tmp_path)
    material = Material(folder, folder.vocabulary("train"))
    found = described(RECIPES["tiny"]) | sources(material)
    assert found["train"]["steps"] == 100
    assert found["network"]["channels"] == 8
    assert found["vocabulary"] == material.vocabulary.digest
    assert found["splits"] == {"train": "train", "held_out": "val"}
    assert found["questions"]["train"] != found["questions"]["val"]
    assert json.loads(json.dumps(found))["perception"] is None


def test_the_table_has_mean_spread_and_the_papers_number(tmp_path) -> None:
    rows = ablation_table(
        {"plain": 0.5, "gamma_one": 0.4},
        Recorder(),
        tmp_path,
        describe=describe,
        paper={"gamma_one": 95.9},
        seeds=(0, 2, 4),
    )
    assert rows[1].mean == pytest.approx(0.42)
    assert rows[1].sd == pytest.approx(0.02)
    assert [row.paper for row in rows] == [None, 95.9]
    with (tmp_path / "ablations.csv").open() as stream:
        table = list(csv.DictReader(stream))
    assert [r["variant"] for r in table] == ["plain", "gamma_one"]
    assert float(table[1]["accuracy"]) == pytest.approx(0.42)
    assert json.loads((tmp_path / "ablations.json").read_text())["plain"]["paper"] is None
    assert (tmp_path / "ablations.png").stat().st_size > 5000


def test_the_papers_ablations_run_over_changed_recipes(tmp_path) -> None:
    trained = {}

    def run(recipe, seed: int, folder: Path) -> dict[str, float]:
        trained[folder.parent.name] = recipe
        return {"accuracy": 0.5}

    rows = paper_ablations(RECIPES["tiny"], run, tmp_path, names=("beta_zero", "blocks_3"))
    assert [(row.name, row.paper) for row in rows] == [
        ("unchanged", 97.4),
        ("beta_zero", 96.9),
        ("blocks_3", 96.7),
    ]
    assert trained["unchanged"] == RECIPES["tiny"]
    assert trained["beta_zero"].config.emit == ("gamma",)
    assert trained["blocks_3"].config.blocks == 3


def test_the_curve_has_one_point_per_size(tmp_path) -> None:
    def run(size: int, *_: object) -> dict[str, float]:
        return {"accuracy": size / 2000}

    rows = data_size_curve([100, 1000], run, tmp_path, describe=describe, blind=0.2)
    assert [row.accuracies for row in rows] == [(0.05,), (0.5,)]
    assert rows[0].sd is None
    with (tmp_path / "data_size.csv").open() as stream:
        assert [r["scenes"] for r in csv.DictReader(stream)] == ["100", "1000"]
    assert (tmp_path / "data_size.png").stat().st_size > 5000


def test_a_result_without_accuracy_and_a_name_that_is_no_folder_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="'accuracy' between 0 and 1"):
        run_all({"a": 1.0}, lambda *_: {"loss": 2.0}, tmp_path, describe=describe)
    with pytest.raises(ValueError, match="can be folders"):
        run_all({"../a": 1.0}, Recorder(), tmp_path, describe=describe)
    run_all({"b": 1.0}, lambda *_: {"accuracy": 0.5}, tmp_path, describe=describe)
    (tmp_path / "b" / "seed_0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="Delete its folder"):
        run_all({"b": 1.0}, Recorder(), tmp_path, describe=describe)


def test_pictures_may_be_a_tensor() -> None:
    exam = small_exam()
    again = replace(exam, pictures=torch.from_numpy(exam.pictures))
    assert (predict(small_network(), exam) == predict(small_network(), again)).all()
