"""Fresh scenes for the page and the demo, rendered on the spot, with questions whose answers are known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8

from torchfilm.data.clevr.questions import QuestionConfig, QuestionGenerator
from torchfilm.data.clevr.render import render
from torchfilm.data.clevr.scenes import SceneConfig, sample_scene
from torchfilm.systems.visual_reasoning.pictures import frame

Pixels = UInt8[np.ndarray, "height width 3"]
ATTRIBUTES = ("size", "color", "material", "shape")


@dataclass(frozen=True)
class Example:
    """A question about a scene with the answer that the scene's facts give."""

    question: str
    answer: str


@dataclass(frozen=True)
class FreshScene:
    """One scene twice: `display` for people, `small` for the network; `facts` are the objects' attributes."""

    seed: int
    display: Pixels
    small: Pixels
    facts: tuple[dict[str, str], ...]
    examples: tuple[Example, ...]


@runtime_checkable
class Scenes(Protocol):
    """Anything that makes the scene of a seed; the same seed gives the same scene."""

    def make(self, seed: int) -> FreshScene:
        """Make the scene of this seed (seed >= 0)."""
        ...


@dataclass(frozen=True)
class RenderedScenes:
    """Scenes from the project's own generator.

    Sizes are (width, height) in pixels; another ratio than 3:2 for `small` squeezes the picture. `examples`:
    how many of the questions drawn to offer, short ones first. The defaults are the laptop recipe's scenes.
    """

    scene: SceneConfig = field(default_factory=lambda: SceneConfig(max_objects=6))
    questions: QuestionConfig = field(default_factory=lambda: QuestionConfig(questions_per_scene=30))
    display: tuple[int, int] = (480, 320)
    small: tuple[int, int] = (96, 64)
    examples: int = 5

    def make(self, seed: int) -> FreshScene:
        """Sample, render at both sizes, and draw example questions; deterministic in the seed."""
        rng = np.random.default_rng(seed)
        scene, view = sample_scene(rng, self.scene)
        drawn = QuestionGenerator(self.questions).generate([scene], rng)
        facts = tuple({key: str(thing[key]) for key in ATTRIBUTES} for thing in scene["objects"])
        return FreshScene(
            seed=seed,
            display=render(scene, view, *self.display).image,
            small=frame(render(scene, view, round(1.5 * self.small[1]), self.small[1]).image, *self.small),
            facts=facts,
            examples=_choose(drawn, self.examples),
        )


def _choose(drawn: Sequence[dict[str, Any]], count: int) -> tuple[Example, ...]:
    """The shortest questions, but one of each type (last function) before a second of any, shortest first."""
    ordered = sorted(drawn, key=lambda question: len(question["question"]))
    kinds: dict[str, int] = {}
    ranks = []
    for question in ordered:
        kind = question["program"][-1]["function"]
        ranks.append(kinds.get(kind, 0))
        kinds[kind] = ranks[-1] + 1
    chosen = sorted(range(len(ordered)), key=lambda i: (ranks[i], i))[:count]
    return tuple(Example(ordered[i]["question"], str(ordered[i]["answer"])) for i in sorted(chosen))
