"""Short ways around circles: a visibility graph over points on the circles, and Dijkstra's algorithm."""

from __future__ import annotations

import heapq
import itertools
import math

import numpy as np

from .scenes import X_RANGE, Y_RANGE, Point, distance

Circle = tuple[Point, float]
"""Centre and radius in metres."""

Path = list[Point]
"""Two or more corners, from the start to the end."""

_CORNERS = (
    12  # of the polygon around a circle: its edges stay outside if its corners are at radius / cos(π / 12)
)
_SWELL = 1.001 / math.cos(math.pi / _CORNERS)


def route(start: Point, end: Point, circles: list[Circle]) -> Path:
    """A short path from `start` to `end` that stays out of all `circles`, or as far out as can be.

    A circle that holds the start or the end is shrunk until it does not; where nothing is left between the
    circles, they all are.
    """
    if clear(start, end, shrunk := _shrunk(start, end, circles)):
        return [start, end]
    for share in (1.0, 0.85, 0.7, 0.5):
        path = _search(start, end, [(centre, share * radius) for centre, radius in shrunk])
        if path is not None:
            return path
    return [start, end]


def clear(start: Point, end: Point, circles: list[Circle]) -> bool:
    """Whether the straight line stays out of all circles."""
    return all(_distance_to(centre, start, end) >= radius for centre, radius in circles)


def clearance_of(path: Path, circle: Circle) -> float:
    """Least distance in metres of a path from a circle; negative where it enters."""
    centre, radius = circle
    return min(_distance_to(centre, a, b) for a, b in itertools.pairwise(path)) - radius


def length_of(path: Path) -> float:
    """Length in metres."""
    return sum(distance(a, b) for a, b in itertools.pairwise(path))


def ahead(path: Path, at: Point, reach: float) -> tuple[Point, float]:
    """The point of `path` that is `reach` metres along it from the point nearest to `at`; and what is left.

    Returns that point, and the length in metres from the nearest point to the end.
    """
    where, share = _nearest(path, at)
    point, left = None, 0.0
    for a, b in zip(path[where:], path[where + 1 :], strict=False):
        length = distance(a, b)
        begin = share * length
        if point is None and left + length - begin >= reach:
            t = (begin + reach - left) / length if length > 0 else 1.0
            point = (a[0] + t * (b[0] - a[0]), a[1] + t * (b[1] - a[1]))
        left += length - begin
        share = 0.0
    return point or path[-1], left


def next_corner(path: Path, at: Point) -> Point:
    """The corner of `path`, or its end, that comes after the point nearest to `at`."""
    where, share = _nearest(path, at)
    return path[min(where + 1 + (share == 1.0), len(path) - 1)]


def _nearest(path: Path, at: Point) -> tuple[int, float]:
    """The stretch of a path on which its point nearest to `at` lies, and at which share of that."""
    best, where, share = math.inf, 0, 0.0
    for i, (a, b) in enumerate(itertools.pairwise(path)):
        length = distance(a, b)
        t = 0.0 if length == 0 else _project(at, a, b, length)
        gap = math.hypot(a[0] + t * (b[0] - a[0]) - at[0], a[1] + t * (b[1] - a[1]) - at[1])
        if gap <= best:  # of two points equally near, the later one
            best, where, share = gap, i, t
    return where, share


def _project(point: Point, a: Point, b: Point, length: float) -> float:
    dot = (point[0] - a[0]) * (b[0] - a[0]) + (point[1] - a[1]) * (b[1] - a[1])
    return min(1.0, max(0.0, dot / (length * length)))


def _distance_to(point: Point, a: Point, b: Point) -> float:
    """Distance of a point from a stretch."""
    length = distance(a, b)
    if length == 0:
        return distance(point, a)
    t = _project(point, a, b, length)
    return math.hypot(a[0] + t * (b[0] - a[0]) - point[0], a[1] + t * (b[1] - a[1]) - point[1])


def _shrunk(start: Point, end: Point, circles: list[Circle]) -> list[Circle]:
    ends = [(c, r, min(distance(start, c), distance(end, c)) / _SWELL - 1e-3) for c, r in circles]
    return [(centre, max(0.0, min(radius, most))) for centre, radius, most in ends]


def _search(start: Point, end: Point, circles: list[Circle]) -> Path | None:
    """Dijkstra's algorithm over the start, the end and the polygons' corners; None where there is no way."""
    centres, radii = np.array([c for c, _ in circles]), np.array([r for _, r in circles])
    angles = 2 * math.pi * np.arange(_CORNERS) / _CORNERS
    ring = np.stack((np.cos(angles), np.sin(angles)), -1)
    corners = (centres[:, None] + _SWELL * radii[:, None, None] * ring).reshape(-1, 2)
    inside = (np.linalg.norm(corners[:, None] - centres, axis=-1) < radii).any(1)
    low, high = np.array((X_RANGE[0], Y_RANGE[0])), np.array((X_RANGE[1], Y_RANGE[1]))
    corners = corners[~inside & ((corners >= low) & (corners <= high)).all(1)]
    nodes = np.concatenate((np.array([start, end]), corners))
    lengths = _sights(nodes, centres, radii)
    best, previous, queue = {0: 0.0}, {0: 0}, [(0.0, 0)]
    while queue:
        cost, node = heapq.heappop(queue)
        if node == 1:
            order = [1]
            while order[-1]:
                order.append(previous[order[-1]])
            return [(float(nodes[i, 0]), float(nodes[i, 1])) for i in reversed(order)]
        if cost > best[node]:
            continue
        for other in np.flatnonzero(np.isfinite(lengths[node])).tolist():
            total = cost + float(lengths[node, other])
            if total < best.get(other, math.inf):
                best[other], previous[other] = total, node
                heapq.heappush(queue, (total, other))
    return None


def _sights(nodes: np.ndarray, centres: np.ndarray, radii: np.ndarray) -> np.ndarray:
    """Distances [nodes, nodes] of nodes that see each other past the circles; inf for the others."""
    way = nodes[None] - nodes[:, None]
    squared = (way**2).sum(-1)
    from_start = centres[None] - nodes[:, None]  # [nodes, circles, 2]
    dots = np.einsum("ijk,ick->ijc", way, from_start)
    share = np.clip(dots / np.maximum(squared, 1e-12)[..., None], 0, 1)
    gaps = from_start[:, None] - share[..., None] * way[:, :, None]
    hidden = ((gaps**2).sum(-1) < radii**2).any(-1) | (squared == 0)
    return np.where(hidden, np.inf, np.sqrt(squared))
