"""The renderer against analytic geometry, and the laws of light that tell materials and shadows apart."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from torchfilm.data.clevr.camera import View
from torchfilm.data.clevr.render import render
from torchfilm.data.clevr.scenes import CAMERA, COLORS, LIGHTS, SceneConfig, sample_scene
from torchfilm.data.clevr.shading import COLOR_CODES

VIEW = View(CAMERA, **LIGHTS)
FOCAL = 35 / 32


def thing(
    shape="sphere", spot=(0.0, 0.0), size="large", material="rubber", color="red", rotation=0.0
) -> dict:
    radius = (0.7 if size == "large" else 0.35) / (math.sqrt(2) if shape == "cube" else 1)
    return {
        "shape": shape,
        "size": size,
        "material": material,
        "color": color,
        "3d_coords": [*spot, radius],
        "rotation": rotation,
    }


def scene(*things: dict) -> dict:
    return {"objects": list(things)}


def camera_axes() -> tuple[np.ndarray, np.ndarray]:
    eye = np.array(CAMERA)
    back = eye / np.linalg.norm(eye)
    side = np.cross([0, 0, 1], back)
    side /= np.linalg.norm(side)
    return eye, np.stack([side, np.cross(back, side), -back])


def hull_area(points: np.ndarray) -> float:
    """Area of the convex hull from its support function h: half the integral of h^2 - h'^2."""
    turns = np.linspace(0, 2 * np.pi, 3001)[:-1]
    compass = np.stack([np.cos(turns), np.sin(turns)])
    reach = (points @ compass).max(0)
    slope = np.gradient(reach, turns)
    return 0.5 * float(np.mean(reach**2 - slope**2)) * 2 * np.pi


def outline(item: dict) -> np.ndarray:
    """Points of the object whose hull is its outline, projected to the plane at distance 1."""
    x, y, z = item["3d_coords"]
    if item["shape"] == "cube":
        angle = math.radians(item["rotation"])
        turn = np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
        flat = (turn @ (z * np.array([[1, 1, -1, -1], [1, -1, 1, -1]]))).T
    else:
        turns = np.linspace(0, 2 * np.pi, 240)
        flat = z * np.stack([np.cos(turns), np.sin(turns)], -1)
    points = np.concatenate([np.insert(flat, 2, h, 1) for h in (-z, z)]) + np.array([x, y, z])
    eye, axes = camera_axes()
    seen = (points - eye) @ axes.T
    return seen[:, :2] / seen[:, 2:]


@pytest.mark.parametrize("size", ["large", "small"])
@pytest.mark.parametrize("spot", [(0.0, 0.0), (1.5, -2.0), (-2.5, 1.0)])
def test_a_sphere_covers_its_analytic_ellipse(spot, size):
    item = thing("sphere", spot, size)
    eye, axes = camera_axes()
    centre = axes @ (np.array(item["3d_coords"]) - eye)
    r2, d2, z2 = item["3d_coords"][2] ** 2, float(centre @ centre), float(centre[2] ** 2)
    area = math.pi * (FOCAL * 480) ** 2 * r2 * math.sqrt((d2 - r2) / (z2 - r2) ** 3)
    assert render(scene(item), VIEW, 480, 320).mask.sum() == pytest.approx(area, rel=0.015)


@pytest.mark.parametrize("shape", ["cube", "cylinder"])
@pytest.mark.parametrize(
    ("spot", "rotation"), [((0.3, 0.1), 20.0), ((1.5, -2.0), 77.0), ((-2.0, 1.0), 301.0)]
)
def test_cube_and_cylinder_cover_the_hull_of_their_rims(shape, spot, rotation):
    item = thing(shape, spot, rotation=rotation)
    area = hull_area(outline(item)) * (FOCAL * 480) ** 2
    assert render(scene(item), VIEW, 480, 320).mask.sum() == pytest.approx(area, rel=0.015)


def test_a_mask_holds_each_object_at_its_centre_and_only_them():
    items = [thing("cube", (-2, -1)), thing("sphere", (0.5, 1.5)), thing("cylinder", (2, -1.5), "small")]
    mask = render(scene(*items), VIEW, 96, 64).mask
    eye, axes = camera_axes()
    for index, item in enumerate(items):
        x, y, z = axes @ (np.array(item["3d_coords"]) - eye)
        assert mask[int(32 - FOCAL * 96 * y / z), int(48 + FOCAL * 96 * x / z)] == index + 1
    assert set(np.unique(mask)) == {0, 1, 2, 3}


def test_the_nearer_object_hides_the_farther_whatever_their_order():
    near, far = thing("sphere", (1.5, -1.3), color="red"), thing("cube", (-0.5, 0.5), color="blue")
    one, two = render(scene(near, far), VIEW, 96, 64), render(scene(far, near), VIEW, 96, 64)
    alone = render(scene(near), VIEW, 96, 64)
    np.testing.assert_array_equal(one.mask == 1, two.mask == 2)
    np.testing.assert_array_equal(one.mask == 1, alone.mask == 1)


@given(
    width=st.integers(16, 60),
    height=st.integers(16, 60),
    samples=st.integers(1, 3),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_size_gives_the_same_bytes_twice(width, height, samples, seed):
    drawn, view = sample_scene(np.random.default_rng(seed), SceneConfig())
    one, two = (render(drawn, view, width, height, samples) for _ in range(2))
    assert one.image.shape == (height, width, 3)
    assert one.image.dtype == one.mask.dtype == np.uint8
    np.testing.assert_array_equal(one.image, two.image)
    np.testing.assert_array_equal(one.mask, two.mask)


def test_a_light_changes_shading_and_never_the_mask():
    drawn, view = sample_scene(np.random.default_rng(3), SceneConfig())
    lit = render(drawn, view, 96, 64)
    for name in ("key", "fill", "back"):
        x, y, z = getattr(view, name)
        moved = render(drawn, replace(view, **{name: (x + 1, y - 1, z + 1)}), 96, 64)
        assert (moved.image != lit.image).mean() > 0.2
        np.testing.assert_array_equal(moved.mask, lit.mask)


def test_small_images_are_the_large_image_seen_from_afar():
    drawn, view = sample_scene(np.random.default_rng(1), SceneConfig())
    large = render(drawn, view, 480, 320).image / 255.0
    small = render(drawn, view, 96, 64).image / 255.0
    shrunk = (large**2.2).reshape(64, 5, 96, 5, 3).mean((1, 3)) ** (1 / 2.2)
    assert np.abs(shrunk - small).mean() < 0.01


def test_objects_throw_shadows_on_the_ground_and_on_each_other():
    bare = render(scene(), VIEW, 96, 64).image.astype(int)
    one = render(scene(thing()), VIEW, 96, 64)
    ground = one.mask == 0
    darker = bare.sum(-1) - one.image.astype(int).sum(-1)
    assert darker[ground].max() > 120
    assert darker[ground].min() >= 0
    key = np.array(VIEW.key)
    blocker = thing("sphere", tuple(1.45 * key[:2] / np.linalg.norm(key[:2])), color="blue")
    lit, shaded = (
        render(scene(thing("cube", color="yellow"), *more), VIEW, 96, 64, samples=1)
        for more in ((), (blocker,))
    )
    both = (lit.mask == 1) & (shaded.mask == 1)
    assert (lit.image.astype(int) - shaded.image)[both].max() > 40


def test_metal_mirrors_its_neighbours_and_rubber_does_not():
    for material, changes in (("metal", True), ("rubber", False)):
        ball = thing("sphere", (0, 0), material=material, color="gray")
        pictures = [
            render(scene(ball, thing("cube", (1.2, 0.4), "small", color=color)), VIEW, 96, 64)
            for color in ("red", "cyan")
        ]
        own = (pictures[0].mask == 1) & (pictures[1].mask == 1)
        inner = own & np.roll(own, 1, 0) & np.roll(own, -1, 0) & np.roll(own, 1, 1) & np.roll(own, -1, 1)
        differs = np.abs(pictures[0].image.astype(int) - pictures[1].image)[inner].max() > 20
        assert differs == changes


@pytest.mark.parametrize("shape", ["cube", "sphere", "cylinder"])
def test_materials_and_colours_are_told_apart_in_small_images(shape):
    means = {}
    for material in ("rubber", "metal"):
        for color in COLORS:
            picture = render(scene(thing(shape, (0.5, 0.2), "small", material, color, 30)), VIEW, 96, 64)
            means[material, color] = picture.image[picture.mask == 1]
    for color in COLORS:
        apart = np.abs(means["rubber", color].astype(int) - means["metal", color]).mean()
        assert apart > 10, f"rubber and metal {color} {shape} look alike"
    for material in ("rubber", "metal"):
        table = np.stack([means[material, color].mean(0) for color in COLORS])
        gaps = np.linalg.norm(table[:, None] - table, axis=-1) + 1e3 * np.eye(len(COLORS))
        assert gaps.min() > 20


@pytest.mark.parametrize("color", COLORS)
def test_rubber_keeps_the_order_of_its_channels(color):
    picture = render(scene(thing("cube", color=color)), VIEW, 48, 32)
    mean = picture.image[picture.mask == 1].mean(0)
    code = np.array(COLOR_CODES[color])
    assert all(mean[i] > mean[j] for i in range(3) for j in range(3) if code[i] > code[j] + 20)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="expected width, height and samples >= 1, got 0, 32, 2"):
        render(scene(), VIEW, 0, 32)
