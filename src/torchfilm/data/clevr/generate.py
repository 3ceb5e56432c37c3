"""Generate a split of a CLEVR dataset: images, masks, scenes and questions in the released CLEVR_v1.0 layout.

    OUT/images/train/CLEVR_train_000000.png      OUT/scenes/CLEVR_train_scenes.json
    OUT/masks/train/CLEVR_train_000000.png       OUT/questions/CLEVR_train_questions.json
    OUT/torchfilm_train.json (the settings)      OUT/views/CLEVR_train_views.json (camera and lamps)

Masks and views are additions: a mask is 0 on the ground and i + 1 on object i of its scene. Unlike the
released test split, ours has answers and programs in every split.
"""

import itertools
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypedDict, Unpack

from .caches import is_full
from .json_stream import Progress
from .scenes import SceneConfig
from .shards import DatasetConfig, finish_shard, is_there, make_scenes, merge, shard_file, write_whole

# The date and version that files carry are those of the format, so that the same settings give the same
# bytes.
GENERATOR = 1  # raised when the same settings begin to give other bytes
_INFO = {"version": "1.0", "date": "11/21/2026", "license": "Apache-2.0"}
_COGENT = {"trainA": "A", "valA": "A", "testA": "A", "valB": "B", "testB": "B"}  # released splits' conditions


@dataclass(frozen=True)
class Recipe:
    """The sizes that go together."""

    width: int
    height: int
    max_objects: int
    questions_per_scene: int


RECIPES = {"laptop": Recipe(96, 64, 6, 40), "full": Recipe(480, 320, 10, 10)}


class Overrides(TypedDict, total=False):
    """What may differ from the recipe; None means the recipe's own."""

    questions_per_scene: int | None
    condition: Literal["A", "B"] | None
    width: int | None
    height: int | None


@dataclass(frozen=True)
class Generated:
    """What a finished split holds."""

    out: Path
    split: str
    num_scenes: int
    num_questions: int


def dataset_config(
    split: str, num_scenes: int, seed: int, recipe: str = "laptop", **overrides: Unpack[Overrides]
) -> DatasetConfig:
    """Return all settings of a split: those of the `recipe`, changed by `overrides`.

    "laptop" makes 96x64 pixels, 3 to 6 objects, 40 questions a scene; "full" makes 480x320, 3 to 10, 10, as
    CLEVR's. CoGenT's splits (trainA, valA, testA, valB, testB) have their condition without being told.
    """
    if recipe not in RECIPES:
        raise ValueError(f"recipe: expected one of {', '.join(RECIPES)}, got {recipe!r}")
    if not split.isalnum():
        raise ValueError(f"split: expected letters and digits, as in 'train' or 'valB', got {split!r}")
    given = {key: value for key, value in overrides.items() if value is not None}
    condition: Any = given.pop("condition", _COGENT.get(split))
    sizes = replace(RECIPES[recipe], **given)
    for name, value, least in (
        ("num_scenes", num_scenes, 1),
        ("seed", seed, 0),
        ("questions_per_scene", sizes.questions_per_scene, 0),
        ("width", sizes.width, 16),
        ("height", sizes.height, 16),
    ):
        if value < least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if split in _COGENT and condition != _COGENT[split]:
        raise ValueError(
            f"condition: expected {_COGENT[split]!r} for CoGenT's split {split!r}, got {condition!r}; "
            "leave the condition out, or give the split another name"
        )
    return DatasetConfig(
        split=split,
        num_scenes=num_scenes,
        seed=seed,
        width=sizes.width,
        height=sizes.height,
        scenes=SceneConfig(max_objects=sizes.max_objects, condition=condition),
        questions_per_scene=sizes.questions_per_scene,
    )


def generate_dataset(
    out: str | Path,
    split: str,
    num_scenes: int,
    seed: int,
    recipe: str = "laptop",
    workers: int | None = None,
    progress: Progress | None = None,
    **overrides: Unpack[Overrides],
) -> Generated:
    """Make a split in the folder `out`, or finish what an earlier, killed call began.

    Files that a finished split has lost are made again.

    `split`, `num_scenes`, `seed`, `recipe` and `overrides` are those of `dataset_config`; the bytes depend
    on them alone. `workers` processes (default: one per core that we may use) share the work;
    `progress(done, total)` is called with scenes. Several splits can share one folder. Processes are
    spawned, so a script that calls this with more than one needs the usual `if __name__ == "__main__"`.

    Raises ValueError, before anything is touched, if `out` holds something else or the same split with other
    settings; OSError if the disk is full: everything finished stays, and the same call goes on later.

    Example: `generate_dataset("clevr", "val", num_scenes=500, seed=1, recipe="laptop")`
    """
    config = dataset_config(split, num_scenes, seed, recipe, **overrides)
    workers = _usable_cores() if workers is None else workers
    if workers < 1:
        raise ValueError(f"workers: expected at least 1, got {workers}")
    out = Path(out)
    record = _check_folder(out, config)
    report = progress or (lambda done, total: None)
    try:
        if not (record["finished"] and _is_whole(out, config)):
            record["finished"] = None
            _write_record(out, record)
            _make_shards(out, config, workers, report)
            record["finished"] = {
                what: merge(out, config, what, {"split": split, **_INFO}) for what in _kinds(config)
            }
            _write_record(out, record)
    except OSError as error:
        if not is_full(error):
            raise
        raise OSError(
            error.errno,
            f"no space left for {out}; what is finished stays. Free some space and run the command again",
        ) from error
    shutil.rmtree(shard_file(out, split, 0).parent, ignore_errors=True)
    report(num_scenes, num_scenes)
    return Generated(out, split, num_scenes, record["finished"].get("questions", 0))


def _kinds(config: DatasetConfig) -> tuple[str, ...]:
    return ("scenes", "views", "questions") if config.questions_per_scene else ("scenes", "views")


def _is_whole(out: Path, config: DatasetConfig) -> bool:
    """Whether the files of a finished split are still there."""
    lists = [out / what / f"CLEVR_{config.split}_{what}.json" for what in _kinds(config)]
    pictures = (
        out / kind / config.split / f"CLEVR_{config.split}_{index:06d}.png"
        for kind in ("images", "masks")
        for index in range(config.num_scenes)
    )
    return all(map(is_there, itertools.chain(lists, pictures)))


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _record_file(out: Path, split: str) -> Path:
    return out / f"torchfilm_{split}.json"


def _write_record(out: Path, record: dict[str, Any]) -> None:
    path = _record_file(out, record["settings"]["split"])
    write_whole(path, (json.dumps(record, indent=1) + "\n").encode())


def _check_folder(out: Path, config: DatasetConfig) -> dict[str, Any]:
    """Return the record of this split in `out`, or a new one; ValueError if it is not ours to write there."""
    wanted = {"generator": GENERATOR, **json.loads(json.dumps(asdict(config)))}
    if out.exists() and not out.is_dir():
        raise ValueError(f"expected a folder to write the dataset to, got the file {out}")
    path = _record_file(out, config.split)
    if path.exists():
        record = _read_record(path)
        there = _flat(record["settings"])
        for name, value in _flat(wanted).items():
            if there.get(name) != value:
                raise ValueError(
                    f"{out} holds the split {config.split!r} made with {name}={there.get(name)!r}, not "
                    f"{value!r}. Nothing was changed. Use the same settings, or another folder."
                )
        return record
    alien = [item.name for item in out.iterdir() if not item.name.startswith(".")] if out.exists() else []
    if alien and not any(out.glob("torchfilm_*.json")):
        raise ValueError(
            f"expected an empty or new folder, or one that this command made, got {out} with "
            f"{min(alien)!r} in it. Nothing was changed. Name another folder."
        )
    return {"settings": wanted, "finished": None}


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_bytes())
        return {"settings": dict(record["settings"]), "finished": record["finished"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"expected the settings of a generated split in {path}, got something else"
        ) from error


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings with those of the scenes among them: the names that a message can give."""
    return {key: value for key, value in settings.items() if key != "scenes"} | settings["scenes"]


def _make_shards(out: Path, config: DatasetConfig, workers: int, report: Progress) -> None:
    """Make all shards that are missing."""
    missing = [s for s in range(config.num_shards) if not is_there(shard_file(out, config.split, s))]
    done = config.num_scenes - sum(len(config.indices(shard)) for shard in missing)
    report(done, config.num_scenes)
    if not missing:
        return
    if workers == 1:
        for shard in missing:
            records: list[dict[str, Any]] = []
            for indices in config.chunks(shard):
                records += make_scenes(out, config, indices)
                report(done := done + len(indices), config.num_scenes)
            finish_shard(out, config, shard, records)
        return
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=_attend_parent)
    try:
        _share_work(
            pool, workers, (out, config), missing, lambda more: report(done + more, config.num_scenes)
        )
    finally:
        pool.shutdown(cancel_futures=True)


def _share_work(
    pool: Executor,
    workers: int,
    where: tuple[Path, DatasetConfig],
    missing: list[int],
    count: Callable[[int], None],
) -> None:
    """Let the `pool` make the `missing` shards; only a few tasks wait at any time, so memory stays bounded.

    `count` is called with the number of scenes made so far.
    """
    _, config = where
    tasks = ((shard, indices) for shard in missing for indices in config.chunks(shard))
    chunks: dict[int, dict[int, list[dict[str, Any]]]] = defaultdict(dict)  # shard -> first index -> records
    running: dict[Future, tuple[int, range] | None] = {}
    made = 0
    while True:
        for shard, indices in _take(tasks, 3 * workers - len(running)):
            running[pool.submit(make_scenes, *where, indices)] = (shard, indices)
        if not running:
            return
        for future in wait(running, return_when=FIRST_COMPLETED).done:
            task, result = running.pop(future), future.result()
            if task is None:
                continue
            shard, indices = task
            made += len(indices)
            chunks[shard][indices.start] = result
            count(made)
            if len(chunks[shard]) == len(config.chunks(shard)):
                records = [record for _, part in sorted(chunks.pop(shard).items()) for record in part]
                running[pool.submit(finish_shard, *where, shard, records)] = None


def _take(tasks: Iterator[tuple[int, range]], count: int) -> list[tuple[int, range]]:
    return [task for _, task in zip(range(count), tasks, strict=False)]


def _attend_parent() -> None:
    """Set up a worker: Ctrl-C is the parent's to answer, and a worker whose parent was killed ends too."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
