"""From condition A to B: what is trained on which questions, and both conditions measured after each."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
from small_exam import small_exam, small_network
from torch import nn

from torchfilm.systems.visual_reasoning.cogent import Transfer, cogent
from torchfilm.systems.visual_reasoning.exam import accuracy
from torchfilm.systems.visual_reasoning.recipe import RECIPES


class Material:
    """What a transfer asks of a material, and the questions of a small exam."""

    def __init__(self, number: int) -> None:
        self.number, self.train_split = number, "valB"

    def training_questions(self):
        return small_exam(self.number).questions


class Recorded(Transfer):
    """A transfer whose networks are random, noting what it trains."""

    calls: list[tuple]

    def trained(self, seed: int, folder: Path) -> nn.Module:
        self.calls.append(("A", seed, folder.parent.name))
        return small_network(seed)

    def tuned(self, start: nn.Module, size: int, seed: int, folder: Path) -> nn.Module:
        assert all(
            a.equal(b) for a, b in zip(start.parameters(), small_network(seed).parameters(), strict=True)
        )
        self.calls.append((size, seed, folder.parent.parent.name))
        return small_network(seed + 10)

    def describe(self):
        return lambda size: {"questions_of_b": size}


def transfer(number: int = 40) -> Recorded:
    material = Material(number)
    made = Recorded("tiny", RECIPES["tiny"], material, material)  # type: ignore[arg-type]
    object.__setattr__(made, "calls", [])
    return made


def test_both_conditions_are_measured_after_each_fine_tuning(tmp_path) -> None:
    exams, made = (small_exam(), small_exam(40)), transfer()
    found = cogent([0, 30], made, exams, tmp_path, seeds=(0, 1))
    assert made.calls == [
        ("A", 0, "on_a"),
        (30, 0, "questions_30"),
        ("A", 1, "on_a"),
        (30, 1, "questions_30"),
    ]
    for rows, exam in ((found.on_a, exams[0]), (found.on_b, exams[1])):
        assert rows[0].accuracies == tuple(accuracy(small_network(seed), exam) for seed in (0, 1))
        assert rows[1].accuracies == tuple(accuracy(small_network(seed), exam) for seed in (10, 11))
    written = json.loads((tmp_path / "cogent.json").read_text())
    assert written["paper"]["after"]["B"] == 0.969
    assert written["B"][1]["accuracy"] == found.on_b[1].mean
    with (tmp_path / "cogent.csv").open() as stream:
        lines = [(row["questions_of_b"], row["seed"]) for row in csv.DictReader(stream)]
    assert lines == [("0", "0"), ("0", "1"), ("30", "0"), ("30", "1")]
    assert (tmp_path / "cogent.png").stat().st_size > 5000


def test_fine_tuning_alone_trains_on_condition_a_first(tmp_path) -> None:
    made = transfer()
    cogent([30], made, (small_exam(), small_exam(40)), tmp_path)
    assert made.calls == [("A", 0, "on_a"), (30, 0, "questions_30")]


def test_the_questions_of_b_are_drawn_at_random_and_more_contain_fewer() -> None:
    made = transfer()
    few, more = made.drawn(12, 3), made.drawn(30, 3)
    assert len(set(few.tolist())) == 12
    assert set(few.tolist()) <= set(more.tolist())
    assert not np.array_equal(few, np.arange(12))
    assert not np.array_equal(few, made.drawn(12, 4))


def test_more_questions_than_there_are_are_refused_before_any_training(tmp_path) -> None:
    made = transfer()
    with pytest.raises(ValueError, match="at most the 40 questions of the split valB, got 41"):
        cogent([0, 41], made, (small_exam(), small_exam(40)), tmp_path)
    assert made.calls == []


def test_fine_tuning_is_shorter_and_gentler_than_training() -> None:
    training, tuning = RECIPES["tiny"].training, transfer().fine_tuning
    assert (tuning.steps, tuning.lr) == (20, training.lr / 10)
    laptop = Transfer("laptop", RECIPES["laptop"], None, None).fine_tuning  # type: ignore[arg-type]
    assert (laptop.minutes, laptop.steps) == (3, None)
