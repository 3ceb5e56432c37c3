"""The policy's page and the API behind it: tell an arm what to do and how, several ways on the same table.

A table is named by its seed and can always be made again; the server keeps nothing. One request is worked on
at a time, a few more may wait, the rest are told to come back.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Annotated

import numpy as np
from fastapi import FastAPI, HTTPException, Query

from torchfilm.app.limits import Gate, Limits
from torchfilm.app.messages import LARGEST_SEED, Part
from torchfilm.app.policy_messages import Place, TableReply, TellReply, TellRequest, ThingReply, ToldReply
from torchfilm.app.serving import page_app
from torchfilm.data.table.episodes import Episode, sample_episode
from torchfilm.data.table.kinematics import elbow_of, finger_of, joints_of
from torchfilm.data.table.scenes import COLOURS, PLACES, Scene
from torchfilm.data.table.tasks import HOWS, Task, What
from torchfilm.data.table.wording import PLACE_WORDS, say
from torchfilm.modulation import Modulation
from torchfilm.systems.diffusion_policy.policy import Policy
from torchfilm.systems.diffusion_policy.telling import Told, tell

DEEDS: tuple[What, ...] = ("push", "reach", "push", "reach")
"""What the examples of a table are about, in turn."""


def create_policy_app(policy: Policy, limits: Limits | None = None) -> FastAPI:
    """The application: the page at /, the API under /api, its description at /openapi.json.

    Every error is a JSON object {"error": reason}; no reply ever holds a traceback.
    """
    app, gate = page_app(
        "torchfilm: a policy that listens",
        "Tell an arm what to do, and how; see what it does, and what γ and β its layers hear.",
        "policy.html",
        ("policy.js", "shared.js", "page.css", "policy.css"),
        limits or Limits(),
    )
    _add_api(app, gate, policy)
    return app


def _add_api(app: FastAPI, gate: Gate, policy: Policy) -> None:
    @app.get("/api/table", summary="Lay a fresh table, or the table of a seed, with example instructions")
    async def table(
        seed: Annotated[int | None, Query(ge=0, le=LARGEST_SEED, examples=[7])] = None,
    ) -> TableReply:
        drawn = secrets.randbelow(LARGEST_SEED) if seed is None else seed
        return await gate.run(lay, drawn)

    @app.post("/api/tell", summary="Tell the arm what to do: up to four ways, each on the same table")
    async def told(request: TellRequest) -> TellReply:
        return await gate.run(_or_400, lambda: _tell(policy, request))


def lay(seed: int) -> TableReply:
    """The table of a seed, as it stands, and what can be told there."""
    rng, episode = _drawn(seed)
    scene = episode.scene
    return TableReply(
        seed=seed,
        things=[
            ThingReply(
                name=f"{thing.size} {thing.colour} {thing.shape}",
                shape=thing.shape,
                colour=f"rgb{tuple(round(255 * part) for part in COLOURS[thing.colour])}",
                radius=thing.radius,
                at=(thing.x, thing.y),
            )
            for thing in scene.things
        ],
        obstacle=scene.obstacle,
        goal=scene.goal,
        places=PLACES,
        finger=scene.starts[0],
        elbow=_places(elbow_of(joints_of(np.array(scene.starts[:1]))))[0],
        examples=_examples(rng, episode),
    )


def _drawn(seed: int) -> tuple[np.random.Generator, Episode]:
    """A scene whose obstacle stands in the way of its task, and what further draws come from."""
    rng = np.random.default_rng([seed, 13])
    return rng, sample_episode(rng, what=DEEDS[0], how="plain", blocked=True)


def _examples(rng: np.random.Generator, episode: Episode) -> list[list[str]]:
    """The episode's task and others, each told in all manners."""
    scene, tasks = episode.scene, [episode.tasks[0]]
    for what in DEEDS[1:]:
        place = None if what == "reach" else str(rng.choice(list(PLACE_WORDS)))
        tasks.append(Task(int(rng.integers(len(scene.things))), what, place=place))
    every = [[Task(task.which, task.what, how, task.place) for how in HOWS] for task in tasks]
    return [[say(rng, scene, task).text for task in manners] for manners in every]


def _tell(policy: Policy, request: TellRequest) -> TellReply:
    scene = _drawn(request.scene)[1].scene
    return TellReply(told=[_reply(scene, one) for one in tell(policy, scene, request.instructions)])


def _reply(scene: Scene, told: Told) -> ToldReply:
    thing = scene.things[told.task.which]
    name, place = f"the {thing.size} {thing.colour} {thing.shape}", told.task.place
    return ToldReply(
        instruction=told.text,
        understood=f"reach {name}" if place is None else f"push {name} to {PLACE_WORDS[place][0]}",
        success=told.outcome.success,
        energy=told.outcome.energy,
        seconds=told.outcome.time,
        collisions=told.outcome.collisions,
        clearance=told.outcome.clearance,
        looked=told.things,
        places={place or "here": share for place, share in told.places.items()},
        finger=_places(finger_of(told.joints)),
        elbow=_places(elbow_of(told.joints)),
        things=[_places(frame) for frame in told.positions],
        modulations={site: _part(modulation) for site, modulation in told.heard.items()},
    )


def _part(modulation: Modulation) -> Part:
    gamma, beta = modulation.gamma, modulation.beta
    size = max(0 if part is None else part.shape[-1] for part in (gamma, beta))
    return Part(
        gamma=[1.0] * size if gamma is None else gamma[0].tolist(),
        beta=[0.0] * size if beta is None else beta[0].tolist(),
    )


def _places(points: np.ndarray) -> list[Place]:
    """Positions to the tenth of a millimetre."""
    return [(round(x, 4), round(y, 4)) for x, y in np.asarray(points, dtype=float).tolist()]


def _or_400(work: Callable[[], TellReply]) -> TellReply:
    """The result of work(), its complaints about the input as HTTP errors."""
    try:
        return work()
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
