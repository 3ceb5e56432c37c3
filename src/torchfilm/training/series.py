"""Series of trainings: several settings with several seeds, none of them twice.

What is finished is kept in a folder per run, so that a stopped series goes on where it was; delete a run's
folder to repeat it.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from .checkpoint import write_json

Setting = TypeVar("Setting")
Run = Callable[[Setting, int, Path], Mapping[str, float]]
"""Train and measure one (setting, seed) in a folder of its own; return numbers by name."""
Progress = Callable[[str, int, int], None]

RESULT = "result.json"
"""What a finished run leaves in its folder."""


def run_all(
    settings: Mapping[str, Setting],
    run: Run[Setting],
    out: Path,
    *,
    seeds: Sequence[int] = (0,),
    shares: Sequence[str] = ("accuracy",),
    progress: Progress = lambda name, done, total: None,
) -> dict[str, list[dict[str, float]]]:
    """Run each setting with each seed that has no result in `out` yet; return all results, per name one
    for each seed.

    The seeds go round: the first of all settings comes before the second of any. `run` gets the folder
    out/NAME/seed_S, which it may use for its own checkpoints: a run that was stopped half-way is called again
    with the same folder.

    Args:
        settings: name -> what `run` trains.
        run: trains and measures one setting with one seed.
        out: where the runs' folders are.
        seeds: of the trainings.
        shares: names of numbers between 0 and 1 that every result must have.
        progress: hears which run is next, how many are done, and of how many.

    Raises:
        ValueError: for a name that can be no folder, and a result that is not as it should be.
    """
    bad = [name for name in settings if not re.fullmatch(r"[A-Za-z0-9_.=+-]+", name)]
    if bad:
        raise ValueError(
            f"run_all: expected names that can be folders (letters, digits, _ . = + -), got {bad}."
        )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    every = [(seed, name) for seed in seeds for name in settings]
    for done, (seed, name) in enumerate(every):
        folder = out / name / f"seed_{seed}"
        if not (folder / RESULT).is_file():
            progress(f"{name}, seed {seed}", done, len(every))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / RESULT, _checked(name, run(settings[name], seed, folder), shares))
        found[name].append(_kept(folder / RESULT, shares))
    return found


def _checked(name: str, result: Mapping[str, float], shares: Sequence[str]) -> dict[str, float]:
    for share in shares:
        number = result.get(share)
        if number is None or not 0 <= number <= 1:
            raise ValueError(
                f"run {name!r}: expected a result with {share!r} between 0 and 1, got {dict(result)}."
            )
    return {key: float(value) for key, value in result.items()}


def _kept(path: Path, shares: Sequence[str]) -> dict[str, float]:
    try:
        return _checked(path.parent.parent.name, json.loads(path.read_text(encoding="utf-8")), shares)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a finished run's numbers, got {error}. Delete its folder."
        ) from error
