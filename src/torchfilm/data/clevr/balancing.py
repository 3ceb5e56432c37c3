"""Keep answers apart from words: which answer is owed next, per family and form.

A question's form is which attributes its noun phrases say. Two rules make the form say nothing about a yes or
no: a form is used on a scene only where both answers can be had there, and the answer given is the one that
the form has had less often. Counts and values take the least used answer that the scene offers; a count that
would exceed the cap of a key is refused.
"""

import random
from collections.abc import Hashable, Iterable, Sequence

Answer = bool | int | str


class AnswerBalance:
    """Answers so far, by key: a family with a form, a family, or a type of question."""

    def __init__(self) -> None:
        self.counts: dict[Hashable, dict[Answer, int]] = {}

    def owed(self, keys: Sequence[Hashable], answers: Iterable[Answer], rnd: random.Random) -> Answer:
        """The least used of the answers: by the sum of their shares over the keys, ties by lot."""
        tables = [self.counts.get(key, {}) for key in keys]
        totals = [sum(table.values()) + 1 for table in tables]
        best, chosen, ties = 1e9, None, 0
        for answer in answers:
            used = sum(table.get(answer, 0) / total for table, total in zip(tables, totals, strict=True))
            if used < best - 1e-12:
                best, chosen, ties = used, answer, 1
            elif used <= best + 1e-12:
                ties += 1
                if rnd.random() * ties < 1:
                    chosen = answer
        if chosen is None:
            raise ValueError("No answers to choose from; expected at least one.")
        return chosen

    def allowed(self, key: Hashable, answer: Answer, cap: float, spare: int) -> bool:
        """Whether one more of this answer stays within `spare` of its largest share `cap` of the key."""
        table = self.counts.get(key, {})
        return table.get(answer, 0) + 1 <= cap * (sum(table.values()) + 1) + spare

    def add(self, keys: Sequence[Hashable], answer: Answer) -> None:
        """Note an answer that was given."""
        for key in keys:
            table = self.counts.setdefault(key, {})
            table[answer] = table.get(answer, 0) + 1
