"""`torchfilm train`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from torchfilm.app.cli import check_known
from torchfilm.app.console import Bar, emit, note, percent
from torchfilm.app.options import (
    OptionalFloat,
    OptionalInt,
    OptionalPath,
    OptionalText,
    SystemName,
    check_least,
    check_own,
)

if TYPE_CHECKING:
    from torchfilm.data.clevr.files import ClevrFolder
    from torchfilm.systems.visual_reasoning.bundle import Bundle, Sight
    from torchfilm.training import TrainConfig


PERCEPTION = "perception"

LEARNED = ("lr", "start", "generator_only", "scenes", "perception", "features")
OWN = {
    "visual_reasoning": (*LEARNED, "train_split", "val_split", "images", "cache"),
    "diffusion_policy": (),
}
"""System -> the options that it has for itself; `LEARNED`: not for the recipe perception."""

SEEN = {"features": ("features",), "maps": ("perception",), "pixels": ()}
"""What a network of visual_reasoning sees -> the options for that alone."""


@dataclass(frozen=True)
class Train:
    """Train a system by a recipe, and leave in OUT/model what eval, ask, inspect and serve read.

    The recipe `perception` trains the stem that laptop recipes see with, on the object labels of a split
    whose scenes no question is asked about. Ctrl-C writes a checkpoint; the same command with --resume
    goes on. --start fine-tunes a trained network: words new to it that come five times or more get vectors
    of their own, and with --generator-only what sees stays as it is, as in the paper's fine-tuning on
    CLEVR-Humans; a recipe with a wider classifier (laptop_large) widens it. Under torchrun the same command
    trains on several processes.

    Example: torchfilm train visual_reasoning --recipe laptop --data data-clevr --out runs/first --minutes 15
    """

    system: SystemName = "visual_reasoning"
    """the system"""
    recipe: str = "laptop"
    """laptop, laptop_large, tiny, paper, paper_pixels, baselines as laptop_lstm, or perception"""
    data: OptionalPath = None
    """the data folder: generated, or a released CLEVR_v1.0 or CLEVR-CoGenT; default: data-clevr. For
    diffusion_policy demonstrations, made where there are none; default: data-table"""
    out: OptionalPath = None
    """the run's folder; default: runs/RECIPE; of diffusion_policy: runs/diffusion_policy-RECIPE"""
    minutes: OptionalFloat = None
    """budget by the clock; default: the recipe's"""
    steps: OptionalInt = None
    """budget in steps, instead of minutes"""
    lr: OptionalFloat = None
    """learning rate; default: the recipe's"""
    seed: int = 0
    """of weights and order"""
    start: OptionalPath = None
    """run or bundle to begin with, its words and perception too; usually with a tenth of the recipe's --lr"""
    generator_only: bool = False
    """train only what reads the question; usually with --start"""
    resume: bool = False
    """go on with the run in OUT"""
    train_split: OptionalText = None
    """what to learn from; default: train, or stem for the recipe perception"""
    val_split: OptionalText = None
    """what to measure on; default: val where there is one"""
    scenes: OptionalInt = None
    """learn from the first so many scenes; default: all"""
    perception: OptionalPath = None
    """run or bundle with a trained perception; default: the shipped one"""
    features: OptionalPath = None
    """the folder with train_features.h5 and val_features.h5 for the recipe paper; default: the data folder"""
    images: OptionalPath = None
    """the folder with the images, where they lie elsewhere: CLEVR-Humans is questions alone"""
    cache: OptionalPath = None
    """where derived files are kept; default: .cache in the data folder"""
    json: bool = False
    """print one JSON object"""

    def __call__(self) -> None:
        """Train."""
        from torchfilm.data.clevr.files import ClevrFolder
        from torchfilm.systems.visual_reasoning.recipe import RECIPES
        from torchfilm.training import first_process

        known_system(self.system)
        check_own(self, OWN, self.system, "system")
        check_least(self, scenes=1)
        if self.system == "diffusion_policy":
            from torchfilm.app.commands import policy

            policy.train(self)
            return
        if self.recipe == PERCEPTION:
            check_own(self, {PERCEPTION: (), "others": LEARNED}, PERCEPTION, "recipe")
        else:
            known_recipe(self.recipe, RECIPES, PERCEPTION)
        folder = ClevrFolder(self.data or Path("data-clevr"), self.images, self.cache)
        out = self.out or Path("runs") / self.recipe
        found = self._perception(folder, out) if self.recipe == PERCEPTION else self._network(folder, out)
        if not first_process():
            return
        if self.json:
            emit({"run": str(out), **found, "seed": self.seed})
        else:
            measured = f", accuracy {percent(found['accuracy'])}" if found.get("accuracy") is not None else ""
            print(f"{found['steps']:,} steps in {found['seconds']:,.0f} s{measured}: {out / 'model'}")

    def _network(self, folder: ClevrFolder, out: Path) -> dict[str, Any]:
        from torchfilm.systems.visual_reasoning.bundle import load_bundle
        from torchfilm.systems.visual_reasoning.growth import can_grow, grown
        from torchfilm.systems.visual_reasoning.recipe import RECIPES
        from torchfilm.systems.visual_reasoning.running import NEW_WORD_COUNT, Material, train_bundle

        recipe, start = known_recipe(self.recipe, RECIPES, PERCEPTION), None
        if self.start is not None:
            start = load_bundle(self.start)
            if can_grow(start.network.config, recipe.config):
                start = replace(start, network=grown(start.network, recipe.config))
            recipe = replace(recipe, config=start.network.config)
        check_own(self, SEEN, recipe.config.input, "recipe over")
        train_split = self.train_split or "train"
        held_out = self._held_out(folder)
        note(f"reading the questions of {folder.root}, split {train_split}")
        with Bar("reading the questions", "bytes") as bar:
            if start is None:
                words = folder.vocabulary(train_split, progress=bar)
            else:
                words = start.vocabulary.expand(folder.questions(train_split, bar), NEW_WORD_COUNT)
            for split in (train_split, held_out):
                if split is not None:
                    folder.encoded(split, words, progress=bar)
        sight = self._sight(start) if recipe.config.input == "maps" else None
        with Bar("looking at the pictures", "pictures") as bar:
            material = Material(folder, words, sight, train_split, held_out, self.scenes, bar, self.features)
            material.warm(recipe.config)
        recipe = replace(recipe, training=trained_alike(recipe.training, self, self.seed))
        if self.lr is not None:
            recipe = replace(recipe, training=replace(recipe.training, lr=self.lr))
        if self.generator_only:
            recipe = replace(recipe, trained="generator")
        begin = None if start is None else start.network
        return train_bundle(self.recipe, recipe, material, out, resume=self.resume, start=begin).to_json()

    def _sight(self, start: Bundle | None) -> Sight:
        from torchfilm.systems.visual_reasoning.bundle import load_sight

        if self.perception is None and start is not None and start.sight is not None:
            return start.sight
        return load_sight(self.perception)

    def _perception(self, folder: ClevrFolder, out: Path) -> dict[str, Any]:
        from torchfilm.systems.visual_reasoning.bundle import save_sight
        from torchfilm.systems.visual_reasoning.sights import PERCEPTION_TRAINING, train_sight
        from torchfilm.training import first_process

        split = self.train_split or ("stem" if "stem" in folder.splits() else "train")
        note(f"reading the objects of {folder.root}, split {split}")
        sight, result = train_sight(
            folder,
            split,
            out,
            held_out=self._held_out(folder),
            training=trained_alike(PERCEPTION_TRAINING, self, self.seed),
            resume=self.resume,
        )
        if first_process():
            save_sight(out / "model", sight)
        return {
            "recipe": self.recipe,
            "steps": result.steps,
            "seconds": round(result.seconds, 1),
            "accuracy": result.evaluation.get("all_four"),
            **result.evaluation,
        }

    def _held_out(self, folder: ClevrFolder) -> str | None:
        if self.val_split is None and "val" not in folder.splits():
            note("no split val: nothing is measured on the way")
            return None
        return self.val_split or "val"


@runtime_checkable
class Budget(Protocol):
    """The options that change a recipe's training."""

    @property
    def minutes(self) -> float | None:
        """Budget by the clock."""
        ...

    @property
    def steps(self) -> int | None:
        """Budget in steps."""
        ...


def trained_alike(training: TrainConfig, budget: Budget, seed: int) -> TrainConfig:
    """The recipe's training with the budget and seed asked for, compiled where the machine can."""
    from torchfilm.systems.visual_reasoning.running import budgeted, compilable

    if training.compile and not compilable():
        note("no C++ compiler: training without torch.compile, somewhat slower")
        training = replace(training, compile=False)
    return budgeted(training, minutes=budget.minutes, steps=budget.steps, seed=seed)


def known_system(name: str) -> None:
    """Raise ValueError with the nearest names unless there is such a system."""
    from torchfilm.systems import SYSTEMS

    check_known("system", name, SYSTEMS)


def known_recipe(name: str, recipes: dict[str, Any], *others: str) -> Any:
    """The recipe of a name; ValueError with the nearest of these and other names if there is none."""
    check_known("recipe", name, recipes, *others)
    return recipes[name]
