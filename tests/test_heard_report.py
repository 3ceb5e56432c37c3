"""What `heard` says: no sentence that the numbers do not bear, and the next step where one is known."""

import itertools
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.heard import heard
from torchfilm.mixing import Concat
from torchfilm.upstream import START

BATCHES = [(torch.randn(11, 5), torch.randn(11, 7)) for _ in range(3)]
BATCH = (torch.randn(6, 3), torch.randn(6, 3))
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
        "the loss rises by 0.5, but the success does not clearly change (+0.000 [-0.030, +0.030])."
    )


def test_a_small_loss_is_shown():
    found = heard(
        lambda x, cond: cond / 2 + 0 * x[:, :1], CHOICES, loss=lambda y, t: (1 - of_target(y, t)) / 1e4
    )
    level, _, swap, *_ = str(found).splitlines()[3:]
    assert level.split()[3:4] == ["5.00e-05"]
    assert swap.split()[4:5] == ["+5.00e-05"]


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
    assert "the loss does not clearly rise by more than in a repetition (0.000 [0.000, 0.000])" in found.words


def test_a_success_that_falls_in_a_repetition_as_well_is_not_said_to_stay():
    fell = itertools.cycle([1.0, 0.0, 0.0, 0.0])
    found = heard(
        lambda x, cond: torch.cat([cond, cond * 0 + next(fell)], 1), CHOICES, success=lambda y, t: y[:, 4]
    )
    assert found.verdict == "unused"
    assert "the success does not clearly fall by more than in a repetition (0.000 [-0." in found.words


def test_a_loss_with_a_chance_of_its_own_is_compared_with_that_of_a_repetition():
    outside = np.random.default_rng(0)
    found = heard(
        lambda x, cond: x + cond, [(*BATCH, BATCH[0])], loss=lambda y, t: outside.normal(size=len(y))
    )
    repeat, swap = found.effects["repeat"], found.effects["swap"]
    assert (repeat.output.high, repeat.beyond) == (0, None)
    assert repeat.loss.low < repeat.loss.high
    assert swap.beyond.loss.value == pytest.approx(swap.loss.value - repeat.loss.value)


def test_plain_values_are_the_numbers_themselves():
    found = heard(lambda x, cond: x + cond, [(*BATCH, BATCH[0])], loss=lambda y, t: (y - t).square().mean(1))
    told, swap = found.to_json(), found.effects["swap"]
    assert told["effects"]["swap"]["output"] == vars(swap.output)
    assert (told["loss"]["value"], told["left_out"], told["notes"]) == (found.loss.value, 0, found.notes)


def length(x: torch.Tensor, cond: list[str]) -> torch.Tensor:
    return x[:, 0] + torch.tensor([float(len(text)) for text in cond])


def test_words_that_are_no_whole_condition_are_no_paraphrase_and_are_counted():
    texts, x = ["pick up the cube", "push the ball", "open"], torch.randn(3, 2)
    found = heard(length, [(x, texts)], paraphrase={"pick up": "grasp"})
    assert "paraphrase" not in found.effects
    assert "paraphrase: not measured, since 0 of 3 samples have a condition among its keys" in str(found)
    found = heard(length, [(x, texts)], paraphrase={"open": "open it"})
    assert "paraphrase: 1 of 3 samples have a condition among its keys; a key is the whole" in str(found)
    assert not any("paraphrase" in note for note in heard(length, [(x, texts)], paraphrase=list).notes)


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
    assert "changes an output that is the same for all samples otherwise" in found.words
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


def test_a_success_that_breaks_down_is_heard_however_little_the_output_changes():
    position, grip = torch.randn(200, 6) * 300, torch.randint(0, 2, (200, 1)).float()
    found = heard(
        lambda x, cond: torch.cat([x, cond], 1),
        [(position, grip, grip[:, 0])],
        success=lambda y, t: y[:, -1] == t,
    )
    assert found.effects["swap"].output.value < 0.01
    assert found.verdict == "heard"
    assert "the success falls by 1" in found.words


def outcomes(right: list[int], swapped: list[int]) -> tuple[Callable[..., torch.Tensor], list]:
    """A model whose success is known with the right condition, and with any other."""
    x, own = torch.tensor([right, swapped]).T.float(), torch.arange(len(right))
    return (lambda x, cond: torch.where(cond == own, x[:, 0], x[:, 1])), [(x, own, own)]


def test_a_success_that_falls_but_not_clearly_is_not_said_to_stay():
    model, batches = outcomes([1, 1, 1, 1, 1, 1, 1, 0], [1, 0, 1, 1, 0, 1, 1, 0])
    found = heard(model, batches, success=lambda y, t: y)
    assert found.verdict == "unused"
    assert "but to no clear advantage" in found.words
    assert "yet the success does not clearly fall (-0.250 [-0." in found.words
    assert "n: 8 independent samples are few; a small effect cannot be seen with so few." in str(found)


def test_a_success_of_twenty_in_twenty_is_not_certain():
    model, batches = outcomes([1] * 20, [0] * 20)
    found = heard(model, batches, success=lambda y, t: y)
    assert (round(found.success.low, 3), found.success.high) == (0.839, 1)
    assert -0.9 < found.effects["swap"].success.high < -0.6
    assert found.effects["repeat"].success.low == found.effects["repeat"].success.high == 0


def test_a_swap_that_does_more_than_a_repetition_but_not_clearly_is_said_to():
    outside = np.random.default_rng(2)
    x, z = torch.randn(2, 24, 1)
    found = heard(
        lambda x, cond: x + 0.1 * cond + torch.from_numpy(outside.normal(0, 0.5, x.shape)), [(x, z)]
    )
    assert found.verdict == "ignored"
    assert "not clearly more than a repetition with the same condition does (0." in found.words
    assert "; the difference is " in found.words


@pytest.mark.parametrize(("calls", "brackets"), [(1, "(one group, or one call"), (6, "; the difference is ")])
def test_chance_that_all_samples_of_a_call_share_is_not_put_down_to_the_condition(calls: int, brackets: str):
    outside = np.random.default_rng(0)
    found = [
        heard(lambda x, cond: torch.zeros(6, 1) + outside.normal(), calls * [BATCH], seed=seed, resamples=40)
        for seed in range(20)
    ]
    ignored = [one for one in found if one.verdict == "ignored"]
    assert len(ignored) >= 18
    assert "not clearly more than a repetition with the same condition does" in ignored[0].words
    assert brackets in ignored[0].words


def test_a_swap_that_does_more_than_the_chance_of_each_call_is_heard():
    outside = np.random.default_rng(0)
    found = heard(
        lambda x, cond: torch.zeros(6, 1) + 0.1 * outside.normal() + 3 * (cond != x).any(),
        8 * [BATCH[:1] * 2],
    )
    assert found.verdict == "heard"


def test_a_loss_that_is_nothing_everywhere_has_no_interval_of_a_success():
    found = heard(lambda x, cond: x + 0 * cond, [(*BATCH, BATCH[0])], loss=lambda y, t: (y - t).abs().mean(1))
    for one in (found.loss, found.effects["repeat"].loss, found.effects["swap"].loss):
        assert str(one) == "0.000 [0.000, 0.000]"


def test_a_swap_is_told_from_a_repetition_by_the_same_samples():
    outside = np.random.default_rng(0)
    verdicts = []
    for part in (0.7, 0.0):
        found = []
        for seed in range(40):
            x, z = torch.from_numpy(outside.normal(size=(2, 40, 3)))
            model = lambda x, cond, part=part: (  # noqa: E731
                x + part * cond + torch.from_numpy(outside.normal(size=x.shape))
            )
            found.append(heard(model, [(x, z)], seed=seed, resamples=200).verdict)
        verdicts.append(found.count("heard") / 40)
    assert verdicts[0] > 0.5
    assert verdicts[1] <= 0.1
