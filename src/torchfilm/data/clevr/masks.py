"""A scene as integers: bit i of a mask is object i, so that an operation on sets is one instruction.

Everything a question generator asks of a scene is looked up: which objects look like object o as far as a
form says (`alike`), who stands left of it (`related`), who shares its color (`same`), which objects a form
singles out (`unique`).
"""

import random
from collections.abc import Mapping
from functools import cache
from typing import Any

from .catalogue import ATTRIBUTES, RELATIONS
from .wording import Phrase

NUM_FORMS = 1 << len(ATTRIBUTES)
_VALUES = tuple(ATTRIBUTES.values())


@cache
def members(mask: int) -> tuple[int, ...]:
    """Indices of the objects in a mask, ascending."""
    return tuple(i for i in range(mask.bit_length()) if mask >> i & 1)


class SceneMasks:
    """Look-up tables of one scene; `form` is a sum of bits, 1 size, 2 color, 4 material, 8 shape.

    objects[o]: its (size, color, material, shape). alike[form][o]: objects that agree with o on the form's
    attributes, o among them. classes[form]: one (mask, object) for each different such set. unique[form]:
    objects that the form singles out. related[r][o]: objects in relation r (order of RELATIONS) to o.
    same[k][o]: others that share attribute k with o.
    """

    def __init__(self, scene: Mapping[str, Any]) -> None:
        self.objects: list[tuple[str, str, str, str]] = [
            (one["size"], one["color"], one["material"], one["shape"]) for one in scene["objects"]
        ]
        count = len(self.objects)
        self.everything = (1 << count) - 1
        self.by_value: list[dict[str, int]] = []
        for place in range(len(ATTRIBUTES)):
            found: dict[str, int] = {}
            for index, one in enumerate(self.objects):
                found[one[place]] = found.get(one[place], 0) | 1 << index
            self.by_value.append(found)
        self.alike: list[list[int]] = [[self.everything] * count]
        for form in range(1, NUM_FORMS):
            top = form.bit_length() - 1
            rest, added = self.alike[form & ~(1 << top)], self.by_value[top]
            self.alike.append([mask & added[one[top]] for mask, one in zip(rest, self.objects, strict=True)])
        self.classes = [[(m, o) for o, m in enumerate(row) if (m & -m) == 1 << o] for row in self.alike]
        self.unique = [[o for o, m in enumerate(row) if m == 1 << o] for row in self.alike]
        relationships = scene["relationships"]
        self.related = [[sum(1 << j for j in others) for others in relationships[name]] for name in RELATIONS]
        self.same = [
            [self.alike[1 << k][o] & ~(1 << o) for o in range(count)] for k in range(len(ATTRIBUTES))
        ]

    def phrase(self, form: int, index: int) -> Phrase:
        """What the form says of an object."""
        size, color, material, shape = self.objects[index]
        return (
            size if form & 1 else None,
            color if form & 2 else None,
            material if form & 4 else None,
            shape if form & 8 else None,
        )

    def absent(self, form: int, rnd: random.Random, tries: int = 8) -> Phrase | None:
        """A phrase of this form that describes no object, drawn evenly; None where no draw found one."""
        for _ in range(tries if form else 0):
            mask, said = self.everything, []
            for place, values in enumerate(_VALUES):
                value = values[int(rnd.random() * len(values))] if form >> place & 1 else None
                said.append(value)
                if value is not None:
                    mask &= self.by_value[place].get(value, 0)
            if not mask:
                return (said[0], said[1], said[2], said[3])
        return None


def entails(first: Phrase, second: Phrase) -> bool:
    """Whether whatever `first` describes is described by `second` too, by the words alone."""
    for a, b in zip(first, second, strict=True):  # noqa: SIM110 - a generator costs three times as much
        if b is not None and a != b:
            return False
    return True


def gives_away(anchor: Phrase, target: Phrase, asked: int) -> bool:
    """Whether the words rule out a value of the target's attribute `asked` (its place, 0 to 3).

    "the red thing left of the big red thing" is not big, or "the big red thing" would not be one: where the
    anchor says the attribute that is asked for, and everything else that it says is said of the target too,
    the anchor's value is excluded.
    """
    if anchor[asked] is None:
        return False
    for place, value in enumerate(anchor):
        if place != asked and value is not None and value != target[place]:
            return False
    return True
