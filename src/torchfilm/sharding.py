"""Tensors that lie in several processes: which these are, without loading what knows them."""

from __future__ import annotations

import sys
from typing import Any

from torch import nn


def is_sharded(value: Any) -> bool:
    """Tell whether a tensor lies in several processes, each of which has a part of it or all."""
    known = sys.modules.get("torch.distributed.tensor")
    return known is not None and isinstance(value, known.DTensor)


def in_parts(value: Any) -> bool:
    """Tell whether no process has all of a tensor, as after `fully_shard`."""
    return is_sharded(value) and not all(placement.is_replicate() for placement in value.placements)


def joins_its_parts(module: nn.Module) -> bool:
    """Tell whether a module joins its own parameters when it is called, as after `fully_shard`."""
    return any(one.__name__ == "FSDPModule" for one in type(module).__mro__)
