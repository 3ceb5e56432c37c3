"""What one request to the server may cost, and the two places that see to it: the gate and the body limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from torchfilm.systems.visual_reasoning.pictures import MAX_IMAGE_BYTES

T = TypeVar("T")


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    body_bytes: size of a request's body. body_seconds: time to send it. seconds: time to be answered, waiting
    included. waiting: requests at work or in line, over which the server says 429. pictures: recent pictures
    kept.
    """

    body_bytes: int = MAX_IMAGE_BYTES + 2**16
    body_seconds: float = 30.0
    seconds: float = 15.0
    waiting: int = 8
    pictures: int = 64


class Gate:
    """Lets one piece of work run at a time, a few wait, and none take longer than allowed.

    Work that ran out of time cannot be stopped; it keeps its place until it ends, so that it counts as load.
    """

    def __init__(self, limits: Limits):
        self._limits = limits
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="torchfilm")
        self._lock = threading.Lock()
        self._inside = 0

    async def run(self, work: Callable[..., T], *arguments: Any) -> T:
        """The result of work(*arguments); 429 when too many wait, 503 when it takes too long."""
        with self._lock:
            if self._inside >= self._limits.waiting:
                raise HTTPException(
                    429, f"busy: {self._inside} requests are waiting; try again", {"Retry-After": "1"}
                )
            self._inside += 1
        future = self._pool.submit(work, *arguments)
        future.add_done_callback(self._leave)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self._limits.seconds)
        except TimeoutError:
            reason = f"no answer within {self._limits.seconds:g} seconds: the machine is busy; try again"
            raise HTTPException(503, reason, {"Retry-After": "5"}) from None

    def _leave(self, _: Future[Any]) -> None:
        with self._lock:
            self._inside -= 1

    def close(self) -> None:
        """Drop what waits; what runs ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)


class BodyLimit:
    """Reads each request's body before the application does: 413 if it is too large, 408 if too slow."""

    def __init__(self, app: ASGIApp, limits: Limits):
        self._app, self._limits = app, limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request; the ASGI interface."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(self._read(receive), self._limits.body_seconds)
        except TimeoutError:
            slow = f"the request was not complete after {self._limits.body_seconds:g} seconds"
            await error_reply(408, slow)(scope, receive, send)
            return
        if body is None:
            large = f"the request is too large: expected at most {self._limits.body_bytes:,} bytes"
            await error_reply(413, large, {"Connection": "close"})(scope, receive, send)
            return
        parts: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replay() -> Message:
            return parts.pop() if parts else await receive()

        await self._app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The whole body, or None as soon as it is too large."""
        body = bytearray()
        while True:
            message = await receive()
            body += message.get("body", b"")
            if len(body) > self._limits.body_bytes:
                return None
            if not message.get("more_body", False):
                return bytes(body)


def error_reply(status: int, reason: str, headers: dict[str, str] | None = None) -> JSONResponse:
    """Every refusal has this form: {"error": reason}."""
    return JSONResponse({"error": reason}, status, headers)
