"""What `heard` found, in words and numbers: is the condition ignored, used to no advantage, or heard?"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

from torchfilm.writing import in_columns

HARDLY = 0.01
"""An output that changes by less than this share of the difference between samples counts as the same."""

_ALONE = "swap "  # in front of the name of one of several conditions

Verdict = Literal["ignored", "unused", "heard"]


@dataclass(frozen=True)
class Estimate:
    """A number over samples with its interval: percentiles 2.5 and 97.5 of bootstrap resamples.

    Args:
        value: the number.
        low: where its interval starts.
        high: where it ends.
        n: how many samples it is over.
    """

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        """Show the number and its interval."""
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


@dataclass(frozen=True)
class Effect:
    """What one change of the conditions does.

    Args:
        output: root mean square change of the outputs, in units of the root mean square difference between
            the outputs of two samples of a batch: 0 for none, 1 for as much as another sample makes. Integers
            and words count as equal or different.
        loss: how much the loss rises, in its own unit; None where it was not measured.
        success: how much the success changes, -1..1; None where it was not measured.
    """

    output: Estimate
    loss: Estimate | None
    success: Estimate | None


@dataclass(frozen=True)
class Hearing:
    """What `heard` found; `print` shows it in words and numbers.

    Args:
        effects: by name: "repeat" (the same conditions once more: what chance alone does), "swap", "blank",
            "paraphrase", those that were measured; and of several conditions "swap NAME", this one alone.
        loss: the loss with the right conditions.
        success: the success with the right conditions, 0..1.
        left_out: how many samples had no different condition to swap with in their batch.
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
        repeat = self.effects["repeat"]
        if swap.output.value <= HARDLY:
            return "ignored"
        if _above(swap.loss, repeat.loss, 1) or _above(swap.success, repeat.success, -1):
            return "heard"
        if repeat.output.value > 0 and swap.output.low <= repeat.output.high:
            return "ignored"
        return "heard" if swap.loss is None and swap.success is None else "unused"

    @property
    def words(self) -> str:
        """Return the verdict as sentences, with the criterion."""
        swap, chance = self.effects["swap"].output, self.effects["repeat"].output
        change = f"swapping it changes the output by {_shown(swap)} of the difference between samples"
        if math.isinf(swap.value):
            change = "swapping it changes the output, which is the same for all samples otherwise"
        if self.verdict == "ignored":
            floor = (
                f"no more than a repetition with the same condition does ({chance.value:.2g})"
                if swap.value > HARDLY
                else f"less than {HARDLY}"
            )
            return f"The condition is ignored: {change}, {floor}. {self.remedy}".rstrip()
        if self.verdict == "unused":
            return (
                f"The condition changes the output, but to no advantage: {change}, yet {self._no_worse()}."
                f"{self._deaf()}"
            )
        return f"The condition is heard: {change}{self._harm()}.{self._deaf()}{self._wording()}"

    def to_json(self) -> dict[str, Any]:
        """Return plain values: all numbers and the verdict."""
        return asdict(self) | {"verdict": self.verdict, "ignored": list(self.ignored), "words": self.words}

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
        parts = [("the loss does not rise", swap.loss, 1), ("the success does not fall", swap.success, -1)]
        shown = []
        for text, found, sign in parts:
            if found is not None:
                more = " by more than in a repetition" if min(sign * found.low, sign * found.high) > 0 else ""
                shown.append(f"{text}{more} ({found})")
        return " and ".join(shown)

    def _harm(self) -> str:
        """Return what a swap does to each score: the harm first, then what does not go with it."""
        swap, repeat = self.effects["swap"], self.effects["repeat"]
        scores = (
            ("loss", "success", swap.loss, repeat.loss, 1),
            ("success", "loss", swap.success, repeat.success, -1),
        )
        harm, rest = [], []
        for name, other, found, chance, sign in scores:
            if found is None:
                continue
            moves = f"the {name} {'rises' if found.value > 0 else 'falls'} by {abs(found.value):.3g}"
            if _above(found, chance, sign):
                harm.append(moves)
            elif _above(found, chance, -sign):
                rest.append(f"but {moves}, which contradicts the {other}")
            else:
                surely = "" if found.low == found.high == 0 else " clearly"
                rest.append(f"but the {name} does not{surely} change ({_shown(found, '+')})")
        return "".join(f", {part}" for part in (" and ".join(harm), *rest) if part)

    def _deaf(self) -> str:
        """Return a sentence on those of several conditions that are ignored."""
        if not self.ignored:
            return ""
        found = (f"{name} ({self.effects[_ALONE + name].output.value:.3f})" for name in self.ignored)
        return f" Swapped alone, ignored: {', '.join(found)}."

    def _wording(self) -> str:
        if "paraphrase" not in self.effects:
            return ""
        share = self.effects["paraphrase"].output.value / self.effects["swap"].output.value
        if math.isnan(share):  # both without bound: the outputs of two samples do not differ
            return ""
        return f" Other words for the same condition change {share:.0%} of what another condition does."


def _above(found: Estimate | None, chance: Estimate | None, sign: int) -> bool:
    """Whether a change in the direction of the sign is clear of zero, and of what a repetition makes."""
    if found is None or chance is None:
        return False
    low, floor = (found.low, chance.high) if sign > 0 else (-found.high, -chance.low)
    return low > max(0.0, floor)


def _shown(found: Estimate | None, sign: str = "") -> str:
    if found is None:
        return ""
    return f"{found.value:{sign}.3f} [{found.low:{sign}.3f}, {found.high:{sign}.3f}]"
