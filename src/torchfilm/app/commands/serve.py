"""`torchfilm serve`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from torchfilm.app.commands.train import known_system
from torchfilm.app.console import emit, note
from torchfilm.app.options import OptionalInt, OptionalPath, SystemName
from torchfilm.extras import needed

if TYPE_CHECKING:
    from fastapi import FastAPI

USUAL_PORT = 8000
ASK = {"visual_reasoning": "Ask at", "diffusion_policy": "Tell the arm what to do at"}


@dataclass(frozen=True)
class Serve:
    """Serve a system's page; Ctrl-C ends it.

    visual_reasoning: ask pictures questions, and turn γ and β. diffusion_policy: tell an arm what to do and
    how, four ways side by side.

    Example: torchfilm serve --model runs/first --port 8080

    Example: torchfilm serve diffusion_policy
    """

    system: SystemName = "visual_reasoning"
    """the system"""
    model: OptionalPath = None
    """run or bundle; default: the shipped checkpoint"""
    host: str = "127.0.0.1"
    """address to listen on; 0.0.0.0 for all of the machine's"""
    port: OptionalInt = None
    """0 for any free one; default: 8000, or any free one if that is taken"""
    json: bool = False
    """print the address as one JSON object"""

    def __call__(self) -> None:
        """Serve."""
        with needed("pages need a server", "serve"):
            from torchfilm.app.serving import serve_app

        known_system(self.system)
        app = self._policy() if self.system == "diffusion_policy" else self._reasoning()
        if self.port is not None:
            serve_app(app, self.host, self.port, self._ready)
            return
        try:
            serve_app(app, self.host, USUAL_PORT, self._ready)
        except ValueError as error:
            note(f"{error}: taking a free one")
            serve_app(app, self.host, 0, self._ready)

    def _reasoning(self) -> FastAPI:
        from torchfilm.app.scenes import RenderedScenes
        from torchfilm.app.server import create_app
        from torchfilm.systems.visual_reasoning.answering import Answerer
        from torchfilm.systems.visual_reasoning.bundle import find_bundle

        answerer = Answerer.load(None if self.model is None else find_bundle(self.model))
        return create_app(answerer, RenderedScenes(small=(answerer.width, answerer.height)))

    def _policy(self) -> FastAPI:
        from torchfilm.app.policy_server import create_policy_app
        from torchfilm.systems.diffusion_policy import load
        from torchfilm.systems.diffusion_policy.policy import Policy

        return create_policy_app(Policy(load(self.model)))

    def _ready(self, address: str) -> None:
        if self.json:
            emit({"address": address})
        else:
            print(f"{ASK[self.system]} {address} (Ctrl-C ends it)", flush=True)
