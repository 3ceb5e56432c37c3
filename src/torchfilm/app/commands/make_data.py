"""`torchfilm data`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import Positional, arg

from torchfilm.app.cli import nearest
from torchfilm.app.console import Bar, emit
from torchfilm.app.options import OptionalInt

WORLDS = ("clevr",)


@dataclass(frozen=True)
class MakeData:
    """Generate a split of scenes with questions, in the released CLEVR_v1.0 layout.

    The same seed gives the same bytes. A run that was stopped goes on with the same command.

    Example: torchfilm data clevr data-clevr --split train --scenes 2000 --seed 1
    """

    name: Annotated[Positional[str], arg(metavar="NAME")] = "clevr"
    """the world: clevr"""
    out: Annotated[Positional[Path], arg(metavar="OUT")] = Path("data-clevr")
    """the folder to write to; several splits can share one"""
    split: str = "train"
    """train, val, test, or CoGenT's trainA, valA, testA, valB, testB"""
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
    json: bool = False
    """print one JSON object"""

    def __call__(self) -> None:
        """Generate."""
        if self.name not in WORLDS:
            raise ValueError(f"unknown world {self.name!r}; nearest: {', '.join(nearest(self.name, WORLDS))}")
        from torchfilm.data.clevr.generate import generate_dataset

        with Bar(f"scenes of {self.split}", "scenes") as bar:
            made = generate_dataset(
                self.out,
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
