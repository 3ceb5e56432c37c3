"""The policy's page and the API behind it: tell an arm what to do and how, several ways on the same table.

A table is named by its seed and can always be made again; the server keeps nothing. One request is worked on
at a time, a few more may wait, the rest are told to come back.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated

import numpy as np
from fastapi import FastAPI, HTTPException, Query

from torchfilm.app.limits import BodyLimit, Gate, Limits
from torchfilm.app.messages import LARGEST_SEED, ErrorReply, HealthReply, Part
from torchfilm.app.policy_messages import Place, TableReply, TellReply, TellRequest, ThingReply, ToldReply
from torchfilm.app.serving import add_errors, add_page
from torchfilm.data.table.episodes import sample_episode
from torchfilm.data.table.kinematics import LINK, finger_of, joints_of
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
    limits = limits or Limits()
    gate = Gate(limits)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        gate.close()

    app = FastAPI(
        title="torchfilm: a policy that listens",
        description="Tell an arm what to do, and how; see what it does, and what γ and β its layers hear.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={code: {"model": ErrorReply} for code in (400, 404, 408, 413, 422, 429, 503)},
    )
    app.add_middleware(BodyLimit, limits=limits)
    add_errors(app)
    names = ("policy.js", "page.css", "policy.css")
    add_page(app, {"/": "policy.html", **{f"/{name}": name for name in names}})
    _add_api(app, gate, policy)
    return app


def _add_api(app: FastAPI, gate: Gate, policy: Policy) -> None:
    born = time.monotonic()

    @app.get("/api/health", summary="Is the server up?")
    async def health() -> HealthReply:
        return HealthReply(seconds_up=time.monotonic() - born)

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
    scene, examples = _drawn(seed)
    joints = joints_of(np.array(scene.starts[0]))
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
        elbow=_places(_elbows(joints))[0],
        examples=examples,
    )


def _drawn(seed: int) -> tuple[Scene, list[list[str]]]:
    """A scene whose obstacle stands in the way of the first example, and the examples."""
    rng = np.random.default_rng([seed, 13])
    episode = sample_episode(rng, what=DEEDS[0], how="plain", blocked=True)
    scene, first = episode.scene, episode.tasks[0]
    tasks = [first]
    for what in DEEDS[1:]:
        place = None if what == "reach" else str(rng.choice(list(PLACE_WORDS)))
        tasks.append(Task(int(rng.integers(len(scene.things))), what, place=place))
    every = [[Task(task.which, task.what, how, task.place) for how in HOWS] for task in tasks]
    return scene, [[say(rng, scene, task).text for task in manners] for manners in every]


def _tell(policy: Policy, request: TellRequest) -> TellReply:
    scene, _ = _drawn(request.scene)
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
        elbow=_places(_elbows(told.joints)),
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


def _elbows(joints: np.ndarray) -> np.ndarray:
    angle = np.atleast_2d(joints)[:, 0]
    return LINK * np.stack([np.cos(angle), np.sin(angle)], axis=-1)


def _places(points: np.ndarray) -> list[Place]:
    """Positions to the tenth of a millimetre."""
    return [(round(x, 4), round(y, 4)) for x, y in np.asarray(points, dtype=float).tolist()]


def _or_400(work: Callable[[], TellReply]) -> TellReply:
    """The result of work(), its complaints about the input as HTTP errors."""
    try:
        return work()
    except ValueError as error:
        raise HTTPException(400, str(error)) from None
