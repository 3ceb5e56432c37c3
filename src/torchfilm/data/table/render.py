"""Pictures of the table from above: rendered by MuJoCo where OpenGL works without a screen, else drawn.

EGL comes with most graphics drivers and with Mesa; OSMesa is software alone. Shadows, reflections and
multi-sampling are off: they cost a hundred times what the rest does.
"""

from __future__ import annotations

import importlib
import os
import warnings
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from .drawing import draw
from .model import require_mujoco
from .scenes import Scene
from .solids import MIDDLE, SPAN, TABLE, Solid, solids

BACKENDS = ("egl", "osmesa", "drawn")
Backend = Literal["auto", "egl", "osmesa", "drawn"]

_STAGE = f"""<mujoco>
  <visual>
    <quality shadowsize="0" offsamples="0"/>
    <global offwidth="{{size}}" offheight="{{size}}"/>
    <headlight ambient="0.55 0.55 0.55" diffuse="0.45 0.45 0.45" specular="0 0 0"/>
    <map znear="0.05" zfar="10"/>
  </visual>
  <statistic extent="1" center="0 {MIDDLE[1]} 0"/>
  <worldbody>
    <geom type="plane" size="2 2 0.1" rgba="{TABLE[0]} {TABLE[1]} {TABLE[2]} 1"/>
    <camera name="above" pos="{MIDDLE[0]} {MIDDLE[1]} 2"/>
  </worldbody>
</mujoco>"""


class Renderer:
    """Draws pictures of one size.

    Args:
        size: width and height in pixels.
        backend: "auto" takes the first of "egl", "osmesa" and "drawn" that works, and warns in one line what
            is missing where only "drawn" does; a name takes that one.

    Attributes:
        backend: the one in use.
        missing: why the ones before it are not, in one line; "" where nothing is missing.

    Raises:
        ValueError: for another backend, a size that is not positive, or a named backend that does not work.

    Example:
        with_arm = Renderer(96)(scene, tables.joints[0], tables.things[0])
    """

    def __init__(self, size: int, backend: Backend = "auto") -> None:
        if size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {size}")
        if backend not in ("auto", *BACKENDS):
            raise ValueError(f"backend: expected auto, {', '.join(BACKENDS)}, got {backend!r}")
        self._size = size
        self._stage: _Stage | None = None
        self.backend, reasons = "drawn", []
        for name in BACKENDS[:2] if backend == "auto" else (backend,) if backend != "drawn" else ():
            try:
                self._stage = _Stage(name, size)
            except Exception as error:  # noqa: BLE001 - drivers fail in every way there is
                reasons.append(f"{name}: {' '.join(str(error).split())[:120] or type(error).__name__}")
            else:
                self.backend = name
                break
        self.missing = "; ".join(reasons)
        if reasons and backend != "auto":
            raise ValueError(f"backend: {self.missing}. Install libegl1 or libosmesa6, or take 'auto'")
        if reasons and self.backend == "drawn":
            warnings.warn(
                f"no OpenGL without a screen ({self.missing}): tables are drawn from above instead; "
                "install libegl1 or libosmesa6 to have them rendered",
                RuntimeWarning,
                stacklevel=2,
            )

    def __call__(self, scene: Scene, joints: NDArray, things: NDArray) -> NDArray[np.uint8]:
        """A picture [size, size, 3] from above: x to the right, the first arm's base at the lower edge.

        Args:
            scene: in the first arm's view.
            joints: [arms, 2] radians.
            things: [things, 2] metres, in the first arm's view.
        """
        seen = solids(scene, joints, things)
        return draw(seen, self._size) if self._stage is None else self._stage.render(seen)

    def close(self) -> None:
        """Give back what OpenGL holds. Pictures taken later are drawn."""
        if self._stage is not None:
            self._stage.close()
            self._stage = None


class _Stage:
    """An OpenGL context, an empty table and a camera; solids are put on it for each picture."""

    def __init__(self, backend: str, size: int) -> None:
        mj = self._mujoco = require_mujoco()
        platform = os.environ.get("PYOPENGL_PLATFORM")
        try:
            module = importlib.import_module(f"mujoco.{backend}")
        finally:  # MuJoCo sets this variable; once OpenGL is imported, nobody needs it
            _restore("PYOPENGL_PLATFORM", platform)
        self._gl = module.GLContext(size, size)
        self._gl.make_current()
        model = mj.MjModel.from_xml_string(_STAGE.format(size=size))
        data = mj.MjData(model)
        mj.mj_forward(model, data)
        self._scene, self._rect = mj.MjvScene(model, maxgeom=100), mj.MjrRect(0, 0, size, size)
        camera = mj.MjvCamera()
        camera.type, camera.fixedcamid = mj.mjtCamera.mjCAMERA_FIXED, 0
        every = mj.mjtCatBit.mjCAT_ALL
        mj.mjv_updateScene(model, data, mj.MjvOption(), None, camera, every, self._scene)
        for view in self._scene.camera:  # parallel rays; MJCF says so in another way in each version
            view.orthographic, view.frustum_bottom, view.frustum_top = 1, -SPAN / 2, SPAN / 2
        self._empty = self._scene.ngeom
        self._context = mj.MjrContext(model, mj.mjtFontScale.mjFONTSCALE_100)
        mj.mjr_setBuffer(mj.mjtFramebuffer.mjFB_OFFSCREEN, self._context)
        self._image = np.empty((size, size, 3), np.uint8)
        self.render([])

    def render(self, seen: list[Solid]) -> NDArray[np.uint8]:
        self._gl.make_current()
        self._scene.ngeom = self._empty
        for solid in seen:
            self._add(solid)
        self._mujoco.mjr_render(self._rect, self._scene, self._context)
        self._mujoco.mjr_readPixels(self._image, None, self._rect, self._context)
        return np.ascontiguousarray(self._image[::-1])

    def close(self) -> None:
        self._gl.make_current()
        self._context.free()
        self._gl.free()

    def _add(self, solid: Solid) -> None:
        mj, scene = self._mujoco, self._scene
        geom = scene.geoms[scene.ngeom]
        middle, half = (solid.low + solid.high) / 2, (solid.high - solid.low) / 2
        kind: Any = getattr(mj.mjtGeom, f"mjGEOM_{solid.kind.upper()}")
        at = np.array((*solid.at, middle))
        size = np.array((solid.radius, half, 0.0) if solid.kind == "cylinder" else (solid.radius,) * 3)
        mj.mjv_initGeom(geom, kind, size, at, np.eye(3).ravel(), np.array(solid.colour, np.float32))
        if solid.kind == "capsule":
            mj.mjv_connector(geom, kind, solid.radius, at, np.array((*solid.end, middle)))
        geom.category = mj.mjtCatBit.mjCAT_DYNAMIC
        scene.ngeom += 1


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value
