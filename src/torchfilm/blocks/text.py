"""Questions as vectors: a recurrent encoder that runs over the words and never over the padding."""

from functools import partial
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from torchfilm.blocks.recurrence import Gru, last_state

BAG_SCALE = 0.3
"""Weight of the bag-of-words vector beside the recurrent state (the laptop recipe)."""

CELLS = {"gru": Gru, "lstm": partial(nn.LSTM, batch_first=True)}


class WordEncoder(nn.Module):
    """Encode each question as the state of a one-layer recurrent network at its last word.

        e_t = embedding(w_t),  h_t = cell(e_t, h_{t-1}),  z = h_length  [+ 0.3 * sum_t bag(w_t)]

    The words are packed, so padding costs nothing and cannot change z, and neither can the other
    questions of the batch. Perez et al. 2018, section 2.2 (the FiLM generator); the optional bag of words,
    a second learned vector per word, is not the paper's.

    Compiled or exported in evaluation mode, a GRU runs over the padding too and takes the same states, in
    one graph that checks no lengths. In training, where the longest question changes from batch to batch and
    each would be compiled anew, the words stay packed, and what follows is the graph.
    """

    def __init__(
        self,
        vocabulary: int,
        word_dim: int,
        width: int,
        *,
        cell: Literal["gru", "lstm"] = "gru",
        bag_of_words: bool = False,
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, word_dim)
        self.rnn = CELLS[cell](word_dim, width)
        self.bag = nn.Embedding(vocabulary, width) if bag_of_words else None

    def forward(
        self, tokens: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch width"]:
        """Return the state [batch, width] at the last word.

        tokens: word ids, padded at the end with anything; lengths: words per question, 1 to time,
        with <START> and <END> counted. Raises ValueError if a length is outside that range, or for no
        questions.
        """
        if self._in_a_graph():
            states, rows = self._unpacked(tokens), torch.arange(tokens.shape[0], device=tokens.device)
            last = states[rows, lengths.to(tokens.device) - 1]
            return last if self.bag is None else last + self._bagged(tokens, lengths).sum(dim=1)
        return self._read_packed(tokens, lengths)  # type: ignore[call-arg]

    @torch.compiler.disable  # packing depends on the lengths' values; what follows compiles as one graph
    def _read_packed(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        packed = self._packed(tokens, lengths)
        if isinstance(self.rnn, Gru) and tokens.device.type == "cpu":
            last = last_state(self.rnn, packed.data, packed.batch_sizes.tolist())
            last = last if packed.unsorted_indices is None else last[packed.unsorted_indices]
        else:
            _, state = self.rnn(packed)
            last = (state[0] if isinstance(state, tuple) else state)[0]
        return last if self.bag is None else last + self._bagged(tokens, lengths).sum(dim=1)

    def states(
        self, tokens: Int[Tensor, "batch time"], lengths: Int[Tensor, " batch"]
    ) -> Float[Tensor, "batch time width"]:
        """Return the state at each word, plus its vector of the bag; zero behind the last word."""
        if self._in_a_graph():
            states = self._unpacked(tokens) * real_words(tokens, lengths)[:, :, None]
        else:
            states, _ = self.rnn(self._packed(tokens, lengths))
            states, _ = pad_packed_sequence(states, batch_first=True, total_length=tokens.shape[1])
        return states if self.bag is None else states + self._bagged(tokens, lengths)

    def _in_a_graph(self) -> bool:
        return torch.compiler.is_compiling() and not self.training and isinstance(self.rnn, Gru)

    def _unpacked(self, tokens: Tensor) -> Tensor:
        assert isinstance(self.rnn, Gru)
        return self.rnn.states(self.embedding(tokens))

    def _bagged(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        """The vectors of the bag, zero behind the last word."""
        assert self.bag is not None
        return BAG_SCALE * self.bag(tokens) * real_words(tokens, lengths)[:, :, None]

    def _packed(self, tokens: Tensor, lengths: Tensor) -> PackedSequence:
        lengths = lengths.cpu()  # if they are on a device, this is the only wait for it
        _check_lengths(tokens, lengths)
        embedded = self.embedding(tokens)
        return pack_padded_sequence(embedded, lengths, batch_first=True, enforce_sorted=False)


def real_words(
    tokens: Shaped[Tensor, "batch time *rest"], lengths: Int[Tensor, " batch"]
) -> Bool[Tensor, "batch time"]:
    """Return True for words and False for the padding behind them."""
    lengths = lengths.to(tokens.device, non_blocking=True)
    return torch.arange(tokens.shape[1], device=tokens.device) < lengths[:, None]


def _check_lengths(tokens: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless there are questions, with one length in 1..time for each."""
    if lengths.shape != tokens.shape[:1]:
        raise ValueError(
            f"Questions: expected one length per question, got lengths {tuple(lengths.shape)} "
            f"for tokens {tuple(tokens.shape)}. Pass lengths as [batch]."
        )
    if not len(lengths):
        raise ValueError(
            f"Questions: expected at least one, got none, tokens {tuple(tokens.shape)}. "
            "Leave out batches without questions."
        )
    low, high = int(lengths.min()), int(lengths.max())
    if low < 1 or high > tokens.shape[1]:
        raise ValueError(
            f"Questions: expected lengths in 1..{tokens.shape[1]} (the padded width), got {low}..{high}. "
            "Count the words of each question, <START> and <END> with them."
        )
