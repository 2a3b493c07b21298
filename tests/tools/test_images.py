"""Frames of any shape and encoding become square JPEGs."""

from __future__ import annotations

import io
from collections.abc import Callable

import numpy as np
import pytest
import simplejpeg
from PIL import Image

from data_tools.images import encode_frames
from stamo_dist.errors import DataError


def picture(height: int, width: int) -> np.ndarray:
    """Smooth, red to the right and green to the bottom."""
    y, x = np.mgrid[:height, :width]
    return np.stack([255 * x / width, 255 * y / height, np.full(x.shape, 90)], axis=2).astype(np.uint8)


def encode(frame: np.ndarray | bytes, size: int = 64, fit: str = "crop") -> np.ndarray:
    return simplejpeg.decode_jpeg(encode_frames([frame], [0], size, fit, 95)[0]).astype(int)


def png(pixels: np.ndarray, mode: str | None = None) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(pixels)
    (image.convert(mode) if mode else image).save(file, "PNG")
    return file.getvalue()


def test_crop_keeps_the_middle_square() -> None:
    assert np.abs(encode(picture(64, 128)) - picture(64, 128)[:, 32:96]).max() < 6
    assert np.abs(encode(picture(200, 64)) - picture(200, 64)[68:132]).max() < 6


def test_letterbox_keeps_everything_between_black_bars() -> None:
    out = encode(picture(64, 128), fit="letterbox")
    assert out[:14].max() < 12
    assert out[50:].max() < 12
    assert np.abs(out[18:46] - picture(64, 128).reshape(32, 2, 64, 2, 3).mean((1, 3))[2:30]).max() < 12


def test_stretch_reaches_all_corners() -> None:
    out = encode(picture(64, 128), fit="stretch")
    assert np.abs(out - picture(64, 64)).max() < 12


def test_a_jpeg_of_the_right_size_is_kept_byte_for_byte() -> None:
    jpeg = simplejpeg.encode_jpeg(picture(64, 64), 60)
    assert encode_frames([jpeg], [0], 64, "crop", 95) == [jpeg]
    assert encode_frames([jpeg], [0], 32, "crop", 95) != [jpeg]
    grey = simplejpeg.encode_jpeg(picture(64, 64)[..., :1].copy(), 60, colorspace="GRAY")
    assert simplejpeg.decode_jpeg_header(encode_frames([grey], [0], 64, "crop", 95)[0])[2] == "YCbCr"


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize(("orientation", "stored"), [
    (1, lambda p: p), (2, lambda p: p[:, ::-1]), (3, lambda p: p[::-1, ::-1]), (4, lambda p: p[::-1]),
    (5, lambda p: p.swapaxes(0, 1)), (6, lambda p: np.rot90(p, 1)), (7, lambda p: np.rot90(p, 2).swapaxes(0, 1)),
    (8, lambda p: np.rot90(p, -1)),
])  # fmt: skip
def test_exif_turns_images_upright_and_turned_ones_are_not_kept(
    form: str, orientation: int, stored: Callable[[np.ndarray], np.ndarray]
) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    for height in (64, 96):
        file = io.BytesIO()
        image = Image.fromarray(np.ascontiguousarray(stored(picture(height, 64))))
        image.save(file, form, exif=exif, **({"quality": 95} if form != "PNG" else {}))
        (made,) = encode_frames([file.getvalue()], [0], 64, "crop", 95)
        expected = picture(height, 64)[(height - 64) // 2 :][:64]
        assert np.abs(simplejpeg.decode_jpeg(made).astype(int) - expected).mean() < 4
        assert (made == file.getvalue()) == (form == "JPEG" and orientation == 1 and height == 64)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_broken_exif_turns_nothing() -> None:
    jpeg = simplejpeg.encode_jpeg(picture(64, 64), 90)
    segment = b"Exif\0\0MM\0*\0\0\0\x08\0\x02\x01\x12\0\x03"
    broken = jpeg[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + jpeg[2:]
    assert encode_frames([broken], [0], 64, "crop", 95) == [broken]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "L"])
def test_other_encodings_are_decoded(mode: str) -> None:
    expected = np.asarray(Image.fromarray(picture(64, 64)).convert(mode).convert("RGB")).astype(int)
    assert np.abs(encode(png(picture(64, 64), mode)) - expected).mean() < 4  # dithered colours do not compress well


@pytest.mark.parametrize(
    ("frame", "message"),
    [
        (simplejpeg.encode_jpeg(picture(64, 64))[:-300], "corrupt JPEG"),
        (png(picture(64, 64))[:-300], "corrupt or unknown image"),
        (b"no image", "corrupt or unknown image"),
        (png(np.zeros((8, 8), np.uint16)), "mode I;16"),
        (np.zeros((8, 8), np.uint8), r"uint8 \(8, 8\), expected uint8 RGB"),
        (np.zeros((8, 8, 3), np.float32), "float32"),
    ],
)
def test_bad_frames_are_named(frame: np.ndarray | bytes, message: str) -> None:
    with pytest.raises(DataError, match=rf"^frame 7: .*({message})"):
        encode_frames([picture(64, 64), frame], [3, 7], 64, "crop", 95)


def test_missing_frames_are_counted() -> None:
    with pytest.raises(DataError, match="only 1 of 2 frames"):
        encode_frames(iter([picture(8, 8)]), [0, 1], 8, "crop", 95)
