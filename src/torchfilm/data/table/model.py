"""The table as MuJoCo knows it: MJCF text built from sizes alone, compiled once for each combination.

Links and fingers hang above the things, which stand on round feet: a finger meets feet and other fingers, a
foot meets feet; links meet nothing. Things slide without turning, held by viscous friction, so a push moves a
thing as long as it lasts. The obstacle yields: it has no contact here, touching it is measured (`trials.py`).
Joints are driven by position servos of limited torque.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from torchfilm.extras import needed

from .kinematics import LINK
from .scenes import DEPTH, FINGER_RADIUS

TIMESTEP = 0.01
"""Seconds of one step of the physics."""

SUBSTEPS = 5
"""Steps of the physics in one step of control: 20 Hz."""

FPS = round(1 / (TIMESTEP * SUBSTEPS))
"""Steps of control in a second."""

TORQUES = (4.0, 2.0)
"""Limits of the shoulder and the elbow in newton metres."""

LAG = 0.1
"""Seconds by which a finger follows a target that moves evenly: damping over stiffness of the servos."""

_HEIGHT = 0.03  # of the centres of feet and finger tips above the table
_STIFFNESS = (60.0, 25.0)


def require_mujoco() -> Any:
    """The module mujoco, or one line that says how to get it (ValueError)."""
    with needed("the table needs MuJoCo", "robots"):
        import mujoco
        import mujoco.rollout
    return mujoco


def _arm(arm: int) -> str:
    place = 'pos="0 0 0.1"' if arm == 0 else f'pos="0 {DEPTH} 0.14" euler="0 0 180"'
    drop = 0.1 if arm == 0 else 0.14
    return f"""
    <body name="base{arm}" {place}>
      <body name="upper{arm}">
        <joint name="arm{arm}_0" axis="0 0 1" damping="0.3" armature="0.01"/>
        <geom type="capsule" fromto="0 0 0 {LINK} 0 0" size="0.018" mass="0.5"/>
        <body name="lower{arm}" pos="{LINK} 0 0">
          <joint name="arm{arm}_1" axis="0 0 1" damping="0.3" armature="0.01"/>
          <geom type="capsule" fromto="0 0 0 {LINK} 0 0" size="0.014" mass="0.3"/>
          <geom type="sphere" size="{FINGER_RADIUS}" pos="{LINK} 0 {_HEIGHT - drop}" mass="0.05"
            contype="1" conaffinity="3"/>
        </body>
      </body>
    </body>"""


def _thing(index: int, radius: float) -> str:
    mass = 60.0 * radius * radius
    return f"""
    <body name="thing{index}" pos="0 0 {_HEIGHT}">
      <joint name="thing{index}_x" type="slide" axis="1 0 0" damping="2" limited="true" range="-0.47 0.47"/>
      <joint name="thing{index}_y" type="slide" axis="0 1 0" damping="2" limited="true" range="0.06 0.74"/>
      <geom type="sphere" size="{radius}" mass="{mass}" contype="2" conaffinity="3"/>
    </body>"""


def _servo(arm: int, joint: int) -> str:
    stiffness, limit = _STIFFNESS[joint], TORQUES[joint]
    return (
        f'<position name="servo{arm}_{joint}" joint="arm{arm}_{joint}" kp="{stiffness}" '
        f'kv="{stiffness * LAG}" forcelimited="true" forcerange="{-limit} {limit}"/>'
    )


def mjcf(radii: tuple[float, ...], arms: int) -> str:
    """The model's text for things with feet of these radii (metres) and this number of arms.

    Positions come first for the arms (two angles each), then for the things (x and y each, metres, in the
    first arm's view). Sensors give the torques in the arms' order.
    """
    pairs = [(arm, joint) for arm in range(arms) for joint in range(2)]
    sensors = "".join(f'<actuatorfrc actuator="servo{arm}_{joint}"/>' for arm, joint in pairs)
    return f"""<mujoco model="table">
  <compiler angle="degree" autolimits="false"/>
  <option timestep="{TIMESTEP}" integrator="implicitfast" gravity="0 0 0">
    <flag autoreset="disable"/>
  </option>
  <default><geom contype="0" conaffinity="0" condim="3" friction="1 0.005 0.0001"/></default>
  <worldbody>{"".join(map(_arm, range(arms)))}{"".join(_thing(i, r) for i, r in enumerate(radii))}
  </worldbody>
  <actuator>{"".join(_servo(*pair) for pair in pairs)}</actuator>
  <sensor>{sensors}</sensor>
</mujoco>"""


@cache
def compiled(radii: tuple[float, ...], arms: int) -> Any:
    """The compiled model of `mjcf`; one for each combination in the process, never changed."""
    return require_mujoco().MjModel.from_xml_string(mjcf(radii, arms))
