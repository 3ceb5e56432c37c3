"""Conditioning and folding over layouts, axes and rows that a generator of cases thinks of."""

import copy

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import torchfilm as tf
from catalogue import randomise
from torchfilm.folding import fold

SIZES = st.integers(1, 5)
few = settings(max_examples=15, deadline=None)


class Any(nn.Module):
    """A layer of somebody else, with channels on an axis of its own choice."""

    def forward(self, x: Tensor) -> Tensor:
        return x.sin()


@given(
    shape=st.lists(SIZES, min_size=1, max_size=4),
    batch=SIZES,
    repeat=st.integers(1, 3),
    axis=st.integers(0, 3),
    where=st.sampled_from(["output", "input"]),
    behind=st.booleans(),
)
@few
def test_at_any_axis_a_site_starts_as_it_was_and_each_row_hears_its_own_condition(
    shape, batch, repeat, axis, where, behind
):
    dim = 1 + axis % len(shape)
    x = torch.randn(batch * repeat, *shape, dtype=torch.float64)
    base = nn.Sequential(Any())
    model = tf.condition(
        copy.deepcopy(base),
        "0",
        tf.Vector(2),
        where=where,
        dim=dim - x.ndim if behind else dim,
        features=x.shape[dim],
        repeat=repeat,
    )
    z = torch.randn(batch, 2, dtype=torch.float64)
    assert torch.equal(model.double()(x, cond=z), base(x))
    randomise(model.film)
    m = model.film.modulations(z)["0"]
    y = model(x, cond=z)
    for row in range(len(x)):
        gamma, beta = (field[row // repeat] for field in (m.gamma, m.beta))
        moved = x[row].movedim(dim - 1, -1)
        expected = gamma * moved.sin() + beta if where == "output" else (gamma * moved + beta).sin()
        torch.testing.assert_close(y[row].movedim(dim - 1, -1), expected)


@given(
    axes=st.integers(1, 3),
    groups=st.integers(1, 3),
    inner=st.integers(1, 2),
    outer=st.integers(1, 2),
    kernel=st.integers(1, 3),
    padding=st.integers(0, 2),
    stride=st.integers(1, 2),
    transposed=st.booleans(),
    bias=st.booleans(),
    where=st.sampled_from(["output", "input"]),
)
@few
def test_any_convolution_folds_exactly_or_keeps_a_constant(
    axes, groups, inner, outer, kernel, padding, stride, transposed, bias, where
):
    name = f"Conv{'Transpose' if transposed else ''}{axes}d"
    options = {"padding": min(padding, kernel - 1), "stride": stride, "groups": groups, "bias": bias}
    layer = getattr(nn, name)(groups * inner, groups * outer, kernel, **options)
    model = nn.Sequential(layer, nn.ReLU()).double().eval()
    model = randomise(tf.condition(model, "0", tf.Vector(2), where=where).double())
    x = torch.randn(2, groups * inner, *[kernel + 2] * axes, dtype=torch.float64)
    z = torch.randn(1, 2, dtype=torch.float64)
    plain, report = fold(model, cond=z, leftover="constant", inputs=(x,))
    torch.testing.assert_close(plain(x), model(x, cond=z))
    if where == "output":
        assert report["0"].target.startswith("0.weight")
        assert type(plain[0]) is type(getattr(nn, name)(1, 1, 1))


@given(
    norm=st.sampled_from(["batch", "group", "instance", "layer", "linear", "embedding"]),
    channels=st.integers(2, 5),
    affine=st.booleans(),
)
@few
def test_any_norm_and_layer_folds_what_it_gives(norm, channels, affine):
    layer, x = {
        "batch": (nn.BatchNorm1d(channels, affine=affine), torch.randn(2, channels, 3)),
        "group": (nn.GroupNorm(1, channels, affine=affine), torch.randn(2, channels, 3)),
        "instance": (nn.InstanceNorm1d(channels, affine=affine), torch.randn(2, channels, 3)),
        "layer": (nn.LayerNorm(channels, elementwise_affine=affine), torch.randn(2, 3, channels)),
        "linear": (nn.Linear(channels, 3, bias=affine), torch.randn(2, channels)),
        "embedding": (nn.Embedding(channels, 3), torch.arange(channels)),
    }[norm]
    model = randomise(tf.condition(nn.Sequential(layer, nn.PReLU()), "0", tf.Vector(2))).double().eval()
    x = x.double() if x.is_floating_point() else x
    z = torch.randn(1, 2, dtype=torch.float64)
    plain, report = fold(model, cond=z, inputs=(x,))
    torch.testing.assert_close(plain(x), model(x, cond=z))
    assert report.error < 1e-6
