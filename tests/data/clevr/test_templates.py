import random
import re

from torchfilm.data.clevr.catalogue import ATTRIBUTES, FAMILY_FILES, RELATIONS, TERMINAL_KINDS
from torchfilm.data.clevr.executor import check_program
from torchfilm.data.clevr.questions import build_program
from torchfilm.data.clevr.templates import ATTRIBUTE_BITS, FAMILIES
from torchfilm.data.clevr.wording import SYNONYMS, compatible, noun_phrase, say

CLEVR_WORDS = set(
    " ".join(
        [
            "; Are Do Does How Is The There What a an and another any anything are as ball balls behind big",
            "block blocks blue both brown color cube cubes cyan cylinder cylinders does either else equal",
            "fewer front gray greater green has have how in is it its large left less made many material",
            "matte metal metallic more number object objects of on or other purple red right rubber same",
            "shape shiny side size small sphere spheres than that the",
            "there thing things tiny to visible what",
            "yellow",
        ]
    ).split(" ")
)


def phrases(family, rnd):
    """Random noun phrases that obey the family's restrictions."""
    found = []
    for hidden, only in zip(family.hidden, family.only, strict=True):
        form = only or (rnd.randrange(16) & ~hidden)
        values = [
            rnd.choice(v) if form & bit else None
            for v, bit in zip(ATTRIBUTES.values(), (1, 2, 4, 8), strict=True)
        ]
        found.append(tuple(values))
    return found


def relations(rnd):
    return [rnd.choice(RELATIONS) for _ in range(3)]


def test_ninety_families_stand_at_their_released_numbers():
    assert len(FAMILIES) == 90
    assert [family.index for family in FAMILIES] == list(range(90))
    assert [(f.file, f.place) for f in FAMILIES] == [(n, i) for n, size in FAMILY_FILES for i in range(size)]
    assert {family.terminal for family in FAMILIES} == set(TERMINAL_KINDS)


def test_each_family_has_its_relations_and_hides_what_it_asks():
    hops = {"zero_hop": 0, "one_hop": 1, "two_hop": 2, "three_hop": 3, "single_and": 2}
    for family in FAMILIES:
        relates = sum(step.startswith("relate") for step in family.steps)
        if family.file in hops:
            assert relates == hops[family.file]
        if family.file == "same_relate":
            assert relates == 0
            assert all(hidden & ATTRIBUTE_BITS[family.same] for hidden in family.hidden)
        if family.terminal.startswith("query"):
            assert family.hidden[-1] & ATTRIBUTE_BITS[family.asked]
        if family.file == "comparison":
            assert sum(hidden == ATTRIBUTE_BITS[family.asked] for hidden in family.hidden) == 2


def test_every_text_says_every_noun_phrase_and_relation_once():
    for family in FAMILIES:
        assert len(set(family.texts)) == len(family.texts) >= 3
        for text in family.texts:
            assert text.endswith("?")
            said = sorted(int(number) for number in re.findall(r"\{[nN](\d)\}", text))
            assert said == list(range(len(family.hidden))), text
            related = sorted(int(number) for number in re.findall(r"\{r(\d)\}", text))
            assert related == list(range(sum(step.startswith("relate") for step in family.steps))), text


def test_families_of_one_type_and_structure_do_not_repeat():
    assert len({(family.file, family.steps, family.only) for family in FAMILIES}) == 90


def test_questions_use_the_words_of_the_clevr_vocabulary_and_all_of_them():
    rnd, words = random.Random(0), set()
    for _ in range(20):
        for family in FAMILIES:
            question = say(family, phrases(family, rnd), relations(rnd), rnd)
            assert not re.search(r"[{}\[\]<>]|  | \?|\ba object\b|\ba a\b", question), question
            words |= set(question.removesuffix("?").replace(";", " ;").split())
    assert words == CLEVR_WORDS
    assert len(words) == 88


def test_programs_of_all_families_type_check():
    rnd = random.Random(1)
    for family in FAMILIES:
        program = build_program(family, phrases(family, rnd), relations(rnd))
        check_program(program)
        assert program[-1]["function"] == family.terminal


def test_a_noun_phrase_says_size_color_material_shape_in_this_order():
    rnd = random.Random(2)
    for _ in range(50):
        size, color, material, shape = noun_phrase(
            ("large", "red", "metal", "cube"), rnd, plural=True
        ).split()
        assert size in SYNONYMS["large"]
        assert color == "red"
        assert material in SYNONYMS["metal"]
        assert shape.removesuffix("s") in SYNONYMS["cube"]
    assert {noun_phrase((None,) * 4, rnd) for _ in range(50)} == {"thing", "object"}
    assert {noun_phrase((None,) * 4, rnd, after_a=True) for _ in range(50)} == {"thing"}


def test_phrases_are_compatible_unless_an_attribute_differs():
    assert compatible(("large", None, None, None), (None, "red", None, "cube"))
    assert not compatible(("large", "red", None, None), (None, "blue", None, None))
