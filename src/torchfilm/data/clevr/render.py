"""Render a CLEVR scene: a vectorised ray caster with CLEVR's camera, lamps, materials and soft grey ground.

Rays are tested only inside each object's box on the screen. The ground, which is smooth, is shaded once a
pixel with area lamps; objects are shaded at `samples` x `samples` points a pixel, and only where they are.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from . import shading, shadows
from .camera import Box, Camera, Float, View
from .shapes import Solid, normal, visible


class Rendered(NamedTuple):
    """An image and who is where in it."""

    image: NDArray[np.uint8]  # [height, width, 3], sRGB
    mask: NDArray[np.uint8]  # [height, width]: 0 ground, i + 1 object i of the scene


def render(scene: dict[str, Any], view: View, width: int, height: int, samples: int = 2) -> Rendered:
    """Return the picture of `scene` (a record of a CLEVR scene file) under `view`, and its object mask.

    The same arguments give the same bytes. `width` and `height` are in pixels; every size shows the
    horizontal extent of CLEVR's 480x320. `samples` squared rays are cast per pixel.
    """
    if width < 1 or height < 1 or samples < 1:
        raise ValueError(f"render: expected width, height and samples >= 1, got {width}, {height}, {samples}")
    solids = [Solid.of(item) for item in scene["objects"]]
    fine = Camera(view.camera, width * samples, height * samples)
    owner, depth = visible(solids, fine)
    linear = np.repeat(_ground(view, solids, Camera(view.camera, width, height)).reshape(-1, 1), 3, axis=1)
    row, column = np.nonzero(owner >= 0)
    if row.size:
        order = np.argsort(owner[row, column], kind="stable")  # one object after the other
        row, column = row[order], column[order]
        own = owner[row, column]
        surface = _surface(own, depth[row, column], fine.through(row, column), view, scene, solids)
        phase = (row % 2) * 2 + column % 2
        color = _object_light(surface, own, phase, view, scene, solids)
        _blend(linear, (row // samples) * width + column // samples, color, samples)
    middle = samples // 2
    mask = (owner[middle::samples, middle::samples] + 1).astype(np.uint8)
    return Rendered(_encode(linear).reshape(height, width, 3), mask)


def _surface(
    own: NDArray, depth: Float, way: Float, view: View, scene: dict[str, Any], solids: list[Solid]
) -> shading.Surface:
    """Return the points where camera rays `way` [3, n] meet solids `own` [n] (sorted) at `depth` [n]."""
    point = np.array(view.camera, np.float32)[:, None] + depth * way
    facing = np.empty_like(point)
    ends = np.searchsorted(own, np.arange(len(solids) + 1))
    for solid, start, end in zip(solids, ends[:-1], ends[1:], strict=True):
        facing[:, start:end] = solid.outward(normal(solid.shape, solid.inward(point[:, start:end])))
    return shading.Surface(point, facing, _albedos(scene)[:, own], _metals(scene)[own])


def _albedos(scene: dict[str, Any]) -> Float:
    return np.stack([shading.albedo(item["color"]) for item in scene["objects"]], 1)


def _metals(scene: dict[str, Any]) -> NDArray[np.bool_]:
    return np.array([item["material"] == "metal" for item in scene["objects"]])


def _object_light(
    surface: shading.Surface,
    own: NDArray,
    phase: NDArray,
    view: View,
    scene: dict[str, Any],
    solids: list[Solid],
) -> Float:
    """Return the colour [3, n] of points on objects: Lambert's law, highlights, and what metal mirrors."""
    seen = shadows.on_objects(surface.point, own, view, solids, phase)
    color = surface.albedo * shading.diffuse_light(surface, view, seen)
    way = surface.point - np.array(view.camera, np.float32)[:, None]
    way /= np.sqrt(shading.dot(way, way))
    mirror = way - 2 * shading.dot(way, surface.normal) * surface.normal
    metal = np.flatnonzero(surface.metal)
    if metal.size:
        part = surface.at(metal)
        shown = shading.mirrored_light(part, own[metal], mirror[:, metal], view, solids, _albedos(scene))
        color[:, metal] = shading.metal_color(part, color[:, metal], shown)
    return color + shading.highlights(surface, mirror, view, seen)


def _blend(linear: Float, pixel: NDArray, color: Float, samples: int) -> None:
    """Lay object samples over the image `linear` [pixels, 3]; each covers 1 / samples^2 of its `pixel`."""
    share = 1 / samples**2
    covered = np.bincount(pixel, minlength=len(linear)) * share
    for channel in range(3):
        over = np.bincount(pixel, weights=color[channel], minlength=len(linear)) * share
        linear[:, channel] = linear[:, channel] * (1 - covered) + over


def _ground(view: View, solids: list[Solid], camera: Camera) -> Float:
    """Return the radiance [height, width] of the ground with all shadows, as if no object hid it."""
    along = camera.rays(Box(0, camera.height, 0, camera.width))
    reach = np.float32(-camera.position[2]) / np.minimum(
        along[2], np.float32(-0.02)
    )  # tall images see the horizon
    x = np.float32(camera.position[0]) + reach * along[0]
    y = np.float32(camera.position[1]) + reach * along[1]
    return shading.ground_light(x, y, view, solids, shadows.on_ground(x, y, view, solids, camera))


def _encode(linear: Float) -> NDArray[np.uint8]:
    """Return linear radiance as 8-bit sRGB (its 2.2 power law)."""
    return (np.clip(linear, 0, 1) ** np.float32(1 / 2.2) * np.float32(255) + np.float32(0.5)).astype(np.uint8)
