"""What stands on the table: things, a goal, an obstacle, and where each arm's finger starts.

The table is seen from above: x to the right, y away from the first arm, whose base is the origin; metres.
A second arm sits at the opposite edge and sees the same table after half a turn: `turned` goes from one view
to the other. Every position that an arm is told or shown is in its own view, so that one policy can drive
either arm.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

Point = tuple[float, float]

COLOURS = {
    "red": (0.86, 0.16, 0.16),
    "green": (0.16, 0.65, 0.25),
    "blue": (0.15, 0.35, 0.85),
    "yellow": (0.95, 0.80, 0.15),
    "purple": (0.58, 0.25, 0.70),
    "orange": (0.95, 0.50, 0.10),
}
"""Name -> red, green, blue in [0, 1]."""

SHAPES = ("cube", "ball", "can")
SIZES = {"small": 0.027, "large": 0.040}
"""Name -> radius of the round foot on which a thing slides, in metres."""

PLACES: dict[str, Point] = {"left": (-0.36, 0.40), "right": (0.36, 0.40), "far": (0.0, 0.62)}
"""Where things can be pushed, beside the goal; in the view of the arm that is told."""

X_RANGE, Y_RANGE = (-0.45, 0.45), (0.12, 0.70)  # what a finger can be sent to, in its arm's own view
DEPTH = 0.80  # between the bases of two arms
OBSTACLE_RADIUS = 0.05
GOAL_RADIUS = 0.06
FINGER_RADIUS = 0.012
_ASIDE = (0.020, 0.045)  # metres from the line that the obstacle blocks to its centre
_ROOM = 2 * FINGER_RADIUS + 0.03  # a finger passes between any two things
_ATTEMPTS = 2000


@dataclass(frozen=True)
class Thing:
    """One thing: names of `COLOURS`, `SHAPES` and `SIZES`, and the centre of its foot in metres."""

    colour: str
    shape: str
    size: str
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Radius of the foot in metres."""
        return SIZES[self.size]


@dataclass(frozen=True)
class Scene:
    """A table at the beginning of an episode, in the first arm's view; one start for each arm, in its own."""

    things: tuple[Thing, ...]
    goal: Point
    obstacle: Point
    starts: tuple[Point, ...]

    def to_dict(self) -> dict[str, Any]:
        """The scene as JSON can hold it; `Scene.from_dict` gives the scene back, to the bit."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Scene:
        """The scene that `to_dict` wrote. Raises ValueError for anything else."""
        try:
            things = tuple(Thing(**thing) for thing in data["things"])
            goal, obstacle = (tuple(map(float, data[name])) for name in ("goal", "obstacle"))
            starts = tuple((float(x), float(y)) for x, y in data["starts"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"scene: expected things, goal, obstacle and starts as Scene.to_dict writes them, got "
                f"{str(data)[:80]!r} ({error})"
            ) from error
        return cls(things, goal, obstacle, starts)  # type: ignore[arg-type]

    def seen_by(self, arm: int) -> Scene:
        """The same table in the view of an arm; the first is 0."""
        if arm == 0:
            return self
        things = (Thing(t.colour, t.shape, t.size, *turned((t.x, t.y))) for t in self.things)
        return Scene(tuple(things), turned(self.goal), turned(self.obstacle), self.starts)


def turned(point: Point) -> Point:
    """A position in the other arm's view: half a turn about the middle of the table."""
    return -point[0], DEPTH - point[1]


def place_of(scene: Scene, place: str) -> Point:
    """Centre of a place, "goal" or a name of `PLACES`, in metres."""
    if place == "goal":
        return scene.goal
    if place not in PLACES:
        raise ValueError(f"place: expected goal, {', '.join(PLACES)}, got {place!r}")
    return PLACES[place]


def sample_scene(
    rng: np.random.Generator, num_things: int = 3, arms: int = 1, in_the_way: float = 0.9
) -> Scene:
    """Draw a scene in which every thing can be told apart and reached, with or without a detour.

    With the chance `in_the_way`, the obstacle blocks the straight line from the first arm's finger to one of
    the things, drawn evenly, so that its place does not tell which thing an instruction is about; otherwise
    it stands anywhere. It blocks a line from one side or the other and never from its middle, where both ways
    around are equally long and a millimetre would decide. No two things share colour, shape and size.

    Args:
        rng: the source of everything drawn.
        num_things: 1 to 4.
        arms: 1 or 2.
        in_the_way: in [0, 1].

    Raises:
        ValueError: for a number out of its range.

    Example:
        scene = sample_scene(np.random.default_rng(0))
    """
    check_counts(num_things, arms)
    if not 0 <= in_the_way <= 1:
        raise ValueError(f"in_the_way: expected a chance in [0, 1], got {in_the_way}")
    kinds = _kinds(rng, num_things)
    blocks = bool(rng.random() < in_the_way)
    for _ in range(_ATTEMPTS):
        starts = tuple((_uniform(rng, -0.15, 0.15), _uniform(rng, 0.13, 0.19)) for _ in range(arms))
        scene = _attempt(rng, kinds, starts, blocks=blocks)
        if scene is not None:
            return scene
    raise RuntimeError(f"no room for {num_things} things after {_ATTEMPTS} attempts")


def check_counts(num_things: int, arms: int) -> None:
    """Raise ValueError unless a table can have so many things and arms."""
    for name, value, least, most in (("num_things", num_things, 1, 4), ("arms", arms, 1, 2)):
        if not least <= value <= most:
            raise ValueError(f"{name}: expected {least} to {most}, got {value}")


def distance(a: Point, b: Point) -> float:
    """Distance of two points in metres."""
    return math.hypot(a[0] - b[0], a[1] - b[1])


def _uniform(rng: np.random.Generator, low: float, high: float) -> float:
    return round(low + (high - low) * rng.random(), 4)


def _kinds(rng: np.random.Generator, count: int) -> list[tuple[str, str, str]]:
    """Colour, shape and size of each thing, no two alike."""
    kinds: list[tuple[str, str, str]] = []
    while len(kinds) < count:
        kind = tuple(names[rng.integers(len(names))] for names in (list(COLOURS), SHAPES, list(SIZES)))
        if kind not in kinds:
            kinds.append(kind)  # type: ignore[arg-type]
    return kinds


def _attempt(
    rng: np.random.Generator, kinds: list[tuple[str, str, str]], starts: tuple[Point, ...], *, blocks: bool
) -> Scene | None:
    """A scene, or None where no room was left for something."""
    low, high = (0.30, 0.54) if len(starts) == 1 else (0.32, 0.48)
    fingers = [starts[0], *map(turned, starts[1:])]
    spots: list[tuple[Point, float]] = []
    for _, _, size in kinds:
        radius = SIZES[size]
        taken = [(finger, 0.05) for finger in fingers] + [(at, r + _ROOM) for at, r in spots]
        spot = _room(rng, (-0.27, 0.27), (low, high), taken, radius)
        if spot is None:
            return None
        spots.append((spot, radius))
    taken = [(finger, FINGER_RADIUS + 0.02) for finger in fingers] + [(at, r + _ROOM) for at, r in spots]
    if blocks:
        (x, y), share = spots[rng.integers(len(spots))][0], _uniform(rng, 0.40, 0.65)
        start, side = starts[0], 1 if rng.random() < 0.5 else -1
        along = (x - start[0]) / distance(start, (x, y)), (y - start[1]) / distance(start, (x, y))
        aside = side * _uniform(rng, *_ASIDE)
        obstacle = (
            start[0] + share * (x - start[0]) - aside * along[1],
            start[1] + share * (y - start[1]) + aside * along[0],
        )
        if not _free(obstacle, taken, OBSTACLE_RADIUS):
            return None
    else:
        obstacle = _room(rng, (-0.22, 0.22), (0.28, 0.52), taken, OBSTACLE_RADIUS)
    if obstacle is None:
        return None
    taken = [(obstacle, OBSTACLE_RADIUS + SIZES["large"] + 0.05 - GOAL_RADIUS)]
    goal = _room(
        rng, (-0.27, 0.27), (0.28, 0.52), [*taken, *((at, r + 0.02) for at, r in spots)], GOAL_RADIUS
    )
    if goal is None:
        return None
    things = tuple(Thing(*kind, *spot) for kind, (spot, _) in zip(kinds, spots, strict=True))
    return Scene(things, goal, (round(obstacle[0], 4), round(obstacle[1], 4)), starts)


def _room(
    rng: np.random.Generator, x: Point, y: Point, taken: list[tuple[Point, float]], radius: float
) -> Point | None:
    """A place for something round in the ranges of x and y, or None where none was found."""
    for _ in range(30):
        spot = _uniform(rng, *x), _uniform(rng, *y)
        if _free(spot, taken, radius):
            return spot
    return None


def _free(spot: Point, taken: list[tuple[Point, float]], radius: float) -> bool:
    return all(distance(spot, at) >= radius + keep for at, keep in taken)
