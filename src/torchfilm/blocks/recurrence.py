"""A GRU over packed words with its gradient written by hand: on a CPU, twice as fast to train as `nn.GRU`.

Automatic differentiation records some fifteen small operations for each word and sums the weights' gradients
word by word. Here the backward pass is six operations a word, and the gradients of the weights are one matrix
product each at the end.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Gru(nn.RNNBase):
    """`nn.GRU` of one layer, batch first: the same names, numbers and start.

    A compiler refuses to look into `nn.GRU`, and into this it looks (`states`).
    """

    weight_ih_l0: Tensor
    weight_hh_l0: Tensor
    bias_ih_l0: Tensor
    bias_hh_l0: Tensor

    def __init__(self, dim: int, width: int) -> None:
        super().__init__("GRU", dim, width, batch_first=True)

    forward = nn.GRU.forward

    def states(self, words: Float[Tensor, "batch time dim"]) -> Float[Tensor, "batch time width"]:
        """Return the state after each word, padding included, in operations that compile and export.

        The loop is unrolled, for one length at a time; the batch may change.
        """
        gates = functional.linear(words, self.weight_ih_l0, self.bias_ih_l0)
        state, found = gates.new_zeros(words.shape[0], self.hidden_size), []
        for gate in gates.unbind(dim=1):
            product = functional.linear(state, self.weight_hh_l0, self.bias_hh_l0)
            reset, update, new = gate.chunk(3, dim=-1)
            again, keep, candidate = product.chunk(3, dim=-1)
            new = torch.tanh(new + torch.sigmoid(reset + again) * candidate)
            state = torch.lerp(new, state, torch.sigmoid(update + keep))
            found.append(state)
        return torch.stack(found, dim=1)


def last_state(
    rnn: nn.RNNBase, words: Float[Tensor, "words dim"], sizes: Sequence[int]
) -> Float[Tensor, "batch width"]:
    """Return the state of a one-layer GRU after the last word of each sequence.

        r, z = sigmoid(W_r x + U_r h), sigmoid(W_z x + U_z h)
        n = tanh(W_n x + r * (U_n h))                            (biases with each product)
        h <- n + z * (h - n)

    words: the packed words, all first words, then all second words, ..., the longest sequence first, as
    `pack_padded_sequence` gives them; sizes: how many sequences have a first, second, ... word (falling).
    Not twice differentiable. All of it runs in the weights' precision, under autocast too: a bfloat16
    product is prepared anew for each number of rows that it meets, and here that changes with every word.
    """
    with torch.autocast(words.device.type, enabled=False):
        return _PackedGRU.apply(
            words, rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0, tuple(sizes)
        )


class _PackedGRU(torch.autograd.Function):
    """The recurrence and its gradient; rows of every [words, ...] buffer are packed as the words are."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        words, w_ih, w_hh, b_ih, b_hh, sizes = inputs
        width = w_hh.shape[1]
        gates = torch.addmm(b_ih, words, w_ih.t())
        after, candidate = gates.new_empty(len(words), width), gates.new_empty(len(words), width)
        recurrent = w_hh.t()
        state = gates.new_zeros(sizes[0], width)
        before, ended = [], []
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            ended.append(state[size:])
            state = state[:size]
            before.append(state)
            product = torch.addmm(b_hh, state, recurrent)
            gate = gates[rows]
            gate[:, : 2 * width].add_(product[:, : 2 * width]).sigmoid_()
            candidate[rows] = product[:, 2 * width :]
            new = gate[:, 2 * width :].addcmul_(gate[:, :width], candidate[rows]).tanh_()
            state = torch.lerp(new, state, gate[:, width : 2 * width], out=after[rows])
            start += size
        ctx.save_for_backward(words, w_ih, w_hh, gates, torch.cat(before), candidate)
        ctx.sizes = sizes
        return torch.cat([state, *reversed(ended)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        words, w_ih, w_hh, gates, before, candidate = ctx.saved_tensors
        width = w_hh.shape[1]
        reset, update, new = gates.split(width, dim=1)
        # What d h becomes in each gate, for all words at once; the loop only multiplies.
        to_new = (1 - update) * (1 - new * new)
        to_update = (before - new) * update * (1 - update)
        to_reset = candidate * reset * (1 - reset)
        d_new, d_product = torch.empty_like(before), torch.empty_like(gates)
        d_reset, d_update, d_candidate = d_product.split(width, dim=1)
        d_state = grads[0].clone()
        start = len(words)
        for size in reversed(ctx.sizes):
            rows = slice(start - size, start)
            d = d_state[:size]
            torch.mul(d, to_new[rows], out=d_new[rows])
            torch.mul(d, to_update[rows], out=d_update[rows])
            torch.mul(d_new[rows], to_reset[rows], out=d_reset[rows])
            torch.mul(d_new[rows], reset[rows], out=d_candidate[rows])
            d.mul_(update[rows]).addmm_(d_product[rows], w_hh)
            start -= size
        d_w_hh, d_b_hh = d_product.t() @ before, d_product.sum(0)
        d_candidate.copy_(d_new)
        d_words = d_product @ w_ih
        d_w_ih, d_b_ih = d_product.t() @ words, d_product.sum(0)
        return d_words, d_w_ih, d_w_hh, d_b_ih, d_b_hh, None
