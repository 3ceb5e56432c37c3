"""Say a task in words: which thing, what to do, and how, with paraphrases, some of them held out.

A thing is named by what tells it apart in its scene: colour, shape, size, any two or all of them, or its
place among the things. Held-out wordings are sentences that training never says, made of
words that it does say.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from .scenes import COLOURS, Scene
from .tasks import Task, tasks_of

NOUNS = {"cube": ("cube", "block"), "ball": ("ball", "sphere"), "can": ("can", "cylinder")}
ADJECTIVES = {"small": ("small", "little"), "large": ("large", "big")}
POSITIONS = ("leftmost", "rightmost", "nearest", "farthest")
_APART = 0.04  # metres by which a thing has to lie farther out to be called the leftmost

PLACE_WORDS = {
    "goal": ("the goal", "the ring"),
    "left": ("the left side", "the left edge"),
    "right": ("the right side", "the right edge"),
    "far": ("the far side", "the far edge"),
}

REACH = (
    "reach {x}",
    "go to {x}",
    "touch {x}",
    "move the finger to {x}",
    "bring the finger to {x}",
    "find {x} and reach it",
)
REACH_HELD_OUT = ("move to {x}", "go and touch {x}", "bring the finger over to {x} and touch it")
PUSH = (
    "push {x} to {p}",
    "slide {x} to {p}",
    "move {x} over to {p}",
    "push {x} until it is at {p}",
    "bring {x} to {p}",
    "find {x} and push it to {p}",
)
PUSH_HELD_OUT = ("slide {x} over to {p}", "move {x} until it is at {p}", "go and push {x} to {p}")

MANNERS = {
    "plain": (
        "{d}",
        "{d} directly",
        "just {d}",
        "simply {d}",
        "go ahead and {d}",
        "{d} and that is all",
        "{d}, in any way",
        "now {d}",
    ),
    "avoid": (
        "{d} and avoid the obstacle",
        "{d} without touching the post",
        "avoiding the obstacle, {d}",
        "{d}, but stay away from the post",
        "mind the obstacle and {d}",
        "{d}, around the post",
        "keep clear of the post, {d}",
        "{d}, and do not touch the obstacle",
    ),
    "save": (
        "{d} and save energy",
        "{d} slowly, with little energy",
        "saving energy, {d}",
        "{d}, but use little energy",
        "take it slowly and {d}",
        "{d}, slowly",
        "with little energy, {d}",
        "{d}, and do not waste energy",
    ),
    "both": (
        "{d}, avoid the obstacle and save energy",
        "avoiding the post and saving energy, {d}",
        "{d} slowly without touching the post",
        "{d}, but stay away from the obstacle and use little energy",
        "mind the post, go slowly and {d}",
        "{d} slowly, around the obstacle",
        "keep clear of the obstacle, use little energy and {d}",
        "{d}, and neither touch the post nor waste energy",
    ),
}
"""Eight each, as many with "and" and with commas in one manner as in another: words that join say nothing."""

MANNERS_HELD_OUT = {
    "plain": ("{d}, just directly",),
    "avoid": ("stay away from the obstacle and {d}", "{d}, but avoid touching the post"),
    "save": ("use little energy and {d}", "slowly {d}, saving energy"),
    "both": (
        "stay away from the post, save energy and {d}",
        "{d} with little energy, without touching the obstacle",
    ),
}

_WORD = re.compile(r"[a-z]+|[,.]")


@dataclass(frozen=True)
class Instruction:
    """A task in words, and its parts apart, for conditions that are to be told one by one.

    Attributes:
        task: what it means.
        text: the whole sentence.
        which: the words for the thing, as "the small red ball".
        what: the words for the deed, as "push it to the goal".
        how: the words for the manner alone, as "avoid the obstacle"; "" for plain ones.
        by: what tells the thing apart: "colour", "size shape", "position", and so on.
        held_out: whether the sentence is one that training never says.
    """

    task: Task
    text: str
    which: str
    what: str
    how: str
    by: str
    held_out: bool

    def to_dict(self) -> dict[str, Any]:
        """The instruction as JSON can hold it; `Instruction.from_dict` gives it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Instruction:
        """The instruction that `to_dict` wrote. Raises ValueError for anything else."""
        try:
            return cls(**{**data, "task": Task(**data["task"])})
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"instruction: expected what Instruction.to_dict writes, got {str(data)[:80]!r} ({error})"
            ) from error


def instructions(rng: np.random.Generator, scene: Scene, held_out: bool = False) -> list[Instruction]:  # noqa: FBT001, FBT002
    """Every task that a scene admits, each said in one of its wordings.

    Args:
        rng: draws the wordings.
        scene: in the view of the arm that is told (`Scene.seen_by`).
        held_out: say them as training never does.

    Example:
        told = instructions(np.random.default_rng(0), scene)
    """
    return [say(rng, scene, task, held_out=held_out) for task in tasks_of(scene)]


def say(
    rng: np.random.Generator,
    scene: Scene,
    task: Task,
    *,
    held_out: bool = False,
    by: Collection[str] | None = None,
) -> Instruction:
    """One wording of a task, drawn evenly from those that name the thing and no other.

    A held-out one has a new sentence for the deed, or for the manner, or for both. `by` leaves only some ways
    to name the thing ("colour", "size shape", "position"); ValueError where none of them names it alone.
    """
    every = descriptions(scene)[task.which]
    names = {key: name for key, name in every.items() if by is None or key in by}
    if not names:
        raise ValueError(f"by: expected one of {', '.join(sorted(every))}, got {', '.join(by or ())}")
    by = _pick(rng, sorted(names))
    which = names[by] if by == "position" else _spoken(rng, names[by])
    place = None if task.place is None else _pick(rng, PLACE_WORDS[task.place])
    deeds = REACH if task.what == "reach" else PUSH
    manners = MANNERS[task.how]
    if held_out:
        new_deed, new_manner = ((True, False), (False, True), (True, True))[rng.integers(3)]
        if new_deed:
            deeds = REACH_HELD_OUT if task.what == "reach" else PUSH_HELD_OUT
        if new_manner:
            manners = MANNERS_HELD_OUT[task.how]
    deed, manner = _pick(rng, deeds), _pick(rng, manners)
    text = manner.format(d=deed.format(x=which, p=place))
    what = deed.format(x="it", p=place)
    how = " ".join(manner.format(d=" ").split()).replace(" ,", ",").strip(" ,").removesuffix(" and")
    return Instruction(task, text, which, what, how.removeprefix("and ").removeprefix("but "), by, held_out)


def descriptions(scene: Scene) -> list[dict[str, str]]:
    """For each thing, what tells it apart (as "size shape") and the words: unique ones alone."""
    kinds = [{"size": t.size, "colour": t.colour, "shape": t.shape} for t in scene.things]
    found: list[dict[str, str]] = [{} for _ in kinds]
    for count in (1, 2, 3):
        for names in itertools.combinations(("size", "colour", "shape"), count):
            keys = [tuple(kind[name] for name in names) for kind in kinds]
            for i, key in enumerate(keys):
                if keys.count(key) == 1:
                    noun = () if "shape" in names else ("thing",)
                    found[i][" ".join(names)] = " ".join(("the", *key, *noun))
    axes = {"leftmost": (0, -1), "rightmost": (0, 1), "nearest": (1, -1), "farthest": (1, 1)}
    for name, (axis, sign) in axes.items():
        far = [sign * (thing.x, thing.y)[axis] for thing in scene.things]
        order = sorted(range(len(far)), key=far.__getitem__)
        if len(far) > 1 and far[order[-1]] - far[order[-2]] >= _APART:
            found[order[-1]].setdefault("position", f"the {name} thing")
    return found


def vocabulary() -> tuple[str, ...]:
    """Every word that training says, sorted; held-out sentences have few others."""
    names = [*COLOURS, *itertools.chain(*ADJECTIVES.values(), *NOUNS.values()), *POSITIONS, "thing"]
    places = itertools.chain(*PLACE_WORDS.values())
    sentences = [*REACH, *PUSH, *itertools.chain(*MANNERS.values()), *places, *names]
    return tuple(sorted({w for s in sentences for w in words(re.sub(r"\{\w\}", "", s))} | {"the", "object"}))


def words(text: str) -> list[str]:
    """A text's words and punctuation marks, in lower case."""
    return _WORD.findall(text.lower())


def _spoken(rng: np.random.Generator, text: str) -> str:
    """The words with synonyms drawn."""
    synonyms = {**NOUNS, **ADJECTIVES, "thing": ("thing", "object")}
    return " ".join(_pick(rng, synonyms[word]) if word in synonyms else word for word in text.split())


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.integers(len(options)))]
