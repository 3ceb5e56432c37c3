"""Demonstrations of the experts, in LeRobot's format v3.0, and what they were told beside.

Columns: observation.state (`STATE_NAMES`), observation.environment_state (`environment_names`), action (the
position to go to, metres). The task of an episode is its instruction; its row in meta/episodes holds, as
JSON, the scene, the meaning and the parts of the instruction, and the outcome: "torchfilm/scene",
"torchfilm/told", "torchfilm/outcome".
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from torchfilm.data.lerobot import LeRobotFolder, Recording, complete, write_lerobot

from .episodes import Episode, sample_episode
from .model import FPS
from .playing import Experts
from .scenes import Scene
from .simulator import Array
from .tasks import What
from .trials import STATE_NAMES, Outcome, Trials, environment_names
from .wording import Instruction

_BATCH = 128
_ATTEMPTS = 20
_KEYS = ("observation.state", "observation.environment_state", "action")

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Generated:
    """What a finished set of demonstrations holds; `attempts` counts also those that failed, left out."""

    out: Path
    num_episodes: int
    num_frames: int
    attempts: int


@dataclass(frozen=True)
class Demonstrations:
    """Demonstrations in memory.

    Attributes:
        state: [frames, 6], `STATE_NAMES`.
        environment: [frames, numbers], `environment_names`.
        action: [frames, 2] metres.
        starts: [episodes + 1]: the frames of episode i are starts[i] to starts[i + 1].
        episodes: scenes and instructions.
        outcomes: how each went.
        fps: frames a second.
    """

    state: NDArray[np.float32]
    environment: NDArray[np.float32]
    action: NDArray[np.float32]
    starts: NDArray[np.int64]
    episodes: list[Episode]
    outcomes: list[Outcome]
    fps: int


class _Noisy:
    """Experts whose answers are disturbed on the way to the arm; what they answered is kept."""

    def __init__(self, trials: Trials, rngs: list[np.random.Generator], noise: float) -> None:
        self._experts, self._rngs, self._noise = Experts(trials), rngs, noise
        self._drift = np.zeros((len(trials), 1, 2))
        self.answers: Array = np.zeros((0, 1, 2))

    def __call__(self, trials: Trials, rows: NDArray[np.intp]) -> Array:
        self.answers = self._experts(trials, rows)
        if not self._noise:
            return self.answers
        for row in rows.tolist():  # half a second of memory
            fresh = self._rngs[row].normal(size=(1, 2))
            self._drift[row] = 0.9 * self._drift[row] + self._noise * np.sqrt(1 - 0.9**2) * fresh
        return self.answers + self._drift[rows]


def demonstrate(
    episodes: list[Episode], rngs: list[np.random.Generator], noise: float = 0.0
) -> list[Recording]:
    """Let the experts play one-armed episodes, and record what was seen and answered.

    Args:
        episodes: with the same number of things.
        rngs: one for each, the source of its noise.
        noise: metres (standard deviation) by which the target drifts on the way to the arm, while what is
            recorded is what the expert answered: it shows how to come back.
    """
    trials = Trials([e.scene for e in episodes], [e.tasks for e in episodes])
    actor = _Noisy(trials, rngs, noise)
    frames: list[list[tuple[NDArray, NDArray, NDArray]]] = [[] for _ in episodes]
    while len(rows := trials.running):
        state, environment = trials.state[rows], trials.environment[rows]
        targets = actor(trials, rows)
        for i, row in enumerate(rows.tolist()):
            frames[row].append((state[i, 0], environment[i, 0], actor.answers[i, 0]))
        trials.step(targets, rows)
    return [
        _recording(episode, trials.outcomes(row)[0], seen)
        for row, (episode, seen) in enumerate(zip(episodes, frames, strict=True))
    ]


def generate_demonstrations(
    out: str | Path,
    num_episodes: int,
    seed: int,
    noise: float = 0.0,
    num_things: int = 3,
    what: What | None = None,
    by: Collection[str] | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Write successful demonstrations of instructions, evenly drawn, with trained wordings.

    The bytes depend on the arguments alone (with the same MuJoCo, NumPy and pyarrow). The folder appears
    whole or not at all.

    Args:
        out: a folder that is new or empty.
        num_episodes: how many; about 70 frames each, thousands of frames a second.
        seed: what scenes, instructions, wordings and noise follow from.
        noise: metres; see `demonstrate`. Half a centimetre leaves nearly all of them successful.
        num_things: 1 to 4.
        what, by: only some instructions, as for `sample_episode`; default: all.
        progress: called with episodes done and asked for.

    Raises:
        ValueError: for numbers out of range or a folder that holds something; OSError if the disk is full.

    Example:
        generate_demonstrations("data-table", 1000, seed=0)
    """
    for name, value, least in (("num_episodes", num_episodes, 1), ("seed", seed, 0), ("noise", noise, 0)):
        if not value >= least:
            raise ValueError(f"{name}: expected at least {least}, got {value}")
    if math.isinf(noise):
        raise ValueError(f"noise: expected a finite number of metres, got {noise}")
    frames = attempts = 0
    report = progress or (lambda done, total: None)

    def draw(rng: np.random.Generator) -> Episode:
        return sample_episode(rng, what=what, by=by, num_things=num_things)

    def recordings() -> Iterator[Recording]:
        nonlocal frames, attempts
        for first in range(0, num_episodes, _BATCH):
            count = min(_BATCH, num_episodes - first)
            made, tries = _successes(range(first, first + count), seed, noise, draw)
            attempts += tries
            frames += sum(len(one) for one in made)
            yield from made
            report(first + count, num_episodes)

    names = {"observation.state": STATE_NAMES, "observation.environment_state": environment_names(num_things)}
    where = write_lerobot(
        out, recordings(), FPS, {**names, "action": ("finger_x", "finger_y")}, robot_type="torchfilm table"
    )
    return Generated(where, num_episodes, frames, attempts)


def read_demonstrations(root: str | Path) -> Demonstrations:
    """Read what `generate_demonstrations` wrote.

    Raises ValueError for a folder that holds something else, a copy that is not whole, or numbers that are
    not finite.
    """
    folder = LeRobotFolder(root)
    missing = [key for key in _KEYS if key not in folder.features]
    if missing or "torchfilm/scene" not in folder.episodes[0]:
        raise ValueError(
            f"{root}: expected demonstrations made by `torchfilm data table`, got a LeRobot dataset with "
            f"{', '.join(folder.features)}; LeRobotFolder reads it"
        )
    columns = {key: folder.column(key) for key in _KEYS}
    for key, values in columns.items():
        if not np.isfinite(values).all():
            frame = int(np.argwhere(~np.isfinite(values))[0, 0])
            raise ValueError(
                f"{root}: expected finite numbers, got {values[frame]} in frame {frame} of {key}"
            )
    with complete(root):
        starts = [row["dataset_from_index"] for row in folder.episodes] + [folder.info["total_frames"]]
        _check_order(root, folder, starts)
        return Demonstrations(
            *(columns[key] for key in _KEYS),
            starts=np.array(starts),
            episodes=[
                Episode(
                    Scene.from_dict(json.loads(row["torchfilm/scene"])),
                    (Instruction.from_dict(json.loads(row["torchfilm/told"])),),
                )
                for row in folder.episodes
            ],
            outcomes=[Outcome(**json.loads(row["torchfilm/outcome"])) for row in folder.episodes],
            fps=folder.fps,
        )


def _check_order(root: str | Path, folder: LeRobotFolder, starts: list[int]) -> None:
    """Raise ValueError unless all frames are in order, and each episode begins where its first frame is."""
    number = folder.column("episode_index")
    found = [0, *(np.flatnonzero(np.diff(number)) + 1).tolist(), len(number)]
    if starts != found or not np.array_equal(folder.column("index"), np.arange(len(number))):
        raise ValueError(
            f"{root}: expected frames in the order of index and episode_index, got another order. "
            "The dataset is damaged: copy or make it again."
        )


def _recording(episode: Episode, outcome: Outcome, seen: list[tuple[NDArray, NDArray, NDArray]]) -> Recording:
    told = episode.told[0]
    notes = {"scene": episode.scene.to_dict(), "told": told.to_dict(), "outcome": outcome.to_dict()}
    columns: dict[str, NDArray] = dict(zip(_KEYS, map(np.stack, zip(*seen, strict=True)), strict=True))
    return Recording(columns, told.text, {f"torchfilm/{k}": json.dumps(v) for k, v in notes.items()})


def _successes(
    indices: range, seed: int, noise: float, draw: Callable[[np.random.Generator], Episode]
) -> tuple[list[Recording], int]:
    """A successful recording for each index, and how many attempts that took."""
    made: dict[int, Recording] = {}
    attempts = 0
    for attempt in range(_ATTEMPTS):
        missing = [index for index in indices if index not in made]
        if not missing:
            break
        rngs = [_rng(seed, index, attempt) for index in missing]
        episodes = [draw(rng) for rng in rngs]
        attempts += len(missing)
        for index, recording in zip(missing, demonstrate(episodes, rngs, noise), strict=True):
            if json.loads(str(recording.notes["torchfilm/outcome"]))["success"]:
                made[index] = recording
    if len(made) < len(indices):
        raise ValueError(
            f"noise: expected one that experts can cope with, got {noise} m: {len(indices) - len(made)} of "
            f"{len(indices)} episodes failed {_ATTEMPTS} times"
        )
    return [made[index] for index in indices], attempts


def _rng(seed: int, index: int, attempt: int) -> np.random.Generator:
    text = json.dumps(["torchfilm table 1", seed, index, attempt])
    return np.random.default_rng(np.frombuffer(hashlib.sha256(text.encode()).digest(), np.uint32))
