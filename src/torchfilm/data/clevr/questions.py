"""Generate CLEVR questions: released form, all 90 families, answers that the words do not give away.

Families are taken least used first, so that all have equal shares; each gets a bounded number of attempts on
a scene (`sampling`), and is passed over where the scene does not allow it. The state that balances families
and answers lives for one call of `generate` (a shard of scenes), so the bytes depend only on the scenes of
the shard and on its random source.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .balancing import AnswerBalance
from .catalogue import ATTRIBUTES
from .masks import SceneMasks
from .sampling import Draft, Sampler
from .templates import FAMILIES, Family
from .vocabulary import answer_text
from .wording import Phrase, say

_FILTERS = tuple(f"filter_{name}" for name in ATTRIBUTES)


@dataclass(frozen=True)
class QuestionConfig:
    """How many questions, and how hard the generator tries.

    questions_per_scene: wanted for each scene (10 in CLEVR); fewer where a scene does not allow as many
    different ones. attempts: draws for one family on one scene before it is passed over. count_cap and
    family_cap: largest shares that one count may have among the questions of one form and of one family.
    trivial_fraction: largest share of relations to a set that change nothing (0.1 in CLEVR).
    """

    questions_per_scene: int = 10
    attempts: int = 15
    count_cap: float = 0.36
    family_cap: float = 0.45
    trivial_fraction: float = 0.1

    def __post_init__(self) -> None:
        for name in ("questions_per_scene", "attempts"):
            if getattr(self, name) < 1:
                raise ValueError(f"QuestionConfig.{name} must be at least 1, got {getattr(self, name)}.")
        for name in ("count_cap", "family_cap"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"QuestionConfig.{name} must be in (0, 1], got {getattr(self, name)}.")
        if not 0 <= self.trivial_fraction < 1:
            raise ValueError(
                f"QuestionConfig.trivial_fraction must be in [0, 1), got {self.trivial_fraction}."
            )


class QuestionGenerator:
    """Makes questions in the released CLEVR_v1.0 form for scenes in that form."""

    def __init__(self, config: QuestionConfig | None = None) -> None:
        self.config = config or QuestionConfig()

    def generate(self, scenes: Sequence[Mapping[str, Any]], rng: np.random.Generator) -> list[dict[str, Any]]:
        """Questions for one shard of scenes, in the scenes' order; `question_index` starts at 0 in each call.

        Each has the released keys: split, image_index, image_filename, question, answer, program (list of
        function, inputs, value_inputs), question_family_index (0 to 89), question_index. Same scenes and same
        state of `rng`: same questions.
        """
        run = _Run(self.config, random.Random(int(rng.integers(2**63))))
        questions: list[dict[str, Any]] = []
        for scene in scenes:
            for family, draft in run.scene(SceneMasks(scene)):
                questions.append(
                    {
                        "split": scene["split"],
                        "image_index": scene["image_index"],
                        "image_filename": scene["image_filename"],
                        "question": say(family, draft.phrases, draft.relations, run.rnd),
                        "answer": answer_text(draft.answer),
                        "program": build_program(family, draft.phrases, draft.relations),
                        "question_family_index": family.index,
                        "question_index": len(questions),
                    }
                )
        return questions


class _Run:
    """One call of `generate`: its random source, what has been used and answered so far."""

    def __init__(self, config: QuestionConfig, rnd: random.Random) -> None:
        self.config, self.rnd = config, rnd
        self.balance = AnswerBalance()
        caps = (config.count_cap, config.family_cap)
        self.sampler = Sampler(rnd, self.balance, count_caps=caps)
        self.used = [0] * len(FAMILIES)
        self.relations = self.trivials = 0

    def scene(self, masks: SceneMasks) -> list[tuple[Family, Draft]]:
        """The questions of one scene: families least used first, and again while some succeed."""
        wanted = self.config.questions_per_scene
        found: list[tuple[Family, Draft]] = []
        seen: set[tuple[object, ...]] = set()
        order = sorted(range(len(FAMILIES)), key=lambda index: (self.used[index], self.rnd.random()))
        while order and len(found) < wanted:
            again = []
            for index in order:
                draft = self._draw(FAMILIES[index], masks, seen)
                if draft is not None:
                    found.append((FAMILIES[index], draft))
                    again.append(index)
                    if len(found) == wanted:
                        break
            order = again
        return found

    def _draw(self, family: Family, masks: SceneMasks, seen: set[tuple[object, ...]]) -> Draft | None:
        chained = (
            family.file.endswith("_hop") and family.terminal in ("count", "exist") and len(family.hidden) > 1
        )
        for _ in range(self.config.attempts):
            fraction = self.config.trivial_fraction
            trivial = (
                chained and self.trivials + 1 <= fraction * (self.relations + 1) and self.rnd.random() < 0.2
            )
            draft = self.sampler.draw(family, masks, trivial=trivial)
            if draft is None:
                continue
            identity = (family.index, draft.phrases, draft.relations)
            if identity in seen:
                continue
            seen.add(identity)
            self.balance.add(draft.keys, draft.answer)
            self.used[family.index] += 1
            self.relations += chained
            self.trivials += draft.trivial
            return draft
        return None


def build_program(
    family: Family, phrases: Sequence[Phrase], relations: Sequence[str]
) -> list[dict[str, Any]]:
    """The family's program with these words, in the released form, topologically sorted."""
    program: list[dict[str, Any]] = []
    stack: list[int] = []

    def push(function: str, inputs: list[int], values: list[str]) -> None:
        program.append({"function": function, "inputs": inputs, "value_inputs": values})
        stack.append(len(program) - 1)

    for step in family.steps:
        verb, _, which = step.partition(" ")
        if verb == "scene":
            push("scene", [], [])
        elif verb == "filter":
            for function, value in zip(_FILTERS, phrases[int(which)], strict=True):
                if value is not None:
                    push(function, [stack.pop()], [value])
        elif verb == "relate":
            push("relate", [stack.pop()], [relations[int(which)]])
        elif verb in ("same", "query"):
            push(f"{verb}_{which}", [stack.pop()], [])
        elif verb in ("unique", "count", "exist"):
            push(verb, [stack.pop()], [])
        else:
            second, first = stack.pop(), stack.pop()
            push(step.replace(" ", "_"), [first, second], [])
    return program
