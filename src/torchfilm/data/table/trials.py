"""Tables with tasks: step them, judge them, and measure energy, clearance, collisions, time and path."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .scenes import COLOURS, FINGER_RADIUS, OBSTACLE_RADIUS, SHAPES, SIZES, Scene, place_of
from .simulator import Array, Tables, Trace, seconds, turn
from .tasks import PUSH_GAP, REACH_GAP, Task

MAX_STEPS = 300
"""Steps of control after which an episode ends unsuccessfully: 15 s; the experts' slowest need 11."""

HOLD = 3  # steps of control for which an end has to last
_STILL = 0.08  # m/s: a slower finger rests

STATE_NAMES = ("joint_0", "joint_1", "rate_0", "rate_1", "finger_x", "finger_y")
"""What each number of an arm's state is: radians, radians a second, metres."""


def environment_names(num_things: int) -> tuple[str, ...]:
    """What each number of the environment's state is: metres, and 1 or 0 for colours and shapes."""
    kinds = (*COLOURS, *SHAPES)
    things = [f"thing_{i}_{what}" for i in range(num_things) for what in ("x", "y", "radius", *kinds)]
    return (*things, "obstacle_x", "obstacle_y", "goal_x", "goal_y")


def positions_of(environment: NDArray[np.floating], num_things: int) -> NDArray[np.floating]:
    """Where the things are, [..., things, 2] metres, in numbers [..., size] of `environment_names`."""
    things = environment[..., :-4]
    return things.reshape(*things.shape[:-1], num_things, -1)[..., :2]


@dataclass(frozen=True)
class Outcome:
    """How one arm's episode went so far.

    Attributes:
        success: the task was done.
        done: the episode is over: by success, by choosing another thing (resting at it when told to reach),
            or by the end of time.
        chosen: index of the thing that was reached or moved; None where there was none.
        energy: Σ |τ·q̇| dt in joules.
        clearance: least distance from the obstacle in metres, of the finger and of the thing to be pushed;
            negative where they entered it.
        collisions: how many times they came to touch it.
        time: in seconds.
        path: length of the finger's path in metres.
        failure: what the simulator said when it failed, which ended the episode; None where it did not.
    """

    success: bool
    done: bool
    chosen: int | None
    energy: float
    clearance: float
    collisions: int
    time: float
    path: float
    failure: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields as JSON can hold them; `failure` where there was one."""
        return {name: value for name, value in asdict(self).items() if name != "failure" or value is not None}


class Trials:
    """N tables, each arm with its task, stepped together and judged.

    Args:
        scenes: with the same numbers of arms and things.
        tasks: one sequence for each scene: one task for each arm, in its own view.

    Example:
        trials = Trials(scenes, [[Task(0)] for _ in scenes])
        while not trials.done.all():
            trials.step(policy(trials.state, trials.environment), trials.running)
    """

    def __init__(self, scenes: Sequence[Scene], tasks: Sequence[Sequence[Task]]) -> None:
        if len(scenes) != len(tasks):
            raise ValueError(f"tasks: expected one entry for each of {len(scenes)} scenes, got {len(tasks)}")
        self.tables = Tables(scenes)
        shape = (len(scenes), self.tables.arms)
        self._energy, self._path = np.zeros(shape), np.zeros(shape)
        self._clearance, self._collisions = np.zeros(shape), np.zeros(shape, int)
        self._touching = np.zeros(shape, bool)
        self._steps, self._ended = np.zeros(shape, int), np.zeros(shape, bool)
        self._success, self._chosen = np.zeros(shape, bool), np.full(shape, -1)
        self._held = np.zeros((*shape, self.tables.num_things), int)
        self._arrived = np.zeros(shape, int)
        self._last = np.zeros((*shape, 2))
        self._obstacles = np.zeros((*shape, 2))
        self._which, self._reaches = np.zeros(shape, int), np.zeros(shape, bool)
        self._places = np.zeros((*shape, 2))
        self._radii = np.zeros((shape[0], self.tables.num_things))
        self._begin = np.zeros((shape[0], self.tables.num_things, 2))
        self._fixed = np.zeros((*shape, len(environment_names(self.tables.num_things))), np.float32)
        self.scenes: list[Scene] = list(scenes)
        self.tasks: list[tuple[Task, ...]] = [()] * len(scenes)
        self._failures: dict[tuple[int, int], str] = {}
        for row, (scene, told) in enumerate(zip(scenes, tasks, strict=True)):
            self.put(row, scene, told)

    def __len__(self) -> int:
        return len(self.scenes)

    def put(self, row: int, scene: Scene, tasks: Sequence[Task]) -> None:
        """Begin an episode in a row. Raises ValueError, with the row as it was, where they do not fit."""
        arms = self.tables.arms
        if len(tasks) != arms or any(not 0 <= task.which < len(scene.things) for task in tasks):
            raise ValueError(
                f"tasks of row {row}: expected {arms}, each about one of {len(scene.things)} things, "
                f"got {list(tasks)}"
            )
        self.tables.put(row, scene)
        self.scenes[row], self.tasks[row] = scene, tuple(tasks)
        for array in (self._energy, self._path, self._collisions, self._steps, self._held, self._arrived):
            array[row] = 0
        self._ended[row] = self._success[row] = False
        self._chosen[row] = -1
        self._radii[row] = [thing.radius for thing in scene.things]
        self._begin[row] = self.tables.things[row]
        self._last[row] = self.tables.fingers[row]
        for arm, task in enumerate(tasks):
            view = scene.seen_by(arm)
            self._obstacles[row, arm] = view.obstacle
            self._which[row, arm], self._reaches[row, arm] = task.which, task.what == "reach"
            self._places[row, arm] = place_of(view, task.place or "goal")
            self._fixed[row, arm] = _description(view)
            self._failures.pop((row, arm), None)
        gap = self._gaps(np.array([row]), self.tables.fingers[[row], None], self.tables.things[[row], None])
        self._clearance[row] = gap[0, 0]
        self._touching[row] = gap[0, 0] < 0

    @property
    def done(self) -> NDArray[np.bool_]:
        """[N]: whether all of a table's arms have ended."""
        return np.logical_and.reduce(self._ended, axis=1)

    @property
    def running(self) -> NDArray[np.intp]:
        """The rows that are not done."""
        return np.flatnonzero(~self.done)

    @property
    def state(self) -> NDArray[np.float32]:
        """[N, arms, 6]: `STATE_NAMES`, each arm in its own view."""
        tables = self.tables
        return np.concatenate((tables.joints, tables.rates, tables.fingers), -1).astype(np.float32)

    @property
    def environment(self) -> NDArray[np.float32]:
        """[N, arms, numbers]: `environment_names`, in each arm's own view."""
        whole = self._fixed.copy()
        stride = 3 + len(COLOURS) + len(SHAPES)
        for arm in range(self.tables.arms):
            things = self.tables.things if arm == 0 else turn(self.tables.things)
            for index in range(self.tables.num_things):
                whole[:, arm, stride * index : stride * index + 2] = things[:, index]
        return whole

    def step(self, targets: Array, rows: Sequence[int] | NDArray[np.intp] | None = None) -> None:
        """Move by one step of control; see `Tables.step`. Arms that have ended are measured no more."""
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        trace = self.tables.step(targets, chosen)
        live = ~self._ended[chosen]
        self._steps[chosen] += live
        self._measure(chosen, trace, live)
        self._judge(chosen, live)

    def fail(self, rows: Sequence[int], reason: str) -> None:
        """End the episodes of tables that can no longer be stepped, without success for arms still at it."""
        for row in rows:
            self._failures |= {(row, arm): reason for arm in np.flatnonzero(~self._ended[row]).tolist()}
            self._ended[row] = True

    def outcomes(self, row: int) -> tuple[Outcome, ...]:
        """How it went for each arm of a table."""
        return tuple(
            Outcome(
                success=bool(self._success[row, arm]),
                done=bool(self._ended[row, arm]),
                chosen=int(self._chosen[row, arm]) if self._chosen[row, arm] >= 0 else None,
                energy=float(self._energy[row, arm]),
                clearance=float(self._clearance[row, arm]),
                collisions=int(self._collisions[row, arm]),
                time=seconds(int(self._steps[row, arm])),
                path=float(self._path[row, arm]),
                failure=self._failures.get((row, arm)),
            )
            for arm in range(self.tables.arms)
        )

    def _views(self, things: Array) -> Array:
        """Positions [..., things, 2] in every arm's view: [..., arms, things, 2]."""
        if self.tables.arms == 1:
            return things[..., None, :, :]
        return np.stack([things, turn(things)], axis=-3)

    def _gaps(self, rows: NDArray[np.intp], fingers: Array, things: Array) -> Array:
        """Distances [rows, substeps, arms] from the obstacle, of finger and pushed thing."""
        obstacles = self._obstacles[rows][:, None]
        gaps = _length(fingers - obstacles) - OBSTACLE_RADIUS - FINGER_RADIUS
        views = self._views(things)
        which, at = self._which[rows], np.arange(len(rows))[:, None]
        pushed = views.swapaxes(1, 2)[at, np.arange(which.shape[1]), :, which].swapaxes(1, 2)
        radii = self._radii[rows][at, which][:, None]
        other = _length(pushed - obstacles) - OBSTACLE_RADIUS - radii
        return np.where(self._reaches[rows][:, None], gaps, np.minimum(gaps, other))

    def _measure(self, rows: NDArray[np.intp], trace: Trace, live: NDArray[np.bool_]) -> None:
        self._energy[rows] += np.where(live, trace.work, 0)
        whole = np.concatenate((self._last[rows][:, None], trace.fingers), axis=1)
        steps = whole[:, 1:] - whole[:, :-1]
        self._path[rows] += np.where(live, _length(steps).sum(1), 0)
        self._last[rows] = trace.fingers[:, -1]
        gaps = self._gaps(rows, trace.fingers, trace.things)
        least = np.minimum(self._clearance[rows], gaps.min(1))
        self._clearance[rows] = np.where(live, least, self._clearance[rows])
        touching = np.concatenate((self._touching[rows][:, None], gaps < 0), axis=1)
        came = (touching[:, 1:] & ~touching[:, :-1]).sum(1)
        self._collisions[rows] += np.where(live, came, 0)
        self._touching[rows] = touching[:, -1]

    def _judge(self, rows: NDArray[np.intp], live: NDArray[np.bool_]) -> None:
        things = self._views(self.tables.things[rows])  # [rows, arms, things, 2]
        fingers = self.tables.fingers[rows]
        still = _length(self.tables.velocities[rows]) < _STILL
        near = _length(things - fingers[:, :, None]) - self._radii[rows][:, None]
        resting = (near - FINGER_RADIUS < REACH_GAP) & still[..., None]
        self._held[rows] = np.where(resting, self._held[rows] + 1, 0)
        reached = self._held[rows] >= HOLD
        away = _length(things - self._places[rows][:, :, None])
        mine = away[np.arange(len(rows))[:, None], np.arange(away.shape[1]), self._which[rows]]
        self._arrived[rows] = np.where(mine < PUSH_GAP, self._arrived[rows] + 1, 0)
        moved = _length(self.tables.things[rows] - self._begin[rows])
        farthest = np.where(moved.max(1) > 0.03, moved.argmax(1), -1)[:, None]
        reaches = self._reaches[rows]
        chosen = np.where(reaches, np.where(reached.any(-1), reached.argmax(-1), -1), farthest)
        success = np.where(reaches, chosen == self._which[rows], self._arrived[rows] >= HOLD)
        ended = success | (reaches & (chosen >= 0)) | (self._steps[rows] >= MAX_STEPS)
        self._chosen[rows] = np.where(live, chosen, self._chosen[rows])
        self._success[rows] |= live & success
        self._ended[rows] |= ended


def _length(vectors: Array) -> Array:
    """Lengths of vectors [..., 2]."""
    return np.hypot(vectors[..., 0], vectors[..., 1])


def _description(scene: Scene) -> NDArray[np.float32]:
    numbers: list[float] = []
    for thing in scene.things:
        numbers += [thing.x, thing.y, SIZES[thing.size]]
        numbers += [float(thing.colour == name) for name in COLOURS]
        numbers += [float(thing.shape == name) for name in SHAPES]
    return np.array([*numbers, *scene.obstacle, *scene.goal], np.float32)
