"""The fusions against loops over single numbers, and the laws that hold for each of them."""

from collections.abc import Callable, Mapping

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

import oracles
import torchfilm as tf
from catalogue import randomise, refilled_by_name, refilled_by_type
from torchfilm.costs import describe
from torchfilm.fusion import FUSIONS, Fusion, resolve

COND, SITES, TOKENS = 7, {"a": 3, "b.c": 5}, 4
OPTIONS = {
    **{name: (name, {}) for name in FUSIONS},
    "film/narrow": ("film", {"head": "lowrank:2"}),
    "film/gate": ("film", {"bound": "tanh", "gamma_offset": 1.0}),
    "gate/narrow": ("gate", {"head": "lowrank:2"}),
    "concat/inner": ("concat", {"width": 2}),
    "low_rank/1": ("low_rank", {"width": 1}),
    "cross_attention/heads": ("cross_attention", {"width": 6, "heads": 3}),
}
over_fusions = pytest.mark.parametrize("name", OPTIONS)
over_layouts = pytest.mark.parametrize(
    ("shape", "dim"), [((2, 3, 5, 4), 1), ((2, 11, 3), -1), ((2, 3, 11), 1), ((2, 5, 3, 4), 2)], ids=str
)


def make(name: str) -> Fusion:
    kind, options = OPTIONS[name]
    return resolve(kind, **options)


def condition(batch: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(batch, COND, dtype=dtype)


def numbers(generator: nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy() for name, value in generator.named_parameters()}


@over_fusions
@over_layouts
def test_every_fusion_starts_as_the_identity_to_the_bit(name: str, shape: tuple[int, ...], dim: int):
    fusion, x = make(name), torch.randn(shape)
    for z in (condition(2), condition(2) * 100):
        value = fusion.build(COND, SITES)(z)["a"]
        assert torch.equal(fusion.apply(x, value, dim, "a"), x)


@over_fusions
@pytest.mark.parametrize("refill", [refilled_by_type, refilled_by_name])
def test_the_identity_survives_the_init_hooks_of_others(name: str, refill: Callable[[nn.Module], None]):
    fusion, x = make(name), torch.randn(2, 3, 5, 4)
    value = fusion.build(COND, SITES).apply(refill)(condition(2))["a"]
    assert torch.equal(fusion.apply(x, value, 1, "a"), x)


@over_fusions
def test_every_fusion_learns_from_its_start(name: str):
    fusion, generator = make(name), make(name).build(COND, {"a": 3})
    optimiser = torch.optim.SGD(generator.parameters(), lr=0.1)
    x, z, target = torch.randn(2, 3, 5, 4), condition(2), torch.randn(2, 3, 5, 4)
    losses = []
    for _ in range(4):
        loss = (fusion.apply(x, generator(z)["a"], 1, "a") - target).square().mean()
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


@over_fusions
def test_row_i_depends_on_condition_i_and_features_i_only(name: str):
    fusion = make(name)
    generator, x, z = randomise(fusion.build(COND, SITES)), torch.randn(3, 3, 5, 4), condition(3)
    before = fusion.apply(x, generator(z)["a"], 1, "a")
    z[1] += 1
    after = fusion.apply(x, generator(z)["a"], 1, "a")
    assert (before == after).flatten(1).all(dim=1).tolist() == [True, False, True]


@over_fusions
@over_layouts
def test_the_layout_of_features_does_not_matter(name: str, shape: tuple[int, ...], dim: int):
    fusion, x = make(name), torch.randn(shape)
    value = randomise(fusion.build(COND, SITES))(condition(2))["a"]
    moved = fusion.apply(x.movedim(dim, -1), value, -1, "a").movedim(-1, dim)
    torch.testing.assert_close(fusion.apply(x, value, dim, "a"), moved)


@over_fusions
@over_layouts
def test_a_batch_of_none_goes_through(name: str, shape: tuple[int, ...], dim: int):
    fusion = make(name)
    x = torch.randn(0, *shape[1:])
    assert fusion.apply(x, fusion.build(COND, SITES)(condition(0))["a"], dim, "a").shape == x.shape


@over_fusions
def test_a_generator_on_the_meta_device_materialises_with_its_start(name: str):
    with torch.device("meta"):
        generator = make(name).build(COND, SITES)
    for parameter in generator.to_empty(device="cpu").parameters():
        nn.init.constant_(parameter, torch.nan)
    for part in generator.modules():
        if hasattr(part, "reset_parameters"):
            part.reset_parameters()
    fresh = make(name).build(COND, SITES)
    assert all(parameter.isfinite().all() for parameter in generator.parameters())
    assert [bool(p.any()) for p in generator.parameters()] == [bool(p.any()) for p in fresh.parameters()]


@over_fusions
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_features_keep_their_precision(name: str, dtype: torch.dtype):
    fusion = make(name)
    value = randomise(fusion.build(COND, SITES))(condition(2))["a"]
    assert fusion.apply(torch.randn(2, 3, 5, 4, dtype=dtype), value, 1, "a").dtype == dtype


@over_fusions
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_features_keep_their_precision_under_autocast(name: str, dtype: torch.dtype):
    fusion = make(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = randomise(fusion.build(COND, SITES))(condition(2))["a"]
        assert fusion.apply(torch.randn(2, 3, 5, 4, dtype=dtype), value, 1, "a").dtype == dtype


@over_fusions
def test_a_folded_value_does_the_same(name: str):
    fusion = make(name)
    if not hasattr(fusion, "fold"):
        pytest.skip("attention is no affine map of the features")
    x = torch.randn(2, 3, 5, 4, dtype=torch.float64)
    value = randomise(fusion.build(COND, SITES).double())(condition(2, torch.float64))["a"]
    folded = fusion.fold(value)
    if isinstance(folded, tf.Modulation):
        expected = oracles.film(x.numpy(), folded.gamma.detach().numpy(), folded.beta.detach().numpy(), 1)
    else:
        weight = folded.weight.detach().expand(2, 3, 3).numpy()
        expected = np.empty(x.shape)
        for b, i, j in np.ndindex(2, 5, 4):
            column = x.numpy()[b, :, i, j]
            expected[b, :, i, j] = column + weight[b] @ column + folded.shift.detach().numpy()[b]
    torch.testing.assert_close(fusion.apply(x, value, 1, "a"), torch.from_numpy(expected))


@over_fusions
@pytest.mark.filterwarnings("ignore:.torch.jit.script")
def test_gradients_are_those_of_finite_differences(name: str):
    fusion, x = make(name), torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    generator = randomise(fusion.build(COND, {"a": 3}).double())
    names, values = zip(*generator.named_parameters(), strict=True)
    z = condition(2, torch.float64).requires_grad_()

    def run(x: Tensor, z: Tensor, *parameters: Tensor) -> Tensor:
        value = torch.func.functional_call(generator, dict(zip(names, parameters, strict=True)), (z,))["a"]
        return fusion.apply(x, value, 1, "a")

    leaves = [value.detach().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(run, (x, z, *leaves), fast_mode=True)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.autograd.gradcheck(run, (x, z, *leaves), fast_mode=True, check_forward_ad=True)
        assert torch.autograd.gradgradcheck(run, (x, z, *leaves), fast_mode=True)


@pytest.mark.plain
@over_fusions
def test_a_fusion_compiles_in_one_graph_and_gives_the_same(name: str):
    torch.compiler.reset()
    fusion = make(name)
    generator = randomise(fusion.build(COND, SITES))
    run = torch.compile(
        lambda x, z: fusion.apply(x, generator(z)["a"], 1, "a"), fullgraph=True, backend="eager"
    )
    x, z = torch.randn(2, 3, 5, 4), condition(2)
    torch.testing.assert_close(run(x, z), fusion.apply(x, generator(z)["a"], 1, "a"))


@over_fusions
def test_a_value_is_a_pytree_of_tensors(name: str):
    value = make(name).build(COND, SITES)(condition(2))["b.c"]
    leaves, spec = pytree.tree_flatten(value)
    assert leaves
    assert all(leaf is None or isinstance(leaf, Tensor) for leaf in leaves)
    assert type(pytree.tree_unflatten(leaves, spec)) is type(value)


def test_scale_bias_and_gate_are_film_with_less():
    x, z = torch.randn(2, 3, 5, 4), condition(2)
    for name, factor, shift in [("scale", True, False), ("bias", False, True), ("gate", True, False)]:
        value = randomise(resolve(name).build(COND, SITES))(z)["a"]
        assert (value.gamma != 1).any().item() == factor
        assert (value.beta != 0).any().item() == shift
    assert 0 < value.gamma.min() < value.gamma.max() < 2
    logits = randomise(resolve("gate").build(COND, {"a": 3}))
    raw = oracles.linear(z.numpy(), *(numbers(logits)[f"logits.head.{n}"] for n in ("weight", "bias")))
    expected = torch.from_numpy(2 / (1 + np.exp(-raw)))
    torch.testing.assert_close(logits(z)["a"].gamma.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(
        resolve("gate").apply(x, logits(z)["a"], 1, "a"), x * logits(z)["a"].gamma[..., None, None]
    )


def test_an_emitted_gate_weighs_the_whole_modulation():
    x = torch.randn(2, 3, 5, 4)
    m = tf.Modulation(torch.randn(2, 3), torch.randn(2, 3), torch.randn(2, 3))
    expected = (m.gate * m.gamma)[..., None, None] * x + (m.gate * m.beta)[..., None, None]
    torch.testing.assert_close(resolve("film").apply(x, m, 1, "a"), expected)


def test_concat_is_a_literal_concatenation_and_a_1x1_convolution():
    fusion, x, z = resolve("concat"), torch.randn(2, 3, 5, 4).double(), condition(2, torch.float64)
    generator = randomise(fusion.build(COND, {"a": 3}).double())
    own = dict(generator.named_parameters())
    tiled = torch.cat([x, z[:, :, None, None].expand(2, COND, 5, 4)], dim=1)
    weight = torch.cat([own["weights.0"] + torch.eye(3), own["shift.weight"]], dim=1)
    literal = nn.functional.conv2d(tiled, weight[:, :, None, None], own["shift.bias"])
    torch.testing.assert_close(fusion.apply(x, generator(z)["a"], 1, "a"), literal)


def test_concat_with_an_inner_layer_is_two_literal_convolutions_beside_a_skip():
    fusion, x, z = resolve("concat", width=2), torch.randn(2, 3, 5, 4).double(), condition(2, torch.float64)
    generator = randomise(fusion.build(COND, {"a": 3}).double())
    own = dict(generator.named_parameters())
    tiled = torch.cat([x, z[:, :, None, None].expand(2, COND, 5, 4)], dim=1)
    weight = torch.cat([own["weights.0"], own["shift.weight"]], dim=1)
    inner = nn.functional.conv2d(tiled, weight[:, :, None, None], own["shift.bias"])
    literal = x + nn.functional.conv2d(inner, own["ups.0"][:, :, None, None])
    torch.testing.assert_close(fusion.apply(x, generator(z)["a"], 1, "a"), literal)


def test_low_rank_is_a_weighted_sum_of_rank_one_maps():
    fusion, x, z = resolve("low_rank", width=2), torch.randn(2, 5, 3).double(), condition(2, torch.float64)
    generator = randomise(fusion.build(COND, {"a": 3}).double())
    own = numbers(generator)
    factors = oracles.linear(z.numpy(), own["factor.weight"], own["factor.bias"])
    expected = x.numpy().copy()
    for b, t, r in np.ndindex(2, 5, 2):
        inner = own["downs.0"][r] @ x.numpy()[b, t] + own["offsets.0"][r]
        expected[b, t] += own["ups.0"][:, r] * factors[b, r] * inner
    torch.testing.assert_close(fusion.apply(x, generator(z)["a"], -1, "a"), torch.from_numpy(expected))


def attended(
    x: np.ndarray, tokens: list[np.ndarray], own: Mapping[str, np.ndarray], heads: int
) -> np.ndarray:
    """Cross-attention of x [B, T, C] over the real tokens of each sample, position by position."""
    width, y = own["queries.0"].shape[0], x.copy()
    size = width // heads
    for b, t in np.ndindex(*x.shape[:2]):
        query, read = own["queries.0"] @ x[b, t], np.zeros(width)
        both = [own["read.weight"] @ token + own["read.bias"] for token in tokens[b]]
        for h in range(heads):
            part = slice(h * size, (h + 1) * size)
            scores = np.array([query[part] @ kv[:width][part] for kv in both]) / size**0.5
            weights = np.exp(scores) / np.exp(scores).sum() if both else []
            for weight, kv in zip(weights, both, strict=True):
                read[part] += weight * kv[width:][part]
        y[b, t] += own["outputs.0"] @ read
    return y


@pytest.fixture(params=["eager", "as in a compiler"])
def mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention by torch's own operation, and written out."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: request.param != "eager")


@pytest.mark.usefixtures("mode")
@pytest.mark.parametrize("heads", [1, 3])
def test_cross_attention_reads_the_real_tokens_position_by_position(heads: int):
    fusion = resolve("cross_attention", width=6, heads=heads)
    generator = randomise(fusion.build(COND, {"a": 3}).double())
    x, tokens = torch.randn(2, 5, 3).double(), torch.randn(2, TOKENS, COND).double()
    mask = torch.tensor([[True, False, True, True], [True, False, False, False]])
    real = [tokens[b][mask[b]].numpy() for b in range(2)]
    expected = attended(x.numpy(), real, numbers(generator), heads)
    tokens[~mask] = float("nan")
    actual = fusion.apply(x, generator((tokens, mask))["a"], -1, "a")
    torch.testing.assert_close(actual, torch.from_numpy(expected))


@pytest.mark.usefixtures("mode")
def test_cross_attention_over_no_token_adds_nothing_and_keeps_gradients_finite():
    fusion = resolve("cross_attention")
    generator = randomise(fusion.build(COND, {"a": 3}))
    x, mask = torch.randn(2, 5, 3, requires_grad=True), torch.tensor([[False, False], [True, False]])
    y = fusion.apply(x, generator((torch.randn(2, 2, COND), mask))["a"], -1, "a")
    assert torch.equal(y[0], x[0])
    assert not torch.equal(y[1], x[1])
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in (x, *generator.parameters()))


@pytest.mark.plain
def test_a_compiler_never_sees_torchs_attention_with_a_mask():
    """Inductor (PyTorch 2.13) compiles its backward pass for one length of the mask only."""
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Tokens(COND, None), fusion="cross_attention")
    seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, _: list[Tensor]) -> object:
        seen.append(graph.code)
        return graph.forward

    x, tokens, mask = torch.randn(2, 4, 3), torch.randn(2, TOKENS, COND), torch.ones(2, TOKENS) > 0
    cond = (randomise(model.film) and tokens, mask)
    found = torch.compile(model, backend=backend, fullgraph=True)(x, cond=cond)
    torch.testing.assert_close(found, model(x, cond=cond))
    assert len(seen) == 1
    assert "scaled_dot_product_attention" not in seen[0]


class Swap:
    """A fusion of a user: swap neighbouring channels as far as the condition says."""

    def build(self, cond_dim: int, sites: Mapping[str, int]) -> nn.Module:
        head = tf.heads.AffineHead(cond_dim, len(sites))

        class Amounts(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.head = head

            def forward(self, z: Tensor) -> dict[str, Tensor]:
                return dict(zip(sites, self.head(z).split(1, dim=-1), strict=True))

        return Amounts()

    def apply(self, x: Tensor, value: Tensor, dim: int, site: str) -> Tensor:
        return x + value.reshape(-1, *[1] * (x.ndim - 1)) * (x.roll(1, dim) - x)


def test_a_fusion_of_a_user_needs_build_and_apply_only():
    fusion = Swap()
    assert resolve(fusion) is fusion
    x, generator = torch.randn(2, 3, 5), fusion.build(COND, SITES)
    assert torch.equal(fusion.apply(x, generator(condition(2))["b.c"], 1, "b.c"), x)


def test_an_unknown_fusion_gives_the_nearest_names():
    with pytest.raises(ValueError, match=r"got 'cross-attention'.\nDid you mean 'cross_attention'\?"):
        resolve("cross-attention")
    with pytest.raises(
        ValueError, match=r"fusion: expected one of \['film', .* got 'zzz'.\nChoose one of these"
    ):
        resolve("zzz")


@pytest.mark.plain
def test_an_object_that_is_no_fusion_is_refused():
    with pytest.raises(ValueError, match=r"expected a name or an object with build\(\) and apply\(\), got 3"):
        resolve(3)
    with pytest.raises(
        ValueError, match=r"build\(\) and apply\(\), got <class '.*Film'>.\nThe names are film, "
    ):
        resolve(FUSIONS["film"])


def test_options_beside_an_object_are_refused():
    with pytest.raises(ValueError, match="expected no options beside an object of type Swap, got width"):
        resolve(Swap(), width=3)


def test_features_of_another_size_are_refused_by_name():
    for name in ("concat", "low_rank", "cross_attention"):
        fusion = resolve(name)
        value = fusion.build(COND, SITES)(condition(2))["a"]
        with pytest.raises(ValueError, match=r"site 'a': the weights are for 3 channels, but x has size 5"):
            fusion.apply(torch.randn(2, 5, 4), value, 1, "a")


def test_attention_refuses_heads_that_do_not_share_evenly_and_pooled_tokens():
    with pytest.raises(ValueError, match=r"site 'a': expected a width divisible by heads=2, got 3"):
        resolve("cross_attention", heads=2).build(COND, SITES)
    with pytest.raises(ValueError, match=r"expected tokens \[B, T, 7\], got \(2, 5, 6\)"):
        resolve("cross_attention").build(COND, SITES)(torch.randn(2, 5, 6))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5)
    )


@over_fusions
def test_a_conditioned_network_starts_as_it_was_and_then_hears(name: str):
    x, z, plain = torch.randn(2, 2, 7, 6), condition(2), network().eval()
    kind, options = OPTIONS[name]
    model = tf.condition(network().eval(), r"[14]", tf.Vector(COND), fusion=kind, **options)
    assert torch.equal(model(x, cond=z), plain(x))
    randomise(model.film)
    assert not torch.allclose(model(x, cond=z), model(x, cond=z + 1))
    assert torch.equal(tf.remove(model)(x), plain(x))


@over_fusions
def test_rows_that_share_a_condition_get_the_same_as_alone(name: str):
    kind, options = OPTIONS[name]
    model = tf.condition(network().eval(), r"[14]", tf.Vector(COND), fusion=kind, repeat=3, **options)
    alone = tf.condition(network().eval(), r"[14]", tf.Vector(COND), fusion=kind, **options)
    alone.load_state_dict(randomise(model.film) and model.state_dict())
    x, z = torch.randn(6, 2, 7, 6), condition(2)
    torch.testing.assert_close(model(x, cond=z), alone(x, cond=z.repeat_interleave(3, dim=0)))


def test_attention_in_a_network_reads_tokens_that_are_not_pooled():
    tokens, mask = torch.randn(2, TOKENS, COND), torch.tensor([[True] * 4, [True, True, False, False]])
    encoder = tf.Tokens(COND, pooling=None)
    model = tf.condition(network().eval(), r"[14]", encoder, fusion="cross_attention")
    randomise(model.film)
    x = torch.randn(2, 2, 7, 6)
    shorter = model(x[1:], cond=(tokens[1:, :2], mask[1:, :2]))
    torch.testing.assert_close(model(x, cond=(tokens, mask))[1:], shorter)


def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@pytest.mark.parametrize("fusion", FUSIONS)
def test_every_fusion_says_what_each_site_costs(fusion: str):
    built = resolve(fusion)
    generator = built.build(7, {"a": 3, "b": 5})
    own = {name: count(built.build(7, {name: channels})) for name, channels in {"a": 3, "b": 5}.items()}
    assert generator.own_parameters() == own
    lines = describe(generator, {"a": 3, "b": 5}).splitlines()
    assert [line.split()[:3] for line in lines[1:3]] == [["a", "3", str(own["a"])], ["b", "5", str(own["b"])]]
    assert lines[-1].split() == ["total", "8", str(count(generator)), "100.0%"]


def test_a_conditioned_network_prints_the_parameters_of_each_site_and_of_the_condition():
    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Classes(11, 7), fusion="concat", width=2)
    shown = tf.conditioning(model).describe().splitlines()
    assert shown[1].split() == ["0", "5", "36", "100.0%"]
    assert shown[-1] == "Classes, the condition: 77 parameters"

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(7, 10)

        def forward(self, z):
            return {"0": tf.Modulation(*self.layer(z).chunk(2, dim=-1))}

    model = tf.condition(nn.Sequential(nn.Linear(3, 5)), "0", tf.Vector(7), generator=Own())
    assert tf.conditioning(model).describe().splitlines()[2].split() == ["(all", "sites)", "80", "100.0%"]


@pytest.mark.parametrize("number", [0, -1])
@pytest.mark.parametrize(
    ("name", "option"),
    [("concat", "width"), ("low_rank", "width"), ("cross_attention", "width"), ("cross_attention", "heads")],
)
def test_widths_and_heads_below_one_are_refused(name: str, option: str, number: int):
    with pytest.raises(ValueError, match=rf"{option} expected a whole number from 1 on, got {number}\.\n"):
        resolve(name, **{option: number})


@pytest.mark.plain
def test_attention_refuses_a_mask_of_numbers():
    generator = resolve("cross_attention").build(COND, SITES)
    with pytest.raises(
        ValueError, match=r"a boolean mask, True where .* got torch.int64.\nFor 0 and 1 .*bool"
    ):
        generator((torch.randn(2, TOKENS, COND), torch.ones(2, TOKENS, dtype=torch.int64)))


@pytest.mark.plain
def test_options_that_a_fusion_does_not_take_are_refused():
    with pytest.raises(ValueError, match=r"'concat': options expected one of .*'width'\], got 'hed'.\nLeave"):
        resolve("concat", hed=3)
    with pytest.raises(ValueError, match=r"'scale': options expected one of .* got 'emit'.\nLeave it out"):
        resolve("scale", emit=("gamma",))
