"""What `heard` found, in words and numbers: is the condition ignored, used to no advantage, or heard?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torchfilm.intervals import Estimate
from torchfilm.writing import in_columns, in_digits, with_interval

HARDLY = 0.01
"""Where no score tells, an output that changes by no more of the difference between samples is the same."""

_ALONE = "swap "  # in front of the name of one of several conditions

Verdict = Literal["ignored", "unused", "heard"]


@dataclass(frozen=True)
class Effect:
    """What one change of the conditions does.

    Args:
        output: root mean square change of the outputs, in units of the root mean square difference between
            the outputs of two samples of a batch: 0 for none, 1 for as much as another sample makes. Integers
            and words count as equal or different.
        loss: how much the loss rises, in its own unit; None where it was not measured.
        success: how much the success changes, -1..1; None where it was not measured.
        beyond: by how much more than a repetition does, sample by sample; None for the repetition itself, and
            where that changes nothing.
    """

    output: Estimate
    loss: Estimate | None
    success: Estimate | None
    beyond: Effect | None = None

    @property
    def proper(self) -> Effect:
        """Return what the change of the condition itself does, without what chance does."""
        return self.beyond or self


@dataclass(frozen=True)
class Hearing:
    """What `heard` found; `print` shows it in words and numbers.

    Args:
        effects: by name: "repeat" (the same conditions once more: what chance alone does), "swap", "blank",
            "paraphrase", those that were measured; and of several conditions "swap NAME", this one alone.
        loss: the loss with the right conditions.
        success: the success with the right conditions, 0..1.
        left_out: how many samples are in batches with a single condition, where there is no other to give.
        notes: what was not measured, and why.
        remedy: what to do where the condition is ignored; empty where there is nothing to ask.
    """

    effects: dict[str, Effect]
    loss: Estimate | None
    success: Estimate | None
    left_out: int
    notes: tuple[str, ...]
    remedy: str = ""

    @property
    def verdict(self) -> Verdict:
        """Return "ignored", "unused" or "heard"; `words` states the criterion."""
        return self._verdict(self.effects["swap"])

    @property
    def ignored(self) -> tuple[str, ...]:
        """Return which of several conditions are ignored, each exchanged by itself."""
        alone = [(name, effect) for name, effect in self.effects.items() if name.startswith(_ALONE)]
        return tuple(
            name.removeprefix(_ALONE) for name, effect in alone if self._verdict(effect) == "ignored"
        )

    def _verdict(self, swap: Effect) -> Verdict:
        if _clear(swap.proper.loss, 1) or _clear(swap.proper.success, -1):
            return "heard"
        unsure = swap.beyond or math.isinf(swap.output.high)
        if swap.output.value <= HARDLY or (unsure and not _clear(swap.proper.output, 1)):
            return "ignored"
        return "heard" if swap.loss is None and swap.success is None else "unused"

    @property
    def words(self) -> str:
        """Return the verdict as sentences, with the criterion."""
        swap, proper = self.effects["swap"].output, self.effects["swap"].proper.output
        change = f"swapping it changes the output by {_shown(swap)} of the difference between samples"
        if math.isinf(swap.value):
            change = "swapping it changes an output that is the same for all samples otherwise"
        if self.verdict == "ignored":
            floor = f"less than {HARDLY}"
            if swap.value > HARDLY:
                (chance,) = in_digits(self.effects["repeat"].output.value)
                more = f"({chance}; the difference is {_shown(proper, '+')})"
                if math.isinf(proper.high):
                    more = "(one group, or one call whose chance all samples share, has no interval)"
                floor = f"not clearly more than a repetition with the same condition does {more}"
            return f"The condition is ignored: {change}, {floor}. {self.remedy}".rstrip()
        if self.verdict == "unused":
            return (
                f"The condition changes the output, but to no clear advantage: {change}, "
                f"yet {self._no_worse()}."
                f"{self._deaf()}"
            )
        return f"The condition is heard: {change}{self._harm()}.{self._deaf()}{self._wording()}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values: all numbers, None for what is without bound, and the verdict."""
        told = {"verdict": self.verdict, "ignored": list(self.ignored), "words": self.words}
        return _bounded(asdict(self)) | told

    def __repr__(self) -> str:
        """Show the verdict, a table of all numbers with 95 % intervals, and what they mean."""
        rows = [("condition", "output changes by", "loss", "success", "n")]
        n = self.effects["repeat"].output.n
        rows.append(("as it is", "", _shown(self.loss), _shown(self.success), str(n)))
        for name, effect in self.effects.items():
            cells = (str(effect.output), _shown(effect.loss, "+"), _shown(effect.success, "+"))
            rows.append((name, *cells, str(effect.output.n)))
        kept = [i for i in range(5) if any(row[i] for row in rows[1:])]
        table = in_columns([[row[i] for i in kept] for row in rows])
        legend = "output: 1 is the difference between two samples; loss, success: change; [95 % intervals]"
        return "\n".join([self.words, "", table, "", legend, *self.notes])

    def _no_worse(self) -> str:
        swap = self.effects["swap"]
        if swap.loss is not None and swap.loss.high < 0:
            return "the loss falls with another sample's condition: are conditions and samples out of step?"
        parts = [("the loss does not clearly rise", swap.loss, swap.proper.loss, 1)]
        parts += [("the success does not clearly fall", swap.success, swap.proper.success, -1)]
        shown = []
        for text, found, proper, sign in parts:
            if found is not None:
                more = " by more than in a repetition" if _clear(found, sign) else ""
                shown.append(f"{text}{more} ({proper if more else found})")
        return " and ".join(shown)

    def _harm(self) -> str:
        """Return what a swap does to each score: the harm first, then what does not go with it."""
        swap = self.effects["swap"]
        more = " more than in a repetition" if swap.beyond else ""
        scores = (("loss", "success", swap.proper.loss, 1), ("success", "loss", swap.proper.success, -1))
        harm, rest = [], []
        for name, other, found, sign in scores:
            if found is None:
                continue
            moves = f"the {name} {'rises' if found.value > 0 else 'falls'} by {abs(found.value):.3g}{more}"
            if _clear(found, sign):
                harm.append(moves)
            elif _clear(found, -sign):
                rest.append(f"but {moves}, which contradicts the {other}")
            else:
                surely = "" if found.low == found.high == 0 else " clearly"
                rest.append(f"but the {name} does not{surely} change ({_shown(found, '+')})")
        return "".join(f", {part}" for part in (" and ".join(harm), *rest) if part)

    def _deaf(self) -> str:
        """Return a sentence on those of several conditions that are ignored."""
        if not self.ignored:
            return ""
        found = (
            f"{name} ({in_digits(self.effects[_ALONE + name].output.value)[0]})" for name in self.ignored
        )
        return f" Swapped alone, ignored: {', '.join(found)}."

    def _wording(self) -> str:
        if "paraphrase" not in self.effects:
            return ""
        found = self.effects["paraphrase"].output
        if math.isinf(found.value):  # without bound: the outputs of two samples do not differ
            return ""
        return f" Other words for the same condition change it by {found}."


def _clear(found: Estimate | None, sign: int) -> bool:
    """Whether a change is clear of zero, in the direction of the sign."""
    return found is not None and (found.low > 0 if sign > 0 else found.high < 0)


def _bounded(found: Any) -> Any:
    """Return None in place of infinity, which JSON does not have."""
    if isinstance(found, dict):
        return {name: _bounded(one) for name, one in found.items()}
    return None if isinstance(found, float) and math.isinf(found) else found


def _shown(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return ""
    return with_interval(found.value, found.low, found.high, sign=sign)
