"""`torchfilm inspect`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchfilm.app.commands.evaluate import bundle_exam, data_folder, film_network, usual_split
from torchfilm.app.commands.train import known_system
from torchfilm.app.console import Bar, emit
from torchfilm.app.options import OptionalPath, OptionalText, RunPath, SystemName, check_least, check_own

if TYPE_CHECKING:
    from torchfilm.data.clevr.files import ClevrFolder
    from torchfilm.systems.visual_reasoning.exam import Exam


OWN = {
    "visual_reasoning": ("data", "split", "scenes", "between", "picture", "images", "cache"),
    "diffusion_policy": (),
}
"""System -> the options that it has for itself."""

DRAWN = {"with --between": ("picture",), "without --between": ("points",)}
"""What is drawn -> the options for that alone."""


class OnDemand(Sequence[np.ndarray]):
    """Pictures at their own size, read when they are shown."""

    def __init__(self, folder: ClevrFolder, split: str, number: int) -> None:
        self._folder, self._split, self._number = folder, split, number

    def __getitem__(self, index: Any) -> Any:
        """The picture of a scene."""
        return self._folder.image(self._split, int(index))

    def __len__(self) -> int:
        return self._number


@dataclass(frozen=True)
class Inspect:
    """Draw what is inside a trained system: γ and β, and what they do.

    visual_reasoning: histograms per block, γ-β planes per feature map, t-SNE by type of question, where the
    max-pool picks; or, with --between, the answers on the way from one question to another.
    diffusion_policy: the same scene told in four manners and two arms told different things, as moving
    pictures, and which part of the instruction each depth hears.

    Example: torchfilm inspect visual_reasoning runs/first --data data-clevr --split val --out figures

    Example: torchfilm inspect diffusion_policy --out figures
    """

    system: SystemName = "visual_reasoning"
    """the system"""
    run: RunPath = None
    """run or bundle; default: the shipped checkpoint"""
    data: OptionalPath = None
    """the data folder; default: fresh scenes"""
    split: OptionalText = None
    """default: test, else val"""
    out: Path = Path("figures")
    """folder for the figures and the numbers behind them"""
    points: int = 3000
    """how many questions or instructions to draw, 4 or more"""
    scenes: int = 200
    """how many fresh scenes, of visual_reasoning"""
    between: tuple[str, ...] = ()
    """visual_reasoning, instead of all else: two questions, from whose γ and β to go step by step"""
    picture: int = 0
    """the picture that --between asks about, by number"""
    seed: int = 0
    """of what is drawn"""
    images: OptionalPath = None
    """the folder with the images, where they lie elsewhere: CLEVR-Humans is questions alone"""
    cache: OptionalPath = None
    """where derived files are kept; default: .cache in the data folder"""
    json: bool = False
    """print one JSON object"""

    def __call__(self) -> None:
        """Draw."""
        known_system(self.system)
        check_own(self, OWN, self.system, "system")
        check_own(self, DRAWN, f"with{'' if self.between else 'out'} --between")
        check_least(self, points=4, scenes=1, seed=0)
        files, about = self._policy() if self.system == "diffusion_policy" else self._reasoning()
        if self.json:
            emit({"out": str(self.out), "files": [str(path) for path in files], **about})
        else:
            print("\n".join(str(path) for path in files))

    def _policy(self) -> tuple[list[Path], dict[str, Any]]:
        from torchfilm.systems.diffusion_policy import load
        from torchfilm.systems.diffusion_policy.inspect_figures import inspect
        from torchfilm.systems.diffusion_policy.policy import Policy

        files = inspect(Policy(load(self.run)), self.out, points=self.points, seed=self.seed)
        return files, {"seed": self.seed}

    def _reasoning(self) -> tuple[list[Path], dict[str, Any]]:
        from torchfilm.systems.visual_reasoning.bundle import load_bundle
        from torchfilm.systems.visual_reasoning.inspect_figures import inspect

        bundle = load_bundle(self.run)
        network = film_network(bundle)
        with data_folder(self, bundle) as (folder, seed):
            split = self.split or usual_split(folder)
            exam = bundle_exam(bundle, folder, split)
            about = {"split": split, "seed": seed}
            if self.between:
                return self._steps(network, exam), about
            shown = OnDemand(folder, split, len(exam.pictures))
            with Bar("t-SNE", "blocks") as bar:
                files = inspect(
                    network, exam, self.out, images=shown, points=self.points, seed=seed, progress=bar
                )
        return files, about

    def _steps(self, network: Any, exam: Exam) -> list[Path]:
        from torchfilm.systems.visual_reasoning.arithmetic import interpolate

        if len(self.between) != 2:
            raise ValueError(f"--between: expected two questions, got {len(self.between)}: {self.between}")
        interpolate(network, exam, self.picture, *self.between, self.out)
        return [self.out / f"interpolation.{kind}" for kind in ("png", "csv")]
