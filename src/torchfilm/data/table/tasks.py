"""What an arm can be told: which thing, what to do with it, and how; and which path that means."""

from __future__ import annotations

import itertools
from dataclasses import asdict, dataclass
from typing import Any, Literal

from .route import Circle, Path, ahead, clearance_of, route
from .scenes import FINGER_RADIUS, OBSTACLE_RADIUS, PLACES, Point, Scene, distance, place_of

What = Literal["reach", "push"]
How = Literal["plain", "avoid", "save", "both"]
WHATS: tuple[What, ...] = ("reach", "push")
HOWS: tuple[How, ...] = ("plain", "avoid", "save", "both")
"""Plainly, avoiding the obstacle, saving energy, or both."""

REACH_GAP = 0.015
"""A finger has reached a thing when its surface is within this of the thing's, in metres."""

BEHIND = 0.022
"""Before a push, a finger goes behind a thing to this distance between their surfaces, in metres."""

PUSH_GAP = 0.030
"""A thing has been pushed to a place when its centre is within this of the place's, in metres."""


@dataclass(frozen=True)
class Task:
    """One instruction's meaning.

    Attributes:
        which: index of the thing in its scene.
        what: one of `WHATS`.
        how: one of `HOWS`.
        place: where to push to, "goal" or a name of `PLACES`; None for "reach".
    """

    which: int
    what: What = "reach"
    how: How = "plain"
    place: str | None = None

    def __post_init__(self) -> None:
        if self.what not in WHATS or self.how not in HOWS:
            raise ValueError(f"task: expected reach or push, and one of {', '.join(HOWS)}, got {self}")
        if (self.place is None) != (self.what == "reach") or self.place not in (None, "goal", *PLACES):
            raise ValueError(
                f"task: expected a place to push to (goal, {', '.join(PLACES)}), none to reach, got {self}"
            )

    @property
    def avoids(self) -> bool:
        """Whether the obstacle is to be left alone."""
        return self.how in ("avoid", "both")

    @property
    def saves(self) -> bool:
        """Whether energy is to be saved."""
        return self.how in ("save", "both")

    def to_dict(self) -> dict[str, Any]:
        """The task as JSON can hold it: `Task(**task.to_dict()) == task`."""
        return asdict(self)


def tasks_of(scene: Scene) -> list[Task]:
    """Every task that a scene admits: (1 + 4 places) for each thing, each in four manners."""
    deeds: list[tuple[What, str | None]] = [("reach", None), *(("push", p) for p in ("goal", *PLACES))]
    every = itertools.product(range(len(scene.things)), deeds, HOWS)
    return [Task(which, what, how, place) for which, (what, place), how in every]


def circles_of(scene: Scene, things: list[Point], task: Task, radius: float) -> list[Circle]:
    """What the centre of something round has to stay out of: the other things, and the obstacle if told.

    Args:
        scene: in the arm's own view, as are `things`, the present positions.
        radius: of what moves, metres.
    """
    circles = [
        (spot, thing.radius + radius + 0.018)
        for index, (thing, spot) in enumerate(zip(scene.things, things, strict=True))
        if index != task.which
    ]
    return [*circles, (scene.obstacle, OBSTACLE_RADIUS + radius + 0.03)] if task.avoids else circles


def finger_path(scene: Scene, things: list[Point], task: Task, finger: Point) -> Path:
    """The way of a finger that reaches the thing: to its centre, around what is to be avoided."""
    return route(finger, things[task.which], circles_of(scene, things, task, FINGER_RADIUS))


def thing_path(scene: Scene, things: list[Point], task: Task) -> Path:
    """The way of the thing that is pushed, from where it is to its place."""
    if task.place is None:
        raise ValueError(f"task: expected one that pushes, got {task}")
    circles = circles_of(scene, things, task, scene.things[task.which].radius)
    return route(things[task.which], place_of(scene, task.place), circles)


def behind(scene: Scene, things: list[Point], task: Task, aim: Point) -> Point:
    """Where a finger stands from where it can push the thing towards `aim`."""
    thing = things[task.which]
    share = (scene.things[task.which].radius + FINGER_RADIUS + BEHIND) / (distance(thing, aim) or 1.0)
    return thing[0] - share * (aim[0] - thing[0]), thing[1] - share * (aim[1] - thing[1])


def is_behind(scene: Scene, things: list[Point], task: Task, finger: Point, aim: Point) -> bool:
    """Whether a finger stands where it can push the thing towards `aim`, give or take 25 degrees."""
    thing = things[task.which]
    apart, away = distance(finger, thing), distance(thing, aim)
    facing = (thing[0] - finger[0]) * (aim[0] - thing[0]) + (thing[1] - finger[1]) * (aim[1] - thing[1])
    return facing > 0.9 * apart * away and apart < scene.things[task.which].radius + FINGER_RADIUS + 0.035


def approach_path(scene: Scene, things: list[Point], task: Task, finger: Point, aim: Point) -> Path:
    """The way of a finger around the thing to `behind` it."""
    touch = scene.things[task.which].radius + FINGER_RADIUS
    circles = [*circles_of(scene, things, task, FINGER_RADIUS), (things[task.which], touch + 0.012)]
    return route(finger, behind(scene, things, task, aim), circles)


def in_the_way(scene: Scene, task: Task, arm: int = 0) -> bool:
    """Whether the obstacle stands in the way of the task done plainly.

    True where the plain path of the finger, or of the pushed thing, cuts the obstacle by at least a
    centimetre. An expert that is told nothing of the obstacle then touches it.
    """
    view, start = scene.seen_by(arm), scene.starts[arm]
    things = [(thing.x, thing.y) for thing in view.things]
    plain = Task(task.which, task.what, "plain", task.place)
    finger = (view.obstacle, OBSTACLE_RADIUS + FINGER_RADIUS - 0.01)
    if task.what == "reach":
        return clearance_of(finger_path(view, things, plain, start), finger) < 0
    way = thing_path(view, things, plain)
    pushed = (view.obstacle, OBSTACLE_RADIUS + view.things[task.which].radius - 0.01)
    approach = approach_path(view, things, plain, start, ahead(way, way[0], 0.04)[0])
    return clearance_of(approach, finger) < 0 or clearance_of(way, pushed) < 0
