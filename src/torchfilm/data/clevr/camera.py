"""The camera of CLEVR's base scene: where it stands, what it projects where, and the ray through each pixel.

World units are Blender's: the ground is z = 0, objects lie within [-3, 3] in x and y. The released frames are
480x320; other sizes show the same horizontal field of view, so 3:2 sizes show the same frame.
"""

import functools
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

FRAME_WIDTH, FRAME_HEIGHT = 480, 320  # of the released images, and of `pixel_coords` at every image size
FOCAL_LENGTH = 35.0 / 32.0  # of the lens, in sensor widths
Float = NDArray[np.floating]  # computed in float32 throughout
Point = tuple[float, float, float]


@dataclass(frozen=True)
class View:
    """What re-rendering needs beside CLEVR's scene file: where camera and lights stand, in world units."""

    camera: Point
    key: Point
    fill: Point
    back: Point

    def to_dict(self) -> dict[str, list[float]]:
        """Return the view as JSON knows it; `View.from_dict` is the exact inverse."""
        return {name: list(getattr(self, name)) for name in ("camera", "key", "fill", "back")}

    @classmethod
    def from_dict(cls, record: dict) -> "View":
        """Read what `to_dict` wrote; other keys of the record are ignored."""
        return cls(*(_point(record[name]) for name in ("camera", "key", "fill", "back")))


def _point(values: list[float]) -> Point:
    x, y, z = map(float, values)
    return x, y, z


class Box(NamedTuple):
    """A rectangle of pixels: rows top to bottom (exclusive), columns left to right (exclusive)."""

    top: int
    bottom: int
    left: int
    right: int


class Camera:
    """A pinhole at `position` that looks at the origin, for images of `width` x `height` pixels.

    A ray is `position + t * d` with d not normalised: its component along the view axis is 1, so that t is
    the depth (the third of CLEVR's `pixel_coords`).
    """

    def __init__(self, position: Point, width: int, height: int) -> None:
        self.position = np.array(position)
        self.width, self.height = width, height
        self.forward = -self.position / np.linalg.norm(self.position)
        self.right = np.array([self.forward[1], -self.forward[0], 0.0])
        self.right /= np.linalg.norm(self.right)
        self.up = np.cross(self.right, self.forward)
        self.focal = FOCAL_LENGTH * width  # in pixels

    def directions(self) -> dict[str, list[float]]:
        """Return CLEVR's six unit vectors: the camera's axes, flattened onto the ground."""
        x, y = (float(v) for v in self.right[:2])
        return {
            "left": [-x, -y, 0.0],
            "right": [x, y, 0.0],
            "front": [y, -x, 0.0],
            "behind": [-y, x, 0.0],
            "above": [0.0, 0.0, 1.0],
            "below": [0.0, 0.0, -1.0],
        }

    def project(self, points: NDArray) -> NDArray:
        """Return column, row (pixels, from the upper left corner) and depth of world `points` [..., 3]."""
        offset = points - self.position
        depth = (offset * self.forward).sum(-1)
        column = self.width / 2 + self.focal * (offset * self.right).sum(-1) / depth
        row = self.height / 2 - self.focal * (offset * self.up).sum(-1) / depth
        return np.stack([column, row, depth], -1)

    def box(self, points: NDArray) -> Box:
        """Return the pixels that can show the convex hull of `points` [n, 3]; all if one is behind."""
        column, row, depth = self.project(points).T
        if depth.min() < 0.1:
            return Box(0, self.height, 0, self.width)
        top, bottom = (int(v) for v in np.clip([row.min(), row.max() + 1.0], 0, self.height))
        left, right = (int(v) for v in np.clip([column.min(), column.max() + 1.0], 0, self.width))
        return Box(top, bottom, left, right)

    def rays(self, box: Box, turn: NDArray | None = None) -> Float:
        """Return d [3, rows, columns] of the pixels in `box`, along the world's axes or `turn`'s [3, 3]."""
        across, down = _offsets(self.width, self.height)
        axes = np.stack([self.right, self.up, self.forward]) / np.array([[self.focal], [self.focal], [1.0]])
        if turn is not None:
            axes = (axes[:, None, :] * turn).sum(-1)
        right, up, forward = axes.astype(np.float32)
        line = forward[:, None] + right[:, None] * across[box.left : box.right]
        return line[:, None, :] - (up[:, None] * down[box.top : box.bottom])[:, :, None]

    def through(self, row: NDArray, column: NDArray) -> Float:
        """Return d [3, n] of the centres of single pixels, in world axes."""
        across, down = _offsets(self.width, self.height)
        scale = np.float32(1 / self.focal)
        right, up, forward = (v.astype(np.float32)[:, None] for v in (self.right, self.up, self.forward))
        return forward + right * (across[column] * scale) - up * (down[row] * scale)


@functools.lru_cache(maxsize=8)
def _offsets(width: int, height: int) -> tuple[Float, Float]:
    """Return the distance of each column's and row's centre from the image's centre, in pixels."""
    across = np.arange(width, dtype=np.float32) + np.float32(0.5 - width / 2)
    down = np.arange(height, dtype=np.float32) + np.float32(0.5 - height / 2)
    return across, down
