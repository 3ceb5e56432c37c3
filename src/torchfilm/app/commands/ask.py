"""`torchfilm ask`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from torchfilm.app.console import emit, percent
from torchfilm.app.options import OptionalPath


@dataclass(frozen=True)
class Ask:
    """Ask a picture a question: the answer, its probability, and the runner-up.

    Example: torchfilm ask data-clevr/images/train/CLEVR_train_000000.png
    "How many red cubes are left of the sphere?"
    """

    image: Annotated[Positional[Path], arg(metavar="IMAGE")]
    """a PNG or JPEG file"""
    question: Annotated[Positional[str], arg(metavar="QUESTION")]
    """in CLEVR's words"""
    model: OptionalPath = None
    """run or bundle; default: the shipped checkpoint"""
    json: bool = False
    """print one JSON object"""

    def __call__(self) -> None:
        """Ask."""
        from torchfilm.systems.visual_reasoning.answering import ask
        from torchfilm.systems.visual_reasoning.bundle import find_bundle

        found = ask(self.image, self.question, None if self.model is None else find_bundle(self.model))
        if self.json:
            emit(
                {
                    "answer": found.answer,
                    "probability": found.probability,
                    "runner_up": found.runner_up,
                    "probabilities": dict(found.probabilities),
                    "tokens": found.tokens,
                    "looked": found.looked,
                }
            )
            return
        second = dict(found.probabilities).get(found.runner_up)
        print(f"{found.answer}  {percent(found.probability)}  (else {found.runner_up}, {percent(second)})")
