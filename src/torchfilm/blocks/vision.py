"""What turns a picture into a grid of features: coordinate maps, convolutions that see them, two stems."""

import itertools

import torch
import torch.nn.functional as torch_functional
from jaxtyping import Float
from torch import Tensor, nn

PIXEL_STEM_LAYERS = 4
PIXEL_STEM_STRIDE = 2**PIXEL_STEM_LAYERS


def coordinate_maps(height: int, width: int) -> Float[Tensor, "2 height width"]:
    """Two maps that tell each cell where it is: x, -1 (left) to 1 (right); y, -1 (top) to 1 (bottom)."""
    x = torch.linspace(-1, 1, width).expand(height, width)
    y = torch.linspace(-1, 1, height)[:, None].expand(height, width)
    return torch.stack([x, y])


class GridConv(nn.Module):
    """A stride-1 convolution that keeps the grid's size and may see where each cell is.

        y = conv(concat(x, coordinates))

    The coordinates are the same for the whole batch, so their part of the sum is computed once and added
    like a bias that varies over the grid; nothing is concatenated. The parameters are those of one plain
    `nn.Conv2d(channels + 2, out_channels)`, coordinates last, x before y (`conv.weight`, `conv.bias`).
    """

    coordinates: Tensor

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        grid: tuple[int, int] | None,
        dilation: int = 1,
    ) -> None:
        """grid: (height, width) of the coordinate maps to see, or None for a plain convolution."""
        super().__init__()
        self.channels = channels
        extra = 0 if grid is None else 2
        padding = dilation * (kernel_size // 2)
        self.conv = nn.Conv2d(channels + extra, out_channels, kernel_size, padding=padding, dilation=dilation)
        self.sees_coordinates = grid is not None
        self.register_buffer("coordinates", coordinate_maps(*(grid or (1, 1)))[None], persistent=False)

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out height width"]:
        """Convolve x with the coordinate maps beside it; ValueError where x has another grid."""
        if not self.sees_coordinates:
            return self.conv(x)
        if x.shape[2:] != self.coordinates.shape[2:]:
            raise ValueError(
                f"GridConv: expected features [batch, {self.channels}, height, width] of the grid "
                f"{tuple(self.coordinates.shape[2:])}, got {tuple(x.shape)}.\n"
                f"Build it with the grid of the features, or resize the picture."
            )
        weight, bias, padding, dilation = (
            self.conv.weight,
            self.conv.bias,
            self.conv.padding,
            self.conv.dilation,
        )
        of_x, of_place = weight[:, : self.channels], weight[:, self.channels :]
        place = torch_functional.conv2d(self.coordinates, of_place, bias, 1, padding, dilation)  # type: ignore[arg-type]
        # A copy for each picture by a product with ones, so that its gradient is a matrix product too: the
        # gradient of a broadcast took more time than all convolutions together (torch 2.13, compiled, CPU).
        ones = place.new_ones(len(x), 1)
        flat = place.permute(0, 2, 3, 1).reshape(1, -1)
        places = (ones @ flat).view(len(x), *place.shape[2:], place.shape[1]).permute(0, 3, 1, 2)
        return torch_functional.conv2d(x, of_x, None, 1, padding, dilation) + places  # type: ignore[arg-type]


class FeatureStem(nn.Module):
    """Bring given features to the width of the blocks: ReLU(BN(conv(concat(x, coordinates)))).

    Perez et al. 2018, section 2.2 (the visual pipeline), where x are ResNet-101 features 1024 x 14 x 14.
    """

    def __init__(
        self,
        channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        grid: tuple[int, int] | None,
        batch_norm: bool,
    ) -> None:
        super().__init__()
        self.conv = GridConv(channels, out_channels, kernel_size, grid=grid)
        self.norm = nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity()

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out height width"]:
        """Return the stem's maps on the same grid."""
        return self.norm(self.conv(x)).relu()


class PixelStem(nn.Module):
    """Learn features from raw pixels: four times [conv 4x4, stride 2 - BN - ReLU], so 1/16 of the size.

    Perez et al. 2018, section 2.2 (the visual pipeline, raw pixels): pixels in 0..1, no coordinates here.
    """

    def __init__(self, channels: int, out_channels: int, *, batch_norm: bool) -> None:
        super().__init__()
        widths = [channels] + [out_channels] * PIXEL_STEM_LAYERS
        self.convs = nn.ModuleList(
            nn.Conv2d(below, above, kernel_size=4, stride=2, padding=1)
            for below, above in itertools.pairwise(widths)
        )
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(width) if batch_norm else nn.Identity() for width in widths[1:]
        )

    def forward(
        self, x: Float[Tensor, "batch channels height width"]
    ) -> Float[Tensor, "batch out rows columns"]:
        """Return maps of 1/16 of the picture's height and width. x: pixels in 0..1 (or uint8 in 0..255)."""
        if x.dtype == torch.uint8:
            x = x.float() / 255
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu()
        return x
