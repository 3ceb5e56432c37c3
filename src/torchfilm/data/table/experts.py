"""Scripted experts: they see everything, know the task, and say where the finger should go next.

An expert holds no clock: its answer follows from where finger and things are, so that it can take over from
any state. The finger is drawn along its path by a target a fixed stretch ahead, which the servos follow with
a lag of `LAG` seconds: a short stretch is a slow finger, and slow saves energy, since friction in the joints
is viscous (its energy goes with the speed) and so is that under the things.
"""

from __future__ import annotations

import math

from .model import LAG
from .route import Path, ahead
from .scenes import FINGER_RADIUS, Point, Scene, distance
from .tasks import BEHIND, Task, approach_path, behind, finger_path, thing_path

SPEEDS = {"reach": (0.60, 0.22), "push": (0.32, 0.14)}
"""Metres a second: plainly, and saving energy; to reach also before a push."""

_GAP = 0.004  # at which a reaching finger stops before the thing
_CONE = math.cos(math.radians(40))  # a push more oblique than this begins anew: friction would give way
_DONE = 0.008  # a thing this near to its place is not pushed any more


class Expert:
    """Does one task in one scene with one arm.

    Args:
        scene: in the arm's own view (`Scene.seen_by`).
        task: what to do.

    Example:
        expert = Expert(scene, Task(which=1, what="push", place="goal", how="avoid"))
        target = expert(finger, things)
    """

    def __init__(self, scene: Scene, task: Task) -> None:
        self._scene, self._task = scene, task
        self._radius = scene.things[task.which].radius + FINGER_RADIUS  # of the finger's centre in touch
        self._path: Path | None = None  # of the finger to the thing, or to behind it
        self._way: Path | None = None  # of the thing
        self._pushing = False

    def __call__(self, finger: Point, things: list[Point]) -> Point:
        """Where to send the finger, for positions of finger and things in the arm's own view, in metres."""
        if self._task.what == "reach":
            return self._reach(finger, things)
        return self._push(finger, things)

    def _stretch(self, what: str) -> float:
        return SPEEDS[what][self._task.saves] * LAG

    def _reach(self, finger: Point, things: list[Point]) -> Point:
        thing = things[self._task.which]
        if self._path is None or distance(self._path[-1], thing) > 0.01:
            self._path = finger_path(self._scene, things, self._task, finger)
        _, left = ahead(self._path, finger, 0.0)
        step = min(self._stretch("reach"), left - self._radius - _GAP)
        if step < 0:
            return _towards(thing, finger, self._radius + _GAP)
        return ahead(self._path, finger, step)[0]

    def _push(self, finger: Point, things: list[Point]) -> Point:
        thing = things[self._task.which]
        if self._way is None:
            self._way = thing_path(self._scene, things, self._task)
        aim, left = ahead(self._way, thing, 0.04)
        if left < _DONE and distance(aim, thing) < _DONE:
            return _towards(thing, finger, max(self._radius + _GAP, distance(thing, finger)))
        along = _unit(thing, aim)
        facing = _unit(finger, thing)
        straight = along[0] * facing[0] + along[1] * facing[1]
        apart = distance(finger, thing) - self._radius
        if self._pushing and (straight < _CONE or apart > 0.03):
            self._pushing, self._path = False, None
        if not self._pushing and straight > 0.97 and apart < BEHIND + 0.012:
            self._pushing = True
        if not self._pushing:
            return self._approach(finger, things, aim)
        step = min(self._stretch("push"), left + 0.01)
        gap = max(0.0, apart)
        return finger[0] + (step + gap) * along[0], finger[1] + (step + gap) * along[1]

    def _approach(self, finger: Point, things: list[Point], aim: Point) -> Point:
        """Around the thing, to behind it; planned anew where the thing has come to be pushed elsewhere."""
        spot = behind(self._scene, things, self._task, aim)
        if self._path is None or distance(self._path[-1], spot) > 0.003:
            self._path = approach_path(self._scene, things, self._task, finger, aim)
        return ahead(self._path, finger, self._stretch("reach"))[0]


def _unit(a: Point, b: Point) -> Point:
    length = distance(a, b) or 1.0
    return (b[0] - a[0]) / length, (b[1] - a[1]) / length


def _towards(centre: Point, point: Point, radius: float) -> Point:
    """The point at `radius` from the centre in the direction of `point`."""
    x, y = _unit(centre, point)
    return centre[0] + radius * x, centre[1] + radius * y
