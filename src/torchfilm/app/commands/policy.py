"""`torchfilm train` and `torchfilm eval` for the diffusion policy."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchfilm.app.console import Bar, emit, note, percent, table

if TYPE_CHECKING:
    from torchfilm.app.commands.evaluate import Evaluate
    from torchfilm.app.commands.train import Train
    from torchfilm.data.table.demonstrations import Demonstrations
    from torchfilm.systems.diffusion_policy.evaluate import Report

DATA = Path("data-table")
NOISE = 0.004
"""Metres by which the arm is disturbed while the experts show how to come back."""


def train(options: Train) -> None:
    """Train a recipe on demonstrations, made first where there are none."""
    from torchfilm.app.commands.train import known_recipe, trained_alike
    from torchfilm.systems.diffusion_policy.recipe import RECIPES
    from torchfilm.systems.diffusion_policy.running import train_policy
    from torchfilm.training import first_process

    recipe = known_recipe(options.recipe, RECIPES)
    recipe = replace(recipe, training=trained_alike(recipe.training, options, options.seed))
    data = options.data or DATA
    out = options.out or Path("runs") / f"diffusion_policy-{options.recipe}"
    shown = demonstrations(data, recipe.demonstrations)
    found = train_policy(options.recipe, recipe, shown, out, resume=options.resume).to_json()
    if not first_process():
        return
    if options.json:
        emit({"run": str(out), **found, "seed": options.seed})
    else:
        print(f"{found['steps']:,} steps in {found['seconds']:,.0f} s: {out / 'model'}")


def demonstrations(folder: Path, count: int) -> Demonstrations:
    """Read a folder of demonstrations; where there is none, let the experts fill it first."""
    from torchfilm.data.table.demonstrations import generate_demonstrations, read_demonstrations

    if not folder.exists():
        note(f"no {folder}: the experts show {count:,} episodes")
        with Bar("episodes", "episodes") as bar:
            generate_demonstrations(folder, count, seed=0, noise=NOISE, progress=bar)
    return read_demonstrations(folder)


def evaluate(options: Evaluate) -> None:
    """Play fresh scenes, and say how it went."""
    from torchfilm.systems.diffusion_policy import load
    from torchfilm.systems.diffusion_policy.evaluate import evaluate as measure
    from torchfilm.systems.diffusion_policy.evaluate import language_score
    from torchfilm.systems.diffusion_policy.policy import Policy

    seed = options.seed or 0
    policy = Policy(load(options.run), guidance=options.guidance, execution=options.execution)
    found: dict[str, Any]
    if options.experiment == "language":
        hearing = language_score(policy, options.scenes, seed)
        found = hearing.to_json() | {"n": options.scenes}
        if not options.json:
            print(hearing)
    else:
        report = measure(policy, options.scenes, seed)
        found = report.to_json()
        if not options.json:
            show(report)
    if options.json:
        emit({"experiment": options.experiment, **found, "seed": seed})


def show(report: Report) -> None:
    """The table of an evaluation."""
    rows: list[list[str]] = []
    for name, row in report.rows.items():
        other = report.held_out.get(name)
        rows.append(
            [
                name,
                f"{row.success.n:,}",
                percent(row.success.value),
                f"{100 * row.success.low:.1f} to {100 * row.success.high:.1f}",
                "" if row.looks is None else percent(row.looks.value),
                percent(row.right.value),
                percent(row.collisions.value),
                f"{row.energy:.2f}",
                f"{row.clearance:+.3f}",
                f"{row.path:.2f}",
                "" if other is None else percent(other.success.value),
            ]
        )
    names = ["told to", "n", "success", "95 %", "looks right", "right thing", "collisions", "J"]
    names += ["clear by m", "path m"]
    table([*names, "held-out wording"], rows)
    saved = ", ".join(f"{what} {percent(report.energy_saved(what))}" for what in ("reach", "push"))
    print(f"Energy when told to save it, of the plain one's: {saved}.")
    if report.failures:
        print(f"Episodes that a failing simulator ended: {len(report.failures)}; {report.failures[0]}")
