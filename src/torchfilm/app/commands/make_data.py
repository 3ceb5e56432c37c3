"""`torchfilm data`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from torchfilm.app.cli import check_known
from torchfilm.app.console import Bar, emit, note
from torchfilm.app.options import OptionalInt, check_own

WORLDS = {
    "clevr": ("split", "scenes", "recipe", "workers", "questions_per_scene", "condition", "width", "height"),
    "table": ("episodes", "noise"),
}
"""Name -> the options that it has for itself."""

SPLITS = ("train", "val", "test", "stem", "trainA", "valA", "testA", "valB", "testB", "stemA")
"""The splits of which something is said somewhere; any other name is free."""


@dataclass(frozen=True)
class MakeData:
    """Generate a world: scenes with questions (clevr), or demonstrations of an instructed arm (table).

    clevr: a split in the released CLEVR_v1.0 layout; a run that was stopped goes on with the same command.
    table: a dataset in LeRobot's format v3.0, whole or not at all. The same seed gives the same bytes.

    Example: torchfilm data clevr data-clevr --split train --scenes 2000 --seed 1

    Example: torchfilm data table data-table --episodes 2000 --seed 1
    """

    name: Annotated[Positional[str], arg(metavar="NAME")] = "clevr"
    """the world: clevr or table"""
    out: Annotated[Positional[Path | None], arg(metavar="OUT", help_behavior_hint="")] = None
    """the folder to write to; default: data-NAME; several splits of clevr can share one"""
    split: str = "train"
    """train, val, test, stem (for the recipe perception), or CoGenT's trainA, valA, testA, valB, testB,
    and stemA with --condition A"""
    scenes: int = 1000
    """number of scenes"""
    seed: int = 0
    """what the scenes and questions follow from"""
    recipe: str = "laptop"
    """laptop: 96x64 pixels, 3 to 6 objects, 40 questions each; full: 480x320, 3 to 10, 10"""
    workers: OptionalInt = None
    """processes; default: one per core"""
    questions_per_scene: OptionalInt = None
    """0 makes none; default: the recipe's"""
    condition: Literal["A", "B"] | None = None
    """CoGenT's condition; default: the split's"""
    width: OptionalInt = None
    """pixels; default: the recipe's"""
    height: OptionalInt = None
    """pixels; default: the recipe's"""
    episodes: int = 1000
    """table: number of demonstrations"""
    noise: float = 0.0
    """table: metres by which the arm is disturbed, so that it is seen coming back"""
    json: bool = False
    """print one JSON object"""

    def __call__(self) -> None:
        """Generate."""
        check_known("world", self.name, WORLDS)
        check_own(self, WORLDS, self.name, "world")
        out = self.out or Path(f"data-{self.name}")
        if self.name == "table":
            self._table(out)
        else:
            self._clevr(out)

    def _table(self, out: Path) -> None:
        from torchfilm.data.table.demonstrations import generate_demonstrations

        with Bar("demonstrations", "episodes") as bar:
            made = generate_demonstrations(out, self.episodes, self.seed, self.noise, progress=bar)
        if self.json:
            emit(asdict(made) | {"out": str(made.out), "seed": self.seed})
        else:
            held = f"{made.num_episodes:,} demonstrations, {made.num_frames:,} frames"
            print(f"{held}: {made.out} ({made.attempts:,} attempts)")

    def _clevr(self, out: Path) -> None:
        from torchfilm.data.clevr.generate import generate_dataset

        if self.split not in SPLITS:
            note(f"the split {self.split!r} is none of {', '.join(SPLITS)}: it is read where it is named")
        with Bar(f"scenes of {self.split}", "scenes") as bar:
            made = generate_dataset(
                out,
                self.split,
                self.scenes,
                self.seed,
                self.recipe,
                self.workers,
                bar,
                questions_per_scene=self.questions_per_scene,
                condition=self.condition,
                width=self.width,
                height=self.height,
            )
        if self.json:
            emit(asdict(made) | {"out": str(made.out), "seed": self.seed})
        else:
            held = f"{made.num_scenes:,} scenes, {made.num_questions:,} questions"
            print(f"{held}: split {made.split} of {made.out}")
