"""Light in CLEVR's world: three lamps and a grey sky on rubber, on metal and on the grey ground.

Radiance is linear and grey levels are relative to a white of 1. Arrays of vectors are [3, n], float32.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .camera import Float, View
from .shapes import Solid, entry, normal

COLOR_CODES = {  # CLEVR's published sRGB triples
    "gray": (87, 87, 87),
    "red": (173, 35, 35),
    "blue": (42, 75, 215),
    "green": (29, 105, 20),
    "brown": (129, 74, 25),
    "purple": (129, 38, 192),
    "cyan": (41, 208, 208),
    "yellow": (255, 238, 51),
}
GROUND_ALBEDO = np.float32(0.31)
AMBIENT = np.float32(0.42)
# What metal mirrors where it mirrors neither an object nor the ground: a dim sky, and in it a wide soft light
# behind the scene, which makes the flat tops of metal things shine.
SKY = np.float32(0.22)
WINDOW = np.float32(1.9)
# Between CLEVR's own use of the codes as linear values (power 1) and their meaning as sRGB (2.2).
_ALBEDO_POWER = 1.6


class Lamp(NamedTuple):
    """A round area lamp: its strength at the origin, its radius (world units), its brightness in metal."""

    power: float
    radius: float
    mirrored: float


LAMPS = {"key": Lamp(0.78, 0.8, 3.0), "fill": Lamp(0.34, 1.2, 0.9), "back": Lamp(0.30, 1.0, 0.9)}


class Surface(NamedTuple):
    """Points on objects that need a colour."""

    point: Float  # [3, n]
    normal: Float  # [3, n]
    albedo: Float  # [3, n]
    metal: NDArray[np.bool_]  # [n]

    def at(self, index: NDArray) -> "Surface":
        """Return some of the points."""
        return Surface(self.point[:, index], self.normal[:, index], self.albedo[:, index], self.metal[index])


def albedo(color: str) -> Float:
    """Return the linear reflectance [3] of one of CLEVR's colours."""
    return ((np.array(COLOR_CODES[color]) / 255.0) ** _ALBEDO_POWER).astype(np.float32)


def dot(a: Float, b: Float) -> Float:
    """Return the inner products [n] of vectors [3, n]."""
    product = a * b
    return product[0] + product[1] + product[2]


def ground_light(x: Float, y: Float, view: View, solids: list[Solid], seen: dict[str, Float]) -> Float:
    """Return the ground's radiance at `x`, `y` [...]; `seen` maps lamps to the share of them in sight.

    Lamps fall off with the square of the distance and the cosine; each object takes from the sky what a
    sphere of its size on the ground would: r^3 / (distance^2 + r^2)^(3/2).
    """
    total = np.full(x.shape, AMBIENT, np.float32)
    for solid in solids:
        dx, dy = x - np.float32(solid.centre[0]), y - np.float32(solid.centre[1])
        near = np.float32(solid.radius**2) / (dx * dx + dy * dy + np.float32(solid.radius**2))
        total *= 1 - np.float32(0.9) * near * np.sqrt(near)
    for name, lamp in LAMPS.items():
        px, py, pz = getattr(view, name)
        dx, dy = x - np.float32(px), y - np.float32(py)
        inverse = np.float32(1) / (dx * dx + dy * dy + np.float32(pz * pz))
        light = inverse * np.sqrt(inverse) * np.float32(lamp.power * _unit_distance(px, py, pz) * pz)
        total += light * seen[name] if name in seen else light
    return total * GROUND_ALBEDO


def _unit_distance(x: float, y: float, z: float) -> float:
    """Return the squared distance to the origin, which makes a lamp's power that at the origin."""
    return x * x + y * y + z * z


def diffuse_light(surface: Surface, view: View, seen: dict[str, Float]) -> Float:
    """Return the light [n] that falls on `surface` from sky, ground and lamps (Lambert)."""
    upward = surface.normal[2]
    total = AMBIENT * (np.float32(0.68) + np.float32(0.32) * upward)
    for name, lamp in LAMPS.items():
        position = np.array(getattr(view, name), np.float32)[:, None]
        way = position - surface.point
        inverse = np.float32(1) / dot(way, way)
        facing = np.maximum(dot(surface.normal, way), 0) * inverse * np.sqrt(inverse)
        facing *= np.float32(lamp.power * _unit_distance(*getattr(view, name)))
        total += facing * seen[name] if name in seen else facing
    return total


def highlights(surface: Surface, mirror: Float, view: View, seen: dict[str, Float]) -> Float:
    """Return the lamps' images [n] in direction `mirror`: sharp on metal, wide and faint on rubber."""
    total = np.zeros(mirror.shape[1], np.float32)
    for name, lamp in LAMPS.items():
        position = np.array(getattr(view, name), np.float32)[:, None]
        way = position - surface.point
        aligned = dot(mirror, way) / np.sqrt(dot(way, way))
        sharp = np.clip((aligned - np.float32(0.972)) * np.float32(1 / 0.02), 0, 1)
        wide = np.maximum(aligned, 0) ** 2
        wide = wide * wide * wide * np.float32(0.10 * lamp.power)
        shine = np.where(surface.metal, sharp * sharp * np.float32(lamp.mirrored), wide)
        total += shine * seen[name] if name in seen else shine
    return total


def metal_color(surface: Surface, matte: Float, shown: Float) -> Float:
    """Return the colour [3, n] of metal: part of its `matte` colour, and what it mirrors, `shown`."""
    tint = np.float32(0.12) + np.float32(0.93) * surface.albedo
    return np.float32(0.40) * matte + tint * shown


def mirrored_light(
    surface: Surface, own: NDArray, mirror: Float, view: View, solids: list[Solid], albedos: Float
) -> Float:
    """Return what metal shows in direction `mirror`, [3, n]: one bounce to objects, ground or sky.

    `own` [n] is the index of the solid on which each point of `surface` lies; `albedos` [3, solids].
    """
    nearest = np.full(own.shape, np.inf, np.float32)
    target = np.full(own.shape, -1, np.int64)
    for index, solid in enumerate(solids):
        others = np.flatnonzero(own != index)
        start = solid.inward(surface.point[:, others])
        met = entry(solid.shape, start, solid.rotated(mirror[:, others]) / np.float32(solid.radius))
        closer = met < nearest[others]
        nearest[others[closer]] = met[closer]
        target[others[closer]] = index
    result = np.empty_like(mirror)
    away = np.flatnonzero(target < 0)
    result[:, away] = _surroundings(surface.point[:, away], mirror[:, away], view, solids)
    for index, solid in enumerate(solids):
        here = np.flatnonzero(target == index)
        if here.size:
            point = surface.point[:, here] + nearest[here] * mirror[:, here]
            facing = solid.outward(normal(solid.shape, solid.inward(point)))
            seen = Surface(point, facing, point, surface.metal[here])
            result[:, here] = diffuse_light(seen, view, {}) * albedos[:, index : index + 1]
    return result


def _surroundings(point: Float, way: Float, view: View, solids: list[Solid]) -> Float:
    """Return the radiance [n] of ground or sky seen from `point` in direction `way`."""
    down = np.minimum(way[2], np.float32(-1e-3))
    reach = np.minimum(point[2] / -down, 60)
    x, y = point[0] + reach * way[0], point[1] + reach * way[1]
    ground = ground_light(x, y, view, solids, {})
    x, y, _ = view.camera
    behind = (way[0] * np.float32(-x) + way[1] * np.float32(-y)) * np.float32(1 / np.hypot(x, y))
    tall = np.maximum(1 - np.abs(way[2] - np.float32(0.48)) * np.float32(1 / 0.32), 0)
    sky = SKY + WINDOW * tall * np.clip(behind * 3 - np.float32(1.2), 0, 1)
    blend = np.clip(way[2] * np.float32(-8) + np.float32(0.5), 0, 1)
    return sky + (ground - sky) * blend
