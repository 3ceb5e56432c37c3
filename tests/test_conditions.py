"""Conditions: what becomes of vectors, classes and tokens."""

import pytest
import torch

import oracles
import torchfilm as tf


def lengths_mask(lengths: list[int], time: int) -> torch.Tensor:
    return torch.arange(time) < torch.tensor(lengths)[:, None]


@pytest.mark.parametrize(
    "condition", [tf.Vector(7), tf.Classes(5, 7), tf.Tokens(7)], ids=lambda c: type(c).__name__
)
def test_every_condition_says_the_size_of_the_vector_it_gives(condition):
    inputs = {tf.Vector: torch.rand(2, 7), tf.Classes: torch.tensor([4, 0]), tf.Tokens: torch.rand(2, 3, 7)}
    assert condition.dim == 7
    assert condition(inputs[type(condition)]).shape == (2, 7)


def test_a_vector_is_its_own_condition():
    z = torch.randn(2, 7)
    assert tf.Vector(7)(z) is z


def test_each_class_has_a_row_of_its_own():
    classes = tf.Classes(5, 7)
    z = classes(torch.tensor([[4, 0], [4, 2]]))
    assert torch.equal(z[0, 0], z[1, 0])
    assert len(torch.unique(z.reshape(4, 7), dim=0)) == 3


def test_a_class_outside_the_table_is_refused():
    with pytest.raises(IndexError, match="out of range"):
        tf.Classes(5, 7)(torch.tensor([5]))


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


REFUSED = [
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
        r"Classes: expected int64 or int32 numbers, got torch.float32 \(2,\)",
    ),
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
