"""The page and the API behind it: ask a scene a question, turn γ and β, see the answer change.

`create_app` builds the application, `serving.serve_app` runs it. The application keeps a bounded number of
recent pictures and nothing else; a scene is named by its seed and can always be made again. One picture or
question is worked on at a time; a few more may wait; the rest are told to come back.
"""

from __future__ import annotations

import base64
import hashlib
import io
import secrets
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated, Any, TypeVar

import numpy as np
from fastapi import FastAPI, HTTPException, Query, Request, UploadFile
from fastapi.responses import JSONResponse, Response
from PIL import Image

from torchfilm.app.limits import Gate, Limits
from torchfilm.app.messages import (
    LARGEST_SEED,
    AskReply,
    AskRequest,
    Example,
    Part,
    Ranked,
    SceneReply,
    UploadReply,
)
from torchfilm.app.scenes import Scenes
from torchfilm.app.serving import page_app
from torchfilm.systems.visual_reasoning.answering import (
    Answer,
    Answerer,
    Seen,
    UnknownWordError,
)
from torchfilm.systems.visual_reasoning.pictures import frame, open_picture

T = TypeVar("T")
DISPLAY = (480, 320)


class Gallery:
    """The recent pictures, each seen once by the network; only the gate's thread touches it."""

    def __init__(self, answerer: Answerer, scenes: Scenes, size: int):
        self._answerer, self._scenes, self._size = answerer, scenes, size
        self._seen: OrderedDict[str, Seen] = OrderedDict()

    def scene(self, seed: int, *, facts: bool) -> SceneReply:
        """Make a scene, and remember it as seen."""
        fresh = self._scenes.make(seed)
        self._keep(f"scene {seed}", self._answerer.see(fresh.small))
        return SceneReply(
            seed=seed,
            image=_data_url(fresh.display),
            examples=[Example(question=e.question, answer=e.answer) for e in fresh.examples],
            facts=list(fresh.facts) if facts else None,
        )

    def upload(self, content: bytes) -> UploadReply:
        """Look at an uploaded picture and remember it; ValueError if it is none."""
        name = hashlib.sha256(content).hexdigest()[:16]
        picture = open_picture(content)
        shown = _data_url(frame(picture, *DISPLAY))
        self._keep(f"image {name}", self._answerer.see(picture))
        return UploadReply(id=name, image=shown)

    def ask(self, request: AskRequest) -> Answer:
        """Answer; 404 for an upload that is not here any more, ValueError for a bad question."""
        self._answerer.words(request.question)
        seen = self._find(request)
        return self._answerer.answer(seen, request.question, request.edits, request.top)

    def _find(self, request: AskRequest) -> Seen:
        name = f"scene {request.scene}" if request.image is None else f"image {request.image}"
        if name not in self._seen:
            if request.scene is None:
                raise HTTPException(404, "this picture is no longer here; upload it again")
            self._keep(name, self._answerer.see(self._scenes.make(request.scene).small))
        self._seen.move_to_end(name)
        return self._seen[name]

    def _keep(self, name: str, seen: Seen) -> None:
        self._seen[name] = seen
        self._seen.move_to_end(name)
        while len(self._seen) > self._size:
            self._seen.popitem(last=False)


def create_app(answerer: Answerer, scenes: Scenes, limits: Limits | None = None) -> FastAPI:
    """The application: the page at /, the API under /api, its description at /openapi.json.

    Every error is a JSON object {"error": reason}; no reply ever holds a traceback.
    """
    limits = limits or Limits()
    app, gate = page_app(
        "torchfilm: visual reasoning",
        "Ask a picture a question; read and turn the γ and β through which it is heard.",
        "index.html",
        ("page.js", "shared.js", "page.css"),
        limits,
    )
    _add_unknown_words(app)
    _add_api(app, gate, Gallery(answerer, scenes, limits.pictures))
    return app


def _add_api(app: FastAPI, gate: Gate, gallery: Gallery) -> None:
    @app.get("/api/scene", summary="Render a fresh scene, or the scene of a seed, with example questions")
    async def scene(
        seed: Annotated[int | None, Query(ge=0, le=LARGEST_SEED, examples=[7])] = None,
        facts: Annotated[bool, Query(description="tell what is in the scene")] = False,  # noqa: FBT002
    ) -> SceneReply:
        drawn = secrets.randbelow(LARGEST_SEED) if seed is None else seed
        return await gate.run(lambda: gallery.scene(drawn, facts=facts))

    @app.post("/api/upload", summary="Upload a PNG or JPEG of up to 10 MiB and 24 megapixels")
    async def upload(file: UploadFile) -> UploadReply:
        content = await file.read()
        return await gate.run(_or_400, gallery.upload, content)

    @app.post("/api/ask", summary="Ask a question, optionally with γ and β turned")
    async def ask(request: AskRequest) -> AskReply:
        if (request.scene is None) == (request.image is None):
            raise HTTPException(422, "give either 'scene' (a seed) or 'image' (the id of an upload)")
        return _reply(await gate.run(_or_400, gallery.ask, request))


def _or_400(work: Callable[[Any], T], argument: Any) -> T:
    """The result of work(argument), its complaints about the input as HTTP errors."""
    try:
        return work(argument)
    except UnknownWordError:
        raise
    except ValueError as error:
        raise HTTPException(400, str(error)) from None


def _reply(answer: Answer) -> AskReply:
    return AskReply(
        answer=answer.answer,
        probability=answer.probability,
        runner_up=answer.runner_up,
        probabilities=[Ranked(answer=a, probability=p) for a, p in answer.probabilities],
        modulations={site: Part(**parts) for site, parts in answer.modulations.items()},
        looked=answer.looked,
        tokens=list(answer.tokens),
    )


def _add_unknown_words(app: FastAPI) -> None:
    @app.exception_handler(UnknownWordError)
    async def unknown_word(_: Request, error: UnknownWordError) -> Response:
        return JSONResponse({"error": str(error), "word": error.word, "nearest": list(error.nearest)}, 400)


def _data_url(image: np.ndarray) -> str:
    stream = io.BytesIO()
    Image.fromarray(image).save(stream, "PNG", compress_level=3)
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
