"""CLEVR-CoGenT: trained on condition A, how much of B is known, and what does fine-tuning on B change?

Perez et al. 2018, section 4.5 and figure 9. In condition A cubes are gray, blue, brown or yellow and
cylinders red, green, purple or cyan; in B these are exchanged; spheres have every colour in both.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from torchfilm import plot
from torchfilm.training import TrainConfig, started
from torchfilm.training.checkpoint import write_csv, write_json
from torchfilm.training.series import run_all

from .exam import Exam, accuracy
from .experiments import Row, described, sources
from .recipe import Recipe
from .running import Material, train_bundle

FINE_TUNING = 5
"""Fine-tuning has this fraction of the training's steps or minutes, ..."""
GENTLER = 10
"""... and this fraction of its learning rate."""


@dataclass(frozen=True)
class CoGenT:
    """Accuracies on conditions A and B after fine-tuning on `questions[i]` questions of B, one per seed; 0
    is training on A only."""

    questions: tuple[int, ...]
    on_a: tuple[Row, ...]
    on_b: tuple[Row, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values, with the paper's (before; after fine-tuning) beside."""
        paper = {"before": {"A": 0.983, "B": 0.756}, "after": {"A": 0.808, "B": 0.969}}
        columns = {"A": [row.to_json() for row in self.on_a], "B": [row.to_json() for row in self.on_b]}
        return {"questions": self.questions, **columns, "paper": paper}


@dataclass(frozen=True, eq=False)
class Transfer:
    """Trains on condition A, and fine-tunes a copy on random questions of condition B.

    name, recipe: of the training on A, seed aside. on_a, on_b: what the two learn from.
    """

    name: str
    recipe: Recipe
    on_a: Material
    on_b: Material

    @property
    def fine_tuning(self) -> TrainConfig:
        """How it is fine-tuned: shorter and more gently than trained."""
        whole = self.recipe.training
        steps = None if whole.steps is None else max(whole.steps // FINE_TUNING, 1)
        minutes = None if whole.minutes is None else whole.minutes / FINE_TUNING
        return replace(whole, steps=steps, minutes=minutes, lr=whole.lr / GENTLER)

    def trained(self, seed: int, folder: Path) -> nn.Module:
        """The network trained on A in a run folder, gone on with if it was stopped."""
        recipe = replace(self.recipe, training=replace(self.recipe.training, seed=seed))
        return train_bundle(self.name, recipe, self.on_a, folder, resume=started(folder)).bundle.network

    def tuned(self, start: nn.Module, size: int, seed: int, folder: Path) -> nn.Module:
        """That network fine-tuned on `size` questions of B, in a run folder."""
        asked = self.on_b.training_questions().select(self.drawn(size, seed))
        recipe = replace(self.recipe, training=replace(self.fine_tuning, seed=seed))
        return train_bundle(
            self.name, recipe, self.on_b, folder, resume=started(folder), start=start, questions=asked
        ).bundle.network

    def drawn(self, size: int, seed: int) -> np.ndarray:
        """Which questions of B are asked, at random and so about as many scenes; more have the fewer in them.

        Raises ValueError if there are not so many.
        """
        there = len(self.on_b.training_questions())
        if size > there:
            raise ValueError(
                f"cogent: expected at most the {there:,} questions of the split {self.on_b.train_split}, "
                f"got {size:,}. Generate more scenes of it, or ask for fewer questions with --only."
            )
        return np.sort(np.random.default_rng(seed).permutation(there)[:size])

    def describe(self) -> Callable[[int], Mapping[str, Any]]:
        """For `run_all`: what the result for a number of questions depends on."""
        on_a = described(self.recipe) | {"condition_a": sources(self.on_a)}
        on_b = {"fine_tuning": asdict(self.fine_tuning), "condition_b": sources(self.on_b)}
        return lambda size: on_a | {"questions_of_b": size} | (on_b if size else {})


def cogent(
    sizes: Sequence[int],
    transfer: Transfer,
    exams: tuple[Exam, Exam],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
) -> CoGenT:
    """Train on A, fine-tune on more and more questions of B, measure on both (figure 9).

    sizes: numbers of questions of B, each fine-tuned from the network that was trained on A (in `out`/on_a),
    which size 0 measures as it is. exams: of conditions A and B, with none of the questions that are
    learned from. Written as cogent.json, .csv and .png.
    """
    on_a: dict[int, nn.Module] = {}
    for size in sizes:
        transfer.drawn(size, 0)

    def run(size: int, seed: int, folder: Path) -> dict[str, float]:
        if seed not in on_a:
            on_a[seed] = transfer.trained(seed, out / "on_a" / f"seed_{seed}")
        model = on_a[seed] if size == 0 else transfer.tuned(on_a[seed], size, seed, folder / "run")
        before, after = (accuracy(model, exam) for exam in exams)
        return {"accuracy": after, "on_a": before, "on_b": after}

    named = {f"questions_{size}": size for size in sizes}
    results = run_all(named, run, out, describe=transfer.describe(), seeds=seeds)

    def rows(key: str) -> tuple[Row, ...]:
        return tuple(Row(name, tuple(r[key] for r in found)) for name, found in results.items())

    found = CoGenT(tuple(sizes), rows("on_a"), rows("on_b"))
    write(found, out, seeds)
    return found


def write(found: CoGenT, out: Path, seeds: Sequence[int]) -> list[Path]:
    """Write cogent.json, cogent.csv with a line per size and seed, and the curves of figure 9."""
    rows = (
        (size, seed, a, b)
        for size, on_a, on_b in zip(found.questions, found.on_a, found.on_b, strict=True)
        for seed, a, b in zip(seeds, on_a.accuracies, on_b.accuracies, strict=True)
    )
    figure = plot.curves(
        list(found.questions),
        {
            "condition A": [100 * row.mean for row in found.on_a],
            "condition B": [100 * row.mean for row in found.on_b],
        },
        xlabel="questions of condition B in fine-tuning",
        ylabel="accuracy, %",
    )
    return [
        write_json(out / "cogent.json", found.to_json()),
        write_csv(out / "cogent.csv", ("questions_of_b", "seed", "accuracy_a", "accuracy_b"), rows),
        plot.save(figure, out / "cogent.png"),
    ]
