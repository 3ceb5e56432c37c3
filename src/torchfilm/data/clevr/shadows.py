"""Shadows: which share of a lamp a point of the ground, or of an object, sees."""

import math

import numpy as np
from numpy.typing import NDArray

from .camera import Box, Camera, Float, Point, View
from .shading import LAMPS
from .shapes import Solid, entry

_GROUND_SAMPLES = {"key": 16, "fill": 10, "back": 10}  # points on each lamp that the ground looks at


def on_ground(x: Float, y: Float, view: View, solids: list[Solid], camera: Camera) -> dict[str, Float]:
    """Return per lamp the share of it [height, width] that the ground at `x`, `y` sees (soft shadows)."""
    seen = {}
    for name, lamp in LAMPS.items():
        share = np.ones(x.shape, np.float32)
        position = getattr(view, name)
        spots = np.array(position) + lamp.radius * _disc(_GROUND_SAMPLES[name])
        for solid in solids:
            box = _shadow_box(solid, position, lamp.radius, camera)
            if box.bottom > box.top and box.right > box.left:
                rows, columns = slice(box.top, box.bottom), slice(box.left, box.right)
                share[rows, columns] *= _unblocked(solid, x[rows, columns], y[rows, columns], spots)
        seen[name] = share
    return seen


def on_objects(
    point: Float, own: NDArray, view: View, solids: list[Solid], phase: NDArray
) -> dict[str, Float]:
    """Return the share of key and fill lamp that is seen [n] from `point` [3, n] on the solids `own` [n].

    Each point looks at two of a lamp's eight spots; `phase` [n], 0 to 3, says which, so that the samples of a
    pixel together see a soft shadow.
    """
    seen = {}
    for name in ("key", "fill"):
        lamp = LAMPS[name]
        spots = (np.array(getattr(view, name)) + lamp.radius * _disc(8)).astype(np.float32)
        free = np.ones(own.shape, np.float32)
        for first in (0, 4):
            way = spots.T[:, phase + first] - point
            free[_blocked(point, way, own, solids)] -= np.float32(0.5)
        seen[name] = free
    return seen


def _blocked(point: Float, way: Float, own: NDArray, solids: list[Solid]) -> NDArray[np.bool_]:
    """Return which rays from `point` along `way` meet a solid other than their own (they are convex)."""
    blocked = np.zeros(own.shape, np.bool_)
    for index, solid in enumerate(solids):
        others = np.flatnonzero((own != index) & _towards(solid, point, way))
        if others.size:
            start = solid.inward(point[:, others])
            along = solid.rotated(way[:, others]) / np.float32(solid.radius)
            blocked[others] |= entry(solid.shape, start, along) < np.inf
    return blocked


def _towards(solid: Solid, point: Float, way: Float) -> NDArray[np.bool_]:
    """Return which rays pass the ball around `solid` on their way up: a cheap test before the exact one."""
    offset = solid.centre.astype(np.float32)[:, None] - point
    along = (offset * way).sum(0)
    square = (way * way).sum(0)
    reach = np.float32(3.01 * solid.radius**2)
    return (along > 0) & ((offset * offset).sum(0) * square - along * along < reach * square)


def _unblocked(solid: Solid, x: Float, y: Float, spots: NDArray) -> Float:
    """Return the share of the lamp's `spots` [k, 3] that ground points [rows, columns] see past one solid."""
    ground = np.stack([x.ravel(), y.ravel(), np.zeros(x.size, np.float32)])
    start = solid.inward(ground)
    ends = solid.inward(spots.T.astype(np.float32))
    along = ends[:, :, None] - start[:, None, :]
    blocked = np.isfinite(entry(solid.shape, start[:, None, :], along))
    return (1 - blocked.mean(0, dtype=np.float32)).reshape(x.shape)


def _shadow_box(solid: Solid, lamp: Point, radius: float, camera: Camera) -> Box:
    """Return the pixels where the shadow of `solid` can fall: its corners, thrown onto the ground."""
    rim = radius * np.array([[1, 1, 0], [1, -1, 0], [-1, 1, 0], [-1, -1, 0]])
    spots = np.array(lamp) + rim
    corners = solid.corners()[:, None, :]
    step = spots[:, 2:] / (spots[:, 2:] - corners[..., 2:])
    return camera.box((spots + (corners - spots) * step).reshape(-1, 3))


def _disc(count: int) -> NDArray:
    """Return `count` evenly spread points [count, 3] of the horizontal unit disc (a sunflower's seeds)."""
    index = np.arange(count)
    around, out = index * math.pi * (3 - math.sqrt(5)), np.sqrt((index + 0.5) / count)
    return np.stack([out * np.cos(around), out * np.sin(around), np.zeros(count)], -1)
