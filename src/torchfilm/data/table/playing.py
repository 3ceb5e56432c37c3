"""Play episodes to their end: many at once, with an expert or with any policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from .experts import Expert
from .scenes import Scene
from .simulator import Array, DeadSimulatorError, turn
from .tasks import Task
from .trials import Outcome, Trials


@runtime_checkable
class Actor(Protocol):
    """Whatever answers where the fingers should go."""

    def __call__(self, trials: Trials, rows: NDArray[np.intp]) -> Array:
        """Targets [rows, arms, 2] in metres for these rows, each arm in its own view."""
        ...


@dataclass(frozen=True)
class Step:
    """What was seen and answered in one step, for the rows that were running.

    Attributes:
        rows: [R] indices of the episodes.
        state, environment: [R, arms, ...] as in `Trials`.
        targets: [R, arms, 2] metres.
    """

    rows: NDArray[np.intp]
    state: NDArray[np.float32]
    environment: NDArray[np.float32]
    targets: Array


class Experts:
    """The scripted experts of all rows and arms of `trials`, as an actor."""

    def __init__(self, trials: Trials) -> None:
        self._experts = [
            [Expert(scene.seen_by(arm), task) for arm, task in enumerate(tasks)]
            for scene, tasks in zip(trials.scenes, trials.tasks, strict=True)
        ]

    def __call__(self, trials: Trials, rows: NDArray[np.intp]) -> Array:
        """Targets [rows, arms, 2] in metres."""
        fingers = trials.tables.fingers[rows].tolist()
        things = trials.tables.things[rows]
        views = [things.tolist(), turn(things).tolist()]
        answers = [
            [
                expert(tuple(fingers[i][arm]), [tuple(spot) for spot in views[arm][i]])  # type: ignore[arg-type]
                for arm, expert in enumerate(self._experts[row])
            ]
            for i, row in enumerate(rows.tolist())
        ]
        return np.array(answers)


def play(
    scenes: Sequence[Scene],
    tasks: Sequence[Sequence[Task]],
    actor: Actor | None = None,
    watch: Callable[[Step], None] | None = None,
) -> list[tuple[Outcome, ...]]:
    """Play one episode for each scene, all together, until each has ended.

    Args:
        scenes, tasks: as for `Trials`.
        actor: who answers; default: the experts.
        watch: called in each step with what was seen and answered.

    Returns:
        For each scene the outcome of each arm. A table whose simulator fails has failed, with the reason in
        its outcome; the others go on.

    Raises:
        ValueError: as `Tables.step`.

    Example:
        outcomes = play(scenes, [[Task(0, how="avoid")] for _ in scenes])
    """
    trials = Trials(scenes, tasks)
    answer = Experts(trials) if actor is None else actor
    while len(rows := trials.running):
        targets = answer(trials, rows)
        if watch is not None:
            watch(Step(rows, trials.state[rows], trials.environment[rows], targets))
        _step(trials, targets, rows)
    return [trials.outcomes(row) for row in range(len(trials))]


def _step(trials: Trials, targets: Array, rows: NDArray[np.intp]) -> None:
    """Step the rows that can be stepped; the episodes of the others end."""
    while len(rows):
        try:
            trials.step(targets, rows)
        except DeadSimulatorError as error:
            trials.fail(error.rows, str(error))
            alive = ~np.isin(rows, error.rows)
            targets, rows = targets[alive], rows[alive]
        else:
            return
