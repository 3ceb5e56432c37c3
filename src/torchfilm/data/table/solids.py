"""What can be seen of a table, as simple solids: the same list for the renderer and for the drawn view."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from numpy.typing import NDArray

from .kinematics import LINK
from .scenes import COLOURS, DEPTH, FINGER_RADIUS, GOAL_RADIUS, OBSTACLE_RADIUS, PLACES, Point, Scene, turned

SPAN = 1.0
"""Width and depth of the square that pictures show, in metres; its middle is the middle of the table."""

MIDDLE: Point = (0.0, DEPTH / 2)
TABLE = (0.80, 0.78, 0.74)
"""The colour of the table."""

Kind = Literal["cylinder", "sphere", "box", "capsule"]


@dataclass(frozen=True)
class Solid:
    """One solid that stands on the table or hangs above it; metres.

    Attributes:
        kind: "cylinder", "sphere", "box" (all upright) or "capsule" (lying, from `at` to `end`).
        at: centre, or first end, seen from above.
        radius: half the width.
        low, high: the heights between which it is.
        colour: red, green, blue, opacity in [0, 1].
        end: second end of a capsule.
    """

    kind: Kind
    at: Point
    radius: float
    low: float
    high: float
    colour: tuple[float, float, float, float]
    end: Point = (0.0, 0.0)


def solids(scene: Scene, joints: NDArray, things: NDArray) -> list[Solid]:
    """Everything to be seen, from the table upwards.

    Args:
        scene: in the first arm's view.
        joints: [arms, 2] radians.
        things: [things, 2] present positions in metres, in the first arm's view.
    """
    seen = [_flat(place, GOAL_RADIUS, 0.002, (0.70, 0.68, 0.64, 1.0)) for place in PLACES.values()]
    seen += [
        _flat(scene.goal, GOAL_RADIUS, 0.003, (1.0, 1.0, 1.0, 1.0)),
        _flat(scene.goal, 0.7 * GOAL_RADIUS, 0.004, (*TABLE, 1.0)),
        Solid("cylinder", scene.obstacle, OBSTACLE_RADIUS, 0.0, 0.05, (0.12, 0.12, 0.14, 1.0)),
    ]
    for thing, spot in zip(scene.things, things.tolist(), strict=True):
        at, colour = (spot[0], spot[1]), COLOURS[thing.colour]
        dark = tuple(0.45 * channel for channel in colour)
        seen.append(_flat(at, thing.radius, 0.012, (*dark, 1.0)))  # type: ignore[arg-type]
        kind: Kind = {"cube": "box", "ball": "sphere", "can": "cylinder"}[thing.shape]  # type: ignore[assignment]
        half = (0.62 if kind == "box" else 0.78) * thing.radius
        top = 0.012 + 2 * half
        seen.append(Solid(kind, at, half, 0.012, top, (*colour, 1.0)))
        if thing.shape == "can":
            seen.append(Solid("cylinder", at, 0.5 * half, top, top + 0.002, (*dark, 1.0)))  # type: ignore[arg-type]
    for arm, (first, second) in enumerate(joints.tolist()):
        seen += _arm(arm, first, second)
    return seen


def _flat(at: Point, radius: float, high: float, colour: tuple[float, float, float, float]) -> Solid:
    return Solid("cylinder", at, radius, 0.0, high, colour)


def _arm(arm: int, first: float, second: float) -> list[Solid]:
    base: Point = (0.0, 0.0)
    elbow = LINK * math.cos(first), LINK * math.sin(first)
    finger = elbow[0] + LINK * math.cos(first + second), elbow[1] + LINK * math.sin(first + second)
    if arm == 1:
        base, elbow, finger = turned(base), turned(elbow), turned(finger)
    height = 0.10 + 0.04 * arm
    grey = (0.35, 0.40, 0.45, 0.45)
    return [
        Solid("capsule", base, 0.014, height - 0.014, height + 0.014, grey, elbow),
        Solid("capsule", elbow, 0.011, height - 0.011, height + 0.011, grey, finger),
        Solid("cylinder", finger, FINGER_RADIUS, 0.0, height + 0.02, (0.98, 0.98, 0.98, 1.0)),
    ]
