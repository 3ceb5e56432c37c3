"""The one place that computes gamma * x + beta.

Broadcasting makes a wrong axis legal: a gamma of 64 channels multiplies a channels-last tensor with one row
without a word. So the channel axis is an argument, and sizes are checked before anything is multiplied.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# From this many features on, and without a graph, one pass (`addcmul`) beats a product and a sum in place:
# 1.0
# to 2.5 times the time of a ReLU in float32, against 1.5 to 4.0. Below, its slower inner loop loses (5.0 to
# 3.0
# at 25 thousand features), and with a graph its backward pass loses everywhere.
_ONE_PASS_FROM = 100_000


def film(
    x: Float[Tensor, "*shape"],
    gamma: Float[Tensor, "*gamma"],
    beta: Float[Tensor, "*beta"],
    dim: int = 1,
    *,
    gate: Float[Tensor, "*gate"] | None = None,
    modulation_dim: int | None = None,
    site: str = "",
) -> Float[Tensor, "*shape"]:
    """Scale and shift each channel: y[b, c, ...] = gamma[b, c] * x[b, c, ...] + beta[b, c].

    Perez et al. 2018, eq. 2 (arXiv 1709.07871). gamma is the final factor, not an offset from one. The
    product and the sum are taken in the wider of the two precisions (float32 for bfloat16 features) and
    rounded once, to x.dtype.

    Args:
        x: features, the channels on axis `dim`: [B, C, H, W], [B, T, C] with dim=-1, ...
        gamma: [C], [B, C], [B, T, C] with the channels last and the other axes aligned with x's from the
            left; or a full map with as many axes as x, in x's own layout. Each size is x's or, but for the
            channels, 1.
        beta: as gamma; it need not have the same shape.
        dim: the channel axis of x.
        gate: aligned as gamma; y = gate * (gamma * x + beta), at no more cost than without.
        modulation_dim: the channel axis of gamma and beta, needed only where they have as many axes as x and
            fit both channels last and as a full map (x [B, C, T] where C == T).
        site: the name to put into error messages.

    Returns:
        Modulated features with the shape, dtype and memory format of x.

    Raises:
        ValueError: where a size does not fit or a layout is ambiguous; nothing is ever broadcast over
        channels.

    Example:
        >>> y = film(torch.rand(2, 3, 5, 7), gamma=torch.rand(2, 3), beta=torch.rand(2, 3))
    """
    fit = _fit(gamma, x, dim, modulation_dim, "gamma", site)
    beta_fit = fit if beta.shape == gamma.shape else _fit(beta, x, dim, modulation_dim, "beta", site)
    gamma, beta = _aligned(gamma, fit), _aligned(beta, beta_fit)
    if gate is not None:
        gate = _aligned(gate, _fit(gate, x, dim, modulation_dim, "gate", site))
        gamma, beta = gate * gamma, gate * beta
    return _affine(x, gamma, beta)


def gated_residual(
    x: Float[Tensor, "*shape"],
    branch: Float[Tensor, "*shape"],
    gate: Float[Tensor, "*gate"],
    dim: int = 1,
    *,
    modulation_dim: int | None = None,
    site: str = "",
) -> Float[Tensor, "*shape"]:
    """Add a branch through a gate per channel: y = x + gate * branch.

    adaLN-Zero (Peebles and Xie 2023, section 3.2, arXiv 2212.09748). A gate of 0 switches the
    branch off, a gate of 1 is the plain residual connection; any real number is allowed.

    Args:
        x: the residual stream, with the channels on axis `dim`.
        branch: what is added, of the shape of x.
        gate: aligned as gamma in `film`.
        dim: the channel axis of x and of the branch.
        modulation_dim: as in `film`.
        site: the name to put into error messages.

    Returns:
        The sum, with the shape and dtype of x.

    Raises:
        ValueError: where the branch has another shape than x, or the gate does not fit.

    Example:
        >>> y = gated_residual(torch.rand(2, 3, 5), torch.rand(2, 3, 5), gate=torch.zeros(2, 3))
    """
    if branch.shape != x.shape:
        raise ValueError(
            f"{_where(site, 'gated_residual')}: expected a branch of the shape of x, got another.\n"
            f"  x       {tuple(x.shape)}\n"
            f"  branch  {tuple(branch.shape)}\n"
            f"Nothing is broadcast here: project the branch to the shape of x first."
        )
    gate = _aligned(gate, _fit(gate, x, dim, modulation_dim, "gate", site))
    return (x + gate * branch).to(x.dtype)


def _affine(x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    """Return gamma * x + beta of aligned tensors, in the form that is fastest where it runs."""
    if torch.compiler.is_compiling() or beta.dtype != gamma.dtype:
        wide = torch.promote_types(gamma.dtype, beta.dtype)
        return (gamma.to(wide) * x + beta).to(x.dtype)
    if x.dtype == gamma.dtype and x.numel() >= _ONE_PASS_FROM and not _has_graph(x, gamma, beta):
        return torch.addcmul(beta, gamma, x)
    y = gamma * x
    if y.dtype != beta.dtype:
        return (y + beta).to(x.dtype)
    try:
        y += beta
    except RuntimeError:  # torch.vmap over beta alone: y has no batch axis to add into
        y = y + beta
    return y.to(x.dtype)


def _has_graph(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def _aligned(value: Tensor, fit: tuple[int, int, list[int]]) -> Tensor:
    """View `value` with one axis for each axis of x, so that broadcasting does what its layout means."""
    channel, position, shape = fit
    return (value if channel == position else value.movedim(channel, position)).reshape(shape)


def _fit(
    value: Tensor, x: Tensor, dim: int, value_dim: int | None, name: str, site: str
) -> tuple[int, int, list[int]]:
    """Check every size; return the channel axis of `value`, where it moves, and the shape to view it in."""
    sizes, features = list(value.shape), list(x.shape)
    if not -len(features) <= dim < len(features) or not 1 <= len(sizes) <= len(features):
        raise ValueError(_rank_message(value, x, dim, name, site))
    axis = dim % len(features)
    channel = len(sizes) - 1
    if value_dim is not None or (len(sizes) == len(features) and axis != channel):
        channel = _channel_axis(value, x, axis, value_dim, name, site)
    if sizes.pop(channel) != features.pop(axis):
        raise ValueError(_channel_message(value, x, dim, channel, name, site))
    for i, size in enumerate(sizes):
        if size != features[i] and size != 1:
            raise ValueError(_size_message(value, x, i if i < axis else i + 1, size, name, site))
    position = min(axis, len(sizes))
    padded = sizes + [1] * (len(features) - len(sizes))
    padded.insert(axis, value.shape[channel])
    return channel, position, padded


def _channel_axis(value: Tensor, x: Tensor, axis: int, value_dim: int | None, name: str, site: str) -> int:
    """Find the channel axis of gamma, beta or gate: the last, unless it is a full map in x's layout."""
    last = value.ndim - 1
    if value_dim is not None:
        if not -value.ndim <= value_dim <= last:
            raise ValueError(
                f"{_where(site, 'film')}: modulation_dim={value_dim} is no axis of {name}.\n"
                f"{_shapes(value, x, name)}\n"
                f"Leave modulation_dim out for [C], [B, C] and [B, T, C]."
            )
        return value_dim % value.ndim
    channels = x.shape[axis]
    others = [size for i, size in enumerate(x.shape) if i != axis]
    as_map = _broadcasts([size for i, size in enumerate(value.shape) if i != axis], others)
    as_last = _broadcasts(list(value.shape[:last]), others)
    fits_map, fits_last = as_map and value.shape[axis] == channels, as_last and value.shape[last] == channels
    if fits_map and fits_last and any(size != 1 for size in value.shape[axis:]):
        raise ValueError(
            f"{_where(site, 'film')}: {name} fits with its channels on axis {axis} and with them last.\n"
            f"{_shapes(value, x, name)}\n"
            f"Say which with modulation_dim={axis} or modulation_dim=-1."
        )
    return axis if fits_map or (as_map and not fits_last) else last


def _broadcasts(sizes: list[int], target: list[int]) -> bool:
    return all(size in (wanted, 1) for size, wanted in zip(sizes, target, strict=True))


def _where(site: str, function: str) -> str:
    return f"FiLM site '{site}'" if site else function


def _shapes(value: Tensor, x: Tensor, name: str) -> str:
    return f"  {'x':<{len(name)}}  {tuple(x.shape)}\n  {name}  {tuple(value.shape)}"


def _rank_message(value: Tensor, x: Tensor, dim: int, name: str, site: str) -> str:
    if not -x.ndim <= dim < x.ndim:
        fact, remedy = (
            f"dim={dim} is no axis of x, which has {x.ndim}",
            "Give the axis of x that holds the channels.",
        )
    elif value.ndim == 0:
        fact, remedy = f"{name} is a single number, expected one per channel", f"Use {name}.expand(channels)."
    else:
        fact = f"{name} has {value.ndim} axes, expected at most the {x.ndim} of x"
        remedy = "Axes that x lacks cannot be modulated: drop them, or give x its own."
    return f"{_where(site, 'film')}: {fact}.\n{_shapes(value, x, name)}\n{remedy}"


def _channel_message(value: Tensor, x: Tensor, dim: int, channel: int, name: str, site: str) -> str:
    channels = value.shape[channel]
    fact = f"{name} has {channels} channels, but x has size {x.shape[dim]} on its channel axis (dim={dim})"
    fits = [i for i, size in enumerate(x.shape) if size == channels and i > 0]
    if fits and fits[-1] == x.ndim - 1:
        remedy = "If x is channels-last, use dim=-1."
    elif fits:
        remedy = f"If the channels of x are on axis {fits[-1]}, use dim={fits[-1]}."
    else:
        remedy = f"Make the generator's features equal to the channels of x ({x.shape[dim]})."
    return f"{_where(site, 'film')}: {fact}.\n{_shapes(value, x, name)}\n{remedy}"


def _size_message(value: Tensor, x: Tensor, axis: int, size: int, name: str, site: str) -> str:
    fact = f"{name} has size {size} where x has size {x.shape[axis]} (axis {axis} of x)"
    if axis == 0 and size and x.shape[0] % size == 0:
        times = x.shape[0] // size
        remedy = f"If each condition serves {times} rows of x, use {name}.repeat_interleave({times}, dim=0)."
    else:
        remedy = f"Besides the channels, the axes of {name} align with x's from the left, with x's size or 1."
    return f"{_where(site, 'film')}: {fact}.\n{_shapes(value, x, name)}\n{remedy}"
