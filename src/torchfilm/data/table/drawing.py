"""The table drawn from above with NumPy alone, for machines that cannot render."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .solids import MIDDLE, SPAN, TABLE, Solid


def draw(solids: list[Solid], size: int) -> NDArray[np.uint8]:
    """A picture [size, size, 3] of solids seen from above, the later ones over the earlier.

    A pixel's share of a solid is taken from its signed distance to the outline, so that edges are smooth.
    Spheres are lit from above, the others are flat.
    """
    pixel = SPAN / size
    across = (np.arange(size) + 0.5) * pixel - SPAN / 2
    x, y = MIDDLE[0] + across[None, :], MIDDLE[1] - across[:, None]
    image = np.broadcast_to(np.array(TABLE), (size, size, 3)).copy()
    for solid in solids:
        part = _window(solid, x[0], y[:, 0], pixel)
        gap = _outside(solid, x[:, part[1]], y[part[0]])
        share = np.clip(0.5 - gap / pixel, 0, 1) * solid.colour[3]
        shade = np.ones_like(share)
        if solid.kind == "sphere":
            shade = 0.75 + 0.35 * np.clip(-gap / solid.radius, 0, 1)
        colour = np.clip(np.array(solid.colour[:3]) * shade[..., None], 0, 1)
        image[part] += share[..., None] * (colour - image[part])
    return np.round(255 * image).astype(np.uint8)


def _window(solid: Solid, x: NDArray, y: NDArray, pixel: float) -> tuple[slice, slice]:
    """The rows and columns that a solid can be seen in."""
    ends = [solid.at, solid.end] if solid.kind == "capsule" else [solid.at]
    reach = solid.radius + pixel
    spans = []
    for axis, values in ((1, y), (0, x)):
        low, high = min(end[axis] for end in ends) - reach, max(end[axis] for end in ends) + reach
        inside = np.flatnonzero((values >= low) & (values <= high))
        spans.append(slice(inside[0], inside[-1] + 1) if len(inside) else slice(0, 0))
    return spans[0], spans[1]


def _outside(solid: Solid, x: NDArray, y: NDArray) -> NDArray:
    """Signed distance [size, size] in metres from a solid's outline; negative inside."""
    dx, dy = x - solid.at[0], y - solid.at[1]
    if solid.kind == "box":
        return np.maximum(np.abs(dx), np.abs(dy)) - solid.radius
    if solid.kind == "capsule":
        ex, ey = solid.end[0] - solid.at[0], solid.end[1] - solid.at[1]
        share = np.clip((dx * ex + dy * ey) / max(ex * ex + ey * ey, 1e-12), 0, 1)
        dx, dy = dx - share * ex, dy - share * ey
    return np.hypot(dx, dy) - solid.radius
