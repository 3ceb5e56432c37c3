"""LeRobot's dataset format v3.0, written and read with pyarrow alone; numbers only, no pictures or videos.

    OUT/meta/info.json                                features, totals, path templates, frames a second
    OUT/meta/stats.json                               min, max, mean, std, quantiles of every feature
    OUT/meta/tasks.parquet                            task_index, by sentence
    OUT/meta/episodes/chunk-000/file-000.parquet      for each episode: length, tasks, where its frames are
    OUT/data/chunk-000/file-000.parquet               the frames of the same episodes

The format is that of LeRobot 0.4 and later (github.com/huggingface/lerobot, src/lerobot/datasets).
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchfilm.extras import needed
from torchfilm.reading import intact

VERSION = "v3.0"
_FILE_BYTES = 100 * 2**20
_FILES_PER_CHUNK = 1000
_PLACE = "chunk-{chunk_index:03d}/file-{file_index:03d}.parquet"
_OWN = {"timestamp": "float32", "frame_index": "int64", "episode_index": "int64"}
_OWN |= {"index": "int64", "task_index": "int64"}
_QUANTILES = {"q01": 0.01, "q10": 0.10, "q50": 0.50, "q90": 0.90, "q99": 0.99}


@dataclass(frozen=True)
class Recording:
    """One episode.

    Attributes:
        columns: name ("observation.state", "action", ...) -> [frames, size] numbers.
        task: the instruction, a sentence.
        notes: further entries of the episode's row in meta/episodes; text or numbers.
    """

    columns: Mapping[str, NDArray[Any]]
    task: str
    notes: dict[str, str | int | float | bool] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def require_pyarrow() -> Any:
    """The module pyarrow, or one line that says how to get it (ValueError)."""
    with needed("LeRobot's format needs pyarrow", "robots"):
        import pyarrow
        import pyarrow.parquet
    return pyarrow


def write_lerobot(
    out: str | Path,
    recordings: Iterable[Recording],
    fps: int,
    names: dict[str, Sequence[str]],
    robot_type: str | None = None,
) -> Path:
    """Write a dataset whole, or leave nothing behind.

    The same recordings give the same bytes (with the same pyarrow).

    Args:
        out: a folder that is new or empty.
        recordings: at least one; all with the columns of `names`, finite, of the same sizes.
        fps: frames a second.
        names: for each column, what each of its numbers is.
        robot_type: a name for the robot.

    Raises:
        ValueError: if `out` holds something, or a recording does not fit; OSError if the disk is full.

    Example:
        write_lerobot("data", [Recording({"action": np.zeros((9, 2))}, "stay")], 20, {"action": ["x", "y"]})
    """
    out = Path(out)
    new = not out.exists()
    if not new and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"out: expected a new or an empty folder, got {out}. Nothing was changed.")
    name = f".{uuid.uuid4().hex}.part"
    draft = out.with_name(out.name + name) if new else out / name  # `out` may be a link or a disk of its own
    writer = _Writer(draft, fps, {key: list(value) for key, value in names.items()})
    try:
        for recording in recordings:
            writer.add(recording)
        writer.finish(robot_type)
        if new:
            draft.replace(out)
        else:
            for part in ("data", "meta"):  # the one that says what is there comes last
                (draft / part).replace(out / part)
            draft.rmdir()
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
    return out


class _Writer:
    """Gathers episodes and writes a file of frames, and one of their rows, whenever enough are there."""

    def __init__(self, root: Path, fps: int, names: dict[str, list[str]]) -> None:
        self._pa = require_pyarrow()
        self._root, self._fps, self._names = root, fps, names
        self._tasks: dict[str, int] = {}
        self._rows: list[dict[str, Any]] = []
        self._waiting: list[dict[str, NDArray[Any]]] = []
        self._files, self._episodes, self._frames, self._bytes = 0, 0, 0, 0

    def add(self, recording: Recording) -> None:
        episode, length = self._episodes, len(recording)
        frames: dict[str, NDArray[Any]] = {key: self._checked(recording, key, episode) for key in self._names}
        task = self._tasks.setdefault(recording.task, len(self._tasks))
        steps = np.arange(length)
        frames["timestamp"] = (steps / self._fps).astype(np.float32)
        frames["frame_index"], frames["index"] = steps, self._frames + steps
        frames["episode_index"], frames["task_index"] = np.full(length, episode), np.full(length, task)
        size = sum(values.nbytes for values in frames.values())
        if self._waiting and self._bytes + size > _FILE_BYTES:
            self._flush()
        chunk, file = divmod(self._files, _FILES_PER_CHUNK)
        row = {"episode_index": episode, "tasks": [recording.task], "length": length}
        row |= {"data/chunk_index": chunk, "data/file_index": file}
        row |= {"dataset_from_index": self._frames, "dataset_to_index": self._frames + length}
        for key, values in frames.items():
            row |= {f"stats/{key}/{name}": value for name, value in _statistics(values).items()}
        row |= {"meta/episodes/chunk_index": chunk, "meta/episodes/file_index": file, **recording.notes}
        self._rows.append(row)
        self._waiting.append(frames)
        self._episodes, self._frames = episode + 1, self._frames + length
        self._bytes += size

    def finish(self, robot_type: str | None) -> None:
        if not self._episodes:
            raise ValueError("recordings: expected at least one episode, got none")
        self._flush()
        self._write(_task_table(self._pa, self._tasks), Path("meta/tasks.parquet"))
        self._json("meta/info.json", self._info(robot_type))
        whole = LeRobotFolder(self._root)  # what was written is not in memory any more
        self._json("meta/stats.json", {key: _statistics(whole.column(key)) for key in self._features()})

    def _checked(self, recording: Recording, key: str, episode: int) -> NDArray[np.float32]:
        """A column as float32, or a ValueError that names what is wrong with it."""
        width = len(self._names[key])
        if set(recording.columns) != set(self._names):
            raise ValueError(
                f"episode {episode}: expected the columns {sorted(self._names)}, "
                f"got {sorted(recording.columns)}"
            )
        values = np.ascontiguousarray(recording.columns[key], dtype=np.float32)
        if values.ndim != 2 or values.shape != (len(recording), width) or not len(values):
            raise ValueError(
                f"episode {episode}: expected {key} to be [frames, {width}] with the same frames in each "
                f"column and at least one, got {list(values.shape)}"
            )
        bad = np.argwhere(~np.isfinite(values))
        if len(bad):
            frame, index = bad[0]
            raise ValueError(
                f"episode {episode}: expected finite numbers, got {values[frame, index]} in frame {frame}, "
                f"{key} {self._names[key][index]!r}"
            )
        return values

    def _features(self) -> dict[str, dict[str, Any]]:
        shaped = {
            key: {"dtype": "float32", "shape": [len(names)], "names": names}
            for key, names in self._names.items()
        }
        return shaped | {key: {"dtype": kind, "shape": [1], "names": None} for key, kind in _OWN.items()}

    def _info(self, robot_type: str | None) -> dict[str, Any]:
        return {
            "codebase_version": VERSION,
            "robot_type": robot_type,
            "total_episodes": self._episodes,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "chunks_size": _FILES_PER_CHUNK,
            "data_files_size_in_mb": _FILE_BYTES // 2**20,
            "video_files_size_in_mb": 200,
            "fps": self._fps,
            "splits": {"train": f"0:{self._episodes}"},
            "data_path": f"data/{_PLACE}",
            "video_path": None,
            "features": self._features(),
        }

    def _flush(self) -> None:
        pa, columns = self._pa, {}
        for key, feature in self._features().items():
            values = np.concatenate([frames[key] for frames in self._waiting])
            if key in _OWN:
                columns[key] = pa.array(values.astype(feature["dtype"]))
            else:
                columns[key] = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
        self._write(pa.table(columns), Path("data") / _place(self._files))
        self._write(pa.Table.from_pylist(self._rows), Path("meta/episodes") / _place(self._files))
        self._files, self._rows, self._waiting, self._bytes = self._files + 1, [], [], 0

    def _write(self, table: Any, place: Path) -> None:
        path = self._root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        self._pa.parquet.write_table(table, path, compression="snappy", use_dictionary=True)

    def _json(self, place: str, content: dict[str, Any]) -> None:
        path = self._root / place
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=4) + "\n", encoding="utf-8")


def _place(number: int) -> str:
    chunk, file = divmod(number, _FILES_PER_CHUNK)
    return _PLACE.format(chunk_index=chunk, file_index=file)


def _statistics(values: NDArray[Any]) -> dict[str, list[float] | list[int]]:
    """What LeRobot keeps of a feature, over its frames; each a list with one entry for each number."""
    found: dict[str, list] = {name: [] for name in ("min", "max", "mean", "std", *_QUANTILES)}
    for column in values.reshape(len(values), -1).T:  # one at a time: twice the bytes of one, not of all
        exact = column.astype(np.float64)
        each = (exact.min(), exact.max(), exact.mean(), exact.std())
        quantiles = np.quantile(exact, list(_QUANTILES.values()))
        for name, value in zip(found, (*each, *quantiles), strict=True):
            found[name].append(float(value))
    return found | {"count": [len(values)]}


def _task_table(pa: Any, tasks: dict[str, int]) -> Any:
    """Sentences as the index of a pandas frame, which is how LeRobot looks them up; pandas is not needed."""
    column = {"metadata": None, "field_name": "task_index", "name": "task_index"}
    column |= {"pandas_type": "int64", "numpy_type": "int64"}
    index = {"metadata": None, "field_name": "task", "name": "task"}
    index |= {"pandas_type": "unicode", "numpy_type": "object"}
    note = {"index_columns": ["task"], "column_indexes": [], "columns": [column, index]}
    note |= {"creator": {"library": "pyarrow", "version": pa.__version__}, "pandas_version": "2.0.0"}
    table = pa.table(
        {"task_index": pa.array(tasks.values(), pa.int64()), "task": pa.array(tasks, pa.string())}
    )
    return table.replace_schema_metadata({b"pandas": json.dumps(note).encode()})


def complete(root: str | Path) -> AbstractContextManager[None]:
    """Raise ValueError, with the folder's name, where an entry of a dataset is missing or of another kind."""
    remedy = "The dataset is damaged: copy or make it again."
    return intact(root, f"all entries of LeRobot's format {VERSION}", remedy)


class LeRobotFolder:
    """Reads a dataset in LeRobot's format v3.0: its numbers, its sentences, its episodes.

    Pictures and videos are left alone. Any dataset of that version can be read, not only ours.

    Attributes:
        info: meta/info.json.
        fps: frames a second.
        features: name -> dtype, shape and names, of the columns that hold numbers.
        tasks: the sentences, by task_index.
        episodes: the rows of meta/episodes, without the statistics.

    Raises:
        ValueError: for a folder without such a dataset, of another version, or with damaged files.

    Example:
        folder = LeRobotFolder("data-table")
        actions, sentence = folder.column("action"), folder.tasks[0]
    """

    def __init__(self, root: str | Path) -> None:
        self._root, self._pa = Path(root), require_pyarrow()
        with complete(root):
            self._read(root)

    def _read(self, root: str | Path) -> None:
        self.info = self._json("meta/info.json")
        version = self.info.get("codebase_version")
        if version != VERSION:
            raise ValueError(
                f"{root}: expected LeRobot's format {VERSION}, got {version}. Convert it with LeRobot's "
                "convert_dataset_v21_to_v30"
            )
        self.fps: int = self.info["fps"]
        seen = ("image", "video", "string")
        self.features = {k: f for k, f in self.info["features"].items() if f["dtype"] not in seen}
        table = self._table(Path("meta/tasks.parquet"))
        text = next((name for name in ("task", "__index_level_0__") if name in table.column_names), None)
        if text is None:
            raise ValueError(f"{root}/meta/tasks.parquet: expected sentences, got {table.column_names}")
        sentences = dict(zip(table["task_index"].to_pylist(), table[text].to_pylist(), strict=True))
        self.tasks: list[str] = [sentences[number] for number in range(len(table))]
        parts = [self._table(p, stats=False) for p in self._files("meta/episodes")]
        rows = [row for part in parts for row in part.to_pylist()]
        self.episodes: list[dict[str, Any]] = sorted(rows, key=lambda row: row["episode_index"])
        if len(self.episodes) != self.info["total_episodes"]:
            raise ValueError(
                f"{root}: expected {self.info['total_episodes']} episodes, got {len(self.episodes)}. "
                "The copy is not whole."
            )
        numbers = [row["episode_index"] for row in self.episodes]
        if numbers != list(range(len(numbers))):
            raise ValueError(
                f"{root}: expected episodes numbered 0 to {len(numbers) - 1}, got {numbers[:8]}... "
                "The copy is not whole."
            )

    def __len__(self) -> int:
        return len(self.episodes)

    def column(self, name: str) -> NDArray[Any]:
        """All frames of a feature in order: [frames, ...size], or [frames] for a size of one."""
        if name not in self.features:
            raise ValueError(f"{self._root}: expected one of {', '.join(self.features)}, got {name!r}")
        parts, feature = [], self.features[name]
        with complete(self._root):
            for path in self._files("data"):
                array = self._table(path, [name])[name].combine_chunks()
                while hasattr(array, "flatten") and self._pa.types.is_nested(array.type):
                    array = array.flatten()
                parts.append(array.to_numpy(zero_copy_only=False))
            shape = () if feature["shape"] == [1] else tuple(feature["shape"])
            values = np.concatenate(parts).astype(feature["dtype"])
            frames, numbers = int(self.info["total_frames"]), int(np.prod(shape))
        if values.size != frames * numbers:
            raise ValueError(
                f"{self._root}: expected {frames} frames of {name}, got {values.size} numbers. The copy is "
                "not whole."
            )
        return values.reshape(frames, *shape)

    def _json(self, place: str) -> dict[str, Any]:
        path = self._root / place
        try:
            return dict(json.loads(path.read_bytes()))
        except FileNotFoundError:
            raise ValueError(
                f"expected a dataset in LeRobot's format, got {self._root} without {place}"
            ) from None
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: expected a JSON object, got something else ({error})") from error

    def _files(self, below: str) -> list[Path]:
        found = sorted((self._root / below).glob("*/*.parquet"))
        if not found:
            raise ValueError(f"{self._root}: expected files below {below}/, got none. The copy is not whole.")
        return [path.relative_to(self._root) for path in found]

    def _table(self, place: Path, columns: list[str] | None = None, *, stats: bool = True) -> Any:
        path = self._root / place
        try:
            if not stats:
                names = self._pa.parquet.read_schema(path).names
                columns = [name for name in names if not name.startswith("stats/")]
            return self._pa.parquet.read_table(path, columns=columns)
        except (FileNotFoundError, self._pa.ArrowException) as error:
            reason = " ".join(str(error).split())[:120]
            raise ValueError(f"{path}: expected a parquet file, got a damaged or none ({reason})") from error
