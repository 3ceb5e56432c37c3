"""What every page of torchfilm is served with: refusals as JSON, files with strict headers, a thread."""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, Response
from starlette.exceptions import HTTPException as StarletteHTTPException

from torchfilm.app.limits import BodyLimit, Gate, Limits, error_reply
from torchfilm.app.messages import ErrorReply, HealthReply

PAGE = Path(__file__).parent / "page"
HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
log = logging.getLogger(__name__)


def page_app(
    title: str, description: str, page: str, others: Sequence[str], limits: Limits
) -> tuple[FastAPI, Gate]:
    """An application with a page, /api/health and /openapi.json, and the gate through which work goes.

    Every error is a JSON object {"error": reason}; no reply ever holds a traceback.
    page, others: files of the folder `page`; the first is at /.
    """
    gate, born = Gate(limits), time.monotonic()

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        gate.close()

    app = FastAPI(
        title=title,
        description=description,
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
        responses={code: {"model": ErrorReply} for code in (400, 404, 408, 413, 422, 429, 503)},
    )
    app.add_middleware(BodyLimit, limits=limits)
    add_errors(app)
    add_page(app, {"/": page, **{f"/{name}": name for name in others}})

    @app.get("/api/health", summary="Is the server up?")
    async def health() -> HealthReply:
        return HealthReply(seconds_up=time.monotonic() - born)

    return app, gate


def add_page(app: FastAPI, files: Mapping[str, str]) -> None:
    """Serve files of the folder `page`: path -> name."""

    def add(path: str, name: str) -> None:
        @app.get(path, include_in_schema=False)
        async def page() -> FileResponse:
            return FileResponse(PAGE / name, headers={**HEADERS, "Cache-Control": "no-cache"})

    for path, name in files.items():
        add(path, name)


def add_errors(app: FastAPI) -> None:
    """Answer every error with a JSON object {"error": reason}, and never with a traceback."""

    @app.exception_handler(StarletteHTTPException)
    async def refused(request: Request, error: StarletteHTTPException) -> Response:
        reason = error.detail
        if error.status_code == 404 and reason == "Not Found":
            reason = f"there is nothing at {request.url.path}; the page is at /, the API at /openapi.json"
        if error.status_code == 405:
            reason = f"{request.method} is not possible at {request.url.path}"
        return error_reply(error.status_code, reason, dict(error.headers or {}))

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return error_reply(
                422, f"the body is no JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
            )
        where = ".".join(str(part) for part in first["loc"] if part != "body")
        return error_reply(422, f"{where}: {first['msg']}" if where else str(first["msg"]))

    @app.exception_handler(Exception)
    async def broken(request: Request, error: Exception) -> Response:
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_reply(500, "the server made a mistake; its log says which")


class Running:
    """A server in a thread of its own: `address` is where it listens, `stop` ends it."""

    def __init__(self, app: FastAPI, host: str = "127.0.0.1", port: int = 8000):
        listener = listen(host, port)
        shown = f"[{host}]" if ":" in host else host
        self.address = f"http://{shown}:{listener.getsockname()[1]}"
        config = uvicorn.Config(app, log_level="warning", limit_concurrency=64, timeout_graceful_shutdown=2)
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [listener]}, daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return when the server has ended."""
        while self._thread.is_alive():
            self._thread.join(1)

    def stop(self) -> None:
        """End the server and wait for it."""
        self._server.should_exit = True
        self._thread.join(10)


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens; port 0 is any free one. Raises ValueError if it cannot be had."""
    if not 0 <= port <= 65535:
        raise ValueError(f"cannot listen on port {port}: expected 0 (any free one) to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or error
        raise ValueError(
            f"cannot listen on {host} port {port}: {reason}; choose another port, 0 for any free one"
        ) from None


def serve_app(
    app: FastAPI, host: str = "127.0.0.1", port: int = 8000, ready: Callable[[str], None] | None = None
) -> None:
    """Serve until Ctrl-C; `ready` is called with the address as soon as it listens.

    port 0 takes any free one. Raises ValueError if the port cannot be had.
    """
    running = Running(app, host, port)
    if ready is not None:
        ready(running.address)
    try:
        running.wait()
    except KeyboardInterrupt:
        running.stop()
