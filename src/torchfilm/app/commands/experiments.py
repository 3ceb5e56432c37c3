"""The experiments of `torchfilm eval` that train: ablations, the data-size curve, CoGenT from A to B."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfilm.app.commands.train import SEEN, known_recipe, trained_alike
from torchfilm.app.console import Bar, emit, note, percent, table
from torchfilm.app.options import check_own

if TYPE_CHECKING:
    from torchfilm.app.commands.evaluate import Evaluate
    from torchfilm.systems.visual_reasoning.experiments import Row
    from torchfilm.systems.visual_reasoning.recipe import Recipe
    from torchfilm.systems.visual_reasoning.running import Material
    from torchfilm.training import TrainConfig

SIZES = (250, 500, 1000, 2000, 4000, 8000, 16000)
FINE_TUNING = (0, 1000, 3000, 10_000, 30_000)


def ablations(options: Evaluate) -> None:
    """Train the recipe and the paper's changes of it."""
    from torchfilm.systems.visual_reasoning.experiments import described, paper_ablations, sources
    from torchfilm.systems.visual_reasoning.recipe import ABLATIONS, ablate

    base, names = _recipe(options), options.only or tuple(ABLATIONS)
    for name in names:
        ablate(base, name)  # an unknown one is told before the pictures are looked at
    material = _material(options, base, "train", options.split or "val")
    out, data = options.out or Path("runs/ablations"), sources(material)
    rows = paper_ablations(
        base,
        lambda recipe, seed, folder: _measured(options.recipe, recipe, material, seed, folder),
        out,
        describe=lambda recipe: described(recipe) | data,
        names=names,
        seeds=range(options.seeds),
    )
    _show(options, rows, out)


def data_size(options: Evaluate) -> None:
    """Train the recipe on more and more scenes."""
    from torchfilm.systems.visual_reasoning.experiments import data_size_curve, described, sources

    base, asked = _recipe(options), _numbers(options)
    material = _material(options, base, "train", options.split or "val")
    out = options.out or Path("runs/data_size")
    there = len(material.folder.image_files("train"))
    sizes = asked or [size for size in SIZES if size < there] + [there]
    about, blind = described(base) | sources(material), _blind(options, material)
    rows = data_size_curve(
        sizes,
        lambda size, seed, folder: _measured(
            options.recipe, base, replace(material, scenes=size), seed, folder
        ),
        out,
        describe=lambda size: about | {"scenes": size},
        seeds=range(options.seeds),
        blind=blind,
    )
    _show(options, rows, out, blind=blind)


def cogent(options: Evaluate) -> None:
    """Train on condition A, fine-tune on questions of condition B, measure on both.

    Trains on trainA, fine-tunes on valB, measures on valA and testB, as the paper does.
    """
    from torchfilm.systems.visual_reasoning.cogent import Transfer
    from torchfilm.systems.visual_reasoning.cogent import cogent as series

    if options.split is not None:
        raise ValueError(
            "eval --experiment cogent trains on trainA, fine-tunes on valB and measures on valA and testB: "
            f"expected no --split, got {options.split!r}. Leave it out."
        )
    if options.perception is None:
        note("no --perception: the shipped one has seen all combinations of shape and color, B's too")
    base, sizes = _recipe(options), _numbers(options) or FINE_TUNING
    material = _material(options, base, "trainA", "valA", "valB", "testB")
    out = options.out or Path("runs/cogent")
    transfer = Transfer(options.recipe, base, material, replace(material, train_split="valB"))
    note(f"training on A: {_budget(base.training)}; each fine-tuning: {_budget(transfer.fine_tuning)}")
    exams = (material.exam(base.config, "valA"), material.exam(base.config, "testB"))
    found = series(sizes, transfer, exams, out, seeds=range(options.seeds))
    if options.json:
        about = {"experiment": "cogent", "recipe": options.recipe, "out": str(out)}
        budgets = {"training": _budget(base.training), "fine_tuning": _budget(transfer.fine_tuning)}
        emit(about | budgets | found.to_json())
        return
    columns = zip(found.questions, found.on_a, found.on_b, strict=True)
    table(
        ["questions of B", "on A", "SD", "on B", "SD"],
        [[f"{q:,}", percent(a.mean), percent(a.sd), percent(b.mean), percent(b.sd)] for q, a, b in columns],
    )
    note(f"figures and numbers in {out}")


SERIES: dict[str, Callable[[Any], None]] = {"ablations": ablations, "data_size": data_size, "cogent": cogent}


def _budget(training: TrainConfig) -> str:
    return f"{training.minutes:g} minutes" if training.steps is None else f"{training.steps:,} steps"


def _recipe(options: Evaluate) -> Recipe:
    """The recipe with the budget asked for."""
    from torchfilm.systems.visual_reasoning.recipe import RECIPES

    recipe = known_recipe(options.recipe, RECIPES)
    check_own(options, SEEN, recipe.config.input, "recipe over")
    return replace(recipe, training=trained_alike(recipe.training, options, seed=0))


def _material(options: Evaluate, recipe: Recipe, train_split: str, val_split: str, *others: str) -> Material:
    """What the recipe learns from, every split looked at."""
    from torchfilm.data.clevr.files import ClevrFolder
    from torchfilm.systems.visual_reasoning.bundle import load_sight
    from torchfilm.systems.visual_reasoning.running import Material

    if options.data is None:
        raise ValueError(f"eval --experiment {options.experiment} trains: expected --data, got none")
    folder = ClevrFolder(options.data, options.images, options.cache)
    sight = load_sight(options.perception) if recipe.config.input == "maps" else None
    note(f"reading the questions of {folder.root}, split {train_split}")
    with Bar("looking at the pictures", "pictures") as bar:
        words = folder.vocabulary(train_split)
        material = Material(
            folder, words, sight, train_split, val_split, progress=bar, features=options.features
        )
        for split in (train_split, val_split, *others):
            material.pictures(recipe.config, split)
    return material


def _measured(name: str, recipe: Recipe, material: Material, seed: int, folder: Path) -> dict[str, float]:
    """Train one setting and return its held-out accuracy, over all and by kind."""
    from torchfilm.systems.visual_reasoning.running import train_bundle
    from torchfilm.training import started

    recipe = replace(recipe, training=replace(recipe.training, seed=seed))
    note(f"training in {folder}")
    outcome = train_bundle(name, recipe, material, folder, resume=started(folder))
    return dict(outcome.result.evaluation)


def _blind(options: Evaluate, material: Material) -> float | None:
    """Accuracy of a network that does not see, on the questions that the others are measured on.

    Of the one that was named, else of the shipped one where it knows the same words, else None.
    """
    from torchfilm.systems.visual_reasoning.bundle import load_blind, load_bundle
    from torchfilm.systems.visual_reasoning.exam import accuracy
    from torchfilm.systems.visual_reasoning.running import HELD_OUT_QUESTIONS

    if options.blind is None and load_bundle().vocabulary != material.vocabulary:
        note("the shipped blind network knows other words than these questions: it is not shown beside")
        return None
    blind = load_blind(options.blind, None, material.vocabulary)
    if blind is None or material.val_split is None:
        return None
    exam = material.exam(blind.config, material.val_split).sample(HELD_OUT_QUESTIONS, seed=0)
    return accuracy(blind, exam)


def _numbers(options: Evaluate) -> list[int]:
    try:
        return [int(number) for number in options.only]
    except ValueError:
        raise ValueError(
            f"--only: expected whole numbers for {options.experiment}, got {options.only}"
        ) from None


def _show(options: Evaluate, rows: list[Row], out: Path, **more: Any) -> None:
    if options.json:
        about = {"experiment": options.experiment, "recipe": options.recipe, "out": str(out)}
        emit(about | {"settings": {row.name: row.to_json() for row in rows}} | more)
        return
    lines = [
        [row.name, percent(row.mean), percent(row.sd), "" if row.paper is None else f"{row.paper:.1f} %"]
        for row in rows
    ]
    lines += [[name, percent(share), "", ""] for name, share in more.items() if share is not None]
    table(["setting", "accuracy", "SD", "paper"], lines)
    note(f"figures and numbers in {out}")
