"""What a policy makes of its observations: the instruction says what to look at."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from torchfilm.functional import film
from torchfilm.fusion import Fusion
from torchfilm.modulation import Modulation

_REACH = 0.25  # metres: the unit of distances from the finger
_SIZE = 0.03  # metres: the unit of radii


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

    def forward(
        self, raw: Float[Tensor, "batch steps size"], scaled: Tensor, heard: Listened
    ) -> Float[Tensor, "batch dim"]:
        """Return the features of scaled observations; `raw` ones, in their units, are not used here."""
        flat = scaled.flatten(1)
        h = self.activation(heard(self.first(flat), "encoder_0"))
        return torch.cat([self.activation(heard(self.second(h), "encoder_1")), flat], dim=-1)


class ThingsEncoder(nn.Module):
    """Look at each thing through the instruction, choose one, and at the table as seen from there.

    Every thing t is a row of numbers: where it is, from the finger and among the things, and what it is like;
    one network reads all of them, so what is learned about one holds for all:

        h_t = mish(FiLM(W_2 mish(FiLM(W_1 t)) + mean_s h_s)),  a = softmax_t(w . h_t),  chosen = sum_t a_t t

    then two layers, which listen too, over the chosen thing, the mean of the things and the rest.

    Args:
        layout: of the observation's numbers.
        steps, size: of the observations [batch, steps, size].
        width: of the layers.
    """

    def __init__(self, layout: Layout, steps: int, size: int, width: int) -> None:
        super().__init__()
        if size < layout.size or layout.arm < 2 or layout.thing < 3:
            raise ValueError(
                f"ThingsEncoder: expected observations of at least {layout.size} numbers for {layout}, "
                f"got {size}. Give the layout of these observations, or use the flat encoder."
            )
        self.layout, self.steps = layout, steps
        self.rest = size - layout.size
        row = 2 * steps + 2 + 4 + (layout.thing - 2)
        look = row + width + steps * layout.arm + self.rest
        self.sites = {"thing_0": width, "thing_1": width, "encoder_0": 2 * width, "encoder_1": 2 * width}
        self.dim = 2 * width + row + steps * layout.arm + self.rest
        self.thing_0 = nn.Linear(row, width)
        self.thing_1 = nn.Linear(width, width)
        self.around = nn.Linear(width, width, bias=False)
        self.score = nn.Linear(width, 1)
        self.first = nn.Linear(look, 2 * width)
        self.second = nn.Linear(2 * width, 2 * width)
        self.activation = nn.Mish()

    def forward(
        self, raw: Float[Tensor, "batch steps size"], scaled: Tensor, heard: Listened
    ) -> Float[Tensor, "batch dim"]:
        """Return the features of observations, in metres and scaled."""
        rows = self.rows(raw)
        h = self.look(rows, heard)
        attention = self.score(h).softmax(dim=1)
        chosen = (attention * rows).sum(dim=1)
        rest = self._rest(raw)
        arm = scaled[..., : self.layout.arm].flatten(1)
        x = torch.cat([chosen, h.mean(dim=1), arm, rest], dim=-1)
        x = self.activation(heard(self.first(x), "encoder_0"))
        x = self.activation(heard(self.second(x), "encoder_1"))
        return torch.cat([x, chosen, arm, rest], dim=-1)

    def attention(
        self, raw: Float[Tensor, "batch steps size"], heard: Listened
    ) -> Float[Tensor, "batch things"]:
        """Return the logits of which thing is looked at."""
        return self.score(self.look(self.rows(raw), heard)).squeeze(-1)

    def look(self, rows: Tensor, heard: Listened) -> Float[Tensor, "batch things width"]:
        """Return what is made of each thing's row."""
        h = self.activation(heard(self.thing_0(rows), "thing_0"))
        h = self.thing_1(h) + self.around(h.mean(dim=1, keepdim=True))
        return self.activation(heard(h, "thing_1"))

    def rows(self, raw: Float[Tensor, "batch steps size"]) -> Float[Tensor, "batch things row"]:
        """Return each thing's numbers: from the finger (now and before), on the table, among the others."""
        layout = self.layout
        finger = raw[:, -1:, None, layout.arm - 2 : layout.arm]
        things = raw[..., layout.arm : layout.size].unflatten(-1, (layout.things, layout.thing))
        spots = things[..., :2]
        away = ((spots - finger) / _REACH).transpose(1, 2).flatten(2)
        now = spots[:, -1] / _REACH
        among = [now - now.amin(dim=1, keepdim=True), now - now.amax(dim=1, keepdim=True)]
        radius = things[:, -1, :, 2:3] / _SIZE - 1
        return torch.cat([away, now, *among, radius, things[:, -1, :, 3:]], dim=-1)

    def _rest(self, raw: Tensor) -> Tensor:
        """The further positions as seen from the finger."""
        finger = raw[:, -1, self.layout.arm - 2 : self.layout.arm]
        spots = raw[:, -1, self.layout.size :].unflatten(-1, (-1, 2))
        return ((spots - finger[:, None]) / _REACH).flatten(1)
