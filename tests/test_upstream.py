"""What encoder and generator tell the sites: found wherever different conditions come out the same."""

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import torchfilm as tf
from catalogue import randomise
from torchfilm.doctor import Diagnosis, doctor

X, Z = torch.randn(4, 3, 5, 5), torch.randn(4, 11)


def chain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU(), nn.Conv2d(5, 7, 1), nn.ReLU(), nn.Conv2d(7, 2, 1))


class Words(nn.Module):
    """An encoder with a layer to be trained: "mute" says the same of all, "cut" lets no gradient through."""

    def __init__(self, way: str = "") -> None:
        super().__init__()
        self.dim, self.way, self.layer = 7, way, nn.Linear(11, 7)

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        if self.way == "mute":
            z = torch.zeros_like(z)
        y = self.layer(z)
        return y.detach() if self.way == "cut" else y


def sources(found: Diagnosis) -> list:
    return [finding.kind for finding in found.findings if not finding.site]


def test_an_encoder_that_says_the_same_of_every_condition_is_a_problem():
    model = randomise(tf.condition(chain(), "0|2", Words("mute")))
    found = doctor(model, X, cond=Z)
    assert sources(found) == ["same"]
    assert not found
    assert "what the sites are told is the same for all conditions of the batch" in str(found)
    assert sources(doctor(model, X, cond=Z[:1].expand(4, -1))) == []


def test_weights_that_decayed_are_not_taken_for_a_start():
    model = randomise(tf.condition(chain(), "0|2", tf.Vector(11)))
    with torch.no_grad():
        tf.conditioning(model).generator.head.weight.zero_()
    found = doctor(model, X, cond=Z)
    assert sources(found) == ["same"]
    assert not found.at_start


def test_a_generator_that_is_frozen_trains_after_what_the_report_says():
    model = tf.condition(chain(), "0|2", tf.Vector(11)).requires_grad_(False)
    (frozen,) = doctor(model, X, cond=Z).findings
    assert frozen.remedy.startswith("Call conditioning(model).requires_grad_(True), after whatever froze it")
    tf.conditioning(tf.freeze_base(model)).requires_grad_(True)
    assert doctor(model, X, cond=Z).findings == ()


def test_of_many_sites_with_one_finding_five_are_named():
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(9)), nn.Linear(3, 2))
    nn.init.zeros_(model[9].weight)
    found = doctor(tf.condition(model, "[0-8]", tf.Vector(11)), torch.randn(4, 3), cond=Z)
    assert "\n0, 1, 2, 3, 4 and 4 more: the output depends on it, but by zero at present.\n" in str(found)


@pytest.mark.parametrize("options", [{}, {"learned_scale": True}], ids=str)
@pytest.mark.parametrize("init", ["identity", "default"])
def test_a_generator_that_collapsed_is_not_taken_for_a_start(init: str, options: dict):
    model = tf.condition(chain(), "0", tf.Vector(11), init=init, trunk=(8, "relu"), **options)
    optimiser = torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        optimiser.zero_grad()
        (model(X, cond=Z) - 1).square().mean().backward()
        optimiser.step()
    with torch.no_grad():
        model.film.generator.trunk[0].bias.fill_(-100.0)  # off for every condition
    found = doctor(model, X, cond=Z)
    assert sources(found) == ["same"]
    assert not found.at_start


def test_an_encoder_without_a_gradient_is_pointed_out():
    found = doctor(tf.condition(chain(), "0|2", Words("cut"), init="default"), X, cond=Z)
    assert sources(found) == ["cut_off"]
    assert found, "a network may listen to an encoder that is not trained"
    model = tf.condition(chain(), "0|2", tf.Maybe(tf.Vector(11)), init="default")
    assert sources(doctor(model, X, cond=Z)) == []
    assert sources(doctor(tf.condition(chain(), "0|2", Words(), init="default"), X, cond=Z)) == []
    frozen = Words("cut").requires_grad_(requires_grad=False)
    assert sources(doctor(tf.condition(chain(), "0|2", frozen, init="default"), X, cond=Z)) == []


def test_conditions_that_are_missing_may_say_the_same():
    model = randomise(tf.condition(chain(), "0|2", tf.Maybe(tf.Vector(11))))
    for cond in (tf.Masked(Z, [False] * 4), tf.Masked(None)):
        for device in ("cpu", "meta"):  # whatever the default is
            with torch.device(device):
                assert sources(doctor(model, X, cond=cond)) == []


def test_numbers_that_are_none_are_looked_for_where_they_come_from():
    model = randomise(tf.condition(chain(), "0|2", tf.Vector(11)))
    wrong = Z.clone()
    wrong[1] = float("nan")
    said = [finding for finding in doctor(model, X, cond=wrong).findings if finding.kind == "nonfinite"]
    assert [one.message for one in said] == ["its gamma and beta are NaN or infinite."] * 2
    assert "Look for NaN in the condition, then" in said[0].remedy
    said = doctor(model, X * float("inf"), cond=Z).findings
    assert "Look for NaN in the input and in the output first." in [finding.remedy for finding in said]


def test_a_spectral_norm_of_weights_that_are_zero_is_named_where_its_nan_arrives():
    model = tf.condition(chain(), "0|2", tf.Vector(11))
    spectral_norm(model.film.generator.head)
    assert "spectral_norm" in doctor(model, X, cond=Z).findings[0].remedy
    model = tf.condition(chain(), "0|2", tf.Vector(11), init="default")
    spectral_norm(model.film.generator.head)
    assert doctor(model, X, cond=Z)


@pytest.mark.parametrize("fusion", ["film", "scale", "bias", "gate", "concat", "low_rank", "cross_attention"])
def test_every_fusion_may_be_told_one_thing(fusion: str):
    model = randomise(tf.condition(chain(), "0|2", Words("mute"), fusion=fusion))
    assert sources(doctor(model, X, cond=Z)) == ["same"]


def test_an_encoder_that_says_one_thing_is_found_behind_dropout_too():
    model = randomise(tf.condition(chain(), "0|2", tf.Maybe(Words("mute"), dropout=0.5))).train()
    assert sources(doctor(model, X, cond=Z)) == ["same"]
    assert model.training
    assert model.film.training


@pytest.mark.parametrize("training", [False, True])
def test_a_condition_that_is_left_out_has_a_part_in_no_finding(training: bool):
    parts = {"text": tf.Maybe(tf.Vector(11)), "label": tf.Maybe(tf.Classes(3, 7), dropout=0.1)}
    model = randomise(tf.condition(chain(), "0|2", tf.Several(parts))).train(training)
    assert sources(doctor(model, X, cond={"text": Z})) == []
    alone = randomise(tf.condition(chain(), "0|2", tf.Maybe(tf.Classes(3, 7)))).train(training)
    assert sources(doctor(alone, X, cond=tf.Masked(None))) == []
    nested = tf.Several({"all": tf.Several(parts), "time": tf.Scalars(1, 4)})
    model = randomise(tf.condition(chain(), "0|2", nested))
    given = {"all": {"text": tf.Masked(Z, [False] * 4)}, "time": torch.full((1, 1), 0.3)}
    assert sources(doctor(model, X, cond=given)) == []


def test_equal_conditions_beside_one_for_all_are_one_condition():
    parts = {"time": tf.Scalars(1, 4), "text": tf.Vector(11)}
    model = randomise(tf.condition(chain(), "0|2", tf.Several(parts)))
    given = {"time": torch.full((1, 1), 0.3), "text": Z[:1].expand(4, -1)}
    assert sources(doctor(model, X, cond=given)) == []


def test_an_encoder_that_makes_one_row_of_all_tells_one_thing_by_right():
    class Pooled(Words):
        def forward(self, z: torch.Tensor) -> torch.Tensor:
            return super().forward(z).mean(dim=0, keepdim=True)

    assert sources(doctor(randomise(tf.condition(chain(), "0|2", Pooled())), X, cond=Z)) == []


def test_sources_are_asked_by_calls_of_the_network_itself():
    model = randomise(tf.condition(chain(), "0|2", Words()))

    def to_numbers(module: nn.Module, args: tuple, kwargs: dict) -> tuple:
        return args, kwargs | {"cond": torch.tensor(kwargs["cond"])}

    model.register_forward_pre_hook(to_numbers, with_kwargs=True)
    assert sources(doctor(model, X, cond=Z.tolist())) == []


def test_a_single_number_may_belong_to_another_loss():
    encoder = Words().requires_grad_(requires_grad=False)
    encoder.temperature = nn.Parameter(torch.ones(()))
    assert sources(doctor(tf.condition(chain(), "0|2", encoder, init="default"), X, cond=Z)) == []
