"""Laws of the question encoder."""

import pytest
import torch
from torch import nn

from torchfilm.blocks.text import WordEncoder


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_a_question_alone_equals_the_question_in_a_padded_batch(cell):
    torch.manual_seed(0)
    encoder = WordEncoder(11, 3, 5, cell=cell, bag_of_words=True).double()
    tokens, lengths = torch.randint(0, 11, (7, 6)), torch.tensor([2, 6, 1, 3, 6, 5, 2])
    together = encoder(tokens, lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = encoder(tokens[row : row + 1, :length], lengths[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


@pytest.mark.parametrize("cell", ["gru", "lstm"])
def test_the_state_is_that_of_a_plain_recurrence_at_the_last_word(cell):
    torch.manual_seed(0)
    encoder = WordEncoder(11, 3, 5, cell=cell).double()
    tokens, lengths = torch.randint(0, 11, (4, 6)), torch.tensor([2, 6, 1, 3])
    states, _ = encoder.rnn(encoder.embedding(tokens))
    torch.testing.assert_close(encoder(tokens, lengths), states[torch.arange(4), lengths - 1])


def test_gradients_do_not_reach_the_padding():
    encoder = WordEncoder(11, 3, 5, bag_of_words=True)
    encoder(torch.tensor([[1, 2, 9], [3, 9, 9]]), torch.tensor([2, 1])).sum().backward()
    assert isinstance(encoder.bag, nn.Embedding)
    for table in (encoder.embedding, encoder.bag):
        assert table.weight.grad.abs().sum(1).gt(0).nonzero().flatten().tolist() == [1, 2, 3]


def test_wrong_lengths_are_named():
    encoder, tokens = WordEncoder(11, 3, 5), torch.zeros(2, 6, dtype=torch.long)
    for low, high in ((0, 3), (1, 7)):
        with pytest.raises(ValueError, match=rf"expected lengths in 1..6 .*, got {low}..{high}"):
            encoder(tokens, torch.tensor([low, high]))
    with pytest.raises(ValueError, match=r"expected at least one, got none, tokens \(0, 6\)"):
        encoder(tokens[:0], torch.tensor([], dtype=torch.long))
    with pytest.raises(ValueError, match="one length per question"):
        encoder(tokens, torch.tensor([1, 2, 3]))
