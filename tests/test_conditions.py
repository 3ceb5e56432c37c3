"""Conditions: what becomes of vectors, classes and tokens."""

import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import oracles
import torchfilm as tf
from catalogue import randomise


def lengths_mask(lengths: list[int], time: int) -> torch.Tensor:
    return torch.arange(time) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize(
    "condition", [tf.Vector(7), tf.Classes(5, 7), tf.Tokens(7)], ids=lambda c: type(c).__name__
)
def test_every_condition_says_the_size_of_the_vector_it_gives(condition):
    inputs = {tf.Vector: torch.rand(2, 7), tf.Classes: torch.tensor([4, 0]), tf.Tokens: torch.rand(2, 3, 7)}
    assert condition.dim == 7
    assert condition(inputs[type(condition)]).shape == (2, 7)


@pytest.mark.parametrize(
    "make",
    [
        lambda **own: tf.Classes(5, 7, **own),
        lambda **own: tf.Scalars(1, 4, learned=True, **own),
        lambda **own: tf.Tokens(7, "attention", **own),
        lambda **own: tf.Maybe(tf.Vector(7), **own),
    ],
    ids=["classes", "scalars", "tokens", "maybe"],
)
def test_what_a_condition_learns_is_made_where_and_as_precise_as_it_is_asked_for(make):
    made = make(device="meta", dtype=torch.float64)
    assert {(p.dtype, p.is_meta) for p in made.parameters()} == {(torch.float64, True)}


def test_a_vector_is_its_own_condition():
    z = torch.randn(2, 7)
    assert tf.Vector(7)(z) is z


def test_each_class_has_a_row_of_its_own():
    classes = tf.Classes(5, 7)
    z = classes(torch.tensor([[4, 0], [4, 2]]))
    assert torch.equal(z[0, 0], z[1, 0])
    assert len(torch.unique(z.reshape(4, 7), dim=0)) == 3


def test_a_class_outside_the_table_is_refused():
    with pytest.raises(IndexError, match="Classes: expected an index from 0 to 4, got -1, 5: out of range"):
        tf.Classes(5, 7)(torch.tensor([5, 0, 4, -1, 5]))
    handed_on = tf.condition(nn.Sequential(nn.Linear(3, 2)), "0", tf.Classes(5), head="table")
    with pytest.raises(IndexError, match="Table of classes: expected an index from 0 to 4, got 5"):
        handed_on(torch.rand(2, 3), cond=torch.tensor([5, 0]))


def test_tokens_become_the_mean_of_the_real_ones():
    tokens = torch.randn(3, 5, 7).double()
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    real = [[tokens[b, t].numpy() for t in range(5) if mask[b, t]] for b in range(3)]
    expected = torch.from_numpy(oracles.masked_mean(real))
    torch.testing.assert_close(tf.Tokens(7)(tokens, mask), expected)
    torch.testing.assert_close(tf.Tokens(7)(tokens)[1], expected[1])


def test_padding_does_not_count_whatever_it_holds():
    tokens, mask = torch.randn(2, 5, 7).double(), lengths_mask([3, 5], 5)
    alone = tf.Tokens(7)(tokens[:1, :3])
    for fill in (0.0, 1e30, float("nan"), float("inf")):
        padded = tokens.clone()
        padded[0, 3:] = fill
        z = tf.Tokens(7)(padded.requires_grad_(), mask)
        torch.testing.assert_close(z[:1], alone)
        (gradient,) = torch.autograd.grad(z.sum(), padded)
        assert torch.equal(gradient[0, 3:], torch.zeros(2, 7).double())
        assert gradient.isfinite().all()


def test_more_padding_and_other_neighbours_change_nothing():
    tokens = torch.randn(1, 3, 7).double()
    far = torch.cat([tokens, torch.randn(1, 8, 7).double()], dim=1)
    both = torch.cat([far, torch.randn(1, 11, 7).double()])
    z = tf.Tokens(7)(both, lengths_mask([3, 11], 11))
    torch.testing.assert_close(z[:1], tf.Tokens(7)(tokens, lengths_mask([3], 3)))


def test_a_sequence_without_real_tokens_gives_zero():
    z = tf.Tokens(7)(torch.randn(2, 3, 7), lengths_mask([0, 2], 3))
    assert torch.equal(z[0], torch.zeros(7))
    assert z[1].abs().min() > 0


def test_tokens_in_half_precision_are_averaged_in_float32():
    tokens = torch.full((1, 1000, 1), 100.0, dtype=torch.float16)
    assert tf.Tokens(1)(tokens, torch.ones(1, 1000, dtype=torch.bool)).item() == 100.0


def test_a_sequence_of_no_tokens_at_all_gives_zero():
    for pooling in ("mean", "attention"):
        assert torch.equal(tf.Tokens(7, pooling)(torch.randn(2, 0, 7)), torch.zeros(2, 7))
    pool = randomise(tf.Tokens(6, "attention", heads=2))
    pool(torch.randn(2, 0, 6)).sum().backward()
    assert torch.equal(pool.query.grad, torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_mean_is_divided_as_that_of_tokens_with_a_mask(dtype):
    for time in range(12):
        tokens = torch.randn(3, time, 7).to(dtype)
        masked = tf.Tokens(7)(tokens, torch.ones(3, time, dtype=torch.bool))
        assert torch.equal(tf.Tokens(7)(tokens), masked)


def test_attention_pools_each_slice_of_the_channels_by_scores_of_its_own():
    tokens = torch.randn(3, 5, 6).double()
    mask = torch.tensor([[1, 0, 1, 1, 0], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]]).bool()
    real = [[tokens[b, t].numpy() for t in range(5) if mask[b, t]] for b in range(3)]
    for heads in (1, 2, 3):
        pool = randomise(tf.Tokens(6, "attention", heads=heads)).double()
        expected = oracles.attention_pooling(real, pool.query.detach().numpy())
        torch.testing.assert_close(pool(tokens, mask), torch.from_numpy(expected))


def test_attention_starts_as_the_mean():
    tokens, mask = torch.randn(3, 5, 7), lengths_mask([3, 0, 5], 5)
    assert torch.equal(tf.Tokens(7, "attention")(tokens, mask), tf.Tokens(7)(tokens, mask))


def test_attention_stands_scores_of_any_size():
    pool = tf.Tokens(2, "attention")
    torch.nn.init.constant_(pool.query, 1e4)
    tokens = torch.tensor([[[1.0, 1.0], [2.0, 2.0]], [[-1.0, -1.0], [-2.0, -2.0]]]).requires_grad_()
    z = pool(tokens, lengths_mask([2, 1], 2))
    assert torch.equal(z, torch.tensor([[2.0, 2.0], [-1.0, -1.0]]))
    z.sum().backward()
    assert tokens.grad.isfinite().all()
    assert pool.query.grad.isfinite().all()


@pytest.mark.plain
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dim", [1, 7, 12, 96])
@pytest.mark.parametrize(("pooling", "heads"), [("mean", 1), ("attention", 1), ("attention", 0)])
def test_padding_and_neighbours_do_not_change_a_bit(pooling, heads, dim, dtype):
    pool = randomise(tf.Tokens(dim, pooling, heads=heads or dim))
    for length in (1, 2, 5, 17, 33):
        tokens = torch.randn(1, length, dim).to(dtype)
        alone = pool(tokens, lengths_mask([length], length))
        for batch, time in [(1, length + 1), (2, 33), (3, 40), (7, 129)]:
            padded = torch.full((batch, time, dim), float("nan"), dtype=dtype)
            padded[1:] = torch.randn(batch - 1, time, dim)
            padded[0, :length] = tokens
            z = pool(padded, lengths_mask([length] + [time] * (batch - 1), time))
            assert torch.equal(z[:1], alone), (length, batch, time)


def test_without_pooling_the_tokens_go_on_with_their_mask():
    tokens, mask = torch.randn(2, 5, 7), lengths_mask([3, 5], 5)
    tokens[0, 3:] = float("nan")
    real, same = tf.Tokens(7, pooling=None)((tokens, mask))
    assert same is mask
    assert torch.equal(real[mask], tokens[mask])
    assert not real[0, 3:].any()
    assert tf.Tokens(7, pooling=None)(tokens)[1].all()


def test_tokens_and_mask_may_come_as_a_pair():
    tokens, mask = torch.randn(2, 5, 7), lengths_mask([3, 5], 5)
    for pooling in ("mean", "attention"):
        pool = tf.Tokens(7, pooling)
        assert torch.equal(pool((tokens, mask)), pool(tokens, mask))


def test_numbers_become_sines_and_cosines_at_periods_in_equal_ratios():
    numbers = torch.randn(3, 2).double()
    for low, high in [(4e-3, 4.0), (2 * math.pi, 2e4 * math.pi)]:
        z = tf.Scalars(2, 20, min_period=low, max_period=high)(numbers)
        expected = oracles.fourier(numbers.numpy(), 20, low, high)
        torch.testing.assert_close(z, torch.from_numpy(expected))


def test_time_steps_are_whole_numbers_and_their_features_those_of_transformers():
    steps = torch.tensor([[0], [3], [999]])
    scalars = tf.Scalars(1, 10, min_period=2 * math.pi, max_period=2e4 * math.pi)
    expected = [[f(s * 1e-4 ** (k / 4)) for f in (math.sin, math.cos) for k in range(5)] for s in (0, 3, 999)]
    assert scalars(steps).dtype == torch.float32
    torch.testing.assert_close(scalars(steps), torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert torch.equal(scalars(steps.int()), scalars(steps.float()))


def test_fixed_frequencies_are_no_state_and_keep_their_precision():
    scalars, numbers = tf.Scalars(1, 64), torch.rand(3, 1)
    before = scalars(numbers)
    assert not scalars.state_dict()
    assert torch.equal(scalars.bfloat16()(numbers), before)
    assert scalars(numbers.bfloat16()).dtype == torch.float32


def test_learned_frequencies_start_as_the_fixed_ones_and_receive_gradients():
    fixed, learned = tf.Scalars(2, 12), tf.Scalars(2, 12, learned=True)
    numbers = torch.rand(3, 2)
    torch.testing.assert_close(learned(numbers), fixed(numbers), rtol=1e-4, atol=1e-4)
    learned(numbers).square().mul(torch.rand(12)).sum().backward()
    assert learned.frequencies.grad.abs().min() > 0
    randomise(learned).reset_parameters()
    torch.testing.assert_close(learned(numbers), fixed(numbers), rtol=1e-4, atol=1e-4)


def test_classes_without_vectors_go_on_as_they_are():
    classes = tf.Classes(5)
    assert classes.dim == 5
    assert not list(classes.parameters())
    assert classes(torch.tensor([4, 0])).tolist() == [4, 0]


REFUSED = [
    (
        tf.Scalars(2, 8),
        (torch.rand(3),),
        r"Scalars: expected 2 real numbers .* \(3,\)[\s\S]*steps\[:, None\]",
    ),
    (tf.Scalars(2, 8), (torch.tensor(1.0),), "Scalars: expected 2 real numbers"),
    (tf.Scalars(1, 8), (torch.tensor(7),), r"for all samples is \[1\]: step\[None\]"),
    (
        tf.Tokens(7, "attention"),
        (torch.rand(2, 3, 7), torch.ones(2, 5).bool()),
        r"boolean mask \(2, 3\).*got torch.bool \(2, 5\)",
    ),
    (
        tf.Vector(7),
        (torch.rand(2, 5),),
        r"Vector: expected floating-point numbers with 7 .* \(2, 5\)[\s\S]*Vector\(5\)",
    ),
    (
        tf.Vector(7),
        (torch.ones(2, 7).long(),),
        "got torch.int64 of shape .*[\\s\\S]*For class numbers use Classes",
    ),
    (
        tf.Classes(5, 7),
        (torch.rand(2),),
        r"Classes: expected int64 or int32 numbers, got torch.float32 \(2,\)[\s\S]*argmax",
    ),
    *(
        (tf.Classes(5, 7), (torch.ones(2, dtype=dtype),), f"got {dtype}[\\s\\S]*Give classes.long\\(\\)")
        for dtype in (torch.uint8, torch.int16, torch.bool)
    ),
    (tf.Tokens(7), (torch.rand(7),), r"an axis of tokens in front of their 7 numbers, got shape \(7,\)"),
    (tf.Tokens(7), (torch.rand(2, 3, 5),), "Tokens: expected floating-point numbers with 7 on the last axis"),
    (
        tf.Tokens(7),
        (torch.rand(2, 3, 7), torch.ones(2, 3)),
        "boolean mask .*, got torch.float32 .*[\\s\\S]*mask.bool",
    ),
    (
        tf.Tokens(7),
        (torch.rand(2, 3, 7), torch.ones(2, 5).bool()),
        r"boolean mask \(2, 3\).*got torch.bool \(2, 5\)",
    ),
]


@pytest.mark.plain
@pytest.mark.parametrize(("condition", "inputs", "message"), REFUSED)
def test_what_is_no_condition_is_refused(condition, inputs, message):
    with pytest.raises(ValueError, match=message):
        condition(*inputs)


@pytest.mark.parametrize("pooling", ["mean", "attention"])
def test_tokens_of_one_sample_need_no_batch_axis(pooling):
    pool, tokens = randomise(tf.Tokens(6, pooling)), torch.randn(5, 6)
    torch.testing.assert_close(pool(tokens), pool(tokens[None])[0])


BUILT_WRONG = [
    (lambda: tf.Scalars(3, 8), r"n=3 with dim=8[\s\S]*multiple of 2 n = 6"),
    (
        lambda: tf.Scalars(1, 8, min_period=4.0, max_period=1.0),
        "0 < min_period < max_period, got 4.0 and 1.0",
    ),
    (lambda: tf.Tokens(7, "max"), r"pooling expected one of \[None, 'mean', 'attention'\], got 'max'"),
    (lambda: tf.Tokens(7, "attention", heads=2), "heads that divide dim=7"),
    (lambda: tf.Tokens(6, heads=2), "got heads=2 with pooling='mean'"),
]


SIZED = {
    "Vector: dim": tf.Vector,
    "Classes: num_classes": tf.Classes,
    "Classes: dim": lambda size: tf.Classes(2, size),
    "Scalars: n": lambda size: tf.Scalars(size, 8),
    "Scalars: dim": lambda size: tf.Scalars(2, size),
    "Tokens: dim": tf.Tokens,
    "Tokens: heads": lambda size: tf.Tokens(6, "attention", heads=size),
    "FiLM: features": lambda size: tf.FiLM(size, 7),
    "FiLM: cond_dim": lambda size: tf.ConditionalGroupNorm(1, 3, size),
    "Generator: cond_dim": lambda size: tf.Generator(size, {"here": 3}),
    "Generator site 'here': channels": lambda size: tf.Generator(7, {"here": size}),
}


@pytest.mark.plain
@pytest.mark.parametrize("size", [0, -1, "3", 6.0, True, torch.ones(2)], ids=str)
@pytest.mark.parametrize("what", SIZED)
def test_what_is_no_size_is_refused_where_it_is_given(what: str, size):
    with pytest.raises(
        ValueError, match=rf"{what} expected a whole number from 1 on, got {re.escape(repr(size))}"
    ):
        SIZED[what](size)


@pytest.mark.plain
def test_a_number_of_numpy_is_a_size():
    assert tf.Vector(np.int64(7))(torch.ones(2, 7)).shape == (2, 7)


@pytest.mark.plain
@pytest.mark.parametrize(("build", "message"), BUILT_WRONG)
def test_sizes_and_options_that_cannot_be_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.plain
@pytest.mark.parametrize(
    "value", [[1.0, 2.0], "up", None, tf.Masked(None)], ids=lambda value: type(value).__name__
)
@pytest.mark.parametrize("kind", [tf.Vector(2), tf.Classes(2, 3), tf.Scalars(2, 4), tf.Tokens(2)], ids=str)
def test_what_is_no_tensor_is_refused_with_what_to_do(kind, value):
    name = type(kind).__name__
    with pytest.raises(
        ValueError, match=rf"{name}: expected a tensor, got {type(value).__name__}.\n(.|\n)*Maybe\({name}"
    ):
        kind(value)
