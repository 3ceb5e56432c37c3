"""Series of trainings: the ablation table, and the curve over the size of the data.

Each takes the training as a function and runs it for one setting after the other. What is finished is kept
in a folder per run, so that a stopped series goes on where it was; delete a run's folder to repeat it.
"""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

from torchfilm import plot
from torchfilm.training.checkpoint import write_csv, write_json
from torchfilm.training.series import Run, run_all

from .recipe import ABLATIONS, Recipe, ablate
from .running import Material

Setting = TypeVar("Setting")
Describe = Callable[[Setting], Mapping[str, Any]]


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

    def to_json(self) -> dict[str, Any]:
        """Plain values: `accuracy` is the mean."""
        return {"accuracy": self.mean, "sd": self.sd, "accuracies": self.accuracies, "paper": self.paper}


def described(recipe: Recipe) -> dict[str, Any]:
    """What a training depends on, in plain values: network, training with its budget, order of questions."""
    return {
        "network": asdict(recipe.config),
        "train": asdict(recipe.training),
        "feed": asdict(recipe.feed),
    }


def sources(material: Material) -> dict[str, Any]:
    """What is learned from and measured on, in plain values: words, perception, the splits' questions."""
    return {
        "vocabulary": material.vocabulary.digest,
        "perception": None if material.sight is None else material.sight.digest,
        "scenes": material.scenes,
        **material.learned_from(),
    }


def ablation_table(
    settings: Mapping[str, Setting],
    run: Run[Setting],
    out: Path,
    *,
    describe: Describe[Setting],
    paper: Mapping[str, float] | None = None,
    seeds: Sequence[int] = (0,),
) -> list[Row]:
    """Accuracy of each variant beside the paper's (tables 2 and 3); written as ablations.csv, .json and .png.

    settings: name -> what `run` trains. describe: what a result depends on (`run_all`). paper: name ->
    percent.
    """
    results = run_all(settings, run, out, describe=describe, seeds=seeds)
    rows = [
        Row(name, tuple(r["accuracy"] for r in found), (paper or {}).get(name))
        for name, found in results.items()
    ]
    write_csv(
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
    describe: Describe[Recipe] = described,
    names: Sequence[str] = tuple(ABLATIONS),
    seeds: Sequence[int] = (0,),
) -> list[Row]:
    """The ablation table of a FiLM recipe: itself, then the named changes of the paper's tables 2 and 3."""
    settings = {name: ablate(base, name) for name in ("unchanged", *names)}
    paper = {name: ABLATIONS[name].paper_accuracy for name in settings}
    return ablation_table(settings, run, out, describe=describe, paper=paper, seeds=seeds)


def data_size_curve(
    sizes: Sequence[int],
    run: Run[int],
    out: Path,
    *,
    describe: Describe[int],
    seeds: Sequence[int] = (0,),
    blind: float | None = None,
) -> list[Row]:
    """Accuracy over the number of training scenes, written as data_size.csv and data_size.png.

    run: trains on the first `size` scenes. describe: what a result depends on (`run_all`).
    blind: accuracy 0..1 without the picture, drawn as a level.
    """
    results = run_all({f"scenes_{size}": size for size in sizes}, run, out, describe=describe, seeds=seeds)
    rows = [Row(name, tuple(r["accuracy"] for r in found)) for name, found in results.items()]
    write_csv(
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
