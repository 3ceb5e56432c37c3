"""What a condition can be: a vector, a class, numbers, or tokens; each becomes what a generator reads.

Every class has `dim`, the size of the vector it gives; a `Generator` or a layer takes it as its `cond_dim`.
Several at once, and conditions that may be missing, are in `several.py`.
"""

from __future__ import annotations

import math
from numbers import Integral
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from torchfilm.heads import no_row, wide
from torchfilm.naming import check_choice, check_size
from torchfilm.sharding import beside

Pooling = Literal["mean", "attention"]


class Vector(nn.Module):
    """A condition that is a vector already: z = v, checked for its size.

    Args:
        dim: size of the last axis.

    Raises:
        ValueError: for a dim that is no whole number from 1 on, as for the sizes of all conditions.

    Example:
        >>> z = Vector(512)(torch.rand(2, 512))
    """

    def __init__(self, dim: int) -> None:
        super().__init__()
        check_size("Vector: dim", dim)
        self.dim = dim

    def forward(self, vector: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch dim"]:
        """Return the vector itself.

        Raises:
            ValueError: where the last axis is not `dim`, or the numbers are integers.
        """
        _check_floats("Vector", vector, self.dim)
        return vector

    def extra_repr(self) -> str:
        """Show the size in `repr`."""
        return f"{self.dim}"


class Classes(nn.Module):
    """A condition that is one of some classes: z = E[k], a learned row for each class.

    Conditional instance normalisation for styles (Dumoulin et al. 2017, arXiv 1610.07629) is this in front of
    a layer. With dim=None the class itself goes on, to a generator with head="table" that has a row of gamma
    and beta for each class and no matrix product at all; `dim` is then the number of classes, which is what
    that generator takes as its `cond_dim`.

    Args:
        num_classes: how many classes there are; k is from 0 to num_classes - 1.
        dim: size of the vector of each class; None to hand on the class itself.
        device: where the table lives.
        dtype: its precision.

    Example:
        >>> z = Classes(10, dim=64)(torch.tensor([3, 0]))
    """

    def __init__(
        self,
        num_classes: int,
        dim: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("Classes: num_classes", num_classes)
        if dim is not None:
            check_size("Classes: dim", dim)
        self.num_classes = num_classes
        self.dim = num_classes if dim is None else dim
        self.table = None if dim is None else nn.Embedding(num_classes, dim, device=device, dtype=dtype)

    def forward(self, classes: Int[Tensor, "*batch"]) -> Float[Tensor, "*batch dim"] | Int[Tensor, "*batch"]:
        """Return the rows of the classes, or the classes themselves with dim=None.

        Raises:
            ValueError: for numbers that are no integers.
            IndexError: for a class outside the table (compiled and on an accelerator, torch's own).
        """
        _check_tensor("Classes", classes)
        if classes.dtype not in (torch.int64, torch.int32):
            floats = classes.is_floating_point() or classes.is_complex()
            remedy = "indices, not one-hot rows: one_hot.argmax(dim=-1)" if floats else "classes.long()"
            raise ValueError(
                f"Classes: expected int64 or int32 numbers, got {classes.dtype} {tuple(classes.shape)}.\n"
                f"Give {remedy}."
            )
        if self.table is None:
            return classes
        try:
            return self.table(classes)
        except IndexError as error:
            raise no_row("Classes", self.num_classes, classes) from error

    def extra_repr(self) -> str:
        """Show the number of classes in `repr`."""
        return f"{self.num_classes}, dim={self.dim if self.table is not None else None}"


class Scalars(nn.Module):
    """A condition of n numbers (a time step, a noise level, an angle): z = [sin(2 pi s f), cos(2 pi s f)].

    Every number gets the same dim / (2 n) frequencies, with periods spaced geometrically from `min_period` to
    `max_period`, in the numbers' own unit; its sines come first, then its cosines, then the next number.
    Vaswani et al. 2017, section 3.5 (arXiv 1706.03762). Two numbers are told apart where they differ by a
    good part of the shortest period, and are confused once they are the longest apart:

    - a time in [0, 1], as of flow matching: the defaults;
    - time steps 0, 1, ..., 999 of a diffusion: min_period=2 * math.pi, max_period=2e4 * math.pi.

    The features are computed in float32 or wider, and fixed frequencies are no state: neither `.to(bfloat16)`
    nor a checkpoint changes them.

    Args:
        n: how many numbers, the size of the last axis.
        dim: size of z; a multiple of 2 n.
        min_period: the shortest period.
        max_period: the longest.
        learned: make the frequencies a parameter that starts there (Li et al. 2021, arXiv 2106.02795).
        device: where learned frequencies live.
        dtype: their precision.

    Raises:
        ValueError: where dim is no multiple of 2 n, or the periods are not 0 < min_period < max_period.

    Example:
        >>> z = Scalars(2, dim=64)(torch.rand(3, 2))
    """

    def __init__(
        self,
        n: int,
        dim: int,
        *,
        min_period: float = 4e-3,
        max_period: float = 4.0,
        learned: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_size("Scalars: n", n)
        check_size("Scalars: dim", dim)
        if dim % (2 * n):
            raise ValueError(
                f"Scalars: expected a sine and a cosine for each number, got n={n} with dim={dim}.\n"
                f"dim is a multiple of 2 n = {2 * n}."
            )
        if not 0 < min_period < max_period:
            raise ValueError(
                f"Scalars: expected 0 < min_period < max_period, got {min_period} and {max_period}.\n"
                f"They are in the unit of the numbers: about the smallest difference that matters, and "
                f"more than the largest."
            )
        self.n = n
        self.dim = dim
        self.min_period = min_period
        self.max_period = max_period
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        self.frequencies = nn.Parameter(torch.empty(dim // (2 * n), **own)) if learned else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Give learned frequencies their start again."""
        if self.frequencies is not None:
            with torch.no_grad():
                self.frequencies.copy_(beside(self.frequencies, self._spaced(self.frequencies)))

    def forward(
        self, numbers: Float[Tensor, "*batch n"] | Int[Tensor, "*batch n"]
    ) -> Float[Tensor, "*batch dim"]:
        """Return the features of the numbers, whole ones included.

        Raises:
            ValueError: where the last axis is not n.
        """
        _check_tensor("Scalars", numbers)
        if numbers.ndim == 0 or numbers.shape[-1] != self.n or numbers.is_complex():
            each = "for each sample is [B, 1]: steps[:, None]"
            raise ValueError(
                f"Scalars: expected {self.n} real numbers on the last axis, "
                f"got {numbers.dtype} of shape {tuple(numbers.shape)}.\n"
                f"One number {'for all samples is [1]: step[None]' if numbers.ndim == 0 else each}."
            )
        real = wide(numbers if numbers.is_floating_point() else numbers.float())
        frequencies = self._spaced(real) if self.frequencies is None else self.frequencies.to(real.dtype)
        angles = 2 * math.pi * real[..., None] * frequencies
        return torch.cat([angles.sin(), angles.cos()], dim=-1).flatten(-2)

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        periods = f"min_period={self.min_period:g}, max_period={self.max_period:g}"
        return f"{self.n}, {self.dim}, {periods}, learned={self.frequencies is not None}"

    def _spaced(self, like: Tensor) -> Tensor:
        """Return the frequencies, from high to low, in the precision and on the device of a tensor."""
        high, low = -math.log(self.min_period), -math.log(self.max_period)
        number = self.dim // (2 * self.n)
        return torch.linspace(high, low, number, dtype=like.dtype, device=like.device).exp()


class Tokens(nn.Module):
    """A condition that is a sequence: z = sum_t a_t x_t / sum_t a_t over its real tokens.

    - "mean": a_t = 1.
    - "attention": each of `heads` equal slices of the channels has learned weights w of its own, and pools
      itself with a_t = exp(w . x_t / sqrt(dim / heads)). w is zero at the start, where this is the mean.
    - None: the tokens go on as they are with their mask, for cross-attention.

    Padding does not count, whatever it holds (NaN included). In eager mode z depends neither on how far a
    batch is padded nor on the other sequences in it, to the bit: sums are taken pair by pair, and 0 added
    changes nothing. On a device that is some small kernels for each halving of the length. Compiled or
    exported, they are plain sums, and the last bit may differ. A sequence without a single real token gives
    zero.

    Args:
        dim: size of each token.
        pooling: as above.
        heads: number of slices of "attention"; divides dim.
        device: where the weights live.
        dtype: their precision.

    Raises:
        ValueError: for an unknown pooling, or heads that do not divide dim.

    Example:
        >>> mask = torch.tensor([[True, True, False], [True, True, True]])
        >>> z = Tokens(512)((torch.rand(2, 3, 512), mask))
    """

    def __init__(
        self,
        dim: int,
        pooling: Pooling | None = "mean",
        *,
        heads: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        other = "For the last token's state index it, and give it to Vector."
        check_choice("Tokens: pooling", pooling, (None, *get_args(Pooling)), remedy=other)
        check_size("Tokens: dim", dim)
        check_size("Tokens: heads", heads)
        if dim % heads or (heads > 1 and pooling != "attention"):
            raise ValueError(
                f"Tokens: expected heads that divide dim={dim}, and 1 without attention, "
                f"got heads={heads} with pooling={pooling!r}.\n"
                f"Each head pools dim / heads channels."
            )
        self.dim = dim
        self.pooling = pooling
        self.heads = heads
        own: dict[str, Any] = {"device": device, "dtype": dtype}
        attends = pooling == "attention"
        self.query = nn.Parameter(torch.empty(heads, dim // heads, **own)) if attends else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Set the weights of attention to zero: the mean."""
        if self.query is not None:
            nn.init.zeros_(self.query)

    def forward(
        self,
        tokens: Float[Tensor, "*batch time dim"] | tuple[Tensor, Tensor | None],
        mask: Bool[Tensor, "*batch time"] | None = None,
    ) -> Float[Tensor, "*batch dim"] | tuple[Tensor, Tensor]:
        """Return the pooled tokens, in float32 or wider; without pooling, the tokens and their mask.

        Args:
            tokens: [B, T, dim]; or the pair of tokens and mask.
            mask: [B, T], True where a token is real; None where all are.

        Raises:
            ValueError: where sizes do not fit, or the mask is not boolean (attention masks of other libraries
                are floats, with 0 for real tokens in some and for padding in others).
        """
        if isinstance(tokens, tuple):
            tokens, mask = tokens
        _check_floats("Tokens", tokens, self.dim)
        if tokens.ndim < 2:
            raise ValueError(
                f"Tokens: expected an axis of tokens in front of their {self.dim} numbers, got shape "
                f"{tuple(tokens.shape)}.\n"
                f"Give one token as tokens[None]; a condition that is a single vector is Vector({self.dim})."
            )
        if mask is None and self.pooling == "mean":  # a mask of all tokens would change no bit
            total = _total(wide(tokens))
            return total / total.new_full((1,), max(tokens.shape[-2], 1))
        if mask is None:
            mask = torch.ones(tokens.shape[:-1], dtype=torch.bool, device=tokens.device)
        _check_mask(mask, tokens)
        real = torch.where(mask[..., None], tokens, 0)
        if self.pooling is None:
            return real, mask
        real = wide(real)
        if self.query is None:
            return _total(real) / mask.sum(dim=-1, keepdim=True).clamp(min=1)
        if tokens.shape[-2] == 0:  # as one that is padding: the weights have a gradient, of zero
            real, mask = functional.pad(real, (0, 0, 0, 1)), functional.pad(mask, (0, 1))
        slices = real.unflatten(-1, (self.heads, -1))
        weights = self._weights(slices, mask)
        pooled = _total((weights[..., None] * slices).flatten(-2)).unflatten(-1, (self.heads, -1))
        total = _total(weights)  # 1 or more, but for a sequence without a real token
        return (pooled / total.masked_fill(total == 0, 1)[..., None]).flatten(-2)

    def extra_repr(self) -> str:
        """Show the options in `repr`."""
        heads = f", heads={self.heads}" if self.heads > 1 else ""
        return f"{self.dim}, pooling={self.pooling!r}{heads}"

    def _weights(self, slices: Tensor, mask: Tensor) -> Tensor:
        """Return the weights of attention [..., T, heads]: the largest real one is 1, padding has 0."""
        assert self.query is not None
        scale = slices.shape[-1] ** -0.5
        scores = _folded(slices * self.query.to(slices.dtype)) * scale
        largest = scores.detach().masked_fill(~mask[..., None], -math.inf).amax(dim=-2, keepdim=True)
        # Not clamped: from torch 2.14 on the gradient is 0 where a bound is met, as by the largest.
        return (scores - largest).masked_fill(~mask[..., None], -math.inf).exp()


def encoded_size(condition: nn.Module) -> int:
    """Return the size of what an encoder gives; ValueError for what is no module with an integer `dim`."""
    dim = getattr(condition, "dim", None)
    if isinstance(condition, nn.Module) and isinstance(dim, Integral):
        return dim if isinstance(dim, int) else int(dim)
    got = f" with dim={dim!r}" if isinstance(condition, nn.Module) else ""
    remedy = "Use Vector, Classes, Scalars or Tokens, or set self.dim in the __init__ of your own."
    if isinstance(condition, Tensor):
        got = f" {tuple(condition.shape)}"
        reads = f"Vector({condition.shape[-1] if condition.ndim else 1})"
        if not condition.is_floating_point():
            reads = "Classes(10, 64)"
        remedy = f"A value goes into the call, model(x, cond=z); here goes what reads it, as {reads}."
    raise ValueError(
        f"condition: expected a module with an integer `dim`, the size of what it gives, "
        f"got {type(condition).__name__}{got}.\n{remedy}"
    )


def _total(x: Tensor) -> Tensor:
    """Return the sum over the last axis but one: neighbours first, then neighbours of those, and so on.

    Zeros behind the last token change no bit of it, and no row depends on how many there are: a sum over a
    whole axis promises neither.
    """
    if torch.compiler.is_compiling() or x.shape[-2] == 0:
        return x.sum(dim=-2)
    while x.shape[-2] > 1:
        if x.shape[-2] % 2:
            x = functional.pad(x, (0, 0, 0, 1))
        x = x[..., 0::2, :] + x[..., 1::2, :]
    return x[..., 0, :]


def _folded(x: Tensor) -> Tensor:
    """Return the sum over the last axis, in halves: of each row by itself, whatever the other axes are."""
    if torch.compiler.is_compiling():
        return x.sum(dim=-1)
    while (size := x.shape[-1]) > 1:
        half = size // 2
        rest = x[..., 2 * half :]
        x = x[..., :half] + x[..., half : 2 * half]
        x = torch.cat([x, rest], dim=-1) if size % 2 else x
    return x[..., 0]


def _check_mask(mask: Tensor, tokens: Tensor) -> None:
    if mask.dtype != torch.bool or mask.shape != tokens.shape[:-1]:
        raise ValueError(
            f"Tokens: expected a boolean mask {tuple(tokens.shape[:-1])}, True where a token is real, "
            f"got {mask.dtype} {tuple(mask.shape)}.\n"
            f"For 0 and 1 with 1 for real tokens use mask.bool(); for lengths use "
            f"torch.arange(T) < lengths[:, None]."
        )


def _check_tensor(kind: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{kind}: expected a tensor, got {type(value).__name__}.\n"
            f"For numbers in lists and arrays use torch.as_tensor(value); encode texts first; what may "
            f"be missing (Masked, None) is Maybe({kind}(...))."
        )


def _check_floats(kind: str, value: Tensor, dim: int) -> None:
    _check_tensor(kind, value)
    if not value.is_floating_point() or value.ndim == 0 or value.shape[-1] != dim:
        raise ValueError(
            f"{kind}: expected floating-point numbers with {dim} on the last axis, "
            f"got {value.dtype} of shape {tuple(value.shape)}.\n"
            f"For class numbers use Classes; else build {kind}({value.shape[-1] if value.ndim else 'dim'})."
        )
