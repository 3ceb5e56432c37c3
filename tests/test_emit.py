"""What a generator emits, site by site: gamma and beta at a norm, a gate at the end of its branch."""

import copy
import dataclasses
import itertools
import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import torchfilm as tf
from catalogue import randomise
from kernels import needs_compiler
from torchfilm.generator_options import GeneratorOptions

# In one group of `shared`, 4 rows each: gamma and beta of 2 channels, and the gate of 4.
SITES = {"0.norm": 2, "0.mlp": 4, "1.norm": 2, "1.mlp": 4, "last": 3}
NORMS = {r"\d\.norm": ("gamma", "beta"), r"\d\.mlp": ("gate",), "last": ("gamma", "beta")}
EMITS = {
    "norms and gates": NORMS,
    "the first pattern counts": {"1.mlp": ("gamma", "beta", "gate"), **NORMS},
    "incomplete": {r".*norm": ("gamma",), "last": ("beta", "gate"), ".*": ("gamma", "gate")},
    "gates alone": {".*": ("gate",)},
}
HEADS = ("linear", "shared", "lowrank:2", "table")
BY_SITE = {
    "norms and gates": "gb a gb a gb",
    "the first pattern counts": "gb a gb gba gb",
    "incomplete": "g ga g ga ba",
    "gates alone": "a a a a a",
}
WORDS = {"g": "gamma", "b": "beta", "a": "gate"}


def rows_by_hand(generator, emit: str, z: np.ndarray) -> np.ndarray:
    """The head's rows for one condition, by products of NumPy."""
    weights = {name: value.detach().double().numpy() for name, value in generator.head.named_parameters()}
    if generator.options.head == "table":
        return z @ weights["weight"]
    if generator.options.head == "lowrank:2":
        return weights["up.weight"] @ (weights["down"] @ z) + weights["up.bias"]
    if generator.options.head == "linear":
        return weights["weight"] @ z + weights["bias"]
    projected, groups, rows = weights["weight"] @ z, {}, []
    for (_, channels), letters in zip(SITES.items(), BY_SITE[emit].split(), strict=True):
        taken = sum(map(len, groups.values()))
        groups.setdefault((channels, letters), projected[taken : taken + channels * len(letters)])
        rows.extend(groups[channels, letters])
    assert sum(map(len, groups.values())) == len(projected)
    return np.array(rows) + weights["bias"]


@pytest.mark.parametrize("small", [True, False])
@pytest.mark.parametrize("bound", [None, "tanh:0.5"])
@pytest.mark.parametrize(("head", "emit"), [*itertools.product(HEADS, EMITS)])
def test_each_site_has_its_fields_and_the_others_are_constant(head, emit, bound, small, monkeypatch):
    if not small:
        monkeypatch.setattr("torchfilm.generator._SMALL", -1)
    start = {"gate_start": 0.7} if "a" in BY_SITE[emit] else {}
    generator = randomise(tf.Generator(7, SITES, head=head, emit=EMITS[emit], bound=bound, **start))
    z = torch.randn(3, 7)
    made = generator(z)
    assert list(made) == list(SITES)
    for sample in range(3):
        rows = iter(rows_by_hand(generator, emit, z[sample].double().numpy()))
        for name, letters in zip(SITES, BY_SITE[emit].split(), strict=True):
            raw = {WORDS[one]: np.array([next(rows) for _ in range(SITES[name])]) for one in letters}
            zero = np.zeros(SITES[name])
            gamma = raw.get("gamma", zero)
            gamma = 1 + (gamma if bound is None else 0.5 * np.tanh(gamma))
            found = made[name]
            np.testing.assert_allclose(found.gamma[sample].detach(), gamma, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(
                found.beta[sample].detach(), raw.get("beta", zero), rtol=1e-5, atol=1e-6
            )
            assert (found.gate is None) == ("gate" not in raw)
            if "gate" in raw:
                np.testing.assert_allclose(
                    found.gate[sample].detach(), 0.7 + raw["gate"], rtol=1e-5, atol=1e-6
                )
        assert next(rows, None) is None


@needs_compiler
@pytest.mark.parametrize("batch", [(), (3,)])
@pytest.mark.parametrize("emit", EMITS)
def test_the_kernels_make_what_the_plain_path_makes(emit, batch, calls):
    generator = randomise(tf.Generator(7, SITES, emit=EMITS[emit]))
    z = torch.randn(*batch, 7)
    with torch.no_grad():
        found = generator(z)
        expected = generator.of_raw(generator.raw(z))
    assert ("generated" in calls) == (emit in ("norms and gates", "the first pattern counts") and batch == ())
    for name, m in expected.items():
        for one, other in zip(found[name].present(), m.present(), strict=True):
            torch.testing.assert_close(one, other)


def test_the_form_for_all_sites_is_that_of_one_pattern():
    alike = tf.Generator(7, SITES, emit=("gamma", "beta", "gate"))
    by_pattern = tf.Generator(7, SITES, emit={".*": ("gamma", "beta", "gate")})
    by_pattern.load_state_dict(randomise(alike).state_dict())
    z = torch.randn(2, 7)
    for one, other in zip(alike(z).values(), by_pattern(z).values(), strict=True):
        assert all(map(torch.equal, one.present(), other.present()))


def test_what_it_costs_is_counted_by_what_each_site_has():
    generator = tf.Generator(7, SITES, emit=NORMS)
    assert generator.own_parameters() == dict(zip(SITES, [32, 32, 32, 32, 48], strict=True))
    assert sum(generator.own_parameters().values()) == sum(p.numel() for p in generator.parameters())
    assert re.search(r"0\.mlp +4 +32 +18\.2%", generator.describe())
    assert "emit={'\\\\d\\\\.norm': ('gamma', 'beta')" in repr(generator)


def test_a_constant_is_at_no_distance_from_the_identity():
    generator = randomise(tf.Generator(7, SITES, emit=NORMS, gate_start=1.0))
    made = generator(torch.randn(2, 7))
    expected = sum(
        ((m.gamma - 1) ** 2 + m.beta**2 + (0 if m.gate is None else (m.gate - 1) ** 2)).sum() / 2
        for m in made.values()
    )
    torch.testing.assert_close(generator.penalty(made), expected)


def test_generators_that_are_composed_have_the_same_fields():
    generator = randomise(tf.ComposedGenerator((3, 4), SITES, emit=NORMS, gate_start=1.0))
    z = torch.randn(2, 7)
    first, second = (part(part_z) for part, part_z in zip(generator.parts, z.split([3, 4], -1), strict=True))
    made = generator(z)
    torch.testing.assert_close(made["0.mlp"].gate, first["0.mlp"].gate * second["0.mlp"].gate)
    assert torch.equal(made["0.mlp"].gamma, torch.ones(2, 4))
    assert made["0.norm"].gate is None
    torch.testing.assert_close(made["0.norm"].gamma, first["0.norm"].gamma * second["0.norm"].gamma)


@pytest.mark.parametrize("head", ["linear", "shared", "lowrank:2"])
@pytest.mark.parametrize("emit", EMITS)
def test_a_separable_table_is_the_generator(emit, head):
    both = tf.Several({"time": tf.Scalars(1, 6), "seen": tf.Vector(5)}).eval()
    generator = randomise(tf.Generator(both.dim, SITES, emit=EMITS[emit], head=head, trunk=("silu",)))
    times, seen = torch.rand(4, 1), torch.randn(2, 5)
    table = tf.SeparableTable(both, generator, "time", times)
    found = table(3, table.encode({"seen": seen}))
    expected = generator(both({"time": times[3].expand(2, 1), "seen": seen}))
    for name, m in expected.items():
        for one, other in zip(found[name].present(), m.present(), strict=True):
            torch.testing.assert_close(one, other.detach())


@pytest.mark.plain  # JSON has lists in the place of pairs
def test_options_by_site_are_compared_hashed_and_written_down_as_others():
    options, lists = GeneratorOptions(emit=NORMS), {name: list(fields) for name, fields in NORMS.items()}
    assert options == GeneratorOptions(emit=lists)
    assert hash(options) == hash(GeneratorOptions(emit=lists))
    assert options != GeneratorOptions(emit={".*": ("gate",)})
    assert options != GeneratorOptions(emit=dict(reversed(NORMS.items())))  # the first that matches counts
    assert GeneratorOptions(**json.loads(json.dumps(dataclasses.asdict(options)))) == options


class Block(nn.Module):
    """A pre-norm branch."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(5)
        self.mlp = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x))


GATED = {r".*norm": ("gamma", "beta"), r".*mlp\.2": ("gate",)}
PATTERN = r"\d\.(norm|mlp\.2)"


def network() -> nn.Module:
    return nn.Sequential(Block(), Block()).eval()


def conditioned(net: nn.Module, gate_start: float = 1.0, **options) -> nn.Module:
    return tf.condition(net, PATTERN, tf.Vector(3), emit=GATED, gate_start=gate_start, **options)


@pytest.mark.parametrize("head", ["linear", "shared", "lowrank:2"])
def test_a_network_is_what_it_was_to_the_bit_with_open_gates_and_without_its_branches_with_closed_ones(head):
    net, x, z = network(), torch.randn(2, 4, 5), torch.randn(2, 3)
    assert torch.equal(conditioned(copy.deepcopy(net), head=head)(x, cond=z), net(x))
    assert torch.equal(conditioned(copy.deepcopy(net), gate_start=0.0, head=head)(x, cond=z), x)


def test_a_conditioned_network_gates_its_branches():
    model = randomise(conditioned(network())).double()
    x, z = torch.randn(2, 4, 5).double(), torch.randn(2, 3).double()
    m, expected = tf.modulations(model, z), x
    with tf.unconditioned(model):
        for i, block in enumerate(itertools.islice(model, 2)):
            norm, gate = m[f"{i}.norm"], m[f"{i}.mlp.2"].gate[:, None]
            branch = block.mlp(norm.gamma[:, None] * block.norm(expected) + norm.beta[:, None])
            expected = expected + gate * branch
    torch.testing.assert_close(model(x, cond=z), expected)


@pytest.mark.plain
def test_it_compiles_into_one_graph():
    model, x, z = randomise(conditioned(network())), torch.randn(2, 4, 5), torch.randn(2, 3)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x, cond=z), model(x, cond=z))


@pytest.mark.parametrize("pairs", [False, True])
@pytest.mark.parametrize("wrapped", [False, True])
def test_it_is_loaded_as_it_was_saved_also_where_blocks_are_wrapped(tmp_path, wrapped, pairs):
    plain = network()
    emit = tuple(GATED.items()) if pairs else GATED
    model = tf.condition(copy.deepcopy(plain), PATTERN, tf.Vector(3), emit=emit, head="shared")
    randomise(model)
    x, z = torch.randn(2, 4, 5), torch.randn(2, 3)
    for name, parameter in plain.named_parameters():
        parameter.data = model.get_parameter(name).data.clone()
    tf.save(model, tmp_path / "one")
    if wrapped:
        plain[0] = checkpoint_wrapper(plain[0])
    loaded = tf.load(plain, tmp_path / "one")
    assert torch.equal(loaded(x, cond=z), model(x, cond=z))
    tf.save(loaded, tmp_path / "two")
    kept = [json.loads((tmp_path / name / "film.json").read_text())["fusion"] for name in ("one", "two")]
    assert kept[0] == kept[1]
    assert kept[0]["options"]["emit"] == {
        f"{i}.{name}": fields
        for i in range(2)
        for name, fields in (("norm", ["gamma", "beta"]), ("mlp.2", ["gate"]))
    }


def test_it_is_tabulated_folded_and_guided_as_any_modulation():
    model = randomise(conditioned(network()))
    x, z = torch.randn(2, 4, 5), torch.randn(2, 3)
    expected = model(x, cond=z)
    plain, _ = tf.fold(model, cond=z[:1])
    assert not any("film" in name for name, _ in plain.named_modules())
    torch.testing.assert_close(plain(x[:1]), expected[:1])
    table = tf.tabulate(copy.deepcopy(model), conds=z)
    torch.testing.assert_close(table(x, cond=torch.tensor([0, 1])), expected)
    guided = randomise(tf.condition(network(), PATTERN, tf.Maybe(tf.Vector(3)), emit=GATED, gate_start=1.0))
    guided.eval()
    one = tf.guide(guided, x, cond=z, scale=1.0, space="modulation")
    torch.testing.assert_close(one, guided(x, cond=z))


def test_a_site_with_a_gate_alone_is_heard_and_summarised_by_its_gate():
    model = randomise(conditioned(network()))
    x, z = torch.randn(6, 4, 5), torch.randn(6, 3)
    assert not tf.doctor(model, x, cond=z).findings
    with tf.record(model) as rec:
        model(x, cond=z)
    line = tf.summarise(rec)["0.mlp.2"]
    assert line.rank > 0
    assert line.gamma_sd == pytest.approx(rec["0.mlp.2"].gate.std(correction=0).item())
    assert not torch.cat([rec["0.mlp.2"].gamma - 1, rec["0.mlp.2"].beta]).any()


def test_a_match_of_parameters_counts_what_is_emitted():
    model = tf.condition(network(), PATTERN, tf.Vector(3), emit=GATED, match_params=97)
    rows = 2 * (2 * 5 + 5)
    assert sum(p.numel() for p in model.film.generator.parameters()) == rows * (2 + 1) + 2 * 3  # rank 2


REFUSED = [
    ({r".*nrom": ("gamma",), ".*": ("gate",)}, r"emit: '\.\*nrom' matches the whole name of none of the 4 "),
    (
        {r".*norm": ("gamma",)},
        r"a pattern for each site, got none for '0\.mlp\.2'.\nThe nearest are '\.\*nor",
    ),
    ({}, r"emit expected patterns with their fields, each pattern once, got \[\]\.\nGive fields by patterns"),
    ([(".*", ("gamma",)), (".*", ("beta",))], r"each pattern once, got \[\('\.\*', \('gamma',\)\), \("),
    (
        [(".*", ("gamma",), 3)],
        r"patterns with their fields, each pattern once, got \[\('\.\*', \('gamma',\), 3",
    ),
    ({".*": "gate"}, r"emit expected a tuple of .* got 'gate'.\nA single one is a tuple too: \('gate',\)"),
    ({".*": ("gate", "gamma")}, r"each once, got \('gate', 'gamma'\)"),
    ({".*": ()}, r"each once, got \(\)"),
    ({".*": ("gain",)}, r"emit expected one of .* got 'gain'"),
    ({3: ("gate",)}, r"emit expected patterns as text, got 3.\nGive names of sites, or regular expressions"),
    ({re.compile(".*"): ("gate",)}, r"patterns as text, .*\nGive its text: '\.\*'"),
    ({"(": ("gate",)}, r"emit: expected a name, or a regular expression, got '\(': missing"),
]


@pytest.mark.plain
@pytest.mark.parametrize(("emit", "message"), REFUSED)
def test_fields_by_site_that_cannot_be_meant_are_refused_before_anything_is_changed(emit, message):
    net = network()
    with pytest.raises(ValueError, match=message):
        tf.condition(net, PATTERN, tf.Vector(3), emit=emit)
    assert type(net) is nn.Sequential
    assert not hasattr(net, "film")


@pytest.mark.plain
def test_a_start_of_the_gate_needs_one_at_any_site():
    assert tf.Generator(7, SITES, emit=NORMS, gate_start=1.0).options.gate_start == 1
    with pytest.raises(
        ValueError, match=r"gate_start=1.0 needs a gate, got emit=\(\('\.\*', \('gamma',\)\),\)"
    ):
        tf.Generator(7, SITES, emit={".*": ("gamma",)}, gate_start=1.0)
