"""The residual block that listens: one FiLM at one of five places."""

from typing import Literal, get_args

from jaxtyping import Float, Int
from torch import Tensor, nn

import torchfilm.functional as film_functional
from torchfilm import Modulation
from torchfilm.blocks.vision import GridConv

Placement = Literal["before_conv1", "after_conv2", "after_batchnorm", "after_relu2", "after_residual"]
INSIDE = ("after_conv2", "after_batchnorm", "after_relu2")
PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


class ListeningBlock(nn.Module):
    """A residual block whose channels a Modulation scales and shifts.

        x = ReLU(conv1x1(concat(input, coordinates)))
        h = ReLU(FiLM(BN(conv(x))))
        output = x + h

    The skip starts after the first ReLU and nothing follows the addition. With `context`, which is not the
    paper's, every cell also sees the maximum of each input channel over the whole grid:

        x = ReLU(conv1x1(concat(input, coordinates)) + W max(input))

    so that a relation may reach across the picture in one block. `placement` moves FiLM:
    before_conv1 (on the block's input), after_conv2 (before BN), after_batchnorm (the paper's choice),
    after_relu2, after_residual (Perez et al. 2018, figure 3 and table 2). None makes a block that does not
    listen, whose BN has an affine of its own.

    Raises:
        ValueError: for another placement.
    """

    def __init__(
        self,
        channels: int,
        *,
        kernel_size: int = 3,
        dilation: int = 1,
        placement: Placement | None = "after_batchnorm",
        residual: bool = True,
        batch_norm: bool = True,
        context: bool = False,
        grid: tuple[int, int] | None = None,
    ) -> None:
        """grid: (height, width) of the coordinate maps that the 1x1 convolution sees, or None for none."""
        super().__init__()
        if placement is not None and placement not in PLACEMENTS:
            raise ValueError(
                f"Residual block: expected a placement of {PLACEMENTS} or None, got {placement!r}."
            )
        self.placement = placement
        self.residual = residual
        self.project = GridConv(channels, channels, kernel_size=1, grid=grid)
        self.context = nn.Linear(channels, channels, bias=False) if context else None
        self.conv = GridConv(channels, channels, kernel_size, grid=None, dilation=dilation)
        self.norm = nn.BatchNorm2d(channels, affine=placement is None) if batch_norm else nn.Identity()

    def forward(
        self,
        x: Float[Tensor, "rows channels height width"],
        modulation: Modulation | None = None,
        rows: Int[Tensor, " batch"] | None = None,
    ) -> Float[Tensor, "batch channels height width"]:
        """Return the block's output, one row per row of the modulation.

        rows: for each row of the modulation, the row of x that it speaks to; None: the same row. What comes
        before FiLM is computed once per row of x, however many conditions speak to it.

        Raises:
            ValueError: for no modulation, of a block that listens.
        """
        place = self.placement
        if place == "before_conv1":
            x = _hear(x, modulation, rows)
        x = (self.project(x) if self.context is None else self.project(x) + self._overview(x)).relu()
        h = self.conv(x)
        if place == "after_conv2":
            h = _hear(h, modulation, rows)
        h = self.norm(h)
        if place == "after_batchnorm":
            h = _hear(h, modulation, rows)
        h = h.relu()
        if place == "after_relu2":
            h = _hear(h, modulation, rows)
        if self.residual:
            h = h + (_spread(x, rows) if place in INSIDE else x)
        return _hear(h, modulation, rows) if place == "after_residual" else h

    def _overview(self, x: Tensor) -> Tensor:
        """What each channel of x has at its strongest, mixed: [rows, channels, 1, 1]."""
        assert self.context is not None
        return self.context(x.amax(dim=(2, 3)))[:, :, None, None]


def _spread(x: Tensor, rows: Tensor | None) -> Tensor:
    """One row of x for each row of the modulation."""
    return x if rows is None else x.index_select(0, rows)


def _hear(x: Tensor, modulation: Modulation | None, rows: Tensor | None) -> Tensor:
    """FiLM on x, with one row of x for each row of the modulation; a missing modulation is an error."""
    if modulation is None:
        raise ValueError(
            "Residual block: expected a Modulation, got None, and silence is not the identity. "
            "Pass Modulation.identity(channels), or build the block with placement=None."
        )
    m = modulation
    return film_functional.film(_spread(x, rows), m.gamma, m.beta, gate=m.gate)
