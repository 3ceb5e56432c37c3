"""Words: they name one thing and no other, say the whole task, and held-out sentences are never trained."""

import itertools
import json

import numpy as np
import pytest

from torchfilm.data.table.scenes import COLOURS, Scene, Thing, sample_scene
from torchfilm.data.table.tasks import HOWS, Task, tasks_of
from torchfilm.data.table.wording import (
    ADJECTIVES,
    MANNERS,
    NOUNS,
    PLACE_WORDS,
    Instruction,
    descriptions,
    instructions,
    say,
    vocabulary,
    words,
)


def some_scenes(count: int) -> list[Scene]:
    rng = np.random.default_rng(0)
    return [sample_scene(rng) for _ in range(count)]


def meant(text: str, scene: Scene) -> list[int]:
    """The things that a noun phrase fits: an oracle that knows words, not how they were chosen."""
    said = set(words(text))
    synonyms = {w: key for key, group in {**NOUNS, **ADJECTIVES}.items() for w in group}
    axes = {"leftmost": (0, -1), "rightmost": (0, 1), "nearest": (1, -1), "farthest": (1, 1)}
    for word in said & set(axes):
        axis, sign = axes[word]
        return [int(np.argmax([sign * (t.x, t.y)[axis] for t in scene.things]))]
    told = {synonyms.get(w, w) for w in said} - {"the", "thing", "object"}
    return [i for i, t in enumerate(scene.things) if told <= {t.colour, t.shape, t.size}]


def test_every_phrase_fits_its_thing_and_no_other():
    rng, kinds = np.random.default_rng(1), set()
    for scene in some_scenes(60):
        for told in instructions(rng, scene):
            assert meant(told.which, scene) == [told.task.which], told
            assert told.which in told.text
            kinds.add(told.by)
    assert {"colour", "shape", "size", "size colour", "position"} <= kinds


def test_a_scene_admits_every_task_in_every_manner():
    scene = some_scenes(1)[0]
    told = instructions(np.random.default_rng(0), scene)
    assert [one.task for one in told] == tasks_of(scene)
    assert len(told) == 3 * (1 + 4) * 4
    assert len({one.task for one in told}) == len(told)


def test_deed_place_and_manner_are_said():
    rng = np.random.default_rng(2)
    keys = {"avoid": ("obstacle", "post"), "save": ("energy", "slowly"), "plain": ()}
    for scene, held_out in itertools.product(some_scenes(10), (False, True)):
        for told in instructions(rng, scene, held_out=held_out):
            task, said = told.task, told.text
            manners = ("avoid", "save") if task.how == "both" else (task.how,)
            for key in ("avoid", "save"):
                assert any(w in said for w in keys[key]) == (key in manners), said
            if task.place is not None:
                assert any(p in said for p in PLACE_WORDS[task.place]), said
                assert any(p in told.what for p in PLACE_WORDS[task.place]), told
            for group in (p for name, p in PLACE_WORDS.items() if name != task.place):
                assert not any(p in said for p in group), said
            assert told.held_out == held_out
            assert not any(mark in said for mark in ("{", "}", "  ", " ,"))


def test_held_out_sentences_are_never_trained_and_use_trained_words():
    rng, trained, held_out = np.random.default_rng(3), set(), set()
    thing = Thing("red", "cube", "small", 0.0, 0.5)
    scene = Scene((thing,), (0.2, 0.4), (0.0, 0.3), ((0.0, 0.15),))
    for task in tasks_of(scene):
        trained |= {say(rng, scene, task).text for _ in range(150)}
        held_out |= {say(rng, scene, task, held_out=True).text for _ in range(60)}
    assert not trained & held_out
    known = set(vocabulary())
    assert {w for text in trained for w in words(text)} <= known
    assert {w for text in held_out for w in words(text)} <= known


def test_the_vocabulary_is_small_sorted_and_whole():
    known = vocabulary()
    assert list(known) == sorted(set(known))
    assert set(COLOURS) <= set(known)
    assert 40 < len(known) < 90


def test_manners_are_told_apart_for_conditions_of_their_own():
    rng, scene = np.random.default_rng(4), some_scenes(1)[0]
    assert set(MANNERS) == set(HOWS)
    for told in [*instructions(rng, scene), *instructions(rng, scene, held_out=True)]:
        assert "{" not in told.how
        assert not told.how.startswith((",", "and ", "but "))
        assert not told.how.endswith((",", " and"))
        assert " ," not in told.how
        assert (told.how == "") <= (told.task.how == "plain")
        assert "it" in words(told.what)


def test_only_the_ways_to_name_that_were_asked_for_are_used():
    rng, scene = np.random.default_rng(5), some_scenes(1)[0]
    told = say(rng, scene, Task(0), by=("size colour shape",))
    assert told.by == "size colour shape"
    assert len(words(told.which)) == 4
    with pytest.raises(ValueError, match=r"by: expected one of .*size colour shape.*, got smell"):
        say(rng, scene, Task(0), by=("smell",))


def test_an_instruction_survives_json():
    told = say(np.random.default_rng(0), some_scenes(1)[0], Task(1, "push", "both", "far"))
    assert Instruction.from_dict(json.loads(json.dumps(told.to_dict()))) == told
    with pytest.raises(ValueError, match=r"instruction: expected what Instruction\.to_dict writes"):
        Instruction.from_dict({"text": "go"})


def test_things_alike_but_for_place_have_no_name_by_looks():
    things = tuple(Thing("red", "cube", "small", x, y) for x, y in ((-0.2, 0.4), (0.2, 0.4), (0.0, 0.5)))
    found = descriptions(Scene(things, (0.1, 0.3), (0.0, 0.3), ((0.0, 0.15),)))
    assert [set(names) for names in found] == [{"position"}, {"position"}, {"position"}]
    assert found[2]["position"] == "the farthest thing"
