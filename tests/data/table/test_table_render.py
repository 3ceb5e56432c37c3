"""Pictures: rendered or drawn, they show the same things in the same places."""

import os
import warnings

import numpy as np
import pytest

pytest.importorskip("mujoco")

from torchfilm.data.table import render
from torchfilm.data.table.env import TableEnv
from torchfilm.data.table.render import Renderer
from torchfilm.data.table.scenes import COLOURS, DEPTH, Scene, sample_scene
from torchfilm.data.table.simulator import Tables
from torchfilm.data.table.solids import SPAN


def picture(renderer: Renderer, scene: Scene) -> np.ndarray:
    tables = Tables([scene])
    return renderer(scene, tables.joints[0], tables.things[0])


def pixel(image: np.ndarray, x: float, y: float) -> np.ndarray:
    size = len(image)
    row, column = int((0.5 - (y - DEPTH / 2) / SPAN) * size), int((0.5 + x / SPAN) * size)
    return image[row, column].astype(float)


@pytest.fixture(scope="module")
def rendered():
    try:
        renderer = Renderer(128, "egl")
    except ValueError as error:
        pytest.skip(str(error))
    yield renderer
    renderer.close()


@pytest.mark.parametrize("arms", [1, 2])
def test_things_are_seen_in_their_colours_at_their_places(arms):
    rng, renderer = np.random.default_rng(0), Renderer(192, "drawn")
    for _ in range(5):
        scene = sample_scene(rng, arms=arms)
        away = np.array([(-np.pi / 2, 0.0)] * arms)  # arms that cover nothing
        image = renderer(scene, away, Tables([scene]).things[0])
        assert image.shape == (192, 192, 3)
        for thing in scene.things:
            seen = pixel(image, thing.x + 0.45 * thing.radius, thing.y)
            shades = {name: np.array(colour) / max(colour) for name, colour in COLOURS.items()}
            nearest = min(shades, key=lambda name: np.abs(seen / seen.max() - shades[name]).sum())
            assert nearest == thing.colour
        assert pixel(image, *scene.obstacle).max() < 60


def test_the_rendered_and_the_drawn_table_look_alike(rendered):
    rng = np.random.default_rng(1)
    for arms in (1, 2):
        scene = sample_scene(rng, arms=arms)
        one, two = (
            picture(rendered, scene).astype(float),
            picture(Renderer(128, "drawn"), scene).astype(float),
        )
        assert np.abs(one - two).mean() < 4
        assert (np.abs(one - two).max(-1) > 60).mean() < 0.03


def test_the_same_table_gives_the_same_picture(rendered):
    scene, other = (sample_scene(np.random.default_rng(seed)) for seed in (0, 1))
    for renderer in (rendered, Renderer(64, "drawn")):
        first = picture(renderer, scene)
        assert not np.array_equal(picture(renderer, other), first)
        assert np.array_equal(picture(renderer, scene), first)


def test_where_nothing_renders_the_table_is_drawn_and_one_line_says_why(monkeypatch):
    def fail(backend: str, size: int) -> None:
        raise ImportError(f"no {backend}\nhere")

    monkeypatch.setattr(render, "_Stage", fail)
    with pytest.warns(RuntimeWarning, match=r"egl: no egl here; osmesa: no osmesa here.*drawn") as caught:
        renderer = Renderer(48)
    assert "\n" not in str(caught[0].message)
    assert (renderer.backend, renderer.missing) == ("drawn", "egl: no egl here; osmesa: no osmesa here")
    assert picture(renderer, sample_scene(np.random.default_rng(0))).shape == (48, 48, 3)
    with pytest.raises(ValueError, match=r"backend: egl: no egl here\. Install libegl1"):
        Renderer(48, "egl")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Renderer(48, "drawn").missing == ""


def test_rendering_leaves_the_process_environment_alone(rendered):
    assert rendered.backend == "egl"
    assert "PYOPENGL_PLATFORM" not in os.environ


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="size: expected at least 1 pixel, got 0"):
        Renderer(0)
    with pytest.raises(ValueError, match="backend: expected auto, egl, osmesa, drawn, got 'vulkan'"):
        Renderer(9, "vulkan")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:no OpenGL")
def test_pictures_of_two_arms_are_each_in_its_own_view():
    env = TableEnv("pixels", arms=2, size=40, render_mode="rgb_array")
    observation, _ = env.reset(seed=0)
    assert observation.shape == (2, 40, 40, 3)
    assert np.array_equal(observation[0], observation[1][::-1, ::-1])
    assert np.array_equal(env.render(), observation[0])
    env.close()
    assert TableEnv().render() is None
