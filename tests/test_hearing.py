"""What `heard` says: no sentence that the numbers do not bear, and the next step where one is known."""

import itertools
import math

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.heard import heard
from torchfilm.mixing import Concat
from torchfilm.telling import START

BATCHES = [(torch.randn(11, 5), torch.randn(11, 7)) for _ in range(3)]
CHOICES = [(torch.rand(64, 3), torch.eye(4).repeat(16, 1), torch.arange(64) % 4)]


def of_target(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return output.gather(1, target[:, None])[:, 0]


def test_a_success_that_does_not_change_is_not_said_to_fall():
    found = heard(
        lambda x, cond: torch.tensor([[5.0, 0.0, 0.0, 0.0]]) + cond / 2,
        CHOICES,
        loss=lambda y, t: -of_target(y, t),
        success=lambda y, t: y.argmax(1) == t,
    )
    assert found.verdict == "heard"
    assert found.words.endswith(
        "the loss rises by 0.5, but the success does not change (+0.000 [+0.000, +0.000])."
    )


def test_a_score_that_contradicts_the_other_is_said_to():
    found = heard(
        lambda x, cond: cond + 0 * x[:, :1],
        CHOICES,
        loss=lambda y, t: -of_target(y, t),
        success=lambda y, t: of_target(y, t) < 0.5,
    )
    assert found.words.endswith(
        "the loss rises by 1, but the success rises by 1, which contradicts the loss."
    )
    found = heard(
        lambda x, cond: cond + 0 * x[:, :1], CHOICES, loss=of_target, success=lambda y, t: of_target(y, t)
    )
    assert found.words.endswith(
        "the success falls by 1, but the loss falls by 1, which contradicts the success."
    )


def test_a_score_whose_interval_has_zero_in_it_does_not_clearly_change():
    chance = torch.arange(64) % 8 < 4
    found = heard(
        lambda x, cond: cond + 0 * x[:, :1],
        CHOICES,
        loss=lambda y, t: -of_target(y, t),
        success=lambda y, t: (of_target(y, t) > 0.5) == chance,
    )
    assert "the loss rises by 1, but the success does not clearly change (+0.000 [-" in found.words


def test_a_loss_that_a_repetition_raises_as_well_is_not_said_to_stay():
    noise = itertools.cycle([0.0, 1.0, 1.0, 1.0])
    found = heard(
        lambda x, cond: torch.cat([cond, cond * 0 + next(noise)], 1), CHOICES, loss=lambda y, t: y[:, 4]
    )
    assert found.verdict == "unused"
    assert "the loss does not rise by more than in a repetition (1.000" in found.words


def length(x: torch.Tensor, cond: list[str]) -> torch.Tensor:
    return x[:, 0] + torch.tensor([float(len(text)) for text in cond])


def test_words_that_are_no_whole_condition_are_no_paraphrase_and_are_counted():
    texts, x = ["pick up the cube", "push the ball", "open"], torch.randn(3, 2)
    found = heard(length, [(x, texts)], paraphrase={"pick up": "grasp"})
    assert "paraphrase" not in found.effects
    assert "paraphrase: not measured, since 0 of 3 samples have a condition among its keys" in str(found)
    found = heard(length, [(x, texts)], paraphrase={"open": "open it"})
    assert "paraphrase: 1 of 3 samples have a condition among its keys; a key is the whole" in str(found)
    assert heard(length, [(x, texts)], paraphrase=lambda words: words).notes == ()


@pytest.mark.parametrize(
    "options",
    [
        *({"head": head} for head in ("linear", "shared", "lowrank:2")),
        {"learned_scale": True},
        *({"fusion": fusion} for fusion in ("scale", "gate", "concat", "low_rank", "cross_attention")),
        {"fusion": Concat(2)},
    ],
    ids=lambda options: "concat of width 2" if isinstance(options.get("fusion"), Concat) else str(options),
)
def test_where_a_condition_is_ignored_the_next_step_is_named(options: dict):
    model = tf.condition(nn.Sequential(nn.Linear(5, 3)), "0", tf.Vector(7), **options)
    found = heard(model, BATCHES)
    assert found.verdict == "ignored"
    assert START in found.words
    randomise(model)
    assert START not in heard(model, BATCHES).words


def test_a_trained_network_that_ignores_its_condition_is_sent_to_the_doctor():
    layers = [nn.Conv1d(1, 3, 1), nn.InstanceNorm1d(3)]
    model = randomise(tf.condition(nn.Sequential(*layers).double(), "0", tf.Vector(7), emit=("beta",)))
    data = [(torch.randn(11, 1, 5).double(), torch.randn(11, 7).double())]
    assert "Run tf.doctor(model, x, cond=z)" in heard(model, data).words
    assert heard(lambda x, cond: x.sum(1), BATCHES).words.endswith("less than 0.01.")


def test_two_changes_without_bound_have_no_share():
    x = torch.tensor([[0.0], [1.0]])
    found = heard(lambda x, cond: (x + cond) % 2, [(x, x)], paraphrase=lambda cond: 1 - cond)
    assert found.verdict == "heard"
    assert "changes the output, which is the same for all samples otherwise" in found.words
    assert "Other words" not in found.words


def test_an_output_that_is_always_right_does_not_drown_the_others():
    x = torch.tensor([[0.0], [1.0], [3.0]])

    def played(x: torch.Tensor, cond: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"place": x + 2 * cond, "right": (x == cond)[:, 0]}

    def deaf(x: torch.Tensor, cond: torch.Tensor) -> dict[str, torch.Tensor]:
        return {**played(x, cond), "place": x}

    place = heard(lambda x, cond: x + 2 * cond, [(x, x)]).effects["swap"].output
    assert heard(played, [(x, x)]).effects["swap"].output == place
    assert math.isinf(heard(deaf, [(x, x)]).effects["swap"].output.value)
