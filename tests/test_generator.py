"""The generator: the paper's head, its bounds, its starts."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import oracles
import torchfilm as tf
from catalogue import randomise
from torchfilm.several import Sizes

SITES = {"block1": 3, "block2": 5, "block3": 2}


def test_the_rows_of_the_head_are_gamma_then_beta_for_each_site_in_order():
    generator = randomise(tf.Generator(7, SITES)).double()
    z = torch.randn(2, 7).double()
    weight, bias = (parameter.detach().numpy() for parameter in generator.head.parameters())
    expected = oracles.paper_generator(z.numpy(), weight, bias, list(SITES.values()))
    modulations = generator(z)
    assert list(modulations) == list(SITES)
    for m, (gamma, beta) in zip(modulations.values(), expected, strict=True):
        torch.testing.assert_close(m.gamma, torch.from_numpy(gamma))
        torch.testing.assert_close(m.beta, torch.from_numpy(beta))
        assert m.gate is None


def test_what_the_head_predicts_becomes_modulations_by_itself():
    generator, z = randomise(tf.Generator(7, SITES, bound="exp", init="default")), torch.randn(2, 7)
    for m, expected in zip(generator.of_raw(generator.raw(z)).values(), generator(z).values(), strict=True):
        assert torch.equal(m.gamma, expected.gamma)
    assert not hasattr(generator, "modulations")  # which takes a condition, wherever else there is one


def test_it_starts_as_the_identity_at_every_site():
    for m in tf.Generator(7, SITES)(torch.randn(2, 7)).values():
        assert torch.equal(m.gamma, torch.ones_like(m.gamma))
        assert torch.equal(m.beta, torch.zeros_like(m.beta))


def test_a_condition_per_step_gives_a_modulation_per_step():
    generator = randomise(tf.Generator(7, SITES))
    z = torch.randn(2, 4, 7)
    m = generator(z)["block2"]
    assert m.gamma.shape == m.beta.shape == (2, 4, 5)
    torch.testing.assert_close(m.gamma[:, 1], generator(z[:, 1])["block2"].gamma)


BOUNDS = [
    ("sigmoid", 0, 1, lambda r: 1 / (1 + math.exp(-r))),
    ("tanh", -1, 1, math.tanh),
    ("exp", 0, math.inf, math.exp),
]


@pytest.mark.parametrize(("bound", "low", "high", "f"), BOUNDS)
def test_a_bound_gives_the_final_gamma_without_the_one(bound, low, high, f):
    free, bounded = tf.Generator(7, SITES), tf.Generator(7, SITES, bound=bound, init="default")
    bounded.load_state_dict(randomise(free).state_dict())
    z = torch.randn(2, 7)
    for m, raw in zip(bounded(z).values(), free(z).values(), strict=True):
        assert low < m.gamma.min() <= m.gamma.max() < high
        assert torch.equal(m.beta, raw.beta)
        expected = [[f(value - 1) for value in row] for row in raw.gamma.tolist()]
        torch.testing.assert_close(m.gamma, torch.tensor(expected))


def test_an_offset_shifts_a_bounded_or_free_gamma():
    z = torch.randn(2, 7)
    for bound, offset, start in [
        (None, 0.5, 0.5),
        ("sigmoid", 0.5, 1.0),
        ("tanh", 1.0, 1.0),
        ("exp", None, 1.0),
    ]:
        generator = tf.Generator(7, SITES, bound=bound, gamma_offset=offset, init="default", init_std=0.0)
        m = generator(z)["block1"]
        assert torch.equal(m.gamma, torch.full((2, 3), start))


@pytest.mark.parametrize("emit", [("gamma",), ("beta",)])
def test_what_is_not_emitted_is_constant_and_costs_nothing(emit):
    generator = randomise(tf.Generator(7, SITES, emit=emit))
    assert generator.head.weight.shape == (10, 7)
    for m in generator(torch.randn(2, 7)).values():
        constant, free = (m.beta, m.gamma - 1) if emit == ("gamma",) else (m.gamma - 1, m.beta)
        assert not constant.any()
        assert free.abs().min() > 0
        assert m.gamma.shape == m.beta.shape


def test_a_random_start_has_the_given_spread_and_no_bias():
    generator = tf.Generator(400, {"a": 100}, gamma_offset=0.5, init="default", init_std=0.1)
    assert generator.head.weight.std().item() == pytest.approx(0.1, rel=0.02)
    assert not generator.head.bias.any()
    assert generator(torch.zeros(1, 400))["a"].gamma.unique().tolist() == [0.5]


def test_the_default_start_is_that_of_a_linear_layer():
    generator, linear = tf.Generator(400, {"a": 50}, init="default"), torch.nn.Linear(400, 100)
    for ours, theirs in zip(generator.head.parameters(), linear.parameters(), strict=True):
        assert ours.abs().max().item() == pytest.approx(0.05, rel=0.05)
        assert ours.std().item() == pytest.approx(theirs.std().item(), rel=0.2)


def test_reset_gives_the_start_back():
    generator = randomise(tf.Generator(7, SITES))
    generator.reset_parameters()
    assert not any(parameter.any() for parameter in generator.parameters())


def test_gamma_and_beta_are_float32_under_autocast_and_from_a_bfloat16_head():
    generator, z = randomise(tf.Generator(7, SITES)), torch.randn(2, 7)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = generator(z)["block1"]
    in_bfloat16 = generator.bfloat16()(z.bfloat16())["block1"]
    for m in (under_autocast, in_bfloat16):
        assert m.gamma.dtype == m.beta.dtype == torch.float32


def test_a_small_offset_is_not_lost_under_autocast():
    generator = tf.Generator(1, {"a": 1}, init="default", init_std=0.0)
    torch.nn.init.constant_(generator.head.weight, 2.0**-10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert generator(torch.ones(1, 1))["a"].gamma.item() == 1 + 2.0**-10


def test_the_paper_s_head_has_the_paper_s_parameters():
    generator = tf.Generator(4096, {f"block{i}": 128 for i in range(1, 5)}, device="meta")
    assert sum(parameter.numel() for parameter in generator.parameters()) == 4_195_328


def test_the_description_counts_every_parameter_of_every_site():
    generator = tf.Generator(7, SITES)
    header, *rows, total = [line.split() for line in generator.describe().splitlines()]
    assert header == ["site", "channels", "parameters", "share"]
    assert rows == [
        ["block1", "3", "48", "30.0%"],
        ["block2", "5", "80", "50.0%"],
        ["block3", "2", "32", "20.0%"],
    ]
    count = sum(parameter.numel() for parameter in generator.parameters())
    assert total == ["total", "10", str(count), "100.0%"]


GATED = ("gamma", "beta", "gate")


@pytest.mark.parametrize("start", [0.0, 1.0])
def test_a_gate_starts_where_it_is_told_to_and_its_rows_come_last(start):
    generator = tf.Generator(7, SITES, emit=GATED, gate_start=start)
    z = torch.randn(2, 7)
    assert all(torch.equal(m.gate, torch.full_like(m.gamma, start)) for m in generator(z).values())
    randomise(generator)
    raw = generator.head(z)[:, 9:24].view(2, 3, 5)
    m = generator(z)["block2"]
    torch.testing.assert_close(m.gamma, 1 + raw[:, 0])
    torch.testing.assert_close(m.beta, raw[:, 1])
    torch.testing.assert_close(m.gate, start + raw[:, 2])


@pytest.mark.parametrize("emit", [("gate",), ("gamma", "gate"), ("beta", "gate")])
def test_a_gate_may_come_with_one_of_gamma_and_beta_or_alone(emit):
    generator = randomise(tf.Generator(7, SITES, emit=emit))
    for m in generator(torch.randn(2, 7)).values():
        assert ("gamma" in emit) == (m.gamma - 1).any().item()
        assert ("beta" in emit) == m.beta.any().item()
        assert m.gate.abs().min() > 0


def test_a_bound_around_one_starts_at_one_and_stays_near_it():
    generator, free = tf.Generator(7, SITES, bound="tanh:0.25"), tf.Generator(7, SITES)
    z = torch.randn(2, 7)
    assert torch.equal(generator(z)["block1"].gamma, torch.ones(2, 3))
    generator.load_state_dict(randomise(free).state_dict())
    for m, raw in zip(generator(z).values(), free(z).values(), strict=True):
        torch.testing.assert_close(m.gamma, 1 + 0.25 * torch.tanh(raw.gamma - 1))
        assert m.gamma.min() > 0.75
        assert m.gamma.max() < 1.25
        assert torch.equal(m.beta, raw.beta)


def test_options_from_lists_are_equal_to_those_from_tuples_and_have_their_hash():
    listed = tf.GeneratorOptions(trunk=[8, "silu"], emit=["gamma"])
    assert listed == (options := tf.GeneratorOptions(trunk=(8, "silu"), emit=("gamma",)))
    assert hash(listed) == hash(options)


@pytest.mark.parametrize("head", ["linear", "shared", "lowrank:2", "table"])
@pytest.mark.parametrize("size", [7, Sizes((3, 4))], ids=["one", "composed"])
def test_a_generator_is_made_where_and_as_precise_as_it_is_asked_for(head: str, size: int):
    own, trunk = {"device": "meta", "dtype": torch.float64}, () if head == "table" else (8, "silu")
    made = tf.build_generator(size, SITES, head=head, trunk=trunk, learned_scale=True, **own)
    assert {(p.dtype, p.is_meta) for p in made.parameters()} == {(torch.float64, True)}


def test_a_trunk_is_computed_once_and_read_by_all_sites():
    generator = randomise(tf.Generator(7, SITES, trunk=(11, "mish", 4, "silu"))).double()
    z = torch.randn(2, 7).double()
    first, _, second, _ = generator.trunk
    hidden = oracles.linear(z.numpy(), *(p.detach().numpy() for p in first.parameters()))
    hidden = oracles.linear(oracles.mish(hidden), *(p.detach().numpy() for p in second.parameters()))
    hidden = hidden / (1 + math.e**-hidden)
    head = (p.detach().numpy() for p in generator.head.parameters())
    expected = oracles.paper_generator(hidden, *head, list(SITES.values()))
    for m, (gamma, beta) in zip(generator(z).values(), expected, strict=True):
        torch.testing.assert_close(m.gamma, torch.from_numpy(gamma))
        torch.testing.assert_close(m.beta, torch.from_numpy(beta))


@pytest.mark.plain
def test_numbers_of_numpy_are_sizes(tmp_path):
    model = tf.condition(
        torch.nn.Sequential(torch.nn.Linear(3, 5)), "0", tf.Vector(np.int64(7)), trunk=(np.int64(4), "silu")
    )
    base = tf.remove(copy.deepcopy(model))
    randomise(model.film)
    tf.save(model, tmp_path)
    x, z = torch.randn(2, 3), torch.randn(2, 7)
    assert torch.equal(tf.load(base, tmp_path).film(z)["0"].gamma, model.film(z)["0"].gamma)
    assert tf.Maybe(tf.Vector(np.int64(7))).dim == 7
    assert model(x, cond=z).shape == (2, 5)


def test_a_leaky_trunk_has_the_slope_of_the_mapping_network_of_pi_gan():
    generator, z = (
        randomise(tf.Generator(7, SITES, trunk=("leaky_relu",))).double(),
        torch.randn(2, 7).double(),
    )
    plain = tf.Generator(7, SITES).double()
    plain.head.load_state_dict(generator.head.state_dict())
    expected = plain(torch.where(z < 0, z / 5, z))
    for name, m in generator(z).items():
        torch.testing.assert_close(m.gamma, expected[name].gamma)
        torch.testing.assert_close(m.beta, expected[name].beta)


def test_a_trunk_of_one_activation_is_that_of_dense_film():
    generator, layer = tf.Generator(7, {"here": 3}, trunk=("mish",)), randomise(tf.DenseFiLM(3, 7))
    generator.head.load_state_dict(layer.film.head.state_dict())
    z = torch.randn(2, 7)
    torch.testing.assert_close(generator(z)["here"].gamma, layer.modulation(z).gamma)


def test_a_condition_in_bfloat16_is_activated_in_the_precision_of_the_head():
    generator, z = randomise(tf.Generator(7, SITES, trunk=("mish",))), torch.randn(2, 7).bfloat16()
    assert torch.equal(generator(z)["block2"].gamma, generator(z.float())["block2"].gamma)


def test_a_learned_scale_starts_at_the_identity_and_learns_first():
    generator = tf.Generator(7, SITES, learned_scale=True)
    modulations = generator(torch.randn(2, 7))
    assert torch.equal(modulations["block1"].gamma, torch.ones(2, 3))
    sum((m.gamma + m.beta).sum() for m in modulations.values()).backward()
    assert generator.scale.grad.abs().min() > 0
    assert not generator.head.weight.grad.any()


def test_a_learned_scale_multiplies_what_is_predicted():
    generator = randomise(tf.Generator(7, SITES, learned_scale=True))
    z, scale = torch.randn(2, 7), generator.scale
    raw = generator.head(z)
    m = generator(z)["block2"]
    torch.testing.assert_close(m.gamma, 1 + (scale * raw)[:, 6:11])
    torch.testing.assert_close(m.beta, (scale * raw)[:, 11:16])


def test_the_random_start_of_a_learned_scale_is_that_of_cnaps():
    generator = tf.Generator(7, {"here": 5000}, learned_scale=True, init="default")
    assert generator.scale.std().item() == pytest.approx(1e-3, rel=0.05)
    assert generator.scale.mean().item() == pytest.approx(0, abs=1e-4)


def test_the_penalty_is_the_distance_from_the_identity():
    generator = randomise(tf.Generator(7, SITES, emit=GATED, gate_start=1.0))
    modulations = generator(torch.randn(2, 7))
    expected = 0.0
    for m in modulations.values():
        for field in (m.gamma - 1, m.beta, m.gate - 1):
            expected += sum(value**2 for row in field.tolist() for value in row) / 2
    assert generator.penalty(modulations).item() == pytest.approx(expected)
    fresh = tf.Generator(7, SITES)
    assert fresh.penalty(fresh(torch.randn(2, 7))).item() == 0
    assert generator.penalty(generator(torch.randn(0, 7))).item() == 0
    with pytest.raises(ValueError, match=r"modulations of at least one site, got none.\nGive those of the b"):
        generator.penalty({})


@pytest.mark.parametrize("without_steps", ["gamma", "beta", "gate"])
def test_the_penalty_counts_a_field_without_steps_for_every_step(without_steps: str):
    generator = tf.Generator(7, {"a": 3}, emit=GATED)
    fields = dict(zip(GATED, torch.rand(3, 2, 5, 3), strict=True))
    fields[without_steps] = fields[without_steps][:, :1]
    expected = generator.penalty({"a": tf.Modulation(*(field.expand(2, 5, 3) for field in fields.values()))})
    fields[without_steps] = fields[without_steps][:, 0]
    torch.testing.assert_close(generator.penalty({"a": tf.Modulation(**fields)}), expected)


def test_the_penalty_of_a_learned_scale_is_its_size():
    generator = randomise(tf.Generator(7, SITES, learned_scale=True))
    expected = sum(value**2 for value in generator.scale.tolist())
    assert generator.penalty().item() == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"no learned scale either[\s\S]*learned_scale=True"):
        tf.Generator(7, SITES).penalty()


def test_the_options_can_be_written_down_and_read_again():
    options = tf.Generator(7, SITES, head="lowrank:2", trunk=(11, "silu"), bound="tanh:0.5").options
    again = json.loads(json.dumps(dataclasses.asdict(options)))
    assert tf.Generator(7, SITES, **again).describe() == tf.Generator(7, SITES, **vars(options)).describe()


def test_the_description_shows_what_all_sites_use():
    lines = [line.split() for line in tf.Generator(7, SITES, trunk=(4, "silu")).describe().splitlines()]
    assert lines[1] == ["block1", "3", "30", "22.7%"]
    assert lines[4] == ["(all", "sites)", "32", "24.2%"]
    assert lines[5] == ["total", "10", "132", "100.0%"]


def test_the_description_of_a_composition_counts_all_parts():
    lines = tf.ComposedGenerator((2, 5), SITES).describe().splitlines()
    assert lines[1].split() == ["block1", "3", "54", "30.0%"]
    assert [line.split()[0] for line in lines] == ["site", *SITES, "total"]


def test_a_composition_is_built_from_sizes_and_anything_else_is_one_generator():
    assert isinstance(tf.build_generator(7, SITES), tf.Generator)
    composed = tf.build_generator(tf.Several({"a": tf.Vector(2), "b": tf.Vector(5)}, "compose").dim, SITES)
    assert [part.cond_dim for part in composed.parts] == [2, 5]


@pytest.mark.plain
def test_a_condition_of_another_size_is_refused_before_the_trunk_and_before_a_composition():
    with pytest.raises(ValueError, match=r"Generator: expected 7 numbers .* got shape \(2, 5\)"):
        tf.Generator(7, SITES, trunk=(4,))(torch.randn(2, 5))
    with pytest.raises(ValueError, match=r"expected 7 numbers .* \(2, 5\) of each, got shape \(3, 5\)"):
        tf.ComposedGenerator((2, 5), SITES)(torch.randn(3, 5))
    with pytest.raises(ValueError, match="the sizes of the conditions, got none"):
        tf.ComposedGenerator((), SITES)


REFUSED = [
    ({"sites": {}}, "expected at least one site, got none"),
    (
        {"sites": tf.find(torch.nn.Sequential(torch.nn.Linear(3, 5)), "0")},
        r"got a Sites.\n.*site.features for site in sites",
    ),
    ({"bound": "tahn"}, "bound expected one of .* got 'tahn'.*[\\s\\S]*Did you mean 'tanh'"),
    ({"init": "zeros"}, r"init expected one of \['identity', 'default'\], got 'zeros'"),
    ({"emit": ("gamma", "gain")}, "emit expected one of .* got 'gain'"),
    ({"emit": ("beta", "gamma")}, "The order is always gamma, beta, gate"),
    ({"emit": ("gamma", "gamma")}, r"each once, got \('gamma', 'gamma'\)"),
    ({"gate_start": 1.0}, "gate_start=1.0 needs a gate"),
    ({"bound": "tanh:0"}, "bound expected one of .* got 'tanh:0'"),
    ({"bound": "tanh:half"}, "got 'tanh:half'"),
    (
        {"bound": "relu"},
        r"one of \[None, 'sigmoid', 'tanh', 'exp', 'tanh:R'\], got 'relu'.\nChoose one of these.$",
    ),
    ({"bound": 0.5}, r"bound expected one of .*, got 0\.5"),
    ({"head": "linaer"}, "head expected 'linear', 'shared', 'lowrank:R' or 'table', got 'linaer'"),
    ({"head": "lowrank:0"}, "got 'lowrank:0'"),
    ({"trunk": 256}, r"trunk expected a tuple of sizes and activations, got 256.\nA single .*\(256,\)"),
    ({"trunk": "silu"}, r"trunk expected a tuple of .* got 'silu'"),
    ({"trunk": (0,)}, "trunk expected a whole number from 1 on, got 0"),
    ({"trunk": ("sliu",)}, "trunk expected one of .* got 'sliu'[\\s\\S]*Did you mean 'silu'"),
    ({"haed": "linear"}, "options expected one of .* got 'haed'[\\s\\S]*Did you mean 'head'"),
    ({"emit": ()}, r"got \(\)"),
    ({"emit": "gamma"}, r"emit expected a tuple of .* got 'gamma'.\nA single .* too: \('gamma',\)"),
    ({"init_std": 0.1}, "init='identity' has zero weights, got init_std=0.1"),
    (
        {"bound": "tanh"},
        r"needs gamma = 1 at the start, but bound='tanh' with gamma_offset=0.0 starts at 0.0",
    ),
    ({"gamma_offset": 0.5}, "needs gamma = 1 at the start"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_options_that_cannot_be_meant_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        tf.Generator(7, **{"sites": SITES, **options})


def test_the_penalty_of_a_composition_is_that_of_what_is_composed_or_the_sum_of_the_scales():
    generator = randomise(tf.ComposedGenerator((3, 4), SITES, learned_scale=True))
    found = generator(torch.randn(2, 7))
    expected = sum(((m.gamma - 1) ** 2 + m.beta**2).sum() / 2 for m in found.values())
    torch.testing.assert_close(generator.penalty(found), expected)
    torch.testing.assert_close(generator.penalty(), sum((p.scale**2).sum() for p in generator.parts))
    gated = tf.ComposedGenerator((3, 4), SITES, emit=GATED, gate_start=0.5)
    assert gated.penalty(gated(torch.randn(2, 7))).item() == pytest.approx(0)


def test_a_condition_in_float32_is_heard_in_a_generator_of_bfloat16():
    for options in ({}, {"head": "shared"}, {"head": "lowrank:2"}, {"trunk": (5, "silu")}, {"head": "table"}):
        generator = randomise(tf.Generator(7, SITES, **options))
        z = torch.rand(2, 7).bfloat16().float()
        expected = generator.bfloat16()(z.bfloat16())["block2"].gamma
        assert torch.equal(generator(z)["block2"].gamma, expected)


@pytest.mark.parametrize("emit", [("gamma", "beta"), ("gamma", "beta", "gate")])
@pytest.mark.parametrize("batch", [(), (1,), (3, 2)])
def test_few_numbers_make_in_two_operations_what_many_make_run_by_run(emit, batch, monkeypatch):
    start = {"gate_start": 0.7} if "gate" in emit else {}
    sites = {"a": 3, "b": 3, "c": 5, "d": 3}
    generator = tf.Generator(7, sites, emit=emit, gamma_offset=0.3, init="default", **start)
    z, weights = torch.randn(*batch, 7, requires_grad=True), torch.randn(*batch, 14)

    def made() -> tuple[list[torch.Tensor], torch.Tensor]:
        fields = [getattr(m, name) for m in generator(z).values() for name in emit]
        loss = sum((torch.cat(fields[i :: len(emit)], dim=-1) * weights).sum() for i in range(len(emit)))
        return fields, torch.autograd.grad(loss, z)[0]

    (few, few_grad), _ = made(), monkeypatch.setattr("torchfilm.generator._SMALL", -1)
    many, many_grad = made()
    assert all(torch.equal(one, other) for one, other in zip(few, many, strict=True))
    torch.testing.assert_close(few_grad, many_grad)


class Lazy(torch.nn.Module):
    """An encoder whose sizes are those of the first condition."""

    dim = 4

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.LazyLinear(4)

    def forward(self, value):
        return self.linear(value)


@pytest.mark.plain
def test_an_encoder_without_sizes_is_asked_to_run_once():
    model = tf.condition(torch.nn.Sequential(torch.nn.Linear(3, 5)), "0", tf.Maybe(Lazy()))
    x = torch.randn(2, 3)
    with pytest.raises(
        ValueError, match=r"Maybe: expected parameters with sizes, got 'condition.linear.weight'"
    ):
        model.film.describe()
    with pytest.raises(
        ValueError, match=r"Maybe: expected a condition whose parameters .* got 'linear.weight'"
    ):
        model(x, cond=tf.Masked(None))
    assert model.eval()(x, cond=tf.Masked(None)).shape == (2, 5)
    model.train()(x, cond=torch.randn(2, 7))
    assert "Maybe, the condition: 36 parameters" in model.film.describe()
    assert model(x, cond=tf.Masked(None)).shape == (2, 5)


@pytest.mark.parametrize(
    ("bound", "offset"), [("sigmoid", 0.5), ("tanh", 1.0), ("exp", 0.0), ("tanh:0.3", 1.0)]
)
def test_a_bound_starts_as_the_identity_with_the_offset_that_makes_it_one_and_with_no_other(bound, offset):
    made = tf.Generator(7, {"a": 3}, bound=bound, gamma_offset=offset)
    assert torch.equal(made(torch.randn(2, 7))["a"].gamma, torch.ones(2, 3))
    with pytest.raises(ValueError, match="needs gamma = 1 at the start"):
        tf.Generator(7, {"a": 3}, bound=bound, gamma_offset=offset + 0.25)
