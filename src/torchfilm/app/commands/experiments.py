"""The experiments of `torchfilm eval` that train: ablations, the data-size curve, CoGenT from A to B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfilm.app.commands.train import known_recipe, trained_alike
from torchfilm.app.console import Bar, emit, note, percent, table

if TYPE_CHECKING:
    from torchfilm.app.commands.evaluate import Evaluate
    from torchfilm.systems.visual_reasoning.experiments import Row
    from torchfilm.systems.visual_reasoning.recipe import Recipe
    from torchfilm.systems.visual_reasoning.running import Material

SIZES = (250, 500, 1000, 2000, 4000, 8000, 16000)
FINE_TUNING = (0, 1000, 3000, 10_000, 30_000)


def ablations(options: Evaluate) -> None:
    """Train the recipe and the paper's changes of it."""
    from torchfilm.systems.visual_reasoning.experiments import paper_ablations
    from torchfilm.systems.visual_reasoning.recipe import ABLATIONS

    base, material = _prepared(options, "train", options.split or "val")
    names = options.only or tuple(ABLATIONS)
    out = options.out or Path("runs/ablations")
    rows = paper_ablations(
        base,
        lambda recipe, seed, folder: _measured(options, recipe, material, seed, folder),
        out,
        names=names,
        seeds=range(options.seeds),
    )
    _show(options, rows, out)


def data_size(options: Evaluate) -> None:
    """Train the recipe on more and more scenes."""
    from torchfilm.systems.visual_reasoning.experiments import data_size_curve

    base, material = _prepared(options, "train", options.split or "val")
    out = options.out or Path("runs/data_size")
    there = len(material.folder.image_files("train"))
    sizes = _numbers(options) or [size for size in SIZES if size < there] + [there]
    rows = data_size_curve(
        sizes,
        lambda size, seed, folder: _measured(options, base, replace(material, scenes=size), seed, folder),
        out,
        seeds=range(options.seeds),
    )
    _show(options, rows, out)


def cogent(options: Evaluate) -> None:
    """Train on condition A, fine-tune on questions of condition B, measure on both.

    Trains on trainA, fine-tunes on valB, measures on valA and testB, as the paper does.
    """
    import torch

    from torchfilm.systems.visual_reasoning.bundle import load_bundle
    from torchfilm.systems.visual_reasoning.experiments import cogent as series
    from torchfilm.systems.visual_reasoning.running import train_bundle
    from torchfilm.training import started

    base, material = _prepared(options, "trainA", "valA")
    out = options.out or Path("runs/cogent")
    tuning = replace(material, train_split="valB")
    asked = tuning.training_questions()

    def fine_tune(size: int, folder: Path) -> torch.nn.Module:
        recipe = replace(base, training=trained_alike(base.training, options, 0))
        run = folder / "run"
        if size == 0:
            train_bundle(options.recipe, recipe, material, out / "on_a", resume=(out / "on_a").is_dir())
            return load_bundle(out / "on_a").network
        gentle = replace(recipe, training=replace(recipe.training, lr=recipe.training.lr / 10))
        start = load_bundle(out / "on_a").network
        chosen = asked.select(slice(size))
        return train_bundle(
            options.recipe, gentle, tuning, run, resume=started(run), start=start, questions=chosen
        ).bundle.network

    exams = [material.exam(base.config, split) for split in ("valA", "testB")]
    found = series(_numbers(options) or FINE_TUNING, fine_tune, exams[0], exams[1], out)
    if options.json:
        emit({"experiment": "cogent", "out": str(out)} | found.to_json())
        return
    columns = zip(found.questions, found.on_a, found.on_b, strict=True)
    table(["questions of B", "on A", "on B"], [[f"{q:,}", percent(a), percent(b)] for q, a, b in columns])


SERIES: dict[str, Callable[[Any], None]] = {"ablations": ablations, "data_size": data_size, "cogent": cogent}


def _prepared(options: Evaluate, train_split: str, val_split: str) -> tuple[Recipe, Material]:
    from torchfilm.data.clevr.files import ClevrFolder
    from torchfilm.systems.visual_reasoning.bundle import load_sight
    from torchfilm.systems.visual_reasoning.recipe import RECIPES
    from torchfilm.systems.visual_reasoning.running import Material

    if options.data is None:
        raise ValueError(f"eval --experiment {options.experiment} trains: expected --data, got none")
    recipe = known_recipe(options.recipe, RECIPES)
    folder = ClevrFolder(options.data, options.images, options.cache)
    sight = load_sight(options.perception) if recipe.config.input == "maps" else None
    note(f"reading the questions of {folder.root}, split {train_split}")
    with Bar("looking at the pictures", "pictures") as bar:
        words = folder.vocabulary(train_split)
        material = Material(folder, words, sight, train_split, val_split, progress=bar)
        material.warm(recipe.config)
    return recipe, material


def _measured(
    options: Evaluate, recipe: Recipe, material: Material, seed: int, folder: Path
) -> dict[str, float]:
    """Train one setting and return its held-out accuracy, over all and by kind."""
    from torchfilm.systems.visual_reasoning.running import train_bundle
    from torchfilm.training import started

    recipe = replace(recipe, training=trained_alike(recipe.training, options, seed))
    note(f"training in {folder}")
    outcome = train_bundle(options.recipe, recipe, material, folder, resume=started(folder))
    return dict(outcome.result.evaluation)


def _numbers(options: Evaluate) -> list[int]:
    try:
        return [int(number) for number in options.only]
    except ValueError:
        raise ValueError(
            f"--only: expected whole numbers for {options.experiment}, got {options.only}"
        ) from None


def _show(options: Evaluate, rows: list[Row], out: Path) -> None:
    if options.json:
        settings = {row.name: {"accuracy": row.mean, "sd": row.sd, "paper": row.paper} for row in rows}
        emit(
            {
                "experiment": options.experiment,
                "recipe": options.recipe,
                "out": str(out),
                "settings": settings,
            }
        )
        return
    lines = [
        [row.name, percent(row.mean), percent(row.sd), "" if row.paper is None else f"{row.paper:.1f} %"]
        for row in rows
    ]
    table(["setting", "accuracy", "SD", "paper"], lines)
    note(f"figures and numbers in {out}")
