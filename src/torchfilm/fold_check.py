"""Whether a network and its condition can be folded, and compute the same then on inputs of the user's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from torchfilm.filling import Conditioning
from torchfilm.restoring import fresh, unchanged
from torchfilm.several import Several
from torchfilm.sharding import check_whole

_TINY = torch.finfo(torch.float64).tiny


def check_copied(model: nn.Module) -> None:
    """Refuse what torch cannot copy: what is sharded, and a tensor with a graph among a module's own."""
    check_whole("fold", model)
    for name, module in model.named_modules():
        for key, value in vars(module).items():
            if isinstance(value, Tensor) and not value.is_leaf:
                raise ValueError(
                    f"fold: expected a network that can be copied, got '{name}.{key}', which a call "
                    f"with gradients left there, as by nn.utils.weight_norm.\n"
                    f"Call nn.utils.remove_weight_norm first, or use nn.utils.parametrizations.weight_norm. "
                    f"For others call the network once under torch.no_grad()."
                )


@contextmanager
def all_given(encoder: nn.Module, cond: Any) -> Iterator[None]:
    """Where an encoder refuses some conditions without others, add that weights take all of them or none."""
    try:
        yield
    except ValueError as error:
        missing = []
        if isinstance(encoder, Several) and isinstance(cond, Mapping) and cond.keys() <= encoder.sizes.keys():
            missing = [name for name in encoder.required if cond.get(name) is None]
        if not missing:
            raise
        raise ValueError(
            f"fold: {error}\n"
            f"The weights can take all of them or none. To leave some open do not fold: give the fixed ones "
            f"at each call, model(x, cond={{**fixed, {missing[0]!r}: ...}})."
        ) from error


def difference(
    film: Conditioning,
    model: nn.Module,
    plain: nn.Module,
    values: dict[str, Any],
    inputs: Sequence[Any] | Mapping[str, Any] | Tensor,
) -> float:
    """Return the largest difference between outputs of the two networks; NaN where one of them alone is NaN.

    Both start from the same random state and get copies of the inputs, and both are left as they were.
    Relative to the largest finite number of each output; infinities that are the same do not differ.

    Args:
        film: the conditioning of the model.
        model: the conditioned network.
        plain: the folded one.
        values: what the sites of the model apply, by name.
        inputs: arguments of both, by position or by name, or their only one.

    Raises:
        ValueError: in training, and for outputs without floating-point tensors.
    """
    if model.training:
        raise ValueError(
            "fold: expected a network in evaluation to compare outputs on inputs, got one in training.\n"
            "Call model.eval() first, or leave inputs out."
        )
    named = inputs if isinstance(inputs, Mapping) else {}
    given = (inputs,) if isinstance(inputs, Tensor) else () if named else tuple(inputs)

    def outputs(network: nn.Module) -> list[Any]:
        args, kwargs = fresh((given, dict(named)))
        with torch.no_grad(), unchanged(network):
            return fresh(pytree.tree_leaves(network(*args, **kwargs)))  # which may be buffers of its own

    with film.fixed(values):
        expected = outputs(model)
    actual = outputs(plain)
    differences = [
        _relative(one.cpu().double(), other.cpu().double())
        for one, other in zip(actual, expected, strict=True)
        if isinstance(one, Tensor) and one.is_floating_point()
    ]
    if not differences:
        got = ", ".join(
            str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__ for leaf in expected
        )
        raise ValueError(
            f"fold: expected outputs with floating-point tensors, to compare them on the inputs, got {got}.\n"
            f"Leave inputs out, or fold the part of the network that gives such an output."
        )
    return float(torch.stack(differences).max())  # which, unlike Python's max, lets no NaN go


def _relative(actual: Tensor, expected: Tensor) -> Tensor:
    """Return the largest difference of one output, relative to its largest finite number."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    apart = (actual - expected).abs().where(~same, 0).flatten()
    sizes = expected.abs().where(expected.isfinite(), 0).flatten()
    if not apart.numel():
        return apart.new_zeros(())
    return apart.max() / sizes.max().clamp(min=_TINY)


def rounding(model: nn.Module) -> float:
    """Return how far rounding may move outputs: 2e-3 in float32, 0.14 in bfloat16; depth makes it grow."""
    return _reach({tensor.dtype for tensor in model.parameters() if tensor.is_floating_point()})


def rounding_here(model: nn.Module) -> float:
    """Return how far rounding may move outputs of calls here: in autocast, or with coarser products."""
    return max(rounding(model), _reach(set(_coarser(model))))


def _reach(kinds: set[torch.dtype]) -> float:
    return max((torch.finfo(kind).eps for kind in kinds), default=torch.finfo(torch.float32).eps) ** 0.4


def _coarser(model: nn.Module) -> Iterator[torch.dtype]:
    """Yield in which precisions torch was told to compute what is float32."""
    device = next((tensor.device.type for tensor in model.parameters()), "cpu")
    if torch.is_autocast_enabled(device):
        yield torch.get_autocast_dtype(device)
    kinds = (getattr(torch.backends.mkldnn, name, None) for name in ("matmul", "conv", "rnn"))
    told = {getattr(kind, "fp32_precision", "none") for kind in kinds}
    try:
        told.add(torch.get_float32_matmul_precision())
    except RuntimeError:  # torch's refusal where its older and newer switches disagree
        told.add("medium")
    if told - {"none", "ieee", "highest"}:
        yield torch.bfloat16
