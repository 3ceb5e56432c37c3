"""A planar arm of two links: from joint angles to the finger and back, in the arm's own view.

    x = l cos q0 + l cos(q0 + q1),   y = l sin q0 + l sin(q0 + q1),   both links l = 0.45 m

The elbow always bends the same way (q1 in [0, π]), so that each point on the table has one answer.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

LINK = 0.45
"""Length of each of the two links in metres."""


def finger_of(joints: NDArray[np.float64]) -> NDArray[np.float64]:
    """Finger positions [..., 2] in metres for joint angles [..., 2] in radians."""
    first, second = joints[..., 0], joints[..., 0] + joints[..., 1]
    finger = np.empty(joints.shape)
    finger[..., 0] = LINK * (np.cos(first) + np.cos(second))
    finger[..., 1] = LINK * (np.sin(first) + np.sin(second))
    return finger


def elbow_of(joints: NDArray[np.float64]) -> NDArray[np.float64]:
    """Elbow positions [..., 2] in metres for joint angles [..., 2] in radians."""
    return LINK * np.stack([np.cos(joints[..., 0]), np.sin(joints[..., 0])], axis=-1)


def velocity_of(joints: NDArray[np.float64], rates: NDArray[np.float64]) -> NDArray[np.float64]:
    """Finger velocities [..., 2] in m/s for joint angles and their rates [..., 2] in rad and rad/s."""
    first, second = joints[..., 0], joints[..., 0] + joints[..., 1]
    a, b = LINK * rates[..., 0], LINK * (rates[..., 0] + rates[..., 1])
    velocity = np.empty(joints.shape)
    velocity[..., 0] = -a * np.sin(first) - b * np.sin(second)
    velocity[..., 1] = a * np.cos(first) + b * np.cos(second)
    return velocity


def joints_of(finger: NDArray[np.float64]) -> NDArray[np.float64]:
    """Joint angles [..., 2] in radians that put the finger at `finger` [..., 2] in metres.

    A point out of reach gives the stretched arm that points at it.
    """
    x, y = finger[..., 0], finger[..., 1]
    bend = np.arccos(np.minimum(np.maximum((x * x + y * y) / (2 * LINK * LINK) - 1, -1), 1))
    joints = np.empty(finger.shape)
    joints[..., 0], joints[..., 1] = np.arctan2(y, x) - bend / 2, bend
    return joints
