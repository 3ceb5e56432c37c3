"""`torchfilm serve`."""

from __future__ import annotations

from dataclasses import dataclass

from torchfilm.app.console import emit, note
from torchfilm.app.options import OptionalInt, OptionalPath

USUAL_PORT = 8000


@dataclass(frozen=True)
class Serve:
    """Serve the page on which to ask pictures questions, and to turn γ and β; Ctrl-C ends it.

    Example: torchfilm serve --model runs/first --port 8080
    """

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
        from torchfilm.app.server import serve
        from torchfilm.systems.visual_reasoning.answering import Answerer
        from torchfilm.systems.visual_reasoning.bundle import find_bundle

        answerer = Answerer.load(None if self.model is None else find_bundle(self.model))
        if self.port is not None:
            serve(answerer, self.host, self.port, self._ready)
            return
        try:
            serve(answerer, self.host, USUAL_PORT, self._ready)
        except ValueError as error:
            note(f"{error}: taking a free one")
            serve(answerer, self.host, 0, self._ready)

    def _ready(self, address: str) -> None:
        if self.json:
            emit({"address": address})
        else:
            print(f"Ask at {address} (Ctrl-C ends it)", flush=True)
