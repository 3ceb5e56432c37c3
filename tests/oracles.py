"""What the library must compute, in NumPy loops over single numbers: slow, plain, independent of its code.

Every function takes and returns float64 arrays.
"""

import itertools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def film(x: Array, gamma: Array, beta: Array, dim: int) -> Array:
    """gamma * x + beta; gamma, beta have channels last and other axes aligned with x's from the left."""
    y = np.empty_like(x)
    for index in np.ndindex(*x.shape):
        y[index] = pick(gamma, index, dim, x.ndim) * x[index] + pick(beta, index, dim, x.ndim)
    return y


def film_map(x: Array, gamma: Array, beta: Array) -> Array:
    """gamma * x + beta in the layout of x; an axis of size one holds for every position."""
    y = np.empty_like(x)
    for index in np.ndindex(*x.shape):
        g = tuple(0 if size == 1 else i for size, i in zip(gamma.shape, index, strict=True))
        b = tuple(0 if size == 1 else i for size, i in zip(beta.shape, index, strict=True))
        y[index] = gamma[g] * x[index] + beta[b]
    return y


def gated_residual(x: Array, branch: Array, gate: Array, dim: int) -> Array:
    """x + gate * branch, the gate aligned as gamma in `film`."""
    y = np.empty_like(x)
    for index in np.ndindex(*x.shape):
        y[index] = x[index] + pick(gate, index, dim, x.ndim) * branch[index]
    return y


def pick(value: Array, index: tuple[int, ...], dim: int, ndim: int) -> float:
    """The entry of a channels-last gamma or beta that belongs to one position of x."""
    axis = dim + ndim if dim < 0 else dim
    rest = index[:axis] + index[axis + 1 :]
    lead = [0 if value.shape[i] == 1 else rest[i] for i in range(value.ndim - 1)]
    return float(value[(*lead, index[axis])])


def linear(z: Array, weight: Array, bias: Array) -> Array:
    """W z + b for each row of z [B, D]."""
    y = np.empty((z.shape[0], weight.shape[0]))
    for b in range(z.shape[0]):
        for row in range(weight.shape[0]):
            y[b, row] = bias[row] + sum(weight[row, d] * z[b, d] for d in range(z.shape[1]))
    return y


def mish(z: Array) -> Array:
    """z tanh(log(1 + exp z))."""
    return z * np.tanh(np.log1p(np.exp(z)))


def batch_norm(x: Array, eps: float) -> Array:
    """Each channel of x [B, C, ...] with mean zero and variance one over the batch and all positions."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        values = [float(x[b, c][at]) for b in range(x.shape[0]) for at in np.ndindex(*x.shape[2:])]
        mean = sum(values) / len(values)
        variance = sum((value - mean) ** 2 for value in values) / len(values)
        y[:, c] = (x[:, c] - mean) / (variance + eps) ** 0.5
    return y


def group_norm(x: Array, groups: int, eps: float) -> Array:
    """Each group of neighbouring channels of each sample [B, C, ...] with mean zero and variance one."""
    y, size = np.empty_like(x), x.shape[1] // groups
    for b in range(x.shape[0]):
        for start in range(0, x.shape[1], size):
            values = [float(x[b, start + c][at]) for c in range(size) for at in np.ndindex(*x.shape[2:])]
            mean = sum(values) / len(values)
            variance = sum((value - mean) ** 2 for value in values) / len(values)
            for c in range(start, start + size):
                y[b, c] = (x[b, c] - mean) / (variance + eps) ** 0.5
    return y


def layer_norm(x: Array, eps: float) -> Array:
    """Each row on the last axis with mean zero and variance one."""
    y = np.empty_like(x)
    for at in np.ndindex(*x.shape[:-1]):
        mean = sum(x[at]) / x.shape[-1]
        variance = sum((value - mean) ** 2 for value in x[at]) / x.shape[-1]
        y[at] = [(value - mean) / (variance + eps) ** 0.5 for value in x[at]]
    return y


def rms_norm(x: Array, eps: float) -> Array:
    """Each row on the last axis over its root mean square."""
    y = np.empty_like(x)
    for at in np.ndindex(*x.shape[:-1]):
        square = sum(value**2 for value in x[at]) / x.shape[-1]
        y[at] = [value / (square + eps) ** 0.5 for value in x[at]]
    return y


def silu(z: Array) -> Array:
    """z / (1 + exp -z)."""
    return z / (1 + np.exp(-z))


def masked_mean(tokens: Sequence[Sequence[Array]]) -> Array:
    """The mean of each list of real tokens."""
    return np.stack([sum(sequence[1:], start=sequence[0]) / len(sequence) for sequence in tokens])


def paper_generator(
    z: Array, weight: Array, bias: Array, channels: Sequence[int]
) -> list[tuple[Array, Array]]:
    """Gamma = 1 + delta and beta per site; the rows of the head are [delta, beta] per site in order."""
    raw, start, sites = linear(z, weight, bias), 0, []
    for count in channels:
        sites.append((1 + raw[:, start : start + count], raw[:, start + count : start + 2 * count]))
        start += 2 * count
    return sites


def relative_change(before: Array, after: Array) -> float:
    """Root mean square of after - before, over that of each value minus each other one."""
    count = len(before)
    moved = sum((after[i] - before[i]) ** 2 for i in range(count)) / count
    apart = sum((a - b) ** 2 for a, b in itertools.permutations(before, 2)) / (count * (count - 1))
    return (moved / apart) ** 0.5


def fourier(numbers: Array, dim: int, min_period: float, max_period: float) -> Array:
    """Sines, then cosines, of each number [B, n] at periods in equal ratios, the shortest first."""
    batch, n = numbers.shape
    count = dim // (2 * n)
    ratio = (max_period / min_period) ** (1 / (count - 1)) if count > 1 else 1.0
    y = np.empty((batch, dim))
    for b, i, k in np.ndindex(batch, n, count):
        turns = numbers[b, i] / (min_period * ratio**k)
        y[b, 2 * count * i + k] = np.sin(2 * np.pi * turns)
        y[b, 2 * count * i + count + k] = np.cos(2 * np.pi * turns)
    return y


def attention_pooling(tokens: Sequence[Sequence[Array]], query: Array) -> Array:
    """Each head's slice of the channels, pooled over the real tokens by a softmax of its own scores."""
    heads, width = query.shape
    y = np.zeros((len(tokens), heads * width))
    for b, sequence in enumerate(tokens):
        for h in range(heads):
            slices = [token[h * width : (h + 1) * width] for token in sequence]
            scores = [sum(q * x for q, x in zip(query[h], one, strict=True)) / width**0.5 for one in slices]
            weights = [np.exp(score) for score in scores]
            for weight, one in zip(weights, slices, strict=True):
                y[b, h * width : (h + 1) * width] += weight / sum(weights) * one
    return y


def shared_head(z: Array, weight: Array, bias: Array, widths: Sequence[int]) -> Array:
    """The rows of each site: those of the projection for its width, and its own offsets."""
    starts, at = {}, 0
    for width in widths:
        if width not in starts:
            starts[width] = at
            at += width
    y = np.empty((z.shape[0], sum(widths)))
    for b in range(z.shape[0]):
        row = 0
        for width in widths:
            for i in range(width):
                product = sum(weight[starts[width] + i, d] * z[b, d] for d in range(z.shape[1]))
                y[b, row] = product + bias[row]
                row += 1
    return y


def variance_between(values: Array, labels: Sequence[str]) -> tuple[Array, Array]:
    """For each column: the sum over rows of (mean of the row's label - mean)^2, and of (row - mean)^2."""
    between, total = np.zeros(values.shape[1]), np.zeros(values.shape[1])
    for c in range(values.shape[1]):
        mean = sum(values[:, c]) / len(values)
        for row, label in enumerate(labels):
            group = [values[other, c] for other in range(len(values)) if labels[other] == label]
            between[c] += (sum(group) / len(group) - mean) ** 2
            total[c] += (values[row, c] - mean) ** 2
    return between, total
