"""Of several conditions by name each is exchanged by itself too: one that is heard hides none that is not."""

from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import torchfilm as tf
from catalogue import randomise
from torchfilm.heard import heard

X = torch.randn(11, 3)
GIVEN = {"time": torch.tensor([[7.0]]), "goal": torch.randn(11, 5), "words": torch.randn(11, 2)}


class Noise(nn.Module):
    """A layer that adds chance from outside."""

    outside = torch.Generator().manual_seed(0)

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * torch.randn(x.shape, generator=self.outside)


def deaf_to_words(*more: nn.Module) -> nn.Module:
    parts = {"time": tf.Scalars(1, 4), "goal": tf.Vector(5), "words": tf.Vector(2)}
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 7), *more), "0", tf.Several(parts)))
    with torch.no_grad():
        tf.conditioning(model).generator.head.weight[:, -2:] = 0
    return model


def test_one_that_is_ignored_is_told_from_one_that_is_heard():
    found = heard(deaf_to_words(), [(X, {**GIVEN, "time": torch.rand(11, 1)})])
    assert list(found.effects) == ["repeat", "swap", "swap time", "swap goal", "swap words", "blank"]
    assert found.verdict == "heard"
    assert found.ignored == ("words",)
    assert found.words.endswith(" Swapped alone, ignored: words (0.000).")
    assert "swap words" in str(found)


def test_one_that_changes_no_more_than_chance_does_is_ignored():
    found = heard(deaf_to_words(Noise()), [(X, GIVEN)])
    assert found.effects["swap words"].output.value > 0.02
    assert found.ignored == ("words",)


def test_one_for_all_samples_stays_as_it_is():
    found = heard(deaf_to_words(), [(X, GIVEN)])
    assert list(found.effects) == ["repeat", "swap", "swap goal", "swap words", "blank"]
    seen = []

    class Seeing(tf.Several):
        def forward(self, conditions: dict) -> Tensor:
            seen.append(conditions)
            return super().forward(conditions)

    encoder = Seeing({"time": tf.Scalars(1, 4), "goal": tf.Vector(5), "words": tf.Vector(2)})
    heard(tf.condition(nn.Sequential(nn.Linear(3, 7)), "0", encoder), [(X, GIVEN)], resamples=40)
    assert all(torch.equal(one["time"], GIVEN["time"]) for one in seen)
    swapped, goal, words = seen[2:5]
    assert torch.equal(goal["words"], GIVEN["words"])
    assert torch.equal(words["goal"], GIVEN["goal"])
    assert not any(torch.equal(one["goal"], GIVEN["goal"]) for one in (swapped, goal))


def test_what_belongs_together_is_not_taken_apart():
    given = {
        "tokens": torch.randn(5, 2, 3),
        "mask": torch.tensor([[True, True], [True, False]] * 2 + [[True] * 2]),
    }
    found = heard(lambda x, cond: x * cond["tokens"].mean(1), [(torch.randn(5, 3), given)])
    assert list(found.effects) == ["repeat", "swap", "blank"]
    assert found.ignored == ()


def test_one_that_is_the_same_for_all_is_not_exchanged():
    found = heard(deaf_to_words(), [(X, GIVEN | {"words": torch.ones(11, 2)})])
    assert list(found.effects) == ["repeat", "swap", "swap goal", "blank"]


class Output(OrderedDict):
    """A mapping with attributes, as the outputs of transformers."""

    @property
    def state(self) -> Tensor:
        return self["state"]


def test_a_mapping_stays_of_its_kind():
    pytree.register_pytree_node(
        Output, lambda one: (list(one.values()), list(one)), lambda v, k: Output(zip(k, v, strict=True))
    )
    found = heard(lambda x, cond: x * cond.state, [(X, Output(state=torch.randn(11, 3)))])
    assert found.verdict == "heard"


def test_paraphrases_see_the_whole_condition_and_pairs_may_share_a_step():
    given = {"time": torch.tensor([[7.0]]), "say": ["up", "down"]}
    other = {"time": torch.tensor([[7.0]]), "say": ["above", "below"]}
    seen = []

    def model(x: Tensor, cond: dict) -> Tensor:
        seen.append(cond)
        return x

    for paraphrase in (lambda cond: {**cond, "say": ["above", "below"]}, (given, other)):
        heard(model, [(X[:2], given)], paraphrase=paraphrase, resamples=40)
        assert seen[-1]["say"] == ["above", "below"]
        assert seen[-1]["time"].shape == (1, 1)


def test_one_that_is_missing_is_not_exchanged_and_the_ignored_are_among_the_plain_values():
    parts = {"goal": tf.Vector(5), "words": tf.Maybe(tf.Vector(2))}
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 7)), "0", tf.Several(parts)))
    given = {"goal": GIVEN["goal"], "words": tf.Masked(None, torch.zeros(11, dtype=torch.bool))}
    assert "swap words" not in heard(model, [(X, given)]).effects
    assert heard(deaf_to_words(), [(X, GIVEN)]).to_json()["ignored"] == ["words"]


@pytest.mark.parametrize("text", [tf.Maybe(tf.Vector(7)), tf.Vector(7)], ids=["may be missing", "required"])
def test_several_conditions_of_which_some_are_required_are_blanked(text: nn.Module):
    x, given = torch.randn(24, 3), {"time": torch.rand(24, 1), "text": torch.randn(24, 7)}
    both = tf.Several({"time": tf.Scalars(1, 8), "text": text})
    model = randomise(tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", both)).eval()
    assert heard(model, [(x, given)], resamples=40).effects["blank"].output.value > 0
