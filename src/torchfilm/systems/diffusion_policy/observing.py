"""What a policy makes of its observations: the instruction says what to look at."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from torchfilm.functional import film
from torchfilm.fusion import Fusion
from torchfilm.modulation import Modulation
from torchfilm.systems.diffusion_policy.detours import Ways, features_of_ways, ways_round

_REACH = 0.25  # metres: the unit of distances from the finger
_BEHIND = 0.075  # metres: from a thing's centre to where it is pushed from
_FINE = 0.05 / _REACH  # distances at which it matters on which side something stands
_SIDES = 18  # numbers that `sides` makes of a position for four ways
_STEP = 0.02  # metres: the unit of what moved between two observations
_SIZE = 0.03  # metres: the unit of radii
_FINGER = 0.012  # metres: a finger's radius
_AWAY = 0.018  # metres: what is left between what moves and what it goes round
_LEAST = 1e-6
_NEAR = 1e-4  # of the unit of distances: nearer than this has no direction


@dataclass(frozen=True)
class Layout:
    """Where things stand in a vector of state: [arm, thing 1, thing 2, ..., further positions].

    Attributes:
        arm: numbers of the arm; the last two are the finger's position.
        things: how many things.
        thing: numbers of each: x, y, radius, then what it is like.
    """

    arm: int
    things: int
    thing: int

    @property
    def size(self) -> int:
        """Numbers up to the further positions."""
        return self.arm + self.things * self.thing


class Listened:
    """What the layers of an encoder hear: a value for each site, applied by a fusion; nothing where None."""

    def __init__(self, fusion: Fusion | None, values: Mapping[str, Any] | None) -> None:
        self._fusion, self._values = fusion, values

    def __call__(self, x: Tensor, site: str) -> Tensor:
        """Return x, channels last, as the site's value has it."""
        if self._values is None or self._fusion is None or site not in self._values:
            return x
        value = self._values[site]
        if isinstance(value, Modulation):
            return film(x, value.gamma, value.beta, dim=-1, modulation_dim=-1, site=site)
        return self._fusion.apply(x, value, -1, site)


@dataclass(frozen=True)
class Seen:
    """What an encoder makes of observations.

    Attributes:
        features: the condition of the network behind it.
        heading: the unit vector [batch, 2] along which it acts, or None: along the axes of the table.
    """

    features: Float[Tensor, "batch dim"]
    heading: Float[Tensor, "batch 2"] | None = None


class Choice(NamedTuple):
    """Ways that could be taken: how much speaks for each, and its direction at the start."""

    logits: Float[Tensor, "batch ways"]
    directions: Float[Tensor, "batch ways 2"]


class _Go(NamedTuple):
    """What follows from what is looked at: the ways of thing and finger, and what is taken of them."""

    thing: Choice
    finger: Choice
    along: Tensor
    begin: Tensor
    heading: Tensor


class FlatEncoder(nn.Module):
    """A perceptron over the flattened history, whose two hidden layers listen.

    h_1 = mish(FiLM(W_1 o)), h_2 = mish(FiLM(W_2 h_1)), and what comes out is [h_2, o]: what is told apart by
    the instruction, and everything as it is.

    Args:
        steps, size: of the observations [batch, steps, size].
        width: of the hidden layers.
    """

    def __init__(self, steps: int, size: int, width: int) -> None:
        super().__init__()
        self.sites = {"encoder_0": width, "encoder_1": width}
        self.dim = width + steps * size
        self.first = nn.Linear(steps * size, width)
        self.second = nn.Linear(width, width)
        self.activation = nn.Mish()

    def forward(self, raw: Float[Tensor, "batch steps size"], scaled: Tensor, heard: Listened) -> Seen:
        """Return the features of scaled observations; `raw` ones, in their units, are not used here."""
        flat = scaled.flatten(1)
        h = self.activation(heard(self.first(flat), "encoder_0"))
        return Seen(torch.cat([self.activation(heard(self.second(h), "encoder_1")), flat], dim=-1))


class Turning(nn.Module):
    """Choose a way by what it would lead to; the instruction says what is to be avoided.

        h_k = mish(FiLM(W_2 mish(FiLM(W_1 k)) + mean_k h_k)),  logit_k = w . h_k

    Args:
        alone: as for `ways_round`.
        width: of the layers.
    """

    def __init__(self, alone: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(features_of_ways(alone) + 1, width)
        self.second = nn.Linear(width, width)
        self.around = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1)
        self.activation = nn.Mish()

    def forward(
        self, ways: Ways, own: Float[Tensor, "batch n"], heard: Listened, *, finger: bool
    ) -> Float[Tensor, "batch ways"]:
        """Return the logits.

        own: 0..1, how far a circle is what moves, which nothing goes round; finger: whether that moves.
        """
        who = ways.features.new_full((*ways.features.shape[:2], 1), float(finger))
        h = self.activation(heard(self.first(torch.cat([ways.features, who], dim=-1)), "way_0"))
        h = self.second(h) + self.around(h.mean(dim=1, keepdim=True))
        logits = self.score(self.activation(heard(h, "way_1"))).squeeze(-1)
        barred = torch.cat([own.new_zeros(own.shape[0], 1), own, own], dim=1)
        return logits + torch.log1p(-barred.clamp(max=1 - _LEAST))


class ThingsEncoder(nn.Module):
    """Look through the instruction for a thing and for where it has to go, and see the table along that way.

    Every thing t is a row of numbers: where it is, from the finger and among the things, and what it is like;
    one network reads all of them, so what is learned about one holds for all. Where to is one of: nowhere, a
    further position of the state, a landmark; each spot s has a vector e_s:

        h_t = mish(FiLM(W_2 mish(FiLM(W_1 t)) + mean_s h_s)),  a = softmax_t(w . h_t),  thing = sum_t a_t t
        b = softmax_s(v . mish(FiLM(e_s))),  goal = sum_s b_s s    (nowhere: the thing itself)

    A thing that has to go somewhere goes straight or round something, and the finger begins behind it; one
    that is reached is where the finger ends. The finger, too, goes straight or round something. `Turning`
    chooses both ways; the heading is the finger's. Straight towards a thing that is pushed means: to halfway
    between where the finger begins and the thing, where it never stands, so that nothing flips.

    All positions are then seen from the finger, along and across four ways: the heading, that of the thing,
    the one from finger to thing, and that to where the finger begins. Two layers, which listen too, read
    that; the network behind acts along the heading.

    Args:
        layout: of the observation's numbers.
        steps, size: of the observations [batch, steps, size].
        width: of the layers.
        landmarks: fixed positions in metres that an instruction may speak of.
        solids: radii in metres of the first further positions, to go round.

    Attributes:
        held: whether what is looked at and which way is taken are held fast: once it is understood, what is
            learned about acting would only blur it, and a blurred goal turns every action.
    """

    landmarks: Tensor
    solids: Tensor

    def __init__(
        self,
        layout: Layout,
        steps: int,
        size: int,
        width: int,
        landmarks: Sequence[tuple[float, float]] = (),
        solids: Sequence[float] = (),
    ) -> None:
        super().__init__()
        if size < layout.size or (size - layout.size) % 2 or layout.arm < 2 or layout.thing < 3:
            raise ValueError(
                f"ThingsEncoder: expected {layout.size} numbers for {layout}, then pairs, got {size}. "
                f"Give the layout of these observations, or use the flat encoder."
            )
        self.layout, self.steps = layout, steps
        further = (size - layout.size) // 2
        if len(solids) > further:
            raise ValueError(
                f"ThingsEncoder: expected radii for at most {further} further positions, got {len(solids)}."
            )
        row = 2 * steps + 2 + 4 + (layout.thing - 2)
        along = row + _SIDES * (3 + further) + 4 * (steps - 1) + 8 + steps * layout.arm
        self.sites = {
            "thing_0": width,
            "thing_1": width,
            "spot": width,
            "way_0": width,
            "way_1": width,
            "encoder_0": 2 * width,
            "encoder_1": 2 * width,
        }
        self.dim = 2 * width + along
        self.register_buffer("landmarks", torch.tensor(landmarks).reshape(-1, 2), persistent=False)
        self.register_buffer("solids", torch.tensor(solids, dtype=torch.float32), persistent=False)
        self.thing_0 = nn.Linear(row, width)
        self.thing_1 = nn.Linear(width, width)
        self.around = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1)
        self.spot = nn.Embedding(1 + further + len(landmarks), width)
        self.spot_score = nn.Linear(width, 1)
        self.turning = Turning(len(solids), width)
        self.beside = nn.Linear(_SIDES + 1 + 1, width)
        self.first = nn.Linear(along + width, 2 * width)
        self.second = nn.Linear(2 * width, 2 * width)
        self.activation = nn.Mish()
        self.held = False

    def forward(self, raw: Float[Tensor, "batch steps size"], scaled: Tensor, heard: Listened) -> Seen:
        """Return the features and the heading of observations, in metres and scaled."""
        rows, spots = self.rows(raw), self.spots(raw)
        attention, share = self._choose(rows, heard)
        things = rows[..., : 2 * self.steps].unflatten(-1, (self.steps, 2))
        chosen = (attention[..., None] * rows).sum(dim=1)
        thing = chosen[:, : 2 * self.steps].unflatten(-1, (self.steps, 2))
        now = thing[:, -1]
        goal = share[:, :1] * now + (share[:, 1:, None] * spots).sum(dim=1)
        go = self._go(raw, attention, share, heard)
        begin = (go.begin - self._finger(raw)[:, -1]) / _REACH
        ways = torch.stack([go.heading, go.along, _unit(now), begin], dim=1).detach()

        radius = rows[..., 2 * self.steps + 6, None]
        beside = torch.cat([sides(ways, things[:, :, -1], now), radius, attention[..., None]], dim=-1)
        beside = self.activation(self.beside(beside)).mean(dim=1)
        further = spots[:, : spots.shape[1] - len(self.landmarks)]
        positions = torch.cat([torch.stack([now, begin, goal], dim=1), further], dim=1)
        moved = torch.cat([self._finger(raw).diff(dim=1), thing.diff(dim=1) * _REACH], dim=1) / _STEP
        along = torch.cat(
            [
                chosen,
                sides(ways, positions, now).flatten(1),
                _seen_along(ways[:, :1], moved).flatten(1),
                ways.flatten(1),
                scaled[..., : self.layout.arm].flatten(1),
            ],
            dim=-1,
        )
        x = self.activation(heard(self.first(torch.cat([along, beside], dim=-1)), "encoder_0"))
        x = self.activation(heard(self.second(x), "encoder_1"))
        return Seen(torch.cat([x, along], dim=-1), ways[:, 0])

    def _choose(self, rows: Tensor, heard: Listened) -> tuple[Tensor, Tensor]:
        """The shares of things and of spots, [batch, n] each."""
        things, spots = (logits.softmax(dim=1) for logits in self._logits(rows, heard))
        return (things.detach(), spots.detach()) if self.held else (things, spots)

    def attention(
        self, raw: Float[Tensor, "batch steps size"], heard: Listened
    ) -> tuple[Float[Tensor, "batch things"], Float[Tensor, "batch spots"]]:
        """Return the logits of which thing is looked at, and of where it has to go."""
        return self._logits(self.rows(raw), heard)

    def _logits(self, rows: Tensor, heard: Listened) -> tuple[Tensor, Tensor]:
        return self.score(self.look(rows, heard)).squeeze(-1), self.where(rows.shape[0], heard)

    def ways(
        self,
        raw: Float[Tensor, "batch steps size"],
        things: Float[Tensor, "batch things"],
        spots: Float[Tensor, "batch spots"],
        heard: Listened,
        turn: Int[Tensor, " batch"] | None = None,
    ) -> tuple[Choice, Choice]:
        """Return which ways the thing could take, and the finger.

        things, spots: the shares of what is looked at, as the softmax of `attention` gives them. turn: the
        index of the way that the thing takes; default: the one that is chosen.
        """
        go = self._go(raw, things, spots, heard, turn)
        return go.thing, go.finger

    def _go(
        self, raw: Tensor, things: Tensor, spots: Tensor, heard: Listened, turn: Tensor | None = None
    ) -> _Go:
        """Where the thing goes, where the finger has to be for that, and how it gets there; in metres."""
        layout, finger, count = self.layout, self._finger(raw)[:, -1], len(self.solids)
        rows = raw[:, -1, layout.arm : layout.size].unflatten(-1, (layout.things, layout.thing))
        thing = torch.einsum("bt,btx->bx", things, rows[..., :2])
        radius = (things * rows[..., 2]).sum(dim=1, keepdim=True)
        solid = raw[:, -1, layout.size : layout.size + 2 * count].unflatten(-1, (count, 2))
        centres = torch.cat([rows[..., :2], solid], dim=1)
        radii = torch.cat([rows[..., 2], self.solids.expand(raw.shape[0], -1)], dim=1) + _AWAY
        own = torch.cat([things, things.new_zeros(raw.shape[0], count)], dim=1)
        reaches = spots[:, :1]

        goal = reaches * thing + torch.einsum("bs,bsx->bx", spots[:, 1:], self._spots(raw))
        found = ways_round(thing, goal, centres, radii + radius, own, count)
        pushed = Choice(self.turning(found, own, heard, finger=False), found.directions)
        along = self._taken(pushed) if turn is None else _one_of(pushed.directions, turn)
        along = _unit(reaches * _unit(thing - finger) + (1 - reaches) * along)
        behind = (1 - reaches) * _BEHIND * along
        begin = thing - behind
        found = ways_round(finger, begin, centres, radii + _FINGER, reaches * own, count)
        straight = _unit(thing - behind / 2 - finger)
        directions = torch.cat([straight[:, None], found.directions[:, 1:]], dim=1)
        moved = Choice(self.turning(found, reaches * own, heard, finger=True), directions)
        return _Go(pushed, moved, along, begin, self._taken(moved))

    def _taken(self, choice: Choice) -> Float[Tensor, "batch 2"]:
        """The way that is taken: the best; their mean while the choice is learned."""
        if self.held or not self.training:
            return _one_of(choice.directions, choice.logits.argmax(dim=1))
        return _unit((choice.logits.softmax(dim=1).unsqueeze(-1) * choice.directions).sum(dim=1))

    def look(self, rows: Tensor, heard: Listened) -> Float[Tensor, "batch things width"]:
        """Return what is made of each thing's row."""
        h = self.activation(heard(self.thing_0(rows), "thing_0"))
        h = self.thing_1(h) + self.around(h.mean(dim=1, keepdim=True))
        return self.activation(heard(h, "thing_1"))

    def where(self, batch: int, heard: Listened) -> Float[Tensor, "batch spots"]:
        """Return the logits of where the thing has to go: nowhere, further positions, landmarks."""
        spots = self.spot(torch.arange(self.spot.num_embeddings, device=self.spot.weight.device))
        spots = spots.expand(batch, -1, -1)
        return self.spot_score(self.activation(heard(spots, "spot"))).squeeze(-1)

    def rows(self, raw: Float[Tensor, "batch steps size"]) -> Float[Tensor, "batch things row"]:
        """Return each thing's numbers: from the finger (now and before), on the table, among the others."""
        layout = self.layout
        finger = self._finger(raw)[:, -1:, None]
        things = raw[..., layout.arm : layout.size].unflatten(-1, (layout.things, layout.thing))
        spots = things[..., :2]
        away = ((spots - finger) / _REACH).transpose(1, 2).flatten(2)
        now = spots[:, -1] / _REACH
        among = [now - now.amin(dim=1, keepdim=True), now - now.amax(dim=1, keepdim=True)]
        radius = things[:, -1, :, 2:3] / _SIZE - 1
        return torch.cat([away, now, *among, radius, things[:, -1, :, 3:]], dim=-1)

    def spots(self, raw: Float[Tensor, "batch steps size"]) -> Float[Tensor, "batch spots 2"]:
        """Return the further positions and the landmarks, from the finger, in units of `_REACH`."""
        return (self._spots(raw) - self._finger(raw)[:, -1:]) / _REACH

    def _spots(self, raw: Tensor) -> Float[Tensor, "batch spots 2"]:
        further = raw[:, -1, self.layout.size :].unflatten(-1, (-1, 2))
        return torch.cat([further, self.landmarks.to(raw).expand(raw.shape[0], -1, -1)], dim=1)

    def _finger(self, raw: Tensor) -> Float[Tensor, "batch steps 2"]:
        return raw[..., self.layout.arm - 2 : self.layout.arm]


def _one_of(
    directions: Float[Tensor, "batch ways 2"], index: Int[Tensor, " batch"]
) -> Float[Tensor, "batch 2"]:
    return directions.gather(1, index[:, None, None].expand(-1, 1, 2)).squeeze(1)


def _unit(vectors: Float[Tensor, "batch 2"]) -> Float[Tensor, "batch 2"]:
    """Directions; of nothing, along the first axis."""
    length = vectors.norm(dim=-1, keepdim=True)
    first = torch.zeros_like(vectors)
    first[:, 0] = 1
    return torch.where(length > _NEAR, vectors / length.clamp(min=_NEAR), first)


def sides(
    ways: Float[Tensor, "batch ways 2"],
    positions: Float[Tensor, "batch n 2"],
    thing: Float[Tensor, "batch 2"],
) -> Float[Tensor, "batch n seen"]:
    """Return positions along and across all ways as they are, and again near zero alone.

    Beside a way of a quarter of a metre, which side a thing stands on is a matter of centimetres: tanh blows
    those up, and passes over what is far. The second way, the goal way, is seen from the thing as well: what
    stands beside that one is in the way of what is pushed.
    """
    seen = _seen_along(ways, positions)
    beside_thing = _seen_along(ways[:, 1:2], positions - thing[:, None])
    return torch.cat([seen, torch.tanh(torch.cat([seen, beside_thing], dim=-1) / _FINE)], dim=-1)


def _seen_along(
    ways: Float[Tensor, "batch ways 2"], positions: Float[Tensor, "batch n 2"]
) -> Float[Tensor, "batch n ways_times_2"]:
    """Return the products of positions with each way, and with the axis across it.

    For a unit vector these are coordinates; a longer way counts in its length, and none is a smooth zero.
    """
    along = torch.einsum("bwx,bnx->bnw", ways, positions)
    across = torch.einsum("bwx,bnx->bnw", torch.stack([-ways[..., 1], ways[..., 0]], -1), positions)
    return torch.cat([along, across], dim=-1)
