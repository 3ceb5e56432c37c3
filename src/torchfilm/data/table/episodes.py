"""Draw episodes: a scene and what each arm is told; everything follows from the random source alone."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from .scenes import Scene, check_counts, sample_scene
from .tasks import HOWS, WHATS, How, Task, What, in_the_way, tasks_of
from .wording import Instruction, descriptions, say

_ATTEMPTS = 200


@dataclass(frozen=True)
class Episode:
    """A scene and one instruction for each of its arms."""

    scene: Scene
    told: tuple[Instruction, ...]

    @property
    def tasks(self) -> tuple[Task, ...]:
        """What each arm is told to do."""
        return tuple(instruction.task for instruction in self.told)


def sample_episode(
    rng: np.random.Generator,
    *,
    what: What | None = None,
    how: How | None = None,
    blocked: bool | None = None,
    held_out: bool = False,
    by: Collection[str] | None = None,
    num_things: int = 3,
    arms: int = 1,
) -> Episode:
    """Draw a scene and an instruction for each arm; several arms are told about different things.

    Args:
        rng: the source of everything drawn.
        what: one of `WHATS`; default: either, evenly.
        how: one of `HOWS`; default: any, evenly.
        blocked: whether the obstacle has to stand in the first arm's way; default: as it comes.
        held_out: whether to say it as training never does.
        by: the ways to name a thing that may be used, as for `say`; default: all.
        num_things, arms: as for `sample_scene`.

    Raises:
        ValueError: as `sample_scene`; with fewer things than arms; or for a what, a how, or ways to name
            that do not exist.

    Example:
        episode = sample_episode(np.random.default_rng(0), what="push", how="avoid", blocked=True)
    """
    for name, value, known in (("what", what, WHATS), ("how", how, HOWS)):
        if value is not None and value not in known:
            raise ValueError(f"{name}: expected {', '.join(known)}, or None for any, got {value!r}")
    check_things(num_things, arms)
    for _ in range(_ATTEMPTS):
        chance = 0.9 if blocked is None else float(blocked)
        scene = sample_scene(rng, num_things, arms, in_the_way=chance)
        which = rng.permutation(num_things)[:arms].tolist()
        tasks = [_draw(rng, scene, thing, what, how) for thing in which]
        views = [scene.seen_by(arm) for arm in range(arms)]
        named = (
            by is None or set(by) & set(descriptions(v)[t.which]) for v, t in zip(views, tasks, strict=True)
        )
        if (blocked is None or in_the_way(scene, tasks[0]) == blocked) and all(named):
            told = [say(rng, v, t, held_out=held_out, by=by) for v, t in zip(views, tasks, strict=True)]
            return Episode(scene, tuple(told))
    raise ValueError(f"expected options that scenes can meet, got blocked={blocked}, by={by}")


def check_things(num_things: int, arms: int) -> None:
    """Raise ValueError unless each arm can be told about a thing of its own."""
    check_counts(num_things, arms)
    if num_things < arms:
        raise ValueError(f"num_things: expected one for each of {arms} arms at least, got {num_things}")


def _draw(rng: np.random.Generator, scene: Scene, which: int, what: What | None, how: How | None) -> Task:
    deed: What = what or WHATS[rng.integers(2)]
    manner: How = how or HOWS[rng.integers(len(HOWS))]
    fitting = [t for t in tasks_of(scene) if (t.which, t.what, t.how) == (which, deed, manner)]
    return fitting[rng.integers(len(fitting))]
