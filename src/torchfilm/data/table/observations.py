"""What an arm observes: numbers, pictures, or both, in its own view."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from torchfilm.extras import needed

from .episodes import check_things
from .render import Renderer
from .trials import STATE_NAMES, Trials, environment_names

OBS_TYPES = ("state", "environment_state_agent_pos", "pixels", "pixels_agent_pos")
"""One vector; the arm and the table apart; a picture; a picture and the arm."""


def require_gymnasium() -> Any:
    """The module gymnasium, or one line that says how to get it (ValueError)."""
    with needed("the table's environment needs gymnasium", "robots"):
        import gymnasium
        import gymnasium.vector
    return gymnasium


class Observer:
    """Observations of one kind, and the space they lie in.

    Args:
        obs_type: one of `OBS_TYPES`.
        arms, num_things: of the tables to observe.
        size: width and height of pictures in pixels.

    Raises:
        ValueError: for another kind, numbers of arms and things that no table has, or a size below 1.
    """

    def __init__(self, obs_type: str, arms: int, num_things: int, size: int) -> None:
        if obs_type not in OBS_TYPES:
            raise ValueError(f"obs_type: expected one of {', '.join(OBS_TYPES)}, got {obs_type!r}")
        check_things(num_things, arms)
        if size < 1:
            raise ValueError(f"size: expected at least 1 pixel, got {size}")
        self._kind, self._arms = obs_type, arms
        self.renderer = Renderer(size) if "pixels" in obs_type else None
        lead = () if arms == 1 else (arms,)
        spaces = require_gymnasium().spaces
        agent, world = len(STATE_NAMES), len(environment_names(num_things))

        def numbers(count: int) -> Any:
            return spaces.Box(-np.inf, np.inf, (*lead, count), np.float32)

        picture = spaces.Box(0, 255, (*lead, size, size, 3), np.uint8)
        self.space = {
            "state": numbers(agent + world),
            "environment_state_agent_pos": spaces.Dict(
                {"agent_pos": numbers(agent), "environment_state": numbers(world)}
            ),
            "pixels": picture,
            "pixels_agent_pos": spaces.Dict({"agent_pos": numbers(agent), "pixels": picture}),
        }[obs_type]

    def __call__(self, trials: Trials, rows: NDArray[np.intp]) -> Any:
        """What the arms of these rows observe: an array or a dict of arrays, each [rows, (arms,) ...]."""
        state = self._squeezed(trials.state[rows])
        if self._kind == "pixels":
            return self._pixels(trials, rows)
        if self._kind == "pixels_agent_pos":
            return {"agent_pos": state, "pixels": self._pixels(trials, rows)}
        environment = self._squeezed(trials.environment[rows])
        if self._kind == "state":
            return np.concatenate((state, environment), axis=-1)
        return {"agent_pos": state, "environment_state": environment}

    def _squeezed(self, values: NDArray[Any]) -> NDArray[Any]:
        return values[:, 0] if self._arms == 1 else values

    def _pixels(self, trials: Trials, rows: NDArray[np.intp]) -> NDArray[np.uint8]:
        assert self.renderer is not None
        tables, draw = trials.tables, self.renderer
        whole = [draw(trials.scenes[row], tables.joints[row], tables.things[row]) for row in rows.tolist()]
        views = [np.stack([image, image[::-1, ::-1]][: self._arms]) for image in whole]
        return self._squeezed(np.stack(views))
