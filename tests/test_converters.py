"""Orders and meanings of others: against their formulas, and against their own modules where installed."""

import pytest
import torch
from torch import Tensor, nn

import torchfilm.functional as F
from catalogue import randomise
from torchfilm.converters import LAYOUTS, Layout, as_generator, convert, read, reorder

over_layouts = pytest.mark.parametrize("name", LAYOUTS)
ACTIVATIONS = {"silu": nn.functional.silu, "mish": nn.functional.mish}

# What each codebase computes, as its papers and its code have it: the activation in front of the projection,
# then each site's output from x and the blocks of the projection, from first to last.
NONE, SILU, MISH = (lambda z: z), (lambda z: z * z.sigmoid()), (lambda z: z * z.exp().log1p().tanh())


def shift_scale_gate(x: Tensor, *p: Tensor) -> list[Tensor]:
    return [p[i + 2] * (x * (1 + p[i + 1]) + p[i]) for i in range(0, len(p), 3)]


FORMULAS = {
    "torchfilm": (NONE, lambda x, p, q: [(1 + p) * x + q]),
    "torchfilm/gate": (NONE, lambda x, p, q, r: [r * ((1 + p) * x + q)]),
    "film": (NONE, lambda x, p, q: [(1 + p) * x + q]),
    "dit": (SILU, shift_scale_gate),
    "dit/final": (SILU, lambda x, p, q: [x * (1 + q) + p]),
    "diffusers/AdaLayerNormZero": (SILU, shift_scale_gate),
    "diffusers/AdaLayerNormZeroSingle": (SILU, shift_scale_gate),
    "diffusers/SD35AdaLayerNormZeroX": (SILU, shift_scale_gate),
    "diffusers/AdaLayerNormContinuous": (SILU, lambda x, p, q: [x * (1 + p) + q]),
    "diffusers/AdaLayerNorm": (SILU, lambda x, p, q: [x * (1 + p) + q]),
    "diffusers/AdaGroupNorm": (NONE, lambda x, p, q: [x * (1 + p) + q]),
    "diffusers/ResnetBlock2D": (SILU, lambda x, p, q: [x * (1 + p) + q]),
    "lucidrains/FiLM": (NONE, lambda x, p, q: [x * (p + 1) + q]),
    "lucidrains/ResnetBlock": (SILU, lambda x, p, q: [x * (p + 1) + q]),
    "lucidrains/raw": (NONE, lambda x, p, q: [x * p + q]),
    "openvla-oft": (NONE, lambda x, p, q: [x * (1 + p) + q]),
    "rt-1": (NONE, lambda x, p, q: [(1 + p) * x + q]),
    "openpi": (NONE, lambda x, p, q, r: [r * (x * (1 + p) + q)]),
    "diffusion_policy": (MISH, lambda x, p, q: [p * x + q]),
    "diffusion_policy/bias": (MISH, lambda x, p: [x + p]),
    "audio2photoreal": (MISH, lambda x, p, q: [(p + 1) * x + q]),
}


def projection(words: int, cond: int = 7, channels: int = 3) -> nn.Linear:
    return randomise(nn.Linear(cond, words * channels))


def blocks(packed: Tensor, layout: Layout) -> dict[str, list[Tensor]]:
    """Cut by hand: word to the blocks of its sites."""
    found: dict[str, list[Tensor]] = {}
    size = packed.shape[-1] // len(layout.words)
    for i, word in enumerate(layout.words):
        found.setdefault(word, []).append(packed[..., i * size : (i + 1) * size])
    return found


@over_layouts
def test_a_generator_made_of_a_projection_does_what_its_codebase_does(name: str):
    layout, (active, outputs) = LAYOUTS[name], FORMULAS[name]
    z, x = torch.randn(2, 7).double(), torch.randn(2, 3).double()
    linear = projection(len(layout.words)).double()
    expected = outputs(x, *linear(active(z)).chunk(len(layout.words), dim=-1))
    made = as_generator({tuple(map(str, range(layout.sites))): linear}, name)(z).values()
    for m, y in zip(made, expected, strict=True):
        gate = 1 if m.gate is None else m.gate
        torch.testing.assert_close(gate * F.film(x, m.gamma, m.beta), y)


@over_layouts
def test_reading_takes_each_word_from_its_place(name: str):
    layout = LAYOUTS[name]
    packed = torch.randn(2, len(layout.words) * 3)
    found, modulations = blocks(packed, layout), read(packed, name)
    assert len(modulations) == layout.sites
    for i, m in enumerate(modulations):
        factors = found.get("gamma", [1 + scale for scale in found.get("scale", [])])
        assert torch.equal(m.gamma, factors[i] if factors else torch.ones(2, 3))
        assert torch.equal(m.beta, found["shift"][i])
        assert (m.gate is None) if "gate" not in found else torch.equal(m.gate, found["gate"][i])


@over_layouts
def test_a_generator_made_of_projections_says_what_they_said(name: str):
    layout, z = LAYOUTS[name], torch.randn(2, 7)
    linears = {}
    for block in ("a", "b"):
        names = tuple(f"{block}.{i}" for i in range(layout.sites))
        linears[names] = projection(len(layout.words))
    generator = as_generator(linears, name)
    active = ACTIVATIONS[layout.trunk[0]](z) if layout.trunk else z
    expected = {
        site: m
        for names, linear in linears.items()
        for site, m in zip(names, read(linear(active), layout), strict=True)
    }
    values = generator(z)
    assert list(values) == list(expected)
    for site, m in values.items():
        torch.testing.assert_close(m.gamma, expected[site].gamma)
        torch.testing.assert_close(m.beta, expected[site].beta)
        assert (m.gate is None) == (expected[site].gate is None)
        if m.gate is not None:
            torch.testing.assert_close(m.gate, expected[site].gate)


@pytest.mark.parametrize(
    ("source", "target"),
    [
        ("dit/final", "torchfilm"),
        ("torchfilm", "diffusion_policy"),
        ("diffusion_policy", "dit/final"),
        ("openpi", "diffusers/AdaLayerNormZeroSingle"),
        ("dit", Layout("scale shift gate scale shift gate")),
    ],
    ids=str,
)
def test_a_converted_projection_says_the_same_in_the_other_layout(source: str, target: str | Layout):
    linear, z = projection(len(LAYOUTS[source].words)), torch.randn(2, 7)
    weight, bias = convert(linear.weight, linear.bias, source, target)
    for one, other in zip(
        read(linear(z), source), read(nn.functional.linear(z, weight, bias), target), strict=True
    ):
        torch.testing.assert_close(one.gamma, other.gamma)
        torch.testing.assert_close(one.beta, other.beta)
    back = convert(weight, bias, target, source)
    assert torch.equal(back[0], linear.weight)
    torch.testing.assert_close(back[1], linear.bias)


@over_layouts
def test_small_numbers_of_a_projection_in_half_precision_are_not_lost(name: str):
    layout, z = LAYOUTS[name], torch.randn(2, 7).bfloat16()
    linear = projection(len(layout.words)).bfloat16()
    nn.init.constant_(linear.bias, 1e-3)
    nn.init.zeros_(linear.weight)
    names = tuple(map(str, range(layout.sites)))
    for site, m in zip(names, read(linear(z), layout), strict=True):
        made = as_generator({names: linear}, name)(z)[site]
        assert torch.equal(made.gamma, m.gamma)
        assert torch.equal(made.beta, m.beta)


def test_small_numbers_of_half_precision_come_back_from_another_layout():
    linear = projection(2).bfloat16()
    nn.init.constant_(linear.bias, 1e-3)
    weight, bias = convert(linear.weight, linear.bias, "diffusion_policy")
    assert (weight.dtype, bias.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(convert(weight, bias, "torchfilm", "diffusion_policy")[1], linear.bias.float())
    assert convert(linear.weight, linear.bias, "dit/final")[1].dtype == torch.bfloat16


def test_a_projection_without_a_bias_gets_the_one_where_it_moves():
    linear = nn.Linear(7, 6, bias=False)
    weight, bias = convert(linear.weight, None, "diffusion_policy")
    assert torch.equal(weight, linear.weight)
    assert bias.tolist() == [-1, -1, -1, 0, 0, 0]


def test_a_low_rank_update_is_permuted_on_its_output_axis_only():
    linear, b, a = projection(2), torch.randn(6, 2), torch.randn(2, 7)
    whole = reorder(linear.weight + b @ a, "dit/final")
    apart = reorder(linear.weight, "dit/final") + reorder(b, "dit/final") @ a
    torch.testing.assert_close(whole, apart)


def test_the_blocks_of_diffusers_are_read_in_their_order():
    normalization = pytest.importorskip("diffusers.models.normalization")
    z, x = torch.randn(2, 3), torch.randn(2, 5, 3)
    plain = nn.functional.layer_norm(x, (3,), eps=1e-6)
    zero = randomise(normalization.AdaLayerNormZero(3))
    first, second = as_generator({("attention", "mlp"): zero.linear}, "diffusers/AdaLayerNormZero")(
        z
    ).values()
    y, gate, shift, scale, gate_mlp = zero(x, emb=z)
    torch.testing.assert_close(F.film(plain, first.gamma, first.beta, dim=-1), y)
    for one, other in [
        (first.gate, gate),
        (second.beta, shift),
        (second.gamma, 1 + scale),
        (second.gate, gate_mlp),
    ]:
        torch.testing.assert_close(one, other)
    single = randomise(normalization.AdaLayerNormZeroSingle(3))
    m = as_generator({"norm": single.linear}, "diffusers/AdaLayerNormZeroSingle")(z)["norm"]
    y, gate = single(x, emb=z)
    torch.testing.assert_close(F.film(plain, m.gamma, m.beta, dim=-1), y)
    torch.testing.assert_close(m.gate, gate)
    last = randomise(normalization.AdaLayerNormContinuous(3, 3, elementwise_affine=False, eps=1e-6))
    m = as_generator({"norm": last.linear}, "diffusers/AdaLayerNormContinuous")(z)["norm"]
    torch.testing.assert_close(F.film(plain, m.gamma, m.beta, dim=-1), last(x, z))
    triple = randomise(normalization.SD35AdaLayerNormZeroX(3))
    names = ("attention", "mlp", "attention2")
    values = as_generator({names: triple.linear}, "diffusers/SD35AdaLayerNormZeroX")(z)
    y, gate, shift, scale, gate_mlp, y2, gate2 = triple(x, emb=z)
    torch.testing.assert_close(
        F.film(plain, values["attention2"].gamma, values["attention2"].beta, dim=-1), y2
    )
    torch.testing.assert_close(values["attention2"].gate, gate2)
    torch.testing.assert_close(values["mlp"].beta, shift)
    grouped = randomise(normalization.AdaGroupNorm(3, 4, 2))
    image = torch.randn(2, 4, 5, 6)
    m = as_generator({"norm": grouped.linear}, "diffusers/AdaGroupNorm")(z)["norm"]
    expected = F.film(nn.functional.group_norm(image, 2, eps=1e-5), m.gamma, m.beta)
    torch.testing.assert_close(expected, grouped(image, z))


def test_packed_numbers_in_low_precision_are_read_in_float32():
    packed = torch.full((2, 6), 1e-3, dtype=torch.bfloat16)
    (m,) = read(packed, "openpi")
    assert {m.gamma.dtype, m.beta.dtype, m.gate.dtype} == {torch.float32}
    assert (m.gamma > 1).all()


@pytest.mark.plain
def test_a_layout_whose_trunk_is_a_list_is_that_with_a_tuple_and_a_word_is_none():
    assert Layout("scale shift", ["silu"]) == Layout("scale shift", ("silu",))
    with pytest.raises(
        ValueError, match=r"trunk expected a tuple of .*, got 'silu'.\nA single one is a tuple"
    ):
        Layout("scale shift", "silu")


def test_wrong_layouts_say_what_is_wrong():
    with pytest.raises(
        ValueError, match=r"layout: expected one of \['.* got 'openpie'.\nDid you mean 'openpi"
    ):
        read(torch.randn(2, 6), "openpie")
    with pytest.raises(ValueError, match=r"got '000'.\nFor another order give Layout"):
        read(torch.randn(2, 6), "000")
    with pytest.raises(ValueError, match="expected words of gamma, scale, shift, gate, got 'scale bias'"):
        Layout("scale bias")
    with pytest.raises(ValueError, match="expected gamma or scale, got both"):
        Layout("gamma shift scale shift")
    with pytest.raises(ValueError, match=r"divisible by its 3 words, got 8 on axis -1 of \(2, 8\)"):
        read(torch.randn(2, 8), "openpi")
    with pytest.raises(
        ValueError, match=r"expected the same words, got shift \(cond_predict_scale=False\) and scale"
    ):
        reorder(torch.randn(6), "diffusion_policy/bias")


def test_separate_projections_of_scale_and_shift_become_one_generator():
    blocks = {"0": 3, "1": 5}  # name and width, as the FiLM of OpenVLA-OFT has them
    pairs = {
        name: (nn.Linear(7, width), nn.Linear(7, width, bias=name == "0")) for name, width in blocks.items()
    }
    found = as_generator(pairs, "openvla-oft")(z := torch.randn(2, 7))
    for name, (scale, shift) in pairs.items():
        torch.testing.assert_close(found[name].gamma, 1 + scale(z))
        torch.testing.assert_close(found[name].beta, shift(z))
    words = [projection(1) for _ in range(6)]
    attention, mlp = as_generator({("a", "b"): words}, "dit")(z).values()
    active = [word(nn.functional.silu(z)) for word in words]
    torch.testing.assert_close(torch.stack([attention.beta, mlp.gate]), torch.stack([active[0], active[5]]))
    torch.testing.assert_close(mlp.gamma, 1 + active[4])


@pytest.mark.parametrize(("sizes", "got"), [((3,), r"1 at 'a'"), ((3, 5), r"\[\(7, 3\), \(7, 5\)\]")])
def test_separate_projections_are_one_for_each_word_and_of_one_size(sizes: tuple, got: str):
    with pytest.raises(ValueError, match=rf"a projection for each word of 'scale shift', .* {got}"):
        as_generator({"a": [nn.Linear(7, size) for size in sizes]}, "rt-1")


def test_wrong_projections_say_what_is_wrong():
    with pytest.raises(ValueError, match=r"expected 2 sites for each projection .*, got \('a',\)"):
        as_generator({"a": projection(6)}, "dit")
    with pytest.raises(ValueError, match=r"expected projections of one condition, got sizes \[7, 8\]"):
        as_generator({"a": projection(2), "b": projection(2, cond=8)}, "torchfilm")
    with pytest.raises(ValueError, match=r"expected each site once, got 'a' again in \('a',\)"):
        as_generator({"a": projection(2), ("a",): projection(2)}, "torchfilm")
    with pytest.raises(ValueError, match=r"expected each site once, got 'a' again in \('a', 'a'\)"):
        as_generator({("a", "a"): projection(6)}, "dit")
    with pytest.raises(ValueError, match=r"expected projections of one condition, got sizes \[\]"):
        as_generator({}, "torchfilm")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("layout", ["dit", "openpi", Layout("gate gamma shift")])
def test_a_gate_goes_to_the_branch_that_is_named_and_its_numbers_stay(layout: str | Layout, bias: bool):
    linear, z = projection(6 if layout == "dit" else 3), torch.randn(2, 7)
    if not bias:
        linear.bias = None
    names = ("norm1", "norm2") if layout == "dit" else ("norm1",)
    alike = as_generator({names: linear}, layout)
    parted = as_generator({names: linear}, layout, gates={name: f"{name}.end" for name in names})
    assert list(parted.sites) == [one for name in names for one in (name, f"{name}.end")]
    assert torch.equal(parted.head.weight, alike.head.weight)
    expected, found = alike(z), parted(z)
    for name in names:
        assert torch.equal(found[name].gamma, expected[name].gamma)
        assert torch.equal(found[name].beta, expected[name].beta)
        assert torch.equal(found[f"{name}.end"].gate, expected[name].gate)
        assert found[name].gate is None
        assert torch.equal(found[f"{name}.end"].gated()[0], expected[name].gate)
        assert not found[f"{name}.end"].beta.any()


def test_a_gate_that_nothing_takes_is_left_out():
    blocks, z = {"0.norm": projection(3), "norm": projection(3)}, torch.randn(2, 7)
    found = as_generator(blocks, "openpi", gates={"norm": None, "0.norm": "0.mlp"})
    expected = as_generator(blocks, "openpi")(z)
    assert list(found.sites) == ["0.norm", "0.mlp", "norm"]
    assert found.head.weight.shape == (15, 7)
    torch.testing.assert_close(found(z)["norm"].beta, expected["norm"].beta)
    torch.testing.assert_close(found(z)["0.mlp"].gate, expected["0.norm"].gate)


def test_wrong_gates_say_what_is_wrong():
    block, blocks = {"norm": projection(3)}, {"a": projection(3), "b": projection(3)}
    with pytest.raises(ValueError, match=r"a layout with a gate .* got 'scale shift'.\nLeave gates= out"):
        as_generator({"norm": projection(2)}, "torchfilm", gates={"norm": "mlp"})
    with pytest.raises(
        ValueError, match=r"gates of the sites of projections, got one of 'nrom'.\nThe nearest are 'n"
    ):
        as_generator(block, "openpi", gates={"nrom": "mlp"})
    with pytest.raises(ValueError, match=r"takes the gate of 'b', got none.\nGive gates={'b': ...}"):
        as_generator(blocks, "openpi", gates={"a": "mlp"})
    with pytest.raises(ValueError, match=r"each site once, got 'mlp' again in gates"):
        as_generator(blocks, "openpi", gates={"a": "mlp", "b": "mlp"})
    with pytest.raises(ValueError, match=r"each site once, got 'b' again in gates"):
        as_generator(blocks, "openpi", gates={"a": "b", "b": "mlp"})
