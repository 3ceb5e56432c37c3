"""Pictures from outside: cropped and resampled as stated, and refused in one line where they are none."""

import io
import zlib

import numpy as np
import pytest
from PIL import Image

from torchfilm.systems.visual_reasoning.pictures import MAX_IMAGE_BYTES, frame

WIDTH, HEIGHT = 48, 32


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    return np.random.default_rng(3).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def test_a_picture_is_cropped_at_its_centre_and_resampled_by_area():
    wide = np.zeros((8 * 20, 12 * 20 + 100, 3), np.uint8)
    wide[:, :50] = wide[:, -50:] = 255  # left and right of the frame
    inside = np.random.default_rng(0).integers(0, 256, (160, 240, 3), dtype=np.uint8)
    wide[:, 50:-50] = inside
    expected = inside.reshape(8, 20, 12, 20, 3).mean((1, 3))
    assert np.abs(frame(wide, 12, 8) - expected).max() <= 1


def test_another_ratio_squeezes_the_same_crop(picture):
    expected = picture.reshape(16, 2, 16, 3, 3).mean((1, 3))
    assert np.abs(frame(picture, 16, 16) - expected).max() <= 1


def test_every_form_of_a_picture_is_the_same_picture(picture, tmp_path):
    image = Image.fromarray(picture)
    path = tmp_path / "picture.png"
    image.save(path)
    for form in (picture, image, path, str(path), path.read_bytes()):
        np.testing.assert_array_equal(frame(form, 24, 16), frame(picture, 24, 16))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_photograph_is_turned_upright(picture, orientation):
    as_seen = {  # from the picture to what a camera that is held so writes
        1: picture,
        2: picture[:, ::-1],
        3: np.rot90(picture, 2),
        4: picture[::-1],
        5: picture.transpose(1, 0, 2),
        6: np.rot90(picture),
        7: np.rot90(picture, 2).transpose(1, 0, 2),
        8: np.rot90(picture, -1),
    }
    exif = Image.Exif()
    exif[0x0112] = orientation
    written = Image.fromarray(np.ascontiguousarray(as_seen[orientation]))
    np.testing.assert_array_equal(frame(encoded(written, "PNG", exif=exif), WIDTH, HEIGHT), picture)


def test_a_note_of_the_camera_that_cannot_be_read_is_no_reason_to_refuse(picture):
    turned, rest = Image.fromarray(np.rot90(picture)), (1).to_bytes(4, "little") + (38).to_bytes(4, "little")
    odd = b"II*\0\x08\0\0\0\x02\0" + b"\x0f\x01\x05\0" + rest + b"\x12\x01\x03\0\x01\0\0\0\x06\0\0\0"
    odd += b"\0" * 4 + (3).to_bytes(4, "little") * 2  # a maker that is a fraction
    np.testing.assert_array_equal(frame(encoded(turned, exif=b"Exif\0\0" + odd), WIDTH, HEIGHT), picture)
    no_note = frame(encoded(Image.fromarray(picture), exif=b"Exif\0\0XX*\0what"), WIDTH, HEIGHT)
    np.testing.assert_array_equal(no_note, picture)


def test_a_grey_picture_of_16_bits_is_that_of_8():
    ramp = np.linspace(0, 65535, 48)[None].repeat(32, 0).astype(np.uint16)
    exact, coarse = (encoded(Image.fromarray(a)) for a in (ramp, (ramp >> 8).astype(np.uint8)))
    np.testing.assert_array_equal(frame(exact, WIDTH, HEIGHT), frame(coarse, WIDTH, HEIGHT))


def test_transparent_and_grey_and_palette_pictures_are_read(picture):
    image = Image.fromarray(picture)
    clear = image.copy()
    clear.putalpha(0)
    assert (frame(encoded(clear), 24, 16) == 128).all()
    for mode in ("L", "P", "1", "CMYK"):
        assert frame(encoded(image.convert(mode), "JPEG" if mode == "CMYK" else "PNG"), 24, 16).shape == (
            16,
            24,
            3,
        )


def bomb() -> bytes:
    """A small PNG file whose header promises 60,000 x 60,000 pixels."""
    content = bytearray(encoded(Image.new("L", (20, 20))))
    content[16:24] = (60_000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "image is empty"),
        (b"hello, world", "image is no image: expected a PNG or JPEG file, got 12 bytes of text"),
        (b"\x00\x01\x02", "image is no image: .* got 3 other bytes"),
        (
            b"\x00" * (MAX_IMAGE_BYTES + 1),
            "image is too large: 10,485,761 bytes, expected at most 10,485,760",
        ),
        (encoded(Image.effect_noise((90, 60), 90))[:200], "image is a damaged image and cannot be read"),
        (
            encoded(Image.effect_noise((300, 200), 90), "JPEG")[:3000],
            "image is a damaged image and cannot be read",
        ),
        (encoded(Image.new("RGB", (90, 60)), "GIF"), "image is no image: expected a PNG or JPEG"),
        (
            encoded(Image.new("L", (6000, 5000))),
            "image is too large: 6000x5000 pixels, expected at most 24,000,000",
        ),
        (bomb(), "image is too large: pixels without end, expected at most 24,000,000 pixels"),
        (encoded(Image.new("L", (3000, 3))), "image of 3000x3 pixels: expected at least 16 on each side"),
    ],
)
def test_what_is_no_usable_picture_gets_one_clear_line(content, reason):
    with pytest.raises(ValueError, match=reason) as raised:
        frame(content, 96, 64)
    assert "\n" not in str(raised.value)


def test_a_missing_file_a_folder_and_a_wrong_array_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"no such image: .*nowhere\.png"):
        frame(tmp_path / "nowhere.png", 96, 64)
    with pytest.raises(ValueError, match="is no file: expected a PNG or JPEG"):
        frame(tmp_path, 96, 64)
    with pytest.raises(ValueError, match=r"expected uint8 \[height, width, 3\], got float64 \[4, 6, 3\]"):
        frame(np.zeros((4, 6, 3)), 96, 64)
    with pytest.raises(ValueError, match="image array is empty"):
        frame(np.zeros((0, 6, 3), np.uint8), 96, 64)
