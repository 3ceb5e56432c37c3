import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_exam import small_exam, small_network

from torchfilm.systems.visual_reasoning.exam import predict
from torchfilm.systems.visual_reasoning.experiments import (
    ablation_table,
    cogent,
    data_size_curve,
    paper_ablations,
)
from torchfilm.systems.visual_reasoning.recipe import RECIPES
from torchfilm.training.series import run_all


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
        run_all(settings, run, tmp_path, seeds=(0, 1))
    found = run_all(settings, run, tmp_path, seeds=(0, 1))
    assert run.calls == [(0.5, 0), (0.4, 0), (0.5, 1), (0.4, 1)], "each is trained once"
    assert [r["accuracy"] for r in found["gamma_one"]] == pytest.approx([0.4, 0.41])
    assert run_all(settings, run, tmp_path, seeds=(0, 1)) == found
    assert len(run.calls) == 4


def test_the_table_has_mean_spread_and_the_papers_number(tmp_path) -> None:
    rows = ablation_table(
        {"plain": 0.5, "gamma_one": 0.4}, Recorder(), tmp_path, paper={"gamma_one": 95.9}, seeds=(0, 2, 4)
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
    rows = data_size_curve([100, 1000], lambda size, *_: {"accuracy": size / 2000}, tmp_path, blind=0.2)
    assert [row.accuracies for row in rows] == [(0.05,), (0.5,)]
    assert rows[0].sd is None
    with (tmp_path / "data_size.csv").open() as stream:
        assert [r["scenes"] for r in csv.DictReader(stream)] == ["100", "1000"]
    assert (tmp_path / "data_size.png").stat().st_size > 5000


def test_cogent_measures_both_conditions_after_each_fine_tuning(tmp_path) -> None:
    exam_a, exam_b = small_exam(), small_exam(40)
    networks = {0: small_network(0), 30: small_network(1)}
    found = cogent([0, 30], lambda size, _: networks[size], exam_a, exam_b, tmp_path)
    for i, network in enumerate(networks.values()):
        assert found.on_a[i] == (predict(network, exam_a) == exam_a.questions.answers).mean()
        assert found.on_b[i] == (predict(network, exam_b) == exam_b.questions.answers).mean()
    assert json.loads((tmp_path / "cogent.json").read_text())["paper"]["after"]["B"] == 0.969
    assert (tmp_path / "cogent.png").stat().st_size > 5000


def test_a_result_without_accuracy_and_a_name_that_is_no_folder_are_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match="'accuracy' between 0 and 1"):
        run_all({"a": 1.0}, lambda *_: {"loss": 2.0}, tmp_path)
    with pytest.raises(ValueError, match="can be folders"):
        run_all({"../a": 1.0}, Recorder(), tmp_path)
    (tmp_path / "b" / "seed_0").mkdir(parents=True)
    (tmp_path / "b" / "seed_0" / "result.json").write_text("{")
    with pytest.raises(ValueError, match="Delete its folder"):
        run_all({"b": 1.0}, Recorder(), tmp_path)


def test_pictures_may_be_a_tensor() -> None:
    exam = small_exam()
    again = replace(exam, pictures=torch.from_numpy(exam.pictures))
    assert (predict(small_network(), exam) == predict(small_network(), again)).all()
