"""How many parameters a module has, and which site of a generator costs how many."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

from torch import nn
from torch.nn.parameter import is_lazy

from torchfilm.writing import in_columns


@runtime_checkable
class Counted(Protocol):
    """A generator that knows what each site costs."""

    def own_parameters(self) -> dict[str, int]:
        """Return how many parameters belong to each site alone."""
        ...


def num_parameters(module: nn.Module) -> int:
    """Return how many numbers are learned; ValueError where lazy layers have no sizes yet."""
    for name, parameter in module.named_parameters():
        if is_lazy(parameter):
            raise ValueError(
                f"{type(module).__name__}: expected parameters with sizes, got '{name}', which is lazy.\n"
                f"Run the network once, with a condition."
            )
    return sum(parameter.numel() for parameter in module.parameters())


def describe(generator: nn.Module, sites: Mapping[str, int]) -> str:
    """Return a table of what each site costs: channels, parameters of its own, share of the generator.

    What all sites use alike has a line of its own: a trunk, a shared projection; all of a generator that
    does not count.

    Args:
        generator: what makes the values of the sites, of any fusion.
        sites: name and number of channels of each.
    """
    total = num_parameters(generator)
    own = generator.own_parameters() if isinstance(generator, Counted) else dict.fromkeys(sites, 0)
    lines = [(name, str(channels), own[name]) for name, channels in sites.items()]
    shared = total - sum(own.values())
    lines += [("(all sites)", "", shared)] if shared else []
    lines.append(("total", str(sum(sites.values())), total))
    rows = [("site", "channels", "parameters", "share")]
    rows += [(name, size, f"{n:,}", f"{n / max(total, 1):.1%}") for name, size, n in lines]
    return in_columns(rows, right=True)
