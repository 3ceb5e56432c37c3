"""Find a well-posed, non-degenerate instance of a question family on a scene, with the answer that is owed.

One attempt draws the forms first (which attributes each noun phrase says), then lists what the scene offers
in these forms, grouped by answer, then takes the answer that is owed, then one of its instances by lot.
Rejected are, after Johnson et al. 2017 (arXiv 1612.06890, section 3, question generation): descriptions that
fit none or several objects; relations without which the same objects would be meant; questions whose words
alone decide the answer.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from .balancing import Answer, AnswerBalance
from .catalogue import ATTRIBUTES, RELATIONS
from .masks import SceneMasks, entails, gives_away, members
from .templates import Family
from .wording import Phrase

_PLACES = {name: place for place, name in enumerate(ATTRIBUTES)}
_BITS = tuple(bin(form).count("1") for form in range(16))


@dataclass(frozen=True)
class Draft:
    """An instance of a family: noun phrases and relations in the program's order, answer, balancing keys."""

    phrases: tuple[Phrase, ...]
    relations: tuple[str, ...]
    answer: Answer
    keys: tuple[tuple[object, ...], ...]
    trivial: bool = False


class _Part(NamedTuple):
    """A piece of an instance: the objects it means, and its words."""

    mask: int
    phrases: tuple[Phrase, ...]
    relations: tuple[str, ...] = ()


@dataclass
class _Anchors:
    """Objects that the question has singled out so far, the last one being where the next relation starts."""

    last: int
    mask: int
    phrases: list[Phrase] = field(default_factory=list)
    relations: list[str] = field(default_factory=list)


def _form_table(weights: Sequence[float]) -> list[list[int]]:
    """For each set of hidden bits, forms to draw from; `weights[k]`: share of those that say k attributes."""
    table: list[list[int]] = []
    for hidden in range(16):
        forms: list[int] = []
        open_forms = [form for form in range(16) if not form & hidden]
        for said, weight in enumerate(weights):
            peers = [form for form in open_forms if _BITS[form] == said]
            for form in peers:
                forms += [form] * max(1 if weight else 0, round(48 * weight / len(peers)))
        table.append(forms or [0])
    return table


_ANCHOR_FORMS = _form_table((0.0, 0.3, 0.4, 0.2, 0.1))
_HOP_FORMS = _form_table((0.2, 0.4, 0.25, 0.1, 0.05))
_EXIST_FORMS = _form_table((0.05, 0.3, 0.35, 0.2, 0.1))
_COUNT_FORMS = _form_table((0.15, 0.45, 0.3, 0.08, 0.02))


class Sampler:
    """Draws instances of families; `trivial` asks for a relation that changes nothing."""

    def __init__(
        self, rnd: random.Random, balance: AnswerBalance, *, count_caps: tuple[float, float]
    ) -> None:
        self.rnd = rnd
        self.balance = balance
        self.count_caps = ((count_caps[0], 1), (count_caps[1], 1))
        self._by_file = {
            "zero_hop": self._zero_hop,
            "one_hop": self._chain,
            "two_hop": self._chain,
            "three_hop": self._chain,
            "same_relate": self._same,
            "single_and": self._and,
            "single_or": self._or,
            "comparison": self._comparison,
            "compare_integer": self._integers,
        }

    def draw(self, family: Family, scene: SceneMasks, *, trivial: bool = False) -> Draft | None:
        """One attempt at an instance; None where the forms drawn offer nothing that is wanted."""
        return self._by_file[family.file](family, scene, trivial=trivial)

    # -- pieces

    def _form(self, table: list[list[int]], hidden: int = 0) -> int:
        forms = table[hidden]
        return forms[int(self.rnd.random() * len(forms))]

    def _one(self, options: Sequence):
        return options[int(self.rnd.random() * len(options))]

    def _few(self, options: list[_Part], most: int) -> list[_Part]:
        return self.rnd.sample(options, most) if len(options) > most else options

    def _anchor(self, scene: SceneMasks, hidden: int = 0) -> _Anchors | None:
        """An object singled out by its own attributes."""
        form = self._form(_ANCHOR_FORMS, hidden)
        found = scene.unique[form]
        if not found:
            return None
        one = self._one(found)
        return _Anchors(one, 1 << one, [scene.phrase(form, one)])

    def _unique_after(self, scene: SceneMasks, anchors: _Anchors, form: int) -> list[tuple[int, _Part]]:
        """Objects that form and relation single out only together, other than the earlier ones."""
        alike, found = scene.alike[form], []
        for place, name in enumerate(RELATIONS):
            near = scene.related[place][anchors.last]
            for one in members(near & ~anchors.mask):
                mask = alike[one]
                if mask & near == 1 << one and mask != 1 << one:
                    found.append((one, _Part(1 << one, (scene.phrase(form, one),), (name,))))
        return found

    def _sets_after(self, scene: SceneMasks, anchors: _Anchors, form: int, *, trivial: bool) -> list[_Part]:
        """Sets that relation and form describe; the relation matters, or, with `trivial`, changes nothing."""
        found = []
        for place, name in enumerate(RELATIONS):
            near = scene.related[place][anchors.last]
            for mask, one in scene.classes[form]:
                rest = mask & ~anchors.mask
                if ((near & rest) == rest) is trivial and rest:
                    found.append(_Part(mask & near, (scene.phrase(form, one),), (name,)))
            if trivial and (phrase := scene.absent(form, self.rnd, 2)):
                found.append(_Part(0, (phrase,), (name,)))
        return found

    def _settle(
        self, family: Family, form: int, options: dict[Answer, list[_Part]], *, trivial: bool = False
    ) -> Draft | None:
        """Take the owed answer among those that the scene offers; a yes or no needs both on offer."""
        binary = family.terminal == "exist" or family.terminal.startswith(("equal", "less", "greater"))
        if len(options) < (2 if binary else 1):
            return None
        keys: tuple[tuple[object, ...], ...] = ((family.index, form), (family.index,))
        caps: tuple[tuple[float, int], ...] = ()
        if family.terminal == "count":
            keys, caps = ((family.file, form), (family.index,)), self.count_caps
        elif binary:
            said = tuple(value is not None for phrase in options[True][0].phrases for value in phrase)
            keys = ((family.index, said), *keys)
        elif family.asked:
            keys, caps = ((family.terminal,), *keys), ((1.1 / len(ATTRIBUTES[family.asked]), 3),)
        answer = self.balance.owed(keys, options, self.rnd)
        if not all(self.balance.allowed(key, answer, *cap) for key, cap in zip(keys, caps, strict=False)):
            return None
        part = self._one(options[answer])
        return Draft(part.phrases, part.relations, answer, keys, trivial)

    def _by_answer(
        self, family: Family, parts: list[_Part], before: _Anchors | None
    ) -> dict[Answer, list[_Part]]:
        """Group sets by what counting them, or asking whether they are empty, gives."""
        options: dict[Answer, list[_Part]] = {}
        for part in parts:
            answer = part.mask > 0 if family.terminal == "exist" else part.mask.bit_count()
            if before:
                part = _Part(
                    part.mask, (*before.phrases, *part.phrases), (*before.relations, *part.relations)
                )
            options.setdefault(answer, []).append(part)
        return options

    def _queried(
        self, family: Family, scene: SceneMasks, found: list[tuple[int, _Part]], before: _Anchors
    ) -> dict[Answer, list[_Part]]:
        """Group single objects by the value asked for, without those that the words give away."""
        place = _PLACES[family.asked or ""]
        options: dict[Answer, list[_Part]] = {}
        for one, part in found:
            target = part.phrases[-1]
            if not any(gives_away(phrase, target, place) for phrase in before.phrases):
                whole = _Part(
                    part.mask, (*before.phrases, *part.phrases), (*before.relations, *part.relations)
                )
                options.setdefault(scene.objects[one][place], []).append(whole)
        return options

    # -- families

    def _zero_hop(self, family: Family, scene: SceneMasks, *, trivial: bool) -> Draft | None:
        if family.asked:
            form = self._form(_ANCHOR_FORMS, family.hidden[0])
            options: dict[Answer, list[_Part]] = {}
            for one in scene.unique[form]:
                value = scene.objects[one][_PLACES[family.asked]]
                options.setdefault(value, []).append(_Part(1 << one, (scene.phrase(form, one),)))
            return self._settle(family, form, options)
        form = self._form(_EXIST_FORMS if family.terminal == "exist" else _COUNT_FORMS)
        parts = [_Part(mask, (scene.phrase(form, one),)) for mask, one in scene.classes[form]]
        if phrase := scene.absent(form, self.rnd):
            parts.append(_Part(0, (phrase,)))
        return self._settle(family, form, self._by_answer(family, parts, None))

    def _chain(self, family: Family, scene: SceneMasks, *, trivial: bool) -> Draft | None:
        anchors = self._anchor(scene)
        if anchors is None:
            return None
        for _ in range(len(family.hidden) - 2):
            found = self._unique_after(scene, anchors, self._form(_HOP_FORMS))
            if not found:
                return None
            one, part = self._one(found)
            anchors = _Anchors(
                one,
                anchors.mask | 1 << one,
                [*anchors.phrases, *part.phrases],
                [*anchors.relations, *part.relations],
            )
        if family.asked:
            form = self._form(_HOP_FORMS, family.hidden[-1])
            found = self._unique_after(scene, anchors, form)
            return self._settle(family, form, self._queried(family, scene, found, anchors))
        form = self._form(_EXIST_FORMS if family.terminal == "exist" else _COUNT_FORMS)
        parts = self._sets_after(scene, anchors, form, trivial=trivial)
        return self._settle(family, form, self._by_answer(family, parts, anchors), trivial=trivial)

    def _same(self, family: Family, scene: SceneMasks, *, trivial: bool) -> Draft | None:
        shared = scene.same[_PLACES[family.same or ""]]
        if len(family.hidden) == 1:
            form = self._form(_ANCHOR_FORMS, family.hidden[0])
            parts = [
                _Part(shared[one], (scene.phrase(form, one),))
                for one in scene.unique[form]
                if shared[one] != scene.everything & ~(1 << one)
            ]
            return self._settle(family, form, self._by_answer(family, parts, None))
        anchors = self._anchor(scene, family.hidden[0])
        if anchors is None:
            return None
        near = shared[anchors.last]
        if family.asked:
            form = self._form(_HOP_FORMS, family.hidden[1])
            found = []
            for one in members(near):
                mask = scene.alike[form][one]
                if mask & near == 1 << one and mask & ~anchors.mask != 1 << one:
                    found.append((one, _Part(1 << one, (scene.phrase(form, one),))))
            return self._settle(family, form, self._queried(family, scene, found, anchors))
        form = self._form(_EXIST_FORMS if family.terminal == "exist" else _COUNT_FORMS, family.hidden[1])
        parts = [
            _Part(mask & near, (scene.phrase(form, one),))
            for mask, one in scene.classes[form]
            if mask & near != mask & ~anchors.mask
        ]
        return self._settle(family, form, self._by_answer(family, parts, anchors))

    def _and(self, family: Family, scene: SceneMasks, *, trivial: bool) -> Draft | None:
        first, second = self._anchor(scene), self._anchor(scene)
        if first is None or second is None or first.last == second.last:
            return None
        both = _Anchors(second.last, first.mask | second.mask, [*first.phrases, *second.phrases])
        form = self._form(_HOP_FORMS if family.asked else _COUNT_FORMS, family.hidden[2])
        sets: list[_Part] = []
        singles: list[tuple[int, _Part]] = []
        pairs = self.rnd.sample(range(16), 6)
        for pair in pairs:
            one, two = scene.related[pair >> 2][first.last], scene.related[pair & 3][second.last]
            relations = (RELATIONS[pair >> 2], RELATIONS[pair & 3])
            for mask, example in scene.classes[form]:
                hit = mask & one & two
                if hit in (mask & one, mask & two):
                    continue
                part = _Part(hit, (scene.phrase(form, example),), relations)
                if family.asked and hit.bit_count() == 1:
                    singles.append((hit.bit_length() - 1, part))
                sets.append(part)
        if family.asked:
            return self._settle(family, form, self._queried(family, scene, singles, both))
        return self._settle(family, form, self._by_answer(family, sets, both))

    def _side(
        self, scene: SceneMasks, hidden: int, empty: float, *, hop: bool
    ) -> tuple[int, list[_Part], _Anchors | None]:
        """One of two sets to join or compare: all that one drawn form offers, plain or after a relation."""
        anchors = self._anchor(scene) if hop else None
        form = self._form(_COUNT_FORMS, hidden)
        if hop:
            if anchors is None:
                return form, [], None
            parts = self._sets_after(scene, anchors, form, trivial=False)
            return (
                form,
                [_Part(p.mask, (*anchors.phrases, *p.phrases), p.relations) for p in self._few(parts, 10)],
                anchors,
            )
        parts = [_Part(mask, (scene.phrase(form, one),)) for mask, one in scene.classes[form]]
        if self.rnd.random() < empty and (phrase := scene.absent(form, self.rnd)):
            parts.append(_Part(0, (phrase,)))
        return form, parts, None

    def _or(self, family: Family, scene: SceneMasks, *, trivial: bool) -> Draft | None:
        hops = [step.startswith("relate") for step in family.steps]
        first_hop = any(hops[: family.steps.index("scene", 1)])
        second_hop = any(hops[family.steps.index("scene", 1) :])
        hidden = family.hidden[0]
        form, lefts, _ = self._side(scene, hidden, 0.3, hop=first_hop)
        other, rights, _ = self._side(scene, hidden, 0.3, hop=second_hop)
        final = family.only[-1]
        parts: list[_Part] = []
        for left in lefts:
            for right in rights:
                a, b = left.phrases[-1], right.phrases[-1]
                if left.mask == right.mask and (left.mask or final):
                    continue
                if (entails(a, b) and not second_hop) or (entails(b, a) and not first_hop) or left == right:
                    continue
                union, phrases = left.mask | right.mask, (*left.phrases, *right.phrases)
                relations = (*left.relations, *right.relations)
                if not final:
                    parts.append(_Part(union, phrases, relations))
                    continue
                for mask, one in scene.classes[final]:
                    if union & mask != union:
                        parts.append(_Part(union & mask, (*phrases, scene.phrase(final, one)), relations))
        form = min(_BITS[form], _BITS[other]) * 5 + max(_BITS[form], _BITS[other])
        return self._settle(family, form, self._by_answer(family, parts, None))

    def _comparison(self, family: Family, scene: SceneMasks, *, trivial: bool) -> Draft | None:
        place, bit = _PLACES[family.asked or ""], 1 << _PLACES[family.asked or ""]
        cut = family.steps.index("scene", 1)
        sides, forms = [], []
        for steps in (family.steps[:cut], family.steps[cut:]):
            form, found = self._described(scene, bit, hop=any(step.startswith("relate") for step in steps))
            if not found:
                return None
            sides.append(found)
            forms.append(form)
        options: dict[Answer, list[_Part]] = {}
        for one, left in sides[0]:
            for two, right in sides[1]:
                if one == two:
                    continue
                anchors, targets = (
                    (*left.phrases[:-1], *right.phrases[:-1]),
                    (left.phrases[-1], right.phrases[-1]),
                )
                if any(gives_away(a, t, place) for a in anchors for t in targets):
                    continue
                equal = scene.objects[one][place] == scene.objects[two][place]
                part = _Part(0, (*left.phrases, *right.phrases), (*left.relations, *right.relations))
                options.setdefault(equal, []).append(part)
        return self._settle(family, forms[0] * 16 + forms[1], options)

    def _described(self, scene: SceneMasks, hidden: int, *, hop: bool) -> tuple[int, list[tuple[int, _Part]]]:
        """All single objects that one drawn form describes, alone or after a relation to one anchor."""
        if not hop:
            form = self._form(_ANCHOR_FORMS, hidden)
            return form, [(one, _Part(1 << one, (scene.phrase(form, one),))) for one in scene.unique[form]]
        anchors = self._anchor(scene)
        form = self._form(_HOP_FORMS, hidden)
        if anchors is None:
            return form, []
        return form, [
            (one, _Part(part.mask, (*anchors.phrases, *part.phrases), part.relations))
            for one, part in self._unique_after(scene, anchors, form)
        ]

    def _integers(self, family: Family, scene: SceneMasks, *, trivial: bool) -> Draft | None:
        cut = family.steps.index("scene", family.steps.index("count"))
        first_hop = any(step.startswith("relate") for step in family.steps[:cut])
        second_hop = any(step.startswith("relate") for step in family.steps[cut:])
        form, lefts, one = self._side(scene, 0, 0.3, hop=first_hop)
        other, rights, two = self._side(scene, 0, 0.3, hop=second_hop)
        nothing = self.rnd.random() < 0.15
        options: dict[Answer, list[_Part]] = {}
        for left in lefts:
            for right in rights:
                if left.mask == right.mask and not (nothing and not left.mask):
                    continue
                if self._decided(left, right, one, two):
                    continue
                x, y = left.mask.bit_count(), right.mask.bit_count()
                answer = {"equal_integer": x == y, "less_than": x < y, "greater_than": x > y}[family.terminal]
                part = _Part(0, (*left.phrases, *right.phrases), (*left.relations, *right.relations))
                options.setdefault(answer, []).append(part)
        return self._settle(family, form * 16 + other, options)

    @staticmethod
    def _decided(left: _Part, right: _Part, one: _Anchors | None, two: _Anchors | None) -> bool:
        """Whether the words alone order the counts: one set is part of the other, or of a single object."""
        a, b = left.phrases[-1], right.phrases[-1]
        if one is None and two is None:
            return entails(a, b) or entails(b, a)
        if one and two:
            shared = one.last == two.last and left.relations == right.relations
            return shared and (entails(a, b) or entails(b, a))
        inner, outer, anchor = (a, b, one) if one else (b, a, two)
        return entails(inner, outer) or bool(anchor and entails(outer, anchor.phrases[0]))
