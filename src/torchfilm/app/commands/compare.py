"""`torchfilm compare`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfilm.app.commands.policy import DATA, demonstrations
from torchfilm.app.console import emit, note, percent, table
from torchfilm.app.options import OptionalFloat, OptionalInt, OptionalPath, OptionalText, SystemName

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Compare:
    """Train and measure FiLM against the alternatives in the same policy, on the same demonstrations.

    Every run has a folder in OUT and goes on where it was stopped; what is finished is not repeated, so more
    names and seeds can be asked for later. The table is OUT/table.json too.

    Example: torchfilm compare diffusion_policy --minutes 10 --seeds 3 --only film,concat,cross_attention
    """

    system: SystemName = "diffusion_policy"
    """the system: diffusion_policy"""
    recipe: str = "laptop"
    """of the policy, for all"""
    data: Path = DATA
    """demonstrations, made where there are none"""
    out: OptionalPath = None
    """where the runs lie; default: runs/compare-RECIPE"""
    minutes: OptionalFloat = None
    """of each training; default: the recipe's"""
    steps: OptionalInt = None
    """budget in steps, instead of minutes"""
    seeds: int = 3
    """trainings of each"""
    scenes: int = 100
    """fresh scenes on which each is measured, in all four manners and twice worded"""
    only: OptionalText = None
    """names, with commas between; default: all"""
    json: bool = False
    """print one JSON object"""

    def __call__(self) -> None:
        """Compare."""
        from torchfilm.app.commands.train import known_recipe, trained_alike
        from torchfilm.systems.diffusion_policy.alternatives import ALTERNATIVES, Contest, hold
        from torchfilm.systems.diffusion_policy.recipe import RECIPES

        if self.system != "diffusion_policy":
            raise ValueError(
                f"compare: expected diffusion_policy, got {self.system!r}; the fusions of any network are "
                "compared by torchfilm.compare, in Python"
            )
        recipe = known_recipe(self.recipe, RECIPES)
        recipe = replace(recipe, training=trained_alike(recipe.training, self, seed=0))
        names = tuple(ALTERNATIVES) if self.only is None else tuple(self.only.split(","))
        contest = Contest(recipe, names, self.seeds, self.scenes)
        out = self.out or Path("runs") / f"compare-{self.recipe}"

        def progress(name: str, done: int, total: int) -> None:
            note(f"{done} of {total} done; {name}")

        found = hold(contest, demonstrations(self.data, recipe.demonstrations), out, progress)
        if self.json:
            emit(found)
        else:
            show(found)


def show(found: Mapping[str, Any]) -> None:
    """The table of a comparison: means over the seeds, and their range."""
    rows = []
    for name, row in found["rows"].items():
        shares = ("reach", "push", "reach_held_out", "collisions_avoid", "energy_saved", "language")
        rows.append(
            [
                name,
                str(row["seeds"]),
                *(_ranged(row[key]) for key in shares),
                f"{row['parameters_added']:+.1%}",
                f"{row['milliseconds_added']:+.2f}",
                f"{row['time']:.2f}",
                f"{row['training_time']:.2f}",
            ]
        )
    head = ["", "seeds", "reach %", "push %", "held out %", "collisions %", "energy %", "language"]
    table([*head, "parameters", "ms", "step", "training"], rows)


def _ranged(one: Mapping[str, float]) -> str:
    if one["low"] == one["high"]:
        return percent(one["mean"])
    return f"{percent(one['mean'])} ({100 * one['low']:.0f} to {100 * one['high']:.0f})"
