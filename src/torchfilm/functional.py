"""gamma * x + beta, with all sizes checked: the one place through which features are modulated.

Broadcasting makes a wrong axis legal: a gamma of 64 channels multiplies a channels-last tensor with one row
without a word. So the channel axis is an argument, and sizes are checked before anything is multiplied.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd import forward_ad
from torch.jit._trace import is_tracing

from torchfilm import onepass
from torchfilm.affine import Activation, activated, affine, has_graph, rounded
from torchfilm.modulation import paired


def film(
    x: Float[Tensor, "*shape"],
    gamma: Float[Tensor, "*gamma"],
    beta: Float[Tensor, "*beta"],
    dim: int = 1,
    *,
    gate: Float[Tensor, "*gate"] | None = None,
    activation: Activation | None = None,
    modulation_dim: int | None = None,
    site: str = "",
) -> Float[Tensor, "*shape"]:
    """Scale and shift each channel: y[b, c, ...] = gamma[b, c] * x[b, c, ...] + beta[b, c].

    Perez et al. 2018, eq. 2 (arXiv 1709.07871). gamma is the final factor, not an offset from one. The
    product and the sum are taken in the wider of the precisions of x and gamma and rounded once, to x.dtype:
    in float32 for bfloat16 features, with gamma and beta in float32 as all layers and generators make them.

    With an activation, y = activation(gamma * x + beta), and training stores only x, gamma and beta; the
    intermediate is recomputed in the backward pass. That saves one activation, and with `torch.compile` most
    of the time (docs/speed.md: forward and backward take 1.04 to 1.83 times as long as a ReLU alone).

    Args:
        x: features, the channels on axis `dim`: [B, C, H, W], [B, T, C] with dim=-1, ...
        gamma: [C], [B, C], [B, T, C] with the channels last and the other axes aligned with x's from the
            left; or a full map with as many axes as x, in x's own layout. Each size is x's or, but for the
            channels, 1.
        beta: as gamma; it need not have the same shape.
        dim: the channel axis of x.
        gate: aligned as gamma; y = gate * activation(gamma * x + beta), at no cost without an activation.
        activation: "relu" or "silu", taken after the shift; None for none.
        modulation_dim: the channel axis of gamma and beta, needed only where they have as many axes as x and
            fit both channels last and as a full map (x [B, C, T] where C == T).
        site: the name to put into error messages.

    Returns:
        Modulated features with the shape, dtype and memory format of x.

    Raises:
        ValueError: where a size does not fit or a layout is ambiguous (nothing is ever broadcast over
            channels), for another activation, and for an x of integers, or of reals where gamma is complex.

    Example:
        >>> y = film(torch.rand(2, 3, 5, 7), gamma=torch.rand(2, 3), beta=torch.rand(2, 3))
    """
    if gate is None and modulation_dim in (None, -1) and activation in (None, "relu"):
        y = onepass.film(x, gamma, beta, dim, relu=activation == "relu", last=modulation_dim == -1)
        if y is not None:
            return y
    gamma, beta = _both_aligned(x, gamma, beta, dim, modulation_dim, site)
    if gate is not None:
        gate = _one_aligned(x, gate, dim, modulation_dim, "gate", site)
    if activation is not None:
        y = activated(x, gamma, beta, activation)
        return y if gate is None else rounded(gate * y, x)
    if gate is None:
        return rounded(affine(x, gamma, beta), x)
    gate = _wide_gate(gate, x)
    gamma, beta = gate * gamma, gate * beta
    y = onepass.film(x, gamma, beta, dim)
    return rounded(affine(x, gamma, beta), x) if y is None else y


def film_(
    x: Float[Tensor, "*shape"],
    gamma: Float[Tensor, "*gamma"],
    beta: Float[Tensor, "*beta"],
    dim: int = 1,
    *,
    gate: Float[Tensor, "*gate"] | None = None,
    site: str = "",
) -> Float[Tensor, "*shape"]:
    """Do what `film` does, in place where that is possible: for an x that nothing else uses.

    `film` allocates memory of the size of x, which for features of a megabyte and more takes longer than the
    product and the sum. With a graph, in a compiler or a trace, under `torch.vmap`, or in another precision
    than that of gamma and beta, x is not overwritten; nor on other devices than a CPU.

    Args:
        x: features, the channels on axis `dim`; may be overwritten.
        gamma: [C], [B, C] or [B, T, C], channels last; in memory of its own, no view of x.
        beta: as gamma.
        dim: the channel axis of x.
        gate: as gamma; y = gate * (gamma * x + beta).
        site: the name to put into error messages.

    Returns:
        Modulated features: x itself, or a new tensor.

    Raises:
        ValueError: as `film`; x is then as it was.

    Example:
        >>> y = film_(torch.rand(2, 3, 5, 7), gamma=torch.rand(2, 3), beta=torch.rand(2, 3))
    """
    if gate is not None:
        gate = _wide_gate(gate, x)
        gamma, beta = paired(torch.mul, gate, gamma), paired(torch.mul, gate, beta)
    writable = not torch.compiler.is_compiling() and _writable(x, gamma, beta)
    y = onepass.film(x, gamma, beta, dim, last=True, in_place=writable)
    if y is not None:
        return y
    gamma, beta = _both_aligned(x, gamma, beta, dim, -1, site)
    plain = type(gamma) is type(beta) is Tensor  # a subclass may give one of its kind, which x cannot become
    if not (writable and plain and x.is_cpu) or is_tracing():  # on a device new memory costs little
        return rounded(affine(x, gamma, beta), x)
    try:
        y = x.mul_(gamma)
    except RuntimeError:  # memory that cannot be written into, and torch.vmap over gamma alone
        return affine(x, gamma, beta)
    try:
        y += beta
    except RuntimeError:  # torch.vmap over beta alone
        y = y + beta
    return y


def featurewise_affine(
    x: Float[Tensor, "*shape"], scale: Float[Tensor, "*scale"], shift: Float[Tensor, "*shift"], dim: int = -1
) -> Float[Tensor, "*shape"]:
    """Apply the scale and shift of Audio2Photoreal: y = (scale + 1) * x + shift, the identity at zero.

    Ng et al. 2024 (arXiv 2401.01885). A converter of their convention: gamma = 1 + scale and beta = shift.

    Args:
        x: features, the channels on axis `dim`.
        scale: offset of the factor from one, aligned as gamma in `film`, channels last.
        shift: aligned in the same way.
        dim: the channel axis of x; tokens have it last.

    Raises:
        ValueError: as `film`.

    Example:
        >>> y = featurewise_affine(torch.rand(2, 196, 64), scale=torch.zeros(2, 64), shift=torch.rand(2, 64))
    """
    wide = torch.promote_types(scale.dtype, torch.float32)
    return film(x, 1 + scale.to(wide), shift.to(wide), dim, modulation_dim=-1)


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
        ValueError: where the branch has another shape than x, the gate does not fit, or x has integers.

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
    gate = _one_aligned(x, gate, dim, modulation_dim, "gate", site)
    return rounded(x + gate * branch, x)


def _wide_gate(gate: Tensor, x: Tensor) -> Tensor:
    """Return a gate in the wider of its precision and that of x, or its product with gamma would round."""
    return gate if gate.dtype == x.dtype else gate.to(torch.promote_types(gate.dtype, x.dtype))


def _writable(x: Tensor, gamma: Tensor, beta: Tensor) -> bool:
    """Whether the result may take x's place: one precision, no graph, no error after writing."""
    one_precision = x.dtype == gamma.dtype == beta.dtype
    frozen = x.is_inference() and not torch.is_inference_mode_enabled()
    forwards = forward_ad._current_level >= 0
    return one_precision and not (frozen or forwards) and not has_graph(x, gamma, beta)


def _both_aligned(
    x: Tensor, gamma: Tensor, beta: Tensor, dim: int, modulation_dim: int | None, site: str
) -> tuple[Tensor, Tensor]:
    """Check gamma and beta against x, and view them with one axis for each of its axes."""
    if beta.shape == gamma.shape and (rows := _rows(x, gamma, dim, modulation_dim)) is not None:
        return gamma.view(rows), beta.view(rows)
    fit = _fit(gamma, x, dim, modulation_dim, "gamma", site)
    beta_fit = fit if beta.shape == gamma.shape else _fit(beta, x, dim, modulation_dim, "beta", site)
    return _aligned(gamma, fit), _aligned(beta, beta_fit)


def _one_aligned(
    x: Tensor, value: Tensor, dim: int, modulation_dim: int | None, name: str, site: str
) -> Tensor:
    """Check a value against x, and view it with one axis for each of its axes."""
    if (rows := _rows(x, value, dim, modulation_dim)) is not None:
        return value.view(rows)
    return _aligned(value, _fit(value, x, dim, modulation_dim, name, site))


def _rows(x: Tensor, value: Tensor, dim: int, modulation_dim: int | None) -> list[int] | None:
    """Return the shape to view a value [B, C] in, in as few steps as there can be: what is checked here fits.

    None for everything else, which is checked and explained step by step: where caches are cold, as between
    two convolutions, that costs as much as the product and the sum.
    """
    sizes, features = value.shape, x.shape
    if len(sizes) != 2 or len(features) < 3 or modulation_dim not in (None, -1):
        return None
    axis = dim if dim >= 0 else dim + len(features)
    if not 0 < axis < len(features) or sizes[1] != features[axis]:
        return None
    if sizes[0] != features[0] and sizes[0] != 1:
        return None
    view = [1] * len(features)
    view[0], view[axis] = sizes
    return view


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
        raise _wrong_rank(value, x, dim, name, site)
    axis = dim % len(features)
    channel = len(sizes) - 1
    if value_dim is not None or (len(sizes) == len(features) and axis != channel):
        channel = _channel_axis(value, x, axis, value_dim, name, site)
    if sizes.pop(channel) != features.pop(axis):
        raise _wrong_channels(value, x, dim, channel, name, site)
    for i, size in enumerate(sizes):
        if size != features[i] and size != 1:
            raise _wrong_size(value, x, axis, i, size, name, site)
    position = min(axis, len(sizes))
    padded = sizes + [1] * (len(features) - len(sizes))
    padded.insert(axis, value.shape[channel])
    return channel, position, padded


def _channel_axis(value: Tensor, x: Tensor, axis: int, value_dim: int | None, name: str, site: str) -> int:
    """Find the channel axis of gamma, beta or gate: the last, unless it is a full map in x's layout."""
    last = value.ndim - 1
    if value_dim is not None:
        if not -value.ndim <= value_dim <= last:
            remedy = "Leave modulation_dim out for [C], [B, C] and [B, T, C]."
            raise _misfit(f"modulation_dim={value_dim} is no axis of {name}", remedy, value, x, name, site)
        return value_dim % value.ndim
    channels = x.shape[axis]
    others = [size for i, size in enumerate(x.shape) if i != axis]
    as_map = _broadcasts([size for i, size in enumerate(value.shape) if i != axis], others)
    as_last = _broadcasts(list(value.shape[:last]), others)
    fits_map, fits_last = as_map and value.shape[axis] == channels, as_last and value.shape[last] == channels
    if fits_map and fits_last and any(size != 1 for size in value.shape[axis:]):
        fact = f"{name} fits with its channels on axis {axis} and with them last"
        remedy = f"Say which with modulation_dim={axis} or modulation_dim=-1."
        raise _misfit(fact, remedy, value, x, name, site)
    return axis if fits_map or (as_map and not fits_last) else last


def _broadcasts(sizes: list[int], target: list[int]) -> bool:
    return all(size in (wanted, 1) for size, wanted in zip(sizes, target, strict=True))


def _where(site: str, function: str) -> str:
    return f"FiLM site '{site}'" if site else function


def _misfit(fact: str, remedy: str, value: Tensor, x: Tensor, name: str, site: str) -> ValueError:
    shapes = f"  {'x':<{len(name)}}  {tuple(x.shape)}\n  {name}  {tuple(value.shape)}"
    return ValueError(f"{_where(site, 'film')}: {fact}.\n{shapes}\n{remedy}")


def _wrong_rank(value: Tensor, x: Tensor, dim: int, name: str, site: str) -> ValueError:
    if not -x.ndim <= dim < x.ndim:
        fact = f"dim={dim} is no axis of x, which has {x.ndim}"
        remedy = "Give the axis of x that holds the channels."
    elif value.ndim == 0:
        fact, remedy = f"{name} is a single number, expected one per channel", f"Use {name}.expand(channels)."
    else:
        fact = f"{name} has {value.ndim} axes, expected at most the {x.ndim} of x"
        remedy = "Axes that x lacks cannot be modulated: drop them, or give x its own."
    return _misfit(fact, remedy, value, x, name, site)


def _wrong_channels(value: Tensor, x: Tensor, dim: int, channel: int, name: str, site: str) -> ValueError:
    channels = value.shape[channel]
    fact = f"{name} has {channels} channels, but x has size {x.shape[dim]} on its channel axis (dim={dim})"
    fits = [i for i, size in enumerate(x.shape) if size == channels and i > 0]
    if fits and fits[-1] == x.ndim - 1:
        remedy = "If x is channels-last, use dim=-1."
    elif fits:
        remedy = f"If the channels of x are on axis {fits[-1]}, use dim={fits[-1]}."
    else:
        remedy = f"Make the generator's features equal to the channels of x ({x.shape[dim]})."
    return _misfit(fact, remedy, value, x, name, site)


def _wrong_size(
    value: Tensor, x: Tensor, channels: int, place: int, size: int, name: str, site: str
) -> ValueError:
    """Say what to do where the size of a value does not fit that of x at one of its axes but the channels."""
    axes = [i for i in range(x.ndim) if i != channels]
    axis = axes[place]
    fact = f"{name} has size {size} where x has size {x.shape[axis]} (axis {axis} of x)"
    if axis == 0 and size and x.shape[0] % size == 0:
        times = x.shape[0] // size
        how = f"{name}.repeat_interleave({times}, dim=0)"
        how += f", or condition with repeat={times}, or repeat='any' where calls differ in it" if site else ""
        remedy = f"If each condition serves {times} rows of x, use {how}."
    else:
        remedy = f"Besides the channels, the axes of {name} align with x's from the left, with x's size or 1."
        later = [i for i in range(place + 1, len(axes)) if place and x.shape[axes[i]] == size]
        if later:
            index = ", ".join([":"] * place + ["None"] * (later[0] - place))
            whose = "the condition" if site else name
            remedy += f"\nWhere these are axis {axes[later[0]]} of x, give {whose}[{index}]."
        elif site and place:
            remedy += (
                "\nWhere a condition has another rate in time, give the fusion align='linear' or 'nearest', "
                "and the condition an axis for each of x's but the channels."
            )
    if axis == 0 and x.ndim == 2:
        given = "cond=z" if site else name
        remedy += f"\nWhere rows are nodes of graphs, give {given}[graph], that of each node."
    elif axis == 0 and axes[1] == 1 and x.shape[1] == size:
        how = "condition with batch=1" if site else f"give {name}[None], or a layer condition[None]"
        remedy += f"\nIf time comes first and the batch is on axis 1 ({size}), {how}."
    return _misfit(fact, remedy, value, x, name, site)
