"""Many tables stepped at once: joint servos follow finger positions, MuJoCo does the rest."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .kinematics import finger_of, joints_of, velocity_of
from .model import SUBSTEPS, TIMESTEP, compiled, require_mujoco
from .scenes import DEPTH, X_RANGE, Y_RANGE, Scene

Array = NDArray[np.float64]


_LOW, _HIGH = np.array((X_RANGE[0], Y_RANGE[0])), np.array((X_RANGE[1], Y_RANGE[1]))
_SANE = 1e6  # no position, angle or rate of a living table is near it


class DeadSimulatorError(RuntimeError):
    """Tables that can no longer be stepped.

    Attributes:
        rows: which.
    """

    def __init__(self, message: str, rows: tuple[int, ...]) -> None:
        super().__init__(message)
        self.rows = rows


@dataclass(frozen=True)
class Trace:
    """What happened in one step of control of some rows.

    Attributes:
        fingers: [rows, substeps, arms, 2] metres, each arm in its own view.
        things: [rows, substeps, things, 2] metres, in the first arm's view.
        work: [rows, arms] joules that the motors did or took up, Σ |τ·q̇| dt over joints and substeps.
    """

    fingers: Array
    things: Array
    work: Array


class Tables:
    """The physics of N tables with the same number of arms and things.

    Rows do not know of one another: the same scene and targets give the same bits in any row of any batch.

    Attributes:
        joints, rates: [N, arms, 2] radians, rad/s.
        things: [N, things, 2] metres, in the first arm's view.

    Example:
        tables = Tables([sample_scene(rng) for _ in range(64)])
        trace = tables.step(tables.fingers + 0.01)
    """

    def __init__(self, scenes: Sequence[Scene]) -> None:
        if not scenes:
            raise ValueError("scenes: expected at least one, got none")
        self.arms, self.num_things = len(scenes[0].starts), len(scenes[0].things)
        self._mujoco = require_mujoco()
        self._models: list[Any] = [None] * len(scenes)
        width = 2 * (self.arms + self.num_things)
        self._state = np.zeros((len(scenes), 1 + 2 * width))
        self._width = width
        for row, scene in enumerate(scenes):
            self.put(row, scene)
        self._data = self._mujoco.MjData(self._models[0])

    def __len__(self) -> int:
        return len(self._models)

    def put(self, row: int, scene: Scene) -> None:
        """Set up a scene in a row, at rest, at time zero. Raises ValueError if its numbers do not fit."""
        if (len(scene.starts), len(scene.things)) != (self.arms, self.num_things):
            raise ValueError(
                f"row {row}: expected {self.arms} arms and {self.num_things} things like the others, "
                f"got {len(scene.starts)} and {len(scene.things)}; make other Tables for it"
            )
        self._models[row] = compiled(tuple(thing.radius for thing in scene.things), self.arms)
        self._state[row] = 0
        positions = self._state[row, 1 : 1 + self._width]
        positions[: 2 * self.arms] = joints_of(np.array(scene.starts)).ravel()
        positions[2 * self.arms :] = [c for thing in scene.things for c in (thing.x, thing.y)]

    @property
    def joints(self) -> Array:
        """[N, arms, 2] radians."""
        return self._state[:, 1 : 1 + 2 * self.arms].reshape(-1, self.arms, 2)

    @property
    def rates(self) -> Array:
        """[N, arms, 2] radians a second."""
        start = 1 + self._width
        return self._state[:, start : start + 2 * self.arms].reshape(-1, self.arms, 2)

    @property
    def things(self) -> Array:
        """[N, things, 2] metres, in the first arm's view."""
        return self._state[:, 1 + 2 * self.arms : 1 + self._width].reshape(-1, self.num_things, 2)

    @property
    def fingers(self) -> Array:
        """[N, arms, 2] metres, each arm in its own view."""
        return finger_of(self.joints)

    @property
    def velocities(self) -> Array:
        """[N, arms, 2] metres a second, of the fingers, each in its arm's own view."""
        return velocity_of(self.joints, self.rates)

    def step(self, targets: Array, rows: Sequence[int] | NDArray[np.intp] | None = None) -> Trace:
        """Move for one step of control (0.05 s) towards finger positions.

        Args:
            targets: [rows, arms, 2] metres, each arm in its own view; positions beyond the table's
                `X_RANGE` and `Y_RANGE` mean its edge.
            rows: which tables to step; default: all.

        Raises:
            ValueError: for targets of another shape, or that are not finite; nothing has moved.
            DeadSimulatorError: if the physics no longer gives numbers; the rows stay as they were.
        """
        chosen = np.arange(len(self)) if rows is None else np.asarray(rows)
        goals = self._checked(targets, chosen)
        before = self._state[chosen]
        states, torques = self._rolled([self._models[row] for row in chosen.tolist()], before, goals)
        bad = ~(np.abs(states) < _SANE).all((1, 2))
        if bad.any():
            dead = tuple(chosen[bad].tolist())
            at, wanted = before[bad][0][0], np.round(goals[bad][0], 3).tolist()
            raise DeadSimulatorError(
                f"table {dead[0]}: the simulator gave positions that are not finite, or too large; at "
                f"{at:.2f} s, targets {wanted}. Reset this table.",
                dead,
            )
        self._state[chosen] = states[:, -1]
        return self._trace(before, states, torques)

    def _rolled(self, models: list[Any], before: Array, goals: Array) -> tuple[Array, Array]:
        """States and torques [rows, substeps, ...] after and in each step of the physics."""
        held = joints_of(np.minimum(np.maximum(goals, _LOW), _HIGH)).reshape(len(models), 1, -1)
        control = np.repeat(held, SUBSTEPS, axis=1)
        states = np.empty((len(models), SUBSTEPS, before.shape[1]))
        torques = np.empty((len(models), SUBSTEPS, 2 * self.arms))
        with _quiet(self._mujoco):
            self._mujoco.rollout.rollout(
                models,
                [self._data],
                before,
                control,
                skip_checks=True,
                nstep=SUBSTEPS,
                state=states,
                sensordata=torques,
            )
        return states, torques

    def _trace(self, before: Array, states: Array, torques: Array) -> Trace:
        """What the substeps hold: a torque acts on the way from one state to the next."""
        rows, arms = len(states), self.arms
        angles = states[:, :, 1 : 1 + 2 * arms]
        earlier = np.concatenate((before[:, None, 1 : 1 + 2 * arms], angles[:, :-1]), axis=1)
        work = np.abs(torques * (angles - earlier)).reshape(rows, SUBSTEPS, arms, 2).sum((1, 3))
        things = states[:, :, 1 + 2 * arms : 1 + self._width].reshape(rows, SUBSTEPS, self.num_things, 2)
        return Trace(finger_of(angles.reshape(rows, SUBSTEPS, arms, 2)), things, work)

    def _checked(self, targets: Array, rows: NDArray[np.intp]) -> Array:
        goals = np.asarray(targets, dtype=np.float64)
        if goals.shape != (len(rows), self.arms, 2):
            raise ValueError(
                f"targets: expected [rows, arms, 2] = {[len(rows), self.arms, 2]}, got {list(goals.shape)}"
            )
        bad = np.argwhere(~np.isfinite(goals))
        if len(bad):
            row, arm, axis = bad[0]
            raise ValueError(
                f"targets: expected finite positions in metres, got {goals[row, arm, axis]} for table "
                f"{rows[row]}, arm {arm}, {'xy'[axis]}; nothing was moved. Look for NaN in the observations "
                "and in the policy's weights."
            )
        return goals


@contextmanager
def _quiet(mujoco: Any) -> Iterator[None]:
    """Keep MuJoCo's warnings out of a log file in the working folder; what they warn of raises here."""
    before = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(lambda text: None)
    try:
        yield
    finally:
        mujoco.set_mju_user_warning(before)


def turn(positions: Array) -> Array:
    """Positions [..., 2] in the other arm's view."""
    return np.array((0.0, DEPTH)) - positions


def seconds(steps: int) -> float:
    """Duration of steps of control."""
    return steps * SUBSTEPS * TIMESTEP
