"""The 90 families of CLEVR questions as own templates: program, attributes left unsaid, several wordings.

A family's program is a list of steps for a stack machine: `scene` pushes all objects, `filter 0` narrows the
top by noun phrase 0, `relate 1` replaces it by what stands in relation 1 to it, `union`, `intersect` and
`equal_...` take the two topmost. The structures are those of the CLEVR families (Johnson et al. 2017, arXiv
1612.06890, section 3); the wordings are ours, in CLEVR's vocabulary. Marks in a wording: `{n0}` noun phrase
0, `{N0}` its plural, `{r0}` relation 0, `{t}` and `{T}` thing and things, `{other}` and `{another}` the words
that a phrase about other objects may take, `[that is]` words that may be left out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

from .catalogue import ATTRIBUTES, FAMILY_FILES, family_index

ATTRIBUTE_BITS: dict[str, int] = {name: 1 << place for place, name in enumerate(ATTRIBUTES)}
"""A form is a sum of these: which attributes a noun phrase says. 0 is a bare "thing", 15 says all four."""


@dataclass(frozen=True)
class Family:
    """One of the 90 families.

    `hidden[i]`: form bits that noun phrase i must not say (CLEVR's NULL constraints). `only[i]`: form bits
    that noun phrase i must say alone (0 where it is free).
    """

    file: str
    place: int
    steps: tuple[str, ...]
    hidden: tuple[int, ...]
    texts: tuple[str, ...]
    only: tuple[int, ...] = ()
    index: int = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "index", family_index(self.file, self.place))

    @cached_property
    def terminal(self) -> str:
        """Last function of the program: the question's type, one of 13."""
        last = self.steps[-1]
        return last.replace(" ", "_")

    @cached_property
    def asked(self) -> str | None:
        """The attribute that is queried or compared, None for counting and existence."""
        word = self.terminal.rsplit("_", 1)[-1]
        return word if word in ATTRIBUTES else None

    @cached_property
    def same(self) -> str | None:
        """The attribute of the family's same_X step, None where it has none."""
        found = [step.split()[1] for step in self.steps if step.startswith("same")]
        return found[0] if found else None


def _unique(phrase: int) -> list[str]:
    return ["scene", f"filter {phrase}", "unique"]


def _hop(relation: int, phrase: int) -> list[str]:
    return [f"relate {relation}", f"filter {phrase}"]


def _chain(hops: int) -> list[str]:
    """A chain of `hops` relations; its last set is left open for the terminal (or for `unique`)."""
    steps = ["scene", "filter 0"]
    for hop in range(hops):
        steps += ["unique", *_hop(hop, hop + 1)]
    return steps


def _the(hops: int, phrase: int = 0, relation: int = 0) -> str:
    """Definite description of the object at the end of a chain from this phrase and relation on."""
    text = f"the {{n{phrase}}}"
    for hop in range(hops):
        text = f"the {{n{phrase + hop + 1}}} [that is] {{r{relation + hop}}} {text}"
    return text


def _a(hops: int, phrase: int = 0, relation: int = 0) -> str:
    """Indefinite description of the same object, to introduce it."""
    return "a" + _the(hops, phrase, relation).removeprefix("the")


def _query_texts(attribute: str, the: str, a: str) -> list[str]:
    """Ways to ask for one attribute of one object."""
    texts = [
        f"What is the {attribute} of {the}?",
        f"What {attribute} is {the}?",
        f"There is {a}; what {attribute} is it?",
        f"There is {a}; what is its {attribute}?",
        f"{the} has what {attribute}?" if attribute != "material" else f"{the} is made of what material?",
    ]
    if attribute == "size":
        texts.append(f"How big is {the}?")
    if attribute == "material":
        texts += [f"What is {the} made of?", f"There is {a}; what is it made of?"]
    if attribute == "color":
        texts.append(f"{the} is what color?")
    return texts


def _family(
    file: str,
    place: int,
    steps: Sequence[str],
    hidden: Sequence[int],
    texts: Sequence[str],
    only: Sequence[int] = (),
) -> Family:
    spoken = tuple(text[0].upper() + text[1:] for text in texts)
    return Family(file, place, tuple(steps), tuple(hidden), spoken, tuple(only) or (0,) * len(hidden))


def _chain_families(file: str, hops: int, queried: Sequence[str]) -> list[Family]:
    last = hops
    free = [0] * (hops + 1)
    if hops == 0:
        count = [
            "How many {N0} are there?",
            "How many {N0} are visible?",
            "What number of {N0} are there?",
            "What is the number of {N0}?",
        ]
        exist = [
            "Are there any {N0}?",
            "Is there a {n0}?",
            "Are any {N0} visible?",
            "Is a {n0} visible?",
        ]
    else:
        near, it, r = _the(hops - 1), _a(hops - 1), f"{{r{hops - 1}}}"
        count = [
            f"How many {{N{last}}} are {r} {near}?",
            f"How many {{N{last}}} are there {r} {near}?",
            f"What number of {{N{last}}} are {r} {near}?",
            f"What is the number of {{N{last}}} [that are] {r} {near}?",
            f"There is {it}; how many {{N{last}}} are {r} it?",
        ]
        exist = [
            f"Are there any {{N{last}}} {r} {near}?",
            f"Is there a {{n{last}}} {r} {near}?",
            f"Are any {{N{last}}} {r} {near}?",
            f"There is {it}; are there any {{N{last}}} {r} it?",
            f"There is {it}; is a {{n{last}}} {r} it?",
        ]
    families = [
        _family(file, 0, [*_chain(hops), "count"], free, count),
        _family(file, 1, [*_chain(hops), "exist"], free, exist),
    ]
    for place, attribute in enumerate(queried, start=2):
        families.append(
            _family(
                file,
                place,
                [*_chain(hops), "unique", f"query {attribute}"],
                [*free[:-1], ATTRIBUTE_BITS[attribute]],
                _query_texts(attribute, _the(hops), _a(hops)),
            )
        )
    return families


def _and_families() -> list[Family]:
    both = "{r0} the {n0} and {r1} the {n1}"
    steps = [*_unique(0), "relate 0", *_unique(1), "relate 1", "intersect", "filter 2"]
    count = [
        f"How many {{N2}} are [both] {both}?",
        f"How many {{N2}} are there that are [both] {both}?",
        f"What number of {{N2}} are [both] {both}?",
        f"What is the number of {{N2}} [that are] [both] {both}?",
    ]
    families = [_family("single_and", 0, [*steps, "count"], [0, 0, 0], count)]
    for place, attribute in enumerate(("size", "color", "material", "shape"), start=1):
        the, a = f"the {{n2}} [that is] [both] {both}", f"a {{n2}} [that is] [both] {both}"
        hidden = [0, 0, ATTRIBUTE_BITS[attribute]]
        texts = _query_texts(attribute, the, a)
        families.append(_family("single_and", place, [*steps, "unique", f"query {attribute}"], hidden, texts))
    return families


def _or_families() -> list[Family]:
    def build(place: int, hops: tuple[int, int], final: str | None) -> Family:
        steps: list[str] = []
        sides: list[str] = []
        phrase = relation = 0
        for hop in hops:
            steps += [*_unique(phrase), *_hop(relation, phrase + 1)] if hop else ["scene", f"filter {phrase}"]
            sides.append(
                f"{{N{phrase + 1}}} [that are] {{r{relation}}} the {{n{phrase}}}" if hop else f"{{N{phrase}}}"
            )
            phrase, relation = phrase + hop + 1, relation + hop
        steps.append("union")
        bit = ATTRIBUTE_BITS[final] if final else 0
        hidden, only, what = [bit] * phrase, [0] * phrase, "{T}"
        if final:
            steps.append(f"filter {phrase}")
            hidden, only, what = [*hidden, 0], [*only, bit], f"{{N{phrase}}}"
        either = f"{sides[0]} or {sides[1]}"
        texts = [
            f"How many {what} are [either] {either}?",
            f"How many {what} are there that are [either] {either}?",
            f"What number of {what} are [either] {either}?",
            f"What is the number of {what} that are [either] {either}?",
        ]
        return _family("single_or", place, [*steps, "count"], hidden, texts, only)

    return [
        build(0, (0, 0), None),
        build(1, (0, 0), "size"),
        build(2, (0, 0), "color"),
        build(3, (1, 1), None),
        build(4, (0, 0), "material"),
        build(5, (0, 0), "shape"),
        build(6, (1, 0), None),
        build(7, (0, 1), None),
    ]


def _same_sets(attribute: str) -> tuple[list[str], list[str], list[str], list[str]]:
    """Wordings of the same_X families on sets: bare exist, bare count, exist and count of a noun phrase."""
    x = "the {n0}"
    made = "[made of] " if attribute == "material" else ""
    alike = [f"have the same {attribute} as {x}", f"are {made}the same {attribute} as {x}"]
    alike_one = [f"has the same {attribute} as {x}", f"is {made}the same {attribute} as {x}"]
    exist = [
        f"Is there anything else that {alike_one[0]}?",
        f"Is there anything else that {alike_one[1]}?",
        f"Is there another {{t}} that {alike_one[0]}?",
        f"Is there any other {{t}} that {alike_one[0]}?",
        f"Are there any other {{T}} that {alike[0]}?",
        f"Are there any other {{T}} that {alike[1]}?",
        f"Are there any other {{T}} of the same {attribute} as {x}?",
    ]
    count = [
        f"How many other {{T}} {alike[0]}?",
        f"How many other {{T}} {alike[1]}?",
        f"What number of other {{T}} {alike[0]}?",
        f"How many other {{T}} are there of the same {attribute} as {x}?",
        f"What is the number of other {{T}} that {alike[1]}?",
    ]
    exist_some = [
        f"Are there any {{other}}{{N1}} that {alike[0]}?",
        f"Is there {{another}} {{n1}} that {alike_one[0]}?",
        f"Is there {{another}} {{n1}} that {alike_one[1]}?",
        f"Is there {{another}} {{n1}} of the same {attribute} as {x}?",
    ]
    count_some = [
        f"How many {{other}}{{N1}} {alike[0]}?",
        f"How many {{other}}{{N1}} {alike[1]}?",
        f"What number of {{other}}{{N1}} {alike[0]}?",
        f"How many {{other}}{{N1}} are there of the same {attribute} as {x}?",
    ]
    return exist, count, exist_some, count_some


def _same_query_texts(same: str, asked: str) -> list[str]:
    x = f"the same {same} as the {{n0}}"
    texts = [
        f"What is the {asked} of the {{other}}{{n1}} that has {x}?",
        f"What {asked} is the {{other}}{{n1}} of {x}?",
        f"What {asked} is the {{other}}{{n1}} that is {x}?",
        f"There is {{another}} {{n1}} that has {x}; what is its {asked}?",
        f"There is {{another}} {{n1}} of {x}; what {asked} is it?",
    ]
    if asked == "material":
        texts.append(f"What is the {{other}}{{n1}} that has {x} made of?")
    else:
        texts.append(f"The {{other}}{{n1}} that is {x} has what {asked}?")
    if asked == "size":
        texts.append(f"How big is the {{other}}{{n1}} that has {x}?")
    return texts


def _same_families() -> list[Family]:
    families: list[Family] = []
    texts = {attribute: _same_sets(attribute) for attribute in ATTRIBUTES}
    endings = (["exist"], ["count"], ["filter 1", "exist"], ["filter 1", "count"])
    for variant, ending in enumerate(endings):
        for attribute, bit in ATTRIBUTE_BITS.items():
            steps = [*_unique(0), f"same {attribute}", *ending]
            hidden = [bit] * (2 if len(ending) == 2 else 1)
            families.append(_family("same_relate", len(families), steps, hidden, texts[attribute][variant]))
    for same, bit in ATTRIBUTE_BITS.items():
        for asked, asked_bit in ATTRIBUTE_BITS.items():
            if asked != same:
                steps = [*_unique(0), f"same {same}", "filter 1", "unique", f"query {asked}"]
                hidden, wordings = [bit, bit | asked_bit], _same_query_texts(same, asked)
                families.append(_family("same_relate", len(families), steps, hidden, wordings))
    return families


def _comparison_families() -> list[Family]:
    def build(place: int, attribute: str, hops: tuple[int, int]) -> Family:
        bit = ATTRIBUTE_BITS[attribute]
        first, second = hops
        x, y = _the(first), _the(second, phrase=first + 1, relation=first)
        steps = _chain(first)
        tail = [
            step if not step[-1].isdigit() else f"{step.split()[0]} {int(step.split()[1]) + offset}"
            for step in _chain(second)
            for offset in [first if step.startswith("relate") else first + 1]
        ]
        steps = [
            *steps,
            "unique",
            f"query {attribute}",
            *tail,
            "unique",
            f"query {attribute}",
            f"equal {attribute}",
        ]
        hidden = [0] * first + [bit] + [0] * second + [bit]
        texts = [
            f"Do {x} and {y} have the same {attribute}?",
            f"Does {x} have the same {attribute} as {y}?",
            f"Is {x} the same {attribute} as {y}?",
            f"Is the {attribute} of {x} the same as the {attribute} of {y}?",
            f"Are {x} and {y} the same {attribute}?",
            f"There is {_a(first)}; does it have the same {attribute} as {y}?",
        ]
        if attribute == "material":
            texts += [
                f"Is {x} made of the same material as {y}?",
                f"Are {x} and {y} made of the same material?",
            ]
        return _family("comparison", place, steps, hidden, texts)

    families = [build(place, attribute, (0, 0)) for place, attribute in enumerate(ATTRIBUTES)]
    for attribute in ATTRIBUTES:
        for hops in ((1, 0), (0, 1), (1, 1)):
            families.append(build(len(families), attribute, hops))
    return families


def _integer_families() -> list[Family]:
    wordings = {
        "equal_integer": (
            "Are there as many {a} as {b}?",
            "Is the number of {a} the same as the number of {b}?",
            "Is the number of {a} equal to the number of {b}?",
            "Is there an equal number of {a} and {b}?",
        ),
        "less_than": (
            "Are there fewer {a} than {b}?",
            "Is the number of {a} less than the number of {b}?",
            "Are there fewer {a} than there are {b}?",
        ),
        "greater_than": (
            "Are there more {a} than {b}?",
            "Is the number of {a} greater than the number of {b}?",
            "Are there more {a} than there are {b}?",
        ),
    }
    families: list[Family] = []
    for hops in ((0, 0), (1, 0), (1, 1)):
        for terminal, texts in wordings.items():
            steps: list[str] = []
            sides: list[str] = []
            phrase = relation = 0
            for hop in hops:
                steps += (
                    [*_unique(phrase), *_hop(relation, phrase + 1)] if hop else ["scene", f"filter {phrase}"]
                )
                steps.append("count")
                plural = f"{{N{phrase + hop}}}"
                sides.append(f"{plural} [that are] {{r{relation}}} the {{n{phrase}}}" if hop else plural)
                phrase, relation = phrase + hop + 1, relation + hop
            spoken = [text.replace("{a}", sides[0]).replace("{b}", sides[1]) for text in texts]
            families.append(
                _family("compare_integer", len(families), [*steps, terminal], [0] * phrase, spoken)
            )
    return families


def _families() -> tuple[Family, ...]:
    attributes = ("size", "color", "material", "shape")
    by_file = {
        "compare_integer": _integer_families(),
        "comparison": _comparison_families(),
        "three_hop": _chain_families("three_hop", 3, ("size", "shape", "color", "material")),
        "single_and": _and_families(),
        "same_relate": _same_families(),
        "single_or": _or_families(),
        "two_hop": _chain_families("two_hop", 2, attributes),
        "one_hop": _chain_families("one_hop", 1, attributes),
        "zero_hop": _chain_families("zero_hop", 0, ("shape", "material", "color", "size")),
    }
    return tuple(family for file, _ in FAMILY_FILES for family in by_file[file])


FAMILIES: tuple[Family, ...] = _families()
"""All 90 families; `FAMILIES[i].index == i`, the released question_family_index."""
