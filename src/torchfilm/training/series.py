"""Series of trainings: several settings with several seeds, none of them twice.

What is finished is kept in a folder per run, so that a stopped series goes on where it was; delete a run's
folder to repeat it. Beside each result stands what it depends on, and another setting is refused there.
"""

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from .checkpoint import write_json
from .folder import differences

Setting = TypeVar("Setting")
Run = Callable[[Setting, int, Path], Mapping[str, float]]
"""Train and measure one (setting, seed) in a folder of its own; return numbers by name."""
Progress = Callable[[str, int, int], None]

RESULT = "result.json"
"""What a finished run leaves in its folder."""
SETTING = "setting.json"
"""What a run's result depends on, beside it."""


def run_all(
    settings: Mapping[str, Setting],
    run: Run[Setting],
    out: Path,
    *,
    describe: Callable[[Setting], Mapping[str, Any]],
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
        describe: all that a setting's result depends on besides the seed, in plain values: the training with
            its budget, the network, the data.
        seeds: of the trainings.
        shares: names of numbers between 0 and 1 that every result must have.
        progress: hears which run is next, how many are done, and of how many.

    Raises:
        ValueError: for a name that can be no folder, a folder with a run of another setting (before any
            is run), and a result that is not as it should be.
    """
    bad = [name for name in settings if not re.fullmatch(r"[A-Za-z0-9_.=+-]+", name)]
    if bad:
        raise ValueError(
            f"run_all: expected names that can be folders (letters, digits, _ . = + -), got {bad}."
        )
    found: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    every = [(seed, name, out / name / f"seed_{seed}") for seed in seeds for name in settings]
    described = {name: json.loads(json.dumps(describe(setting))) for name, setting in settings.items()}
    for _, name, folder in every:
        _refuse_others(folder, described[name])
    for done, (seed, name, folder) in enumerate(every):
        if not (folder / RESULT).is_file():
            progress(f"{name}, seed {seed}", done, len(every))
            folder.mkdir(parents=True, exist_ok=True)
            write_json(folder / SETTING, described[name])
            write_json(folder / RESULT, _checked(name, run(settings[name], seed, folder), shares))
        found[name].append(_kept(folder / RESULT, shares))
    return found


def _refuse_others(folder: Path, wanted: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder has a run, finished or not, of another setting."""
    path = folder / SETTING
    if not path.is_file():
        if (folder / RESULT).is_file():
            raise ValueError(
                f"{folder}: expected {SETTING} beside {RESULT}, found none, so that nobody knows what the "
                "result is of. Delete the folder to run it again, or use another one."
            )
        return
    differing = differences(_read(path), wanted)
    if differing:
        fields = "; ".join(f"{name}: expected {now!r}, got {was!r}" for name, (was, now) in differing.items())
        raise ValueError(
            f"{folder} has a run of another setting: {fields}. Ask with the same setting to go on, or delete "
            "the folder to run it again, or use another one."
        )


def _checked(name: str, result: Mapping[str, float], shares: Sequence[str]) -> dict[str, float]:
    for share in shares:
        number = result.get(share)
        if number is None or not 0 <= number <= 1:
            raise ValueError(
                f"run {name!r}: expected a result with {share!r} between 0 and 1, got {dict(result)}."
            )
    return {key: float(value) for key, value in result.items()}


def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _kept(path: Path, shares: Sequence[str]) -> dict[str, float]:
    try:
        return _checked(path.parent.parent.name, _read(path), shares)
    except (ValueError, AttributeError, TypeError) as error:
        raise ValueError(
            f"{path}: expected a finished run's numbers, got {error}. Delete its folder."
        ) from error
