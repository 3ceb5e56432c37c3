"""Say a question: fill a family's wording with noun phrases, relations and synonyms of CLEVR's vocabulary.

Which wording and which synonyms are taken depends on the random source alone, never on the scene or the
answer, so that the words say nothing about the answer.
"""

import random
import re
from collections.abc import Sequence
from functools import cache

from .templates import Family

Phrase = tuple[str | None, str | None, str | None, str | None]
"""What a noun phrase says: size, color, material, shape; None where it says nothing."""

SYNONYMS: dict[str, tuple[str, ...]] = {
    "thing": ("thing", "object"),
    "cube": ("cube", "block"),
    "sphere": ("sphere", "ball"),
    "cylinder": ("cylinder",),
    "large": ("large", "big"),
    "small": ("small", "tiny"),
    "metal": ("metal", "metallic", "shiny"),
    "rubber": ("rubber", "matte"),
    "left": ("left of", "to the left of", "on the left side of"),
    "right": ("right of", "to the right of", "on the right side of"),
    "front": ("in front of",),
    "behind": ("behind",),
}
"""Words for each value; colors have one name each."""

_MARK = re.compile(r"\{(\w+?)(\d*)\}|\[([^\]]*)\] ?")
_Piece = tuple[str, str, int]


@cache
def _pieces(text: str) -> tuple[_Piece, ...]:
    """A wording cut into (mark, literal, number): marks are text, optional, n, N, r, t, T, other, another."""
    pieces: list[_Piece] = []
    at = 0
    for match in _MARK.finditer(text):
        if match.start() > at:
            pieces.append(("text", text[at : match.start()], 0))
        mark, number, optional = match.groups()
        if optional is not None:
            pieces.append(("optional", optional + " ", 0))
        else:
            pieces.append((mark, "", int(number or 0)))
        at = match.end()
    if at < len(text):
        pieces.append(("text", text[at:], 0))
    return tuple(pieces)


def _pick(words: Sequence[str], rnd: random.Random) -> str:
    return words[int(rnd.random() * len(words))]


def noun_phrase(phrase: Phrase, rnd: random.Random, *, plural: bool = False, after_a: bool = False) -> str:
    """Words of a noun phrase such as "big red matte balls"; `after_a` avoids "a object"."""
    words = [_pick(SYNONYMS.get(value, (value,)), rnd) for value in phrase[:3] if value is not None]
    noun = _pick(SYNONYMS[phrase[3] or "thing"], rnd)
    if after_a and not words and noun == "object":
        noun = "thing"
    words.append(noun + "s" if plural else noun)
    return " ".join(words)


def compatible(first: Phrase, second: Phrase) -> bool:
    """Whether one object could be both: no attribute is said by both with different values."""
    return all(a is None or b is None or a == b for a, b in zip(first, second, strict=True))


def say(family: Family, phrases: Sequence[Phrase], relations: Sequence[str], rnd: random.Random) -> str:
    """One of the family's wordings, filled: a sentence that ends on a question mark."""
    other = len(phrases) > 1 and compatible(phrases[0], phrases[1])
    said: list[str] = []
    for mark, literal, number in _pieces(_pick(family.texts, rnd)):
        if mark == "text":
            said.append(literal)
        elif mark == "optional":
            said.append(literal if rnd.random() < 0.5 else "")
        elif mark in ("n", "N"):
            after_a = "".join(said[-3:]).endswith(" a ")
            said.append(noun_phrase(phrases[number], rnd, plural=mark == "N", after_a=after_a))
        elif mark == "r":
            said.append(_pick(SYNONYMS[relations[number]], rnd))
        elif mark in ("t", "T"):
            said.append(_pick(SYNONYMS["thing"], rnd) + ("s" if mark == "T" else ""))
        elif mark == "other":
            said.append("other " if other and rnd.random() < 0.5 else "")
        else:
            said.append("another" if other and rnd.random() < 0.5 else "a")
    return "".join(said)
