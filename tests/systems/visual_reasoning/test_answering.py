"""Asking one picture one question: what is understood, what is answered, and how bad input is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from torchfilm.data.clevr.vocabulary import Vocabulary
from torchfilm.systems.visual_reasoning import BaselineConfig, build, describe
from torchfilm.systems.visual_reasoning.answering import (
    Answerer,
    UnknownWordError,
    ask,
    looked,
)
from torchfilm.systems.visual_reasoning.model import ReasonerConfig, VisualReasoner
from torchfilm.systems.visual_reasoning.perception import Perception, PerceptionConfig
from torchfilm.systems.visual_reasoning.recipe import TINY
from torchfilm.training import save_weights

SENTENCES = [
    ("How many red cubes are left of the sphere?", "2"),
    ("Are there any red cubes; what color is it?", "yes"),
    ("There is a Cyan, large thing.", "no"),
    ("What color is the sphere?", "red"),
]
VOCABULARY = Vocabulary.build({"question": q, "answer": a} for q, a in SENTENCES)
QUESTION = SENTENCES[0][0]
CHANNELS, WIDTH, HEIGHT = 7, 48, 32


@pytest.fixture(scope="module")
def answerer() -> Answerer:
    torch.manual_seed(0)
    config = ReasonerConfig(
        vocabulary=len(VOCABULARY.questions),
        word_dim=5,
        encoder_width=6,
        input="pixels",
        input_channels=3,
        input_height=HEIGHT,
        input_width=WIDTH,
        blocks=2,
        channels=CHANNELS,
        projection=11,
        hidden=13,
        answers=len(VOCABULARY.answers),
    )
    return Answerer(VisualReasoner(config), VOCABULARY)


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


# ---------------------------------------------------------------- the answer


def test_probabilities_are_the_softmax_of_the_networks_logits_over_the_real_answers(answerer, picture):
    pixels = torch.from_numpy(picture).permute(2, 0, 1)[None] / 255
    ids = torch.tensor([VOCABULARY.encode(QUESTION)])
    with torch.no_grad():
        logits = answerer.model(pixels, ids, torch.tensor([ids.shape[1]]))[0].numpy()
    odds = np.exp(logits[4:].astype(np.float64))
    expected = dict(zip(VOCABULARY.answer_words[4:], odds / odds.sum(), strict=True))
    answer = answerer.answer(picture, QUESTION, top=100)
    assert dict(answer.probabilities) == pytest.approx(expected, rel=1e-5)
    assert answer.answer == max(expected, key=expected.__getitem__)
    assert answer.probability == max(expected.values()) or answer.probability == pytest.approx(
        max(expected.values())
    )
    assert answer.runner_up == sorted(expected, key=expected.__getitem__)[-2]


def test_top_limits_the_list_and_not_the_answer(answerer, picture):
    assert len(answerer.answer(picture, QUESTION, top=1).probabilities) == 1
    assert answerer.answer(picture, QUESTION, top=1).runner_up == answerer.answer(picture, QUESTION).runner_up


def test_a_picture_seen_once_answers_as_the_picture_itself(answerer, picture):
    assert answerer.answer(answerer.see(picture), QUESTION) == answerer.answer(picture, QUESTION)


def test_a_network_over_maps_sees_through_its_perception(picture):
    perception = Perception(PerceptionConfig((3, 5, 7), num_blocks=1))
    config = replace(TINY, vocabulary=len(VOCABULARY.questions), answers=len(VOCABULARY.answers))
    config = replace(config, input_width=WIDTH // 8, input_height=HEIGHT // 8)
    answerer = Answerer(VisualReasoner(config), VOCABULARY, perception)
    ids = torch.tensor([VOCABULARY.encode(QUESTION)])
    with torch.no_grad():
        maps = perception.maps(torch.from_numpy(picture).permute(2, 0, 1)[None])
        logits = answerer.model(maps, ids, torch.tensor([ids.shape[1]]))[0, 4:]
    expected = dict(zip(VOCABULARY.answer_words[4:], logits.softmax(0).tolist(), strict=True))
    assert dict(answerer.answer(picture, QUESTION, top=100).probabilities) == pytest.approx(
        expected, rel=1e-4
    )


def test_a_network_that_cannot_look_at_pictures_is_refused(answerer):
    over_maps = VisualReasoner(TINY)
    with pytest.raises(ValueError, match="got one over maps without a perception"):
        Answerer(over_maps, VOCABULARY)
    with pytest.raises(ValueError, match="got one over pixels with a perception"):
        Answerer(answerer.model, VOCABULARY, Perception(PerceptionConfig((3, 5, 7), num_blocks=1)))


def test_a_checkpoint_folder_answers_as_the_network_that_was_saved(picture, tmp_path):
    perception = Perception(PerceptionConfig((3, 5, 7), num_blocks=1))
    config = replace(TINY, vocabulary=len(VOCABULARY.questions), answers=len(VOCABULARY.answers))
    saved = Answerer(VisualReasoner(config), VOCABULARY, perception)
    save_weights(tmp_path / "weights.safetensors", saved.model.state_dict())
    save_weights(tmp_path / "perception.safetensors", perception.state_dict())
    VOCABULARY.save(tmp_path / "vocab.json")
    about = {"network": describe(config), "perception": {"widths": [3, 5, 7], "num_blocks": 1}}
    (tmp_path / "config.json").write_text(json.dumps(about))
    assert ask(picture, QUESTION, tmp_path) == saved.answer(picture, QUESTION)


def test_a_baselines_folder_is_refused(tmp_path):
    config = BaselineConfig("lstm", vocabulary=len(VOCABULARY.questions), answers=len(VOCABULARY.answers))
    save_weights(tmp_path / "weights.safetensors", build(config).state_dict())
    (tmp_path / "config.json").write_text(json.dumps({"network": describe(config)}))
    with pytest.raises(ValueError, match="holds a baseline, which has no gamma and beta"):
        Answerer.load(tmp_path)


def test_looked_counts_where_each_channel_has_its_maximum():
    maps = torch.rand(23, 3, 5, generator=torch.Generator().manual_seed(1)) - 0.1
    maps[4] = -1.0
    expected = np.zeros((3, 5), int)
    for channel in maps.numpy():
        if channel.max() > 0:
            expected[np.unravel_index(channel.argmax(), channel.shape)] += 1
    assert looked(maps) == expected.tolist()
    assert expected.sum() == 22


# ---------------------------------------------------------------- edits


def test_edits_that_repeat_what_the_question_says_change_nothing(answerer, picture):
    plain = answerer.answer(picture, QUESTION)
    same = {
        site: {part: dict(enumerate(values)) for part, values in parts.items()}
        for site, parts in plain.modulations.items()
    }
    assert answerer.answer(picture, QUESTION, edits=same) == plain


def test_an_edit_sets_the_named_channel_alone(answerer, picture):
    plain = answerer.answer(picture, QUESTION)
    turned = answerer.answer(picture, QUESTION, edits={"block2": {"gamma": {3: -2.5}}})
    expected = [-2.5 if c == 3 else v for c, v in enumerate(plain.modulations["block2"]["gamma"])]
    assert turned.modulations["block2"]["gamma"] == expected
    assert turned.modulations["block2"]["beta"] == plain.modulations["block2"]["beta"]
    assert turned.modulations["block1"] == plain.modulations["block1"]
    assert turned.probabilities != plain.probabilities


def test_a_network_with_all_blocks_muted_does_not_hear_the_question(answerer, picture):
    mute = {"gamma": dict.fromkeys(range(CHANNELS), 1.0), "beta": {str(c): 0.0 for c in range(CHANNELS)}}
    edits = {"block1": mute, "block2": mute}
    a = answerer.answer(picture, QUESTION, edits=edits)
    b = answerer.answer(picture, "What color is the sphere?", edits=edits)
    assert a.probabilities == b.probabilities
    assert answerer.answer(picture, QUESTION).probabilities != a.probabilities


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ({"block9": {}}, r"edits: no site 'block9'; expected one of block1, block2"),
        ({"block1": {"delta": {0: 1.0}}}, r"edits of block1: no part 'delta'; expected 'gamma' or 'beta'"),
        ({"block1": {"gamma": {7: 1.0}}}, r"edits of block1.gamma: no channel 7; expected 0 to 6"),
        ({"block1": {"beta": {"x": 1.0}}}, r"edits of block1.beta: no channel 'x'; expected 0 to 6"),
        (
            {"block1": {"beta": {0: float("nan")}}},
            r"edit of block1.beta\[0\]: expected a number between -1000 and 1000",
        ),
        ({"block2": {"gamma": {0: 1e9}}}, r"edit of block2.gamma\[0\]: .* got 1000000000.0"),
    ],
)
def test_an_edit_of_what_is_not_there_is_refused(answerer, picture, edits, reason):
    with pytest.raises(ValueError, match=reason):
        answerer.answer(picture, QUESTION, edits=edits)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        (QUESTION, "How many red cubes are left of the sphere"),
        ("how many red cubes are left of the sphere", "How many red cubes are left of the sphere"),
        ("  HOW many  RED cubes\nare left of the sphere ?", "How many red cubes are left of the sphere"),
        ("are there any red cubes; What color is it?", "Are there any red cubes ; what color is it"),
        ("there is a cyan, large thing.", "There is a Cyan , large thing"),
    ],
)
def test_casing_spaces_and_a_missing_question_mark_are_forgiven(answerer, typed, understood):
    assert answerer.words(typed) == tuple(understood.split())


def test_an_unknown_word_is_named_with_the_three_nearest(answerer):
    with pytest.raises(
        UnknownWordError, match="unknown word 'sphear'; the nearest known words are sphere, "
    ) as raised:
        answerer.words("What color is the sphear?")
    assert raised.value.word == "sphear"
    assert len(set(raised.value.nearest)) == 3
    assert set(raised.value.nearest) <= set(VOCABULARY.questions)


@pytest.mark.parametrize("question", ["", "   ", "?", " ; ,. "])
def test_an_empty_question_is_refused(answerer, question):
    with pytest.raises(ValueError, match="the question is empty: ask, for example"):
        answerer.words(question)


def test_a_question_without_end_is_refused(answerer):
    with pytest.raises(ValueError, match="has 600 characters: expected at most 500"):
        answerer.words("red " * 150)


@pytest.mark.parametrize("word", ["<NULL>", "<END>", "<UNK>"])
def test_the_special_tokens_are_no_words(answerer, word):
    with pytest.raises(UnknownWordError, match="unknown word"):
        answerer.words(f"What color is {word}?")
