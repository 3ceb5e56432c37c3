"""CLEVR's three solids: where a ray enters them, which way their surface faces, which of them a pixel shows.

Each solid is computed in its own frame, where it is the unit sphere, the cube [-1, 1]^3 or the upright
cylinder of radius 1 and height 2. Arrays of vectors are [3, ...], float32.
"""

import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from .camera import Box, Camera, Float

RADII = {"large": 0.7, "small": 0.35}  # world units
BEVEL = 0.10  # of the half-width: normals of cubes and cylinders turn smoothly over this width at each edge
_CORNERS = np.array([[x, y, z] for x in (-1, 1) for y in (-1, 1) for z in (-1, 1)], dtype=float)
_TINY = np.float32(1e-9)  # keeps a division by a ray's zero component finite


class Solid(NamedTuple):
    """One object as geometry: its kind, its centre, half its width, its turn about the vertical."""

    shape: str
    centre: NDArray  # [3]
    radius: float
    turn: NDArray  # [3, 3], world -> own frame, without the scale

    @classmethod
    def of(cls, item: dict[str, Any]) -> "Solid":
        """Return the geometry of an object of a scene file."""
        angle = math.radians(item["rotation"])
        cosine, sine = math.cos(angle), math.sin(angle)
        turn = np.array([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]])
        return cls(item["shape"], np.array(item["3d_coords"]), half_width(item["shape"], item["size"]), turn)

    def corners(self) -> NDArray:
        """Return the corners [8, 3] of the box around the solid, in the world."""
        return self.centre + self.radius * (_CORNERS[:, :, None] * self.turn).sum(1)

    def inward(self, points: Float) -> Float:
        """Return world `points` [3, n] in the solid's own frame."""
        return self.rotated(points - self.centre.astype(np.float32)[:, None]) / np.float32(self.radius)

    def rotated(self, vectors: Float) -> Float:
        """Return world `vectors` [3, ...] along the solid's own axes."""
        if self.shape == "sphere":
            return vectors
        cosine, sine = np.float32(self.turn[0, 0]), np.float32(self.turn[0, 1])
        x, y = vectors[0], vectors[1]
        return np.stack([cosine * x + sine * y, cosine * y - sine * x, vectors[2]])

    def outward(self, vectors: Float) -> Float:
        """Return `vectors` [3, n] of the solid's own axes along the world's: the inverse of `rotated`."""
        if self.shape == "sphere":
            return vectors
        cosine, sine = np.float32(self.turn[0, 0]), np.float32(self.turn[0, 1])
        x, y = vectors[0], vectors[1]
        return np.stack([cosine * x - sine * y, cosine * y + sine * x, vectors[2]])


def half_width(shape: str, size: str) -> float:
    """Return half a solid's width in world units; CLEVR divides a cube's by sqrt(2)."""
    return RADII[size] / math.sqrt(2) if shape == "cube" else RADII[size]


def entry(shape: str, start: Float, along: Float) -> Float:
    """Return t [...] where rays `start + t * along` [3, ...] enter a unit solid; inf where they miss.

    Sphere: |start + t along|^2 = 1. Cube and cylinder: the latest entry into their slabs (and tube), if that
    comes before the earliest exit. Entries behind the start count as misses.
    """
    if shape == "sphere":
        enter, leave = _tube(start, along)
    elif shape == "cube":
        enter, leave = _slabs(start, along)
        enter, leave = enter.max(0), leave.min(0)
    else:
        enter, leave = _tube(start[:2], along[:2])
        down, up = _slabs(start[2], along[2])
        enter, leave = np.maximum(enter, down), np.minimum(leave, up)
    return np.where((leave > enter) & (enter > 0), enter, np.float32(np.inf))


def _tube(start: Float, along: Float) -> tuple[Float, Float]:
    """Return entry and exit of the unit ball in as many dimensions as `start` has: in two, a tube."""
    square = _dot(along, along) + _TINY
    middle = _dot(start, along) / square
    inside = middle * middle - (_dot(start, start) - np.float32(1)) / square
    root = np.sqrt(np.maximum(inside, 0))
    enter = np.where(inside > 0, -middle - root, np.float32(np.inf))
    return enter, root - middle


def _slabs(start: Float, along: Float) -> tuple[Float, Float]:
    """Return entry and exit of [-1, 1] on each axis."""
    inverse = np.float32(1) / (along + _TINY)
    middle, reach = start * inverse, np.abs(inverse)
    return -middle - reach, reach - middle


def _dot(a: Float, b: Float) -> Float:
    product = a * b
    return product[0] + product[1] + product[2] if len(product) == 3 else product[0] + product[1]


def normal(shape: str, point: Float) -> Float:
    """Return unit normals [3, n] at surface points of a unit solid, with edges rounded over `BEVEL`."""
    if shape == "sphere":
        vector = point
    elif shape == "cube":
        vector = np.sign(point) * np.maximum(np.abs(point) - np.float32(1 - BEVEL), 0)
    else:
        around = np.sqrt(_dot(point[:2], point[:2])) + _TINY
        rim = np.maximum(around - np.float32(1 - BEVEL), 0) / around
        lid = np.sign(point[2]) * np.maximum(np.abs(point[2]) - np.float32(1 - BEVEL), 0)
        vector = np.stack([point[0] * rim, point[1] * rim, lid])
    return vector / (np.sqrt(_dot(vector, vector)) + _TINY)


def visible(solids: list[Solid], camera: Camera) -> tuple[NDArray[np.int16], Float]:
    """Return which solid each pixel's centre shows (-1: none) and at which depth, both [height, width]."""
    owner = np.full((camera.height, camera.width), -1, np.int16)
    depth = np.full((camera.height, camera.width), np.inf, np.float32)
    for index, solid in enumerate(solids):
        box = camera.box(solid.corners())
        met = _first_hits(solid, camera, box)
        region = depth[box.top : box.bottom, box.left : box.right]
        nearer = met < region
        region[nearer] = met[nearer]
        owner[box.top : box.bottom, box.left : box.right][nearer] = index
    return owner, depth


def _first_hits(solid: Solid, camera: Camera, box: Box) -> Float:
    along = camera.rays(box, solid.turn / solid.radius)
    start = (solid.turn * (camera.position - solid.centre)).sum(-1) / solid.radius
    return entry(solid.shape, start.astype(np.float32)[:, None, None], along)
