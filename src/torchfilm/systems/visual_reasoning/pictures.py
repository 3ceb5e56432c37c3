"""Pictures from outside, as the network sees them: upright, cropped, at its size; or refused in one line.

A picture of any shape is cropped at its centre and not letterboxed, because the network has never seen bars.
Show `frame(image, ...)` to the user, and they see what the network sees.
"""

from __future__ import annotations

import io
import struct
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from torchfilm.data.clevr.files import eight_bits
from torchfilm.extras import needed
from torchfilm.reading import DAMAGED

with needed("pictures need Pillow", "systems"):
    from PIL import ExifTags, Image, UnidentifiedImageError

MAX_IMAGE_BYTES = 10 * 2**20
MAX_IMAGE_PIXELS = 24_000_000
MIN_IMAGE_SIDE = 16
ASPECT = 3 / 2
FORMATS = ("PNG", "JPEG")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What undoes each orientation of a camera's note (EXIF)."""

Pixels = UInt8[np.ndarray, "height width 3"]
Picture = str | Path | bytes | Image.Image | np.ndarray


def frame(image: Picture, width: int, height: int) -> Pixels:
    """The picture as the network sees it: upright, cropped at its centre to 3:2, resampled by area.

    image: a path, the bytes of a PNG or JPEG file, a PIL image, or uint8 [H, W, 3]. width, height: in pixels;
    another ratio than 3:2 squeezes, as the original does to 224x224. Raises ValueError if it is empty, of
    another kind, too large (bytes or pixels) or too small to show anything.
    """
    picture = open_picture(image)
    if min(picture.size) < MIN_IMAGE_SIDE:
        raise ValueError(
            f"image of {picture.size[0]}x{picture.size[1]} pixels: "
            f"expected at least {MIN_IMAGE_SIDE} on each side"
        )
    crop_width = min(picture.width, picture.height * ASPECT)
    crop_height = crop_width / ASPECT
    left, top = (picture.width - crop_width) / 2, (picture.height - crop_height) / 2
    box = (left, top, left + crop_width, top + crop_height)
    how = Image.Resampling.BOX if crop_width >= width else Image.Resampling.BICUBIC
    return np.array(picture.resize((width, height), how, box=box))


def open_picture(image: Picture) -> Image.Image:
    """The picture whole, upright and as RGB; what is no picture ends in a ValueError of one line."""
    if isinstance(image, np.ndarray):
        image = _from_array(image)
    if isinstance(image, Image.Image):
        return _upright(image, "image")
    name = "image" if isinstance(image, bytes) else str(image)
    content = image if isinstance(image, bytes) else _read(Path(image))
    if not content:
        raise ValueError(f"{name} is empty (0 bytes): expected a PNG or JPEG image")
    if len(content) > MAX_IMAGE_BYTES:
        raise _too_large(name, f"{len(content):,} bytes", f"{MAX_IMAGE_BYTES:,}")
    with _decode(content, name) as picture:
        return _upright(picture, name)


def _decode(content: bytes, name: str) -> Image.Image:
    """The pixels of a PNG or JPEG file; its size is looked at before anything is unpacked."""
    try:
        picture = Image.open(io.BytesIO(content), formats=FORMATS)
        if picture.width * picture.height <= MAX_IMAGE_PIXELS:
            picture.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise _too_large(name, "pixels without end", f"{MAX_IMAGE_PIXELS:,} pixels") from None
    except UnidentifiedImageError:
        raise ValueError(f"{name} is no image: expected a PNG or JPEG file, got {_kind(content)}") from None
    except (OSError, SyntaxError, ValueError, EOFError, struct.error) as error:
        raise ValueError(f"{name} is a damaged image and cannot be read: {error}") from None
    return picture


def _read(path: Path) -> bytes:
    if not path.exists():
        raise ValueError(f"no such image: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is no file: expected a PNG or JPEG image")
    if (size := path.stat().st_size) > MAX_IMAGE_BYTES:
        raise _too_large(str(path), f"{size:,} bytes", f"{MAX_IMAGE_BYTES:,}")
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(
            f"image array: expected uint8 [height, width, 3], got {array.dtype} {list(array.shape)}; "
            "convert with (255 * image).round().astype('uint8') if it holds 0..1"
        )
    if array.size == 0:
        raise ValueError(f"image array is empty: shape {list(array.shape)}")
    return Image.fromarray(array)


def _upright(picture: Image.Image, name: str) -> Image.Image:
    """Rotate as the camera's note says, put transparency on grey, and convert to RGB."""
    if picture.width * picture.height > MAX_IMAGE_PIXELS:
        raise _too_large(name, f"{picture.width}x{picture.height} pixels", f"{MAX_IMAGE_PIXELS:,} pixels")
    turn = _turn(picture)
    picture = eight_bits(picture)
    if turn is not None:
        picture = picture.transpose(turn)
    if picture.has_transparency_data:
        ground = Image.new("RGBA", picture.size, (128, 128, 128, 255))
        picture = Image.alpha_composite(ground, picture.convert("RGBA"))
    return picture.convert("RGB")


def _turn(picture: Image.Image) -> Image.Transpose | None:
    """What the camera's note asks for; one that cannot be read asks for nothing."""
    try:
        return _TURNS.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except (*DAMAGED, OSError, SyntaxError, ValueError, struct.error):
        return None


def _too_large(name: str, got: str, most: str) -> ValueError:
    return ValueError(f"{name} is too large: {got}, expected at most {most}; scale it down")


def _kind(content: bytes) -> str:
    head = content[:512]
    what = "bytes of text" if head.isascii() and b"\0" not in head else "other bytes"
    return f"{len(content):,} {what}"
