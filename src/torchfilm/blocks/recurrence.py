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


def last_state(
    rnn: nn.GRU, words: Float[Tensor, "words dim"], sizes: Sequence[int]
) -> Float[Tensor, "batch width"]:
    """Return the state of a one-layer GRU after the last word of each sequence.

        r, z = sigmoid(W_r x + U_r h), sigmoid(W_z x + U_z h)
        n = tanh(W_n x + r * (U_n h))                            (biases with each product)
        h <- n + z * (h - n)

    words: the packed words, all first words, then all second words, ..., the longest sequence first, as
    `pack_padded_sequence` gives them; sizes: how many sequences have a first, second, ... word (falling).
    Under autocast the matrix products run in its precision, states and gates in that of the weights.
    Not twice differentiable.
    """
    device = words.device.type
    precision = (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else rnn.weight_hh_l0.dtype
    )
    with torch.autocast(device, enabled=False):
        return _PackedGRU.apply(
            words, rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0, tuple(sizes), precision
        )


class _PackedGRU(torch.autograd.Function):
    """The recurrence and its gradient; rows of every [words, ...] buffer are packed as the words are."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        words, w_ih, w_hh, b_ih, b_hh, sizes, precision = inputs
        width = w_hh.shape[1]
        gates = torch.addmm(b_ih.to(precision), words.to(precision), w_ih.to(precision).t()).to(w_hh.dtype)
        after, candidate = gates.new_empty(len(words), width), gates.new_empty(len(words), width)
        recurrent, bias = w_hh.to(precision).t(), b_hh.to(precision)
        state = gates.new_zeros(sizes[0], width)
        before, ended = [], []
        start = 0
        for size in sizes:
            rows = slice(start, start + size)
            ended.append(state[size:])
            state = state[:size]
            before.append(state)
            product = torch.addmm(bias, state.to(precision), recurrent)
            gate = gates[rows]
            gate[:, : 2 * width].add_(product[:, : 2 * width]).sigmoid_()
            candidate[rows] = product[:, 2 * width :]
            new = gate[:, 2 * width :].addcmul_(gate[:, :width], candidate[rows]).tanh_()
            state = torch.lerp(new, state, gate[:, width : 2 * width], out=after[rows])
            start += size
        ctx.save_for_backward(words, w_ih, w_hh, gates, torch.cat(before), candidate)
        ctx.sizes, ctx.precision = sizes, precision
        return torch.cat([state, *reversed(ended)])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        words, w_ih, w_hh, gates, before, candidate = ctx.saved_tensors
        width, precision = w_hh.shape[1], ctx.precision
        reset, update, new = gates.split(width, dim=1)
        # What d h becomes in each gate, for all words at once; the loop only multiplies.
        to_new = (1 - update) * (1 - new * new)
        to_update = (before - new) * update * (1 - update)
        to_reset = candidate * reset * (1 - reset)
        d_new, d_product = torch.empty_like(before), torch.empty_like(gates)
        d_reset, d_update, d_candidate = d_product.split(width, dim=1)
        recurrent = w_hh.to(precision)
        d_state = grads[0].clone()
        start = len(words)
        for size in reversed(ctx.sizes):
            rows = slice(start - size, start)
            d = d_state[:size]
            torch.mul(d, to_new[rows], out=d_new[rows])
            torch.mul(d, to_update[rows], out=d_update[rows])
            torch.mul(d_new[rows], to_reset[rows], out=d_reset[rows])
            torch.mul(d_new[rows], reset[rows], out=d_candidate[rows])
            d.mul_(update[rows]).add_(d_product[rows].to(precision) @ recurrent)
            start -= size
        d_w_hh, d_b_hh = _transposed_product(d_product, before, precision), d_product.sum(0)
        d_candidate.copy_(d_new)
        d_words = (d_product.to(precision) @ w_ih.to(precision)).to(words.dtype)
        d_w_ih, d_b_ih = _transposed_product(d_product, words, precision), d_product.sum(0)
        return d_words, d_w_ih, d_w_hh, d_b_ih, d_b_hh, None, None


def _transposed_product(a: Tensor, b: Tensor, precision: torch.dtype) -> Tensor:
    """a^T b with the product in the given precision and the result in that of a."""
    return (a.to(precision).t() @ b.to(precision)).to(a.dtype)
