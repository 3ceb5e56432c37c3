"""Each ailment in a network that has it, and none in one that is well."""

import pytest
import torch
from torch import nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.doctor import Diagnosis, doctor
from torchfilm.injection import condition

X = torch.linspace(-2, 3, 4 * 3 * 8 * 8).reshape(4, 3, 8, 8).sin()


def z(batch: int = 4) -> torch.Tensor:
    return torch.randn(batch, 11)


def one(batch: int = 4) -> torch.Tensor:
    return torch.randn(1, 11).expand(batch, -1)


def conv(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def chain(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(3, 5), *layers, nn.ReLU(), conv(5, 7), nn.ReLU(), conv(7, 2))


def ask(model: nn.Module, sites: object, given: torch.Tensor | None = None, **options: object) -> Diagnosis:
    found = condition(model, sites, tf.Vector(11), **options)
    return doctor(found, X, cond=z() if given is None else given)


def test_a_network_that_hears_everywhere_is_healthy_though_it_starts_at_the_identity():
    found = ask(chain(), "0|2|4")
    assert found
    assert found.findings == ()
    assert all(pulse.strength > 0.05 for pulse in found.pulses.values())
    assert "3 of 3 sites can be heard" in str(found)
    assert str(found).splitlines()[1].split()[-1] == "ok"


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(5), nn.GroupNorm(5, 5)], ids=lambda norm: type(norm).__name__
)
@pytest.mark.parametrize("training", [True, False])
def test_a_norm_of_each_sample_behind_a_site_cancels_it(norm: nn.Module, training: bool):
    found = ask(chain(norm).train(training), "0|3")
    assert found.of("0") == ["cancelled"]
    assert found.of("3") == []
    assert not found
    assert found.pulses["0"].strength < 1e-3 * found.pulses["3"].strength
    text = str(found)
    assert f"{type(norm).__name__} '1' reads it and normalises again" in text
    assert f"condition the output of {type(norm).__name__} '1'" in text


def test_where_every_site_is_cancelled_all_are_found_without_one_to_compare_with():
    model = nn.Sequential(
        conv(3, 5), nn.InstanceNorm2d(5), nn.ReLU(), conv(5, 7), nn.InstanceNorm2d(7), nn.ReLU()
    )
    found = ask(model, "0|3")
    assert [finding.kind for finding in found.problems] == ["cancelled", "cancelled"]


def test_a_batch_norm_in_training_cancels_one_condition_per_batch():
    found = ask(chain(nn.BatchNorm2d(5)), "0|3", one())
    assert found.of("0") == ["cancelled"]
    assert "BatchNorm2d '1' reads it and takes out what all samples share" in str(found)
    assert "Mix conditions within each batch" in str(found)
    assert ask(chain(nn.BatchNorm2d(5)), "0|3", z(1).expand(4, -1)).of("0") == ["cancelled"]


ONE_FOR_ALL = {
    "vectors": (tf.Vector(11), {}, one),
    "one vector": (tf.Vector(11), {}, lambda: torch.randn(11)),
    "all absent": (tf.Maybe(tf.Vector(11)), {}, lambda: tf.Masked(z(), torch.zeros(4, dtype=torch.bool))),
    "a class": (tf.Classes(7), {"head": "table"}, lambda: torch.tensor([3, 3, 3, 3])),
    "one class": (tf.Classes(7, 5), {}, lambda: torch.tensor(3)),
    "often dropped": (tf.Maybe(tf.Vector(11), dropout=0.5), {}, one),
    "concat": (tf.Vector(11), {"fusion": "concat"}, one),
}


@pytest.mark.parametrize(("encoder", "options", "given"), ONE_FOR_ALL.values(), ids=ONE_FOR_ALL)
@pytest.mark.parametrize("way", ["cond", "using", "modulation", "using a modulation"])
def test_one_condition_for_a_batch_is_seen_however_it_comes(encoder, options: dict, given, way: str):
    model, cond = condition(chain(nn.BatchNorm2d(5)), "0|3", encoder, **options), given()
    with model.film.predicting():
        made = model.film.modulations(cond)
    if way == "cond":
        found = doctor(model, X, cond=cond)
    elif way == "modulation":
        found = doctor(model, X, modulation=made)
    else:
        with tf.using(model, **({"cond": cond} if way == "using" else {"modulation": made})):
            found = doctor(model, X)
    assert found.of("0") == ["cancelled"]
    assert "takes out what all samples share, and there is one condition" in str(found)


@pytest.mark.parametrize("training", [True, False])
def test_mixed_conditions_under_using_are_no_single_one(training: bool):
    model = condition(chain(nn.BatchNorm2d(5)), "0|3", tf.Vector(11)).train(training)
    with tf.using(model, cond=z()):
        assert doctor(model, X).of("0") == ["one_condition"] * training
    rows = randomise(model).film.modulations(z())
    assert "cancelled" not in doctor(model, X, modulation=rows).of("0")


def test_a_batch_norm_in_training_is_pointed_out_where_conditions_are_mixed():
    found = ask(chain(nn.BatchNorm2d(5)), "0|3", z())
    assert found.of("0") == ["one_condition"]
    assert found, "it is no problem of this batch"
    assert "with one condition for a whole batch it would not be heard: BatchNorm2d '1'" in str(found)


def test_a_batch_norm_in_evaluation_cancels_nothing():
    for conditions in (z(), one()):
        assert ask(chain(nn.BatchNorm2d(5)).eval(), "0|3", conditions).findings == ()


def test_a_layer_norm_that_mixes_channels_cancels_nothing():
    model = nn.Sequential(nn.Conv2d(3, 5, 8), nn.Flatten(), nn.LayerNorm(5), nn.Linear(5, 2))
    assert ask(model, "0").findings == ()


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = conv(3, 5), conv(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(nn.functional.instance_norm(self.a(x)).relu())


def test_a_norm_that_is_no_module_is_found_in_the_graph():
    found = ask(Functional(), "a|b")
    assert found.of("a") == ["cancelled"]
    assert "a norm reads it" in str(found)
    assert "The norm is a function call in a forward" in str(found)
    assert "condition the next module with where='input'" in str(found)
    assert ask(Functional(), "b", where="input").findings == (), "the remedy helps"


def test_sites_with_the_same_finding_share_its_text_and_each_column_is_explained():
    class Closed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.zeros(()))
            self.branches = nn.ModuleList(conv(3, 3) for _ in range(5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.scale * sum(branch(x) for branch in self.branches)

    found = ask(Closed(), r"branches\.\d", emit=("beta", "gate"), gate_start=1.0)
    assert [finding.kind for finding in found.findings] == ["dead"] * 5
    names = ", ".join(f"branches.{index}" for index in range(5))
    assert f"{names}: the output depends on it, but by zero at present." in str(found)
    assert str(found).count("by zero at present") == 1
    assert "Numbers: |dy/dgamma| / |y|, |dy/dbeta| rms(x) / |y|, |dy/dgate| / |y|; in brackets what" in str(
        found
    )
    assert str(found).splitlines()[1].split()[2:5] == ["(0)", "0", "0"]


def test_a_site_at_the_input_of_a_norm_is_cancelled_by_this_norm():
    found = ask(chain(nn.InstanceNorm2d(5)), "1", where="input", features=5)
    assert found.of("1") == ["cancelled"]
    assert "InstanceNorm2d '1' itself reads it" in str(found)


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.never, self.dropped, self.zero, self.small = (conv(3, 3) for _ in range(4))
        self.first = self.again = conv(3, 3)
        self.scale = nn.Parameter(torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.dropped(x)
        x = x + self.scale * self.zero(x) + 1e-6 * self.small(x)
        return self.again(self.first(x))


def test_sites_that_are_skipped_dropped_closed_weak_tied_or_called_again_are_told_apart():
    found = ask(Odd(), "never|dropped|zero|small|first")
    assert {name: found.of(name) for name in found.pulses} == {
        "never": ["never_called"],
        "dropped": ["unused"],
        "zero": ["dead"],
        "small": ["weak"],
        "first": ["tied", "repeated"],
    }
    assert {finding.kind for finding in found.problems} == {"never_called", "unused", "dead", "weak"}
    assert [finding.kind for finding in found.findings][-2:] == ["tied", "repeated"], "problems come first"
    assert {name: pulse.calls for name, pulse in found.pulses.items()} == {
        "never": 0,
        "dropped": 1,
        "zero": 1,
        "small": 1,
        "first": 2,
    }
    text = str(found)
    for words in (
        "its module never runs",
        "the output does not depend on it",
        "by zero at present",
        "is also 'again'",
    ):
        assert words in text
    assert "1 of 5 sites can be heard" in text


def test_a_trained_network_is_asked_where_it_is_or_at_the_identity():
    model = randomise(condition(chain(), "0|2", tf.Vector(11)))
    with torch.no_grad():
        head = model.get_submodule("film.generator.head")
        head.weight.zero_()
        head.bias.zero_()
        head.bias[:5] = -1  # gamma = 0 at site 0: the first channel mixture is closed
    there, start = doctor(model, X, cond=z()), doctor(model, X, cond=z(), at="identity")
    assert there.pulses["2"].fields != start.pulses["2"].fields


def test_the_network_is_left_as_it_was():
    model = condition(chain(nn.BatchNorm2d(5), nn.Dropout(0.5)), "0|4", tf.Vector(11))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    given, state = z(), torch.get_rng_state()
    with torch.no_grad():
        doctor(model, X, cond=given)
        assert torch.equal(torch.get_rng_state(), state)
        with pytest.raises(RuntimeError):
            doctor(model, X[:, :2], cond=z())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert model.get_submodule("film").transforms == []
    assert all(slot.fusion is model.film.fusion for slot in model.film.slots.values())
    assert all(slot.is_plain_film for slot in model.film.slots.values())
    assert model.training


@pytest.mark.plain
def test_a_compiled_network_is_asked_without_being_compiled_again():
    torch._dynamo.reset()
    model = condition(chain(nn.InstanceNorm2d(5)), "0|3", tf.Vector(11))
    fast = torch.compile(model, fullgraph=True, backend="eager")
    fast(X, cond=z())
    with torch._dynamo.config.patch(error_on_recompile=True):
        assert doctor(fast, X, cond=z()).of("0") == ["cancelled"]
        fast(X, cond=z())


@pytest.mark.parametrize("off", [torch.no_grad, torch.inference_mode])
def test_a_network_is_asked_also_where_gradients_are_off(off):
    model, given = condition(chain(nn.BatchNorm2d(5)), "0|3", tf.Vector(11)), z()
    expected = doctor(model, X, cond=given).to_json()
    with off():
        assert doctor(model, X.clone(), cond=given.clone()).to_json() == expected
        made = tf.Modulations(model.film.modulations(given))
        assert doctor(model, X, modulation=made).pulses["3"].strength > 0
    model(X, cond=given).sum().backward()


def test_a_frozen_generator_is_pointed_out():
    model = condition(chain(), "0|2", tf.Vector(11)).requires_grad_(False)
    found = doctor(model, X, cond=z())
    assert [finding.kind for finding in found.findings] == ["frozen"]
    assert str(found.findings[0]).startswith("all sites: no parameter of the generator is trained")


def test_a_gradient_that_is_not_a_number_is_said_to_be_none():
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    found = doctor(condition(model, "0", tf.Vector(11)), torch.full((4, 3), torch.inf), cond=z())
    assert found.of("0") == ["nonfinite"]


class Scaled(nn.Module):
    def __init__(self, norm: nn.Module, by: float) -> None:
        super().__init__()
        self.norm, self.by, self.stem, self.last = norm, by, conv(3, 8), conv(8, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        return self.last(x + self.by * self.norm(x))


@pytest.mark.parametrize("kind", ["GroupNorm", "InstanceNorm"])
def test_a_norm_that_took_a_modulation_into_its_affine_does_not_cancel_it(kind: str):
    for by, expected in ((0.005, []), (0.0001, ["weak"])):
        norm = nn.GroupNorm(4, 8) if kind == "GroupNorm" else nn.InstanceNorm2d(8, affine=True)
        assert ask(Scaled(norm, by), "norm").of("norm") == expected


def test_a_norm_behind_a_norm_that_is_a_site_is_named():
    found = ask(chain(nn.GroupNorm(1, 5), nn.InstanceNorm2d(5)), "1|4")
    assert found.of("1") == ["cancelled"]
    assert "InstanceNorm2d '2' reads it and normalises again" in str(found)


@pytest.mark.parametrize("fusion", ["scale", "bias", "concat", "low_rank", "cross_attention"])
def test_every_fusion_can_be_asked(fusion: str):
    model = condition(chain(nn.InstanceNorm2d(5)), "0|3", tf.Vector(11), fusion=fusion)
    given = torch.randn(4, 2, 11) if fusion == "cross_attention" else z()
    if fusion == "cross_attention":
        model = condition(chain(nn.InstanceNorm2d(5)), "0|3", tf.Tokens(11, pooling=None), fusion=fusion)
    found = doctor(model, X, cond=given)
    assert found.pulses["3"].strength > 0
    assert found.of("3") == []
    if fusion in ("scale", "bias"):
        assert found.of("0") == ["cancelled"]


def before_a_norm(*between: nn.Module) -> nn.Sequential:
    return nn.Sequential(conv(3, 5), *between, nn.InstanceNorm2d(5, affine=True), nn.ReLU(), conv(5, 2))


ONLY_A_SHIFT = {
    "concat": ({"fusion": "concat"}, "shift"),
    "concat of two": ({"fusion": "concat", "width": 3}, "shift"),
    "bias": ({"fusion": "bias"}, "beta"),
    "emit": ({"emit": ("beta",)}, "beta"),
    "drawn": ({"emit": ("beta",), "init": "default"}, "beta"),
}


@pytest.mark.parametrize(("options", "field"), ONLY_A_SHIFT.values(), ids=ONLY_A_SHIFT)
@pytest.mark.parametrize("between", [(), (nn.Conv2d(5, 5, 1),)], ids=["next", "behind a convolution"])
def test_only_what_the_condition_moves_counts_as_heard(options: dict, field: str, between: tuple):
    model = condition(before_a_norm(*between), "0", tf.Vector(11), **options)
    given = z()
    made = doctor(model, X, modulation=model.film.modulations(given))
    for found in (doctor(model, X, cond=given), made):
        assert found.of("0") == ["cancelled"]
        assert not found
        assert found.pulses["0"].moved == (field,)
        name = f"InstanceNorm2d '{len(between) + 1}'"
        assert f"{name} reads it and normalises again: {field} is gone" in str(found)
        assert f"condition the output of {name}" in str(found)


@pytest.mark.parametrize("classes", [torch.tensor([2, 0, 4, 2]), torch.zeros(4, dtype=torch.int64)])
def test_only_what_a_table_moves_counts_as_heard(classes: torch.Tensor):
    model = before_a_norm(nn.Conv2d(5, 5, 1))
    model = condition(model, "0", tf.Classes(7), head="table", emit=("beta",))
    assert doctor(model, X, cond=classes).of("0") == ["cancelled"]
    tf.tabulate(randomise(model), conds=torch.arange(7))
    assert doctor(model, X, cond=torch.tensor([2, 0, 4, 2])).of("0") == ["cancelled"]


def test_a_field_that_is_cancelled_though_another_is_heard_is_pointed_out():
    found = ask(before_a_norm(nn.Conv2d(5, 5, 1)), "0")
    assert found.of("0") == ["partial"]
    assert found, "the site is heard"
    assert "its beta is cancelled: InstanceNorm2d '2' takes it out again" in str(found)
    assert "Condition the output of InstanceNorm2d '2' if beta is to be heard; gamma is" in str(found)


def test_a_gate_that_starts_closed_is_heard_and_cancels_nothing():
    found = ask(nn.Sequential(conv(3, 5), conv(5, 2)), "0", emit=("gamma", "beta", "gate"))
    assert found.of("0") == []
    assert found.pulses["0"].fields["beta"] == 0


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"emit": ("beta",)},
        {"head": "shared"},
        {"learned_scale": True},
        {"fusion": "gate"},
        {"fusion": "concat"},
        {"fusion": "concat", "width": 3},
        {"fusion": "low_rank"},
        {"fusion": "cross_attention"},
    ],
    ids=str,
)
def test_a_generator_that_no_step_has_reached_is_named(options: dict):
    model = chain()
    early = torch.optim.Adam(model.parameters())
    given = z()
    found = []
    condition(model, "0|2", tf.Vector(11), **options)
    for optimiser in (None, early, torch.optim.Adam(model.parameters())):
        for _ in range(2 if optimiser else 0):
            model(X, cond=given).square().sum().backward()
            optimiser.step()
        found.append(doctor(model, X, cond=given))
    assert [one.at_start for one in found] == [True, True, False]
    assert all(found), "it is no failure"
    line = "The generator is at its start, the same for every condition: has training not begun, or was the "
    assert [line + "optimiser built before condition()?" in str(one) for one in found] == [True, True, False]


def test_a_generator_with_a_random_start_or_without_a_part_in_the_pass_is_not_said_to_be_at_its_start():
    assert not ask(chain(), "0|2", init="default").at_start
    model = condition(chain(), "0", tf.Vector(11))
    assert not doctor(model, X, modulation={"0": tf.Modulation.identity(5)}).at_start


def test_what_a_generator_moves_that_takes_only_its_own_condition_is_all():
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.zeros(3, 5))

        def forward(self, names: list[str]) -> dict:
            beta = torch.stack([self.table["abc".index(name)] for name in names])
            return {"0": tf.Modulation(torch.ones_like(beta), beta)}

    class Names(nn.Module):
        dim = 3

        def forward(self, names: list[str]) -> list[str]:
            return names

    model = condition(chain(), "0", Names(), generator=Own())
    assert doctor(model, X, cond=["a", "b", "c", "a"]).pulses["0"].moved == ("gamma", "beta")


def test_a_measure_says_what_counts():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 5), nn.Linear(3, 7)

        def forward(self, x: torch.Tensor) -> dict:
            return {"a": self.a(x), "b": self.b(x), "best": self.b(x).argmax(1)}

    model = condition(Two(), "a|b", tf.Vector(11))
    assert doctor(model, torch.randn(4, 3), cond=z()).of("b") == ["repeated"]
    found = doctor(model, torch.randn(4, 3), cond=z(), measure=lambda y: 1e-7 * y["a"].sum(1))
    assert found.of("a") == []
    assert found.of("b") == ["unused", "repeated"]
    with pytest.raises(ValueError, match=r"expected a tensor with a gradient, got torch.int64"):
        doctor(model, torch.randn(4, 3), cond=z(), measure=lambda y: y["best"])


@pytest.mark.parametrize(("share", "kinds"), [(2e-3, []), (7e-4, ["weak"])])
@pytest.mark.parametrize("sites", ["faint", "loud|faint", "loud|faint|[abc]"])
def test_a_site_is_weak_below_a_thousandth_of_the_output_or_of_the_others(sites: str, share: float, kinds):
    class Sum(nn.ModuleDict):
        share = 1e-2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            loud, faint, *off = (layer(x) for layer in self.values())
            return loud + self.share * faint + 0 * sum(off)

    layers = {name: conv(3, 5) for name in ("loud", "faint", "a", "b", "c")}
    model, others = condition(Sum(layers), sites, tf.Vector(11)), sites != "faint"
    measure = torch.sum if others else None  # which has no unit: the others alone count
    before = doctor(model, X, cond=z(), measure=measure).pulses
    model.share *= share / before["faint"].strength * (before["loud"].strength if others else 1)
    assert doctor(model, X, cond=z(), measure=measure).of("faint") == kinds


def test_modulations_may_stand_in_for_the_condition():
    model = condition(chain(nn.BatchNorm2d(5)), "0|3", tf.Vector(11))
    alone = {"0": tf.Modulation.identity(5), "3": tf.Modulation.identity(7)}
    assert doctor(model, X, modulation={"0": alone["0"], "3": alone["3"]}).of("3") == []
    rows = {name: tf.Modulation.identity(4, m.gamma.shape[0]) for name, m in alone.items()}
    assert doctor(model, X, modulation=rows).of("0") == ["cancelled"]


@pytest.mark.plain
def test_what_cannot_be_asked_is_refused():
    with pytest.raises(ValueError, match="expected a conditioned network"):
        doctor(chain(), X, cond=z())
    model = condition(chain(), "0", tf.Vector(11))
    for function in (doctor, tf.sensitivity):
        with (
            tf.unconditioned(model),
            pytest.raises(ValueError, match=r"got it inside of `with unconditioned\(model\):`"),
        ):
            function(model, X, cond=z())
    model = condition(chain(), "0", tf.Vector(11), fusion="low_rank")
    with pytest.raises(ValueError, match=r"expected modulations for at='identity', got Bilinear"):
        doctor(model, X, cond=z(), at="identity")
    with pytest.raises(ValueError, match=r"doctor: at expected one of .*, got 'identiy'"):
        doctor(model, X, cond=z(), at="identiy")

    class Last(nn.Sequential):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(ValueError, match="Output: expected one with a gradient"):
        doctor(condition(Last(nn.Linear(3, 5)), "0", tf.Vector(11)), torch.randn(4, 3), cond=z())


def test_all_of_it_comes_as_plain_values():
    found = ask(chain(nn.InstanceNorm2d(5)), "0|3").to_json()
    assert not found["healthy"]
    assert found["pulses"]["0"]["calls"] == 1
    assert found["findings"][0]["kind"] == "cancelled"
