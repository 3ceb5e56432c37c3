"""The hand-written GRU against PyTorch's, values and gradients."""

import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from torchfilm.blocks.recurrence import last_state


def packed(batch: int = 7, dim: int = 3, dtype: torch.dtype = torch.float64):
    torch.manual_seed(0)
    lengths = torch.tensor([6, 6, 5, 3, 2, 2, 1][:batch])
    words = torch.randn(batch, 6, dim, dtype=dtype)
    return pack_padded_sequence(words, lengths, batch_first=True)


def test_values_and_gradients_are_those_of_pytorchs_gru():
    torch.manual_seed(1)
    rnn, sequences = nn.GRU(3, 5).double(), packed()
    inputs = (sequences.data.requires_grad_(), *rnn.parameters())
    ours = last_state(rnn, inputs[0], sequences.batch_sizes.tolist())
    theirs = rnn(sequences)[1][0]
    torch.testing.assert_close(ours, theirs)
    weights = torch.randn(7, 5, dtype=torch.float64)
    got = torch.autograd.grad((ours * weights).sum(), inputs)
    expected = torch.autograd.grad((theirs * weights).sum(), inputs)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_gradient_is_that_of_finite_differences():
    rnn, sequences = nn.GRU(3, 2).double(), packed(4)
    sizes = sequences.batch_sizes.tolist()
    assert torch.autograd.gradcheck(
        lambda words: last_state(rnn, words, sizes), sequences.data.requires_grad_()
    )


def test_autocast_changes_nothing():
    rnn, sequences = nn.GRU(3, 5), packed(dtype=torch.float32)
    sizes = sequences.batch_sizes.tolist()
    exact = last_state(rnn, sequences.data, sizes)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(last_state(rnn, sequences.data, sizes), exact)
