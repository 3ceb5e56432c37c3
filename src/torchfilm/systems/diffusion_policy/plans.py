"""Round what things and fingers of demonstrations went: what there is to learn about ways."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from torchfilm.data.table.demonstrations import Demonstrations
from torchfilm.data.table.route import Circle, Path, ahead, next_corner
from torchfilm.data.table.scenes import OBSTACLE_RADIUS, Point, distance
from torchfilm.data.table.tasks import approach_path, finger_path, is_behind, thing_path
from torchfilm.data.table.trials import positions_of

_AHEAD = 0.04  # metres that a thing is pushed ahead along its path, as the expert does
_THERE = 0.01  # metres: nearer to the end of its path than this, a thing has no way left


class Plans:
    """Round what thing and finger of a demonstration go next; the thing by the path of its beginning.

    What was asked once is remembered: a search for a path takes as long as the rest of a step.
    """

    def __init__(self, demonstrations: Demonstrations) -> None:
        self._demonstrations = demonstrations
        self._paths: dict[int, Path] = {}
        self._known: dict[int, tuple[int, int]] = {}

    def __call__(self, episodes: NDArray[np.int64], frames: NDArray[np.int64]) -> NDArray[np.int64]:
        """Of `ways_round` the index of thing's and finger's way [batch, 2]; -1 where there is none left."""
        for episode, frame in zip(episodes.tolist(), frames.tolist(), strict=True):
            if frame not in self._known:
                self._known[frame] = self._turns(episode, frame)
        return np.array([self._known[frame] for frame in frames.tolist()])

    def _turns(self, episode: int, frame: int) -> tuple[int, int]:
        scene, task = (one := self._demonstrations.episodes[episode]).scene, one.tasks[0]
        x, y = self._demonstrations.state[frame, 4:6].tolist()
        table = self._demonstrations.environment[frame]
        things: list[Point] = [(x, y) for x, y in positions_of(table, len(scene.things)).tolist()]
        circles = {i: (at, scene.things[i].radius) for i, at in enumerate(things)}
        if task.avoids:
            circles[len(things)] = (scene.obstacle, OBSTACLE_RADIUS)
        others = {i: circle for i, circle in circles.items() if i != task.which}

        def turn(path: Path, at: Point, circles: Mapping[int, Circle]) -> int:
            return turn_of(path, at, circles, len(things) + 1)

        if task.what == "reach":
            return -1, turn(finger_path(scene, things, task, (x, y)), (x, y), others)
        if episode not in self._paths:
            self._paths[episode] = thing_path(scene, [(t.x, t.y) for t in scene.things], task)
        way, thing = self._paths[episode], things[task.which]
        aim, left = ahead(way, thing, _AHEAD)
        if left < _THERE:
            return -1, -1
        if is_behind(scene, things, task, (x, y), aim):
            return turn(way, thing, others), 0
        approach = approach_path(scene, things, task, (x, y), aim)
        return turn(way, thing, others), turn(approach, (x, y), circles)


def turn_of(path: Path, at: Point, circles: Mapping[int, Circle], count: int) -> int:
    """Which of `ways_round` a path takes from the point nearest to `at`; 0 is straight to its end.

    circles: those it may go round, by their index among all `count`.
    """
    corner = next_corner(path, at)
    if corner == path[-1]:
        return 0
    index = min(circles, key=lambda i: distance(corner, circles[i][0]) - circles[i][1])
    (cx, cy), (x, y) = circles[index][0], at
    left = (cx - x) * (corner[1] - y) > (cy - y) * (corner[0] - x)
    return 1 + index + (0 if left else count)
