"""The one place that computes gamma * x + beta.

Broadcasting makes a wrong axis legal: a gamma of 64 channels multiplies a channels-last tensor with one row
without a word. So the channel axis is an argument, and sizes are checked before anything is multiplied.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor


def film(
    x: Float[Tensor, "*shape"],
    gamma: Float[Tensor, "*gamma"],
    beta: Float[Tensor, "*beta"],
    dim: int = 1,
    *,
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
    gamma = _align(gamma, x, dim, modulation_dim, "gamma", site)
    beta = _align(beta, x, dim, modulation_dim, "beta", site)
    return (gamma * x + beta).to(x.dtype)


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

    adaLN-Zero (Peebles and Xie 2023, section 3.2, arXiv 2212.09748). A gate of 0 switches the branch off, a gate of 1 is the plain residual connection; any real number is
    allowed.

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
    gate = _align(gate, x, dim, modulation_dim, "gate", site)
    return (x + gate * branch).to(x.dtype)


def _align(value: Tensor, x: Tensor, dim: int, value_dim: int | None, name: str, site: str) -> Tensor:
    """View `value` with one axis for each axis of x, so that broadcasting does what its layout means."""
    if not -x.ndim <= dim < x.ndim or not 1 <= value.ndim <= x.ndim:
        raise ValueError(_rank_message(value, x, dim, name, site))
    axis = dim % x.ndim
    channel = _channel_axis(value, x, axis, value_dim, name, site)
    if value.shape[channel] != x.shape[axis]:
        raise ValueError(_channel_message(value, x, dim, channel, name, site))
    lead = [size for i, size in enumerate(value.shape) if i != channel]
    others = [size for i, size in enumerate(x.shape) if i != axis]
    for i, (size, expected) in enumerate(zip(lead, others, strict=False)):
        if size != expected and size != 1:
            raise ValueError(_size_message(value, x, i if i < axis else i + 1, size, name, site))
    before = min(axis, len(lead))
    shape = lead[:before] + [1] * (axis - before) + [x.shape[axis]] + lead[before:]
    return value.movedim(channel, before).reshape(shape + [1] * (x.ndim - len(shape)))


def _channel_axis(value: Tensor, x: Tensor, axis: int, value_dim: int | None, name: str, site: str) -> int:
    """Find the channel axis of gamma, beta or gate: the last, unless it is a full map in x's layout."""
    last = value.ndim - 1
    if value_dim is not None:
        if not -value.ndim <= value_dim <= last:
            raise ValueError(
                f"{_where(site, 'film')}: modulation_dim={value_dim} is no axis of {name} ({value.ndim} axes).\n"
                f"{_shapes(value, x, name)}\n"
                f"Leave modulation_dim out for [C], [B, C] and [B, T, C]."
            )
        return value_dim % value.ndim
    if value.ndim < x.ndim or axis == last or value.shape[axis] != x.shape[axis]:
        return last
    if value.shape[last] != x.shape[axis] or all(size == 1 for size in value.shape[axis:]):
        return axis
    as_map = all(a in (b, 1) for a, b in zip(value.shape, x.shape, strict=True))
    rest = [size for i, size in enumerate(x.shape) if i != axis]
    as_last = all(a in (b, 1) for a, b in zip(value.shape, rest, strict=False))
    if as_map and as_last:
        raise ValueError(
            f"{_where(site, 'film')}: {name} fits with its channels on axis {axis} and with them last.\n"
            f"{_shapes(value, x, name)}\n"
            f"Say which with modulation_dim={axis} or modulation_dim=-1."
        )
    return axis if as_map else last


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
    if x.shape[axis] % size == 0:
        times = x.shape[axis] // size
        remedy = f"If each condition serves {times} rows of x, use {name}.repeat_interleave({times}, dim=0)."
    else:
        remedy = f"Besides the channels, the axes of {name} align with x's from the left, with x's size or 1."
    return f"{_where(site, 'film')}: {fact}.\n{_shapes(value, x, name)}\n{remedy}"
