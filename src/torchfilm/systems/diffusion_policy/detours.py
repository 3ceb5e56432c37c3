"""Ways round what stands on a table: where to turn, and what each turn would lead to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

_INSIDE = 0.96  # of a circle's radius is left where the start or the end would lie within it
_PAST = 0.3  # radii that a corner lies beyond the point where its way touches the circle
_NEAR = 0.02  # metres: what is nearer than this is close
_FAR = 0.1  # metres: the unit of detours and of distances
_WIDE = 0.25  # metres: the unit of positions
_LEAST = 1e-6
_NOTHING = 10.0  # metres: the distance from what is not there


def features_of_ways(alone: int) -> int:
    """How many numbers `ways_round` gives for each way, with so many circles alone."""
    return 10 + 5 * alone


@dataclass(frozen=True)
class Ways:
    """The straight way, then those past the left and past the right of each circle.

    Attributes:
        directions: unit vectors at the start.
        features: what a way would lead to: how long it is, how far it turns, and how near it comes to
            circles before and after its corner.
    """

    directions: Float[Tensor, "batch ways 2"]
    features: Float[Tensor, "batch ways numbers"]


def ways_round(
    start: Float[Tensor, "batch 2"],
    end: Float[Tensor, "batch 2"],
    centres: Float[Tensor, "batch n 2"],
    radii: Float[Tensor, "batch n"],
    absent: Float[Tensor, "batch n"],
    alone: int,
) -> Ways:
    """Return ways with at most one corner from `start` to `end`; all in metres.

    A way round a circle leaves the start along its tangent, turns a little beyond the point of contact, and
    goes straight to the end. A circle that holds the start or the end is shrunk until it does not.

    Args:
        start, end, centres: positions.
        radii: what a way has to stay away from each centre.
        absent: 0..1, how little a circle counts: what moves is not in its own way.
        alone: the last so many circles have numbers of their own; of the others the nearest one counts.
    """
    n = centres.shape[1]
    towards = end - start
    straight = towards / towards.norm(dim=-1, keepdim=True).clamp(min=_LEAST)
    there = centres - start[:, None]
    apart = there.norm(dim=-1).clamp(min=_LEAST)
    late = torch.minimum(radii, _INSIDE * (centres - end[:, None]).norm(dim=-1))
    early = torch.minimum(late, _INSIDE * apart)
    angle = torch.asin((1.02 * early / apart).clamp(0, 1))
    contact = (apart.square() - early.square()).clamp(min=_LEAST).sqrt() + _PAST * early
    sides = [_rotated(there / apart[..., None], sign * angle) for sign in (1, -1)]
    directions = torch.cat([straight[:, None], *sides], dim=1)
    corners = torch.cat(
        [end[:, None], *(start[:, None] + contact[..., None] * side for side in sides)], dim=1
    )

    begin, finish = start[:, None].expand_as(corners), end[:, None].expand_as(corners)
    near = [*_nearest(begin, corners, centres, early, absent, alone)]
    near += _nearest(corners, finish, centres, late, absent, alone)
    length = towards.norm(dim=-1)[:, None]
    longer = (corners - begin).norm(dim=-1) + (finish - corners).norm(dim=-1) - length
    circle = functional.pad(torch.arange(n, device=centres.device).repeat(2), (1, 0), value=-1)
    kind = torch.stack([circle == one for one in (-1, *range(n - alone, n))], dim=-1).to(start)
    features = [
        corners / _WIDE,
        *(part[..., None] for part in (longer / _FAR, (length / _WIDE).expand_as(longer))),
        (directions * straight[:, None]).sum(dim=-1, keepdim=True),
        *(torch.tanh(gaps / _NEAR) for gaps in near),
        *((gaps / _FAR).clamp(-1, 1) for gaps in near),
        kind.expand(start.shape[0], -1, -1),
    ]
    return Ways(directions, torch.cat(features, dim=-1))


def _nearest(
    a: Tensor, b: Tensor, centres: Tensor, radii: Tensor, absent: Tensor, alone: int
) -> tuple[Tensor, Tensor]:
    """How far the stretches from a to b stay out of the nearest of the crowd, and of each of the others."""
    way, there = (b - a)[:, :, None], centres[:, None] - a[:, :, None]
    share = (way * there).sum(dim=-1) / way.square().sum(dim=-1).clamp(min=_LEAST)
    gaps = (
        (share.clamp(0, 1)[..., None] * way - there).norm(dim=-1)
        - radii[:, None]
        + _NOTHING * absent[:, None]
    )
    crowd = gaps.shape[-1] - alone
    return gaps[..., :crowd].amin(dim=-1, keepdim=True), gaps[..., crowd:]


def _rotated(directions: Float[Tensor, "batch n 2"], angle: Float[Tensor, "batch n"]) -> Tensor:
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y = directions.unbind(dim=-1)
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=-1)
