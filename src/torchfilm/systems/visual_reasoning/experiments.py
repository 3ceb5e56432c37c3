"""Series of trainings: the ablation table, the curve over the size of the data, and CoGenT from A to B.

Each takes the training as a function and runs it for one setting after the other. What is finished is kept
in a folder per run, so that a stopped series goes on where it was; delete a run's folder to repeat it.
"""

import csv
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from torchfilm import plot
from torchfilm.training.checkpoint import write_json
from torchfilm.training.series import Run, run_all

from .exam import Exam, predict
from .recipe import ABLATIONS, Recipe, ablate

Setting = TypeVar("Setting")
PAPER_UNCHANGED = 97.4
"""Percent of the paper's network on CLEVR's validation split, +- 0.4 over five runs."""


@dataclass(frozen=True)
class Row:
    """One setting's accuracies 0..1, one per seed; `paper`: what the paper measured, in percent, where it
    did."""

    name: str
    accuracies: tuple[float, ...]
    paper: float | None = None

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds; None for a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None


def ablation_table(
    settings: Mapping[str, Setting],
    run: Run[Setting],
    out: Path,
    *,
    paper: Mapping[str, float] | None = None,
    seeds: Sequence[int] = (0,),
) -> list[Row]:
    """Accuracy of each variant beside the paper's (tables 2 and 3); written as ablations.csv, .json and .png.

    settings: name -> what `run` trains. paper: name -> percent.
    """
    results = run_all(settings, run, out, seeds=seeds)
    rows = [
        Row(name, tuple(r["accuracy"] for r in found), (paper or {}).get(name))
        for name, found in results.items()
    ]
    _write_csv(
        out / "ablations.csv",
        ("variant", "accuracy", "sd", "runs", "paper"),
        [(r.name, r.mean, "" if r.sd is None else r.sd, len(r.accuracies), r.paper or "") for r in rows],
    )
    write_json(out / "ablations.json", {r.name: {"accuracies": r.accuracies, "paper": r.paper} for r in rows})
    plot.save(
        plot.dots(
            {r.name: [100 * a for a in r.accuracies] for r in rows},
            {r.name: r.paper for r in rows if r.paper is not None},
            xlabel="accuracy, %",
            reference="paper, on CLEVR",
        ),
        out / "ablations.png",
    )
    return rows


def paper_ablations(
    base: Recipe,
    run: Run[Recipe],
    out: Path,
    *,
    names: Sequence[str] = tuple(ABLATIONS),
    seeds: Sequence[int] = (0,),
) -> list[Row]:
    """The ablation table of a FiLM recipe: itself, then the named changes of the paper's tables 2 and 3."""
    settings = {"unchanged": base} | {name: ablate(base, name) for name in names}
    paper = {"unchanged": PAPER_UNCHANGED} | {name: ABLATIONS[name].paper_accuracy for name in names}
    return ablation_table(settings, run, out, paper=paper, seeds=seeds)


def data_size_curve(
    sizes: Sequence[int], run: Run[int], out: Path, *, seeds: Sequence[int] = (0,), blind: float | None = None
) -> list[Row]:
    """Accuracy over the number of training scenes, written as data_size.csv and data_size.png.

    run: trains on the first `size` scenes. blind: accuracy 0..1 without the picture, drawn as a level.
    """
    results = run_all({f"scenes_{size}": size for size in sizes}, run, out, seeds=seeds)
    rows = [Row(name, tuple(r["accuracy"] for r in found)) for name, found in results.items()]
    _write_csv(
        out / "data_size.csv",
        ("scenes", *(f"seed_{seed}" for seed in seeds)),
        [(size, *row.accuracies) for size, row in zip(sizes, rows, strict=True)],
    )
    figure = plot.curves(
        list(sizes),
        {f"seed {seed}": [100 * row.accuracies[i] for row in rows] for i, seed in enumerate(seeds)},
        xlabel="training scenes",
        ylabel="accuracy, %",
        levels=None if blind is None else {"blind": 100 * blind},
        log_x=True,
    )
    plot.save(figure, out / "data_size.png")
    return rows


@dataclass(frozen=True)
class CoGenT:
    """Accuracy 0..1 on conditions A and B after fine-tuning on `questions[i]` questions of B; 0 is
    training on A only."""

    questions: tuple[int, ...]
    on_a: tuple[float, ...]
    on_b: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the paper's (before; after fine-tuning) beside."""
        paper = {"before": {"A": 0.983, "B": 0.756}, "after": {"A": 0.808, "B": 0.969}}
        return {"questions": self.questions, "A": self.on_a, "B": self.on_b, "paper": paper}


def cogent(
    sizes: Sequence[int],
    fine_tune: Callable[[int, Path], Any],
    exam_a: Exam,
    exam_b: Exam,
    out: Path,
) -> CoGenT:
    """Train on A, fine-tune on more and more questions of B, measure on both (figure 9).

    fine_tune: (number of questions of B, folder) -> network; with 0 the network as trained on A. It starts
    from that network each time and must not use the questions of exam_b. Written as cogent.json, .csv and
    .png.
    """

    def run(size: int, seed: int, folder: Path) -> dict[str, float]:
        model = fine_tune(size, folder)
        on_a, on_b = (
            float((predict(model, exam) == exam.questions.answers).mean()) for exam in (exam_a, exam_b)
        )
        return {"accuracy": on_b, "on_a": on_a, "on_b": on_b}

    results = run_all({f"questions_{size}": size for size in sizes}, run, out)
    found = CoGenT(
        tuple(sizes),
        tuple(r[0]["on_a"] for r in results.values()),
        tuple(r[0]["on_b"] for r in results.values()),
    )
    write_json(out / "cogent.json", found.to_json())
    rows = zip(found.questions, found.on_a, found.on_b, strict=True)
    _write_csv(out / "cogent.csv", ("questions_of_b", "accuracy_a", "accuracy_b"), list(rows))
    figure = plot.curves(
        list(sizes),
        {
            "condition A": (100 * np.array(found.on_a)).tolist(),
            "condition B": (100 * np.array(found.on_b)).tolist(),
        },
        xlabel="questions of condition B in fine-tuning",
        ylabel="accuracy, %",
    )
    plot.save(figure, out / "cogent.png")
    return found


def _write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(header)
        writer.writerows(rows)
