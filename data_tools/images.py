"""Frames of any size and encoding → square JPEGs."""

from __future__ import annotations

import io
import struct
from collections.abc import Iterable, Sequence

import numpy as np
import simplejpeg
from PIL import Image

from stamo_dist.errors import DataError

FITS = ("crop", "letterbox", "stretch")
_JPEG = b"\xff\xd8"
_EXIF = b"Exif\0\0"
#: EXIF tag Orientation → Pillow operation that turns the stored image upright; 1 is upright (CIPA DC-008, 4.6.4).
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
#: Modes of Pillow that become RGB without losing anything but an alpha channel.
_MODES = ("RGB", "RGBA", "RGBX", "P", "L", "LA", "1")


def encode_frames(
    frames: Iterable[np.ndarray | bytes], numbers: Sequence[int], size: int, fit: str, quality: int
) -> list[bytes]:
    """JPEG-encode frames at (size, size).

    A JPEG that has this size and is upright is kept byte for byte.

    Args:
        frames: uint8 (H, W, 3) or encoded images, one for each of `numbers`.
        numbers: Frame numbers for messages.
        size: Side in pixels.
        fit: "crop" to the middle square, "letterbox" (black bars), or "stretch".
        quality: Of the JPEGs.

    Raises:
        DataError: A frame is corrupt, not RGB, or missing.
    """
    encoded: list[bytes] = []
    for frame in frames:
        if len(encoded) == len(numbers):
            raise DataError(f"more frames than the {len(numbers)} that were asked for")
        try:
            encoded.append(_encode(frame, size, fit, quality))
        except DataError as e:
            raise DataError(f"frame {numbers[len(encoded)]}: {e}") from e
    if len(encoded) < len(numbers):
        raise DataError(f"lengths differ: only {len(encoded)} of {len(numbers)} frames are there")
    return encoded


def decode(image: bytes) -> np.ndarray:
    """An encoded image as uint8 (H, W, 3), turned upright as its EXIF says.

    Raises:
        DataError: Corrupt, or not an 8-bit image.
    """
    if image[:2] == _JPEG:
        try:
            pixels = simplejpeg.decode_jpeg(image, "RGB")
        except ValueError as e:
            raise DataError(f"corrupt JPEG ({e})") from e
        turn = _jpeg_turn(image)
        return pixels if turn is None else np.asarray(Image.fromarray(pixels).transpose(turn))
    try:
        with Image.open(io.BytesIO(image)) as opened:
            if opened.mode not in _MODES:
                raise DataError(f"{opened.format} of mode {opened.mode}, expected 8-bit RGB")
            upright, turn = opened.convert("RGB"), _turn(opened)
            return np.asarray(upright if turn is None else upright.transpose(turn))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as e:
        raise DataError(f"corrupt or unknown image ({e})") from e


def _jpeg_turn(image: bytes) -> Image.Transpose | None:
    if _EXIF not in image:  # the usual case: nothing is parsed
        return None
    try:
        with Image.open(io.BytesIO(image)) as opened:
            return _turn(opened)
    except (OSError, SyntaxError):
        return None


def _turn(opened: Image.Image) -> Image.Transpose | None:
    """The operation that turns an image upright; None if it is upright or its EXIF is damaged."""
    try:
        return _TURNS.get(opened.getexif().get(_ORIENTATION, 1))
    except (OSError, SyntaxError, ValueError, KeyError, TypeError, struct.error):
        return None


def _encode(frame: np.ndarray | bytes, size: int, fit: str, quality: int) -> bytes:
    """JPEG-encode; chroma keeps full resolution below 128 px, where subsampling is visible, and is halved above."""
    pixels = frame if isinstance(frame, np.ndarray) else decode(frame)
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise DataError(f"{pixels.dtype} {pixels.shape}, expected uint8 RGB")
    if not isinstance(frame, np.ndarray) and pixels.shape[:2] == (size, size) and _can_be_kept(frame):
        return bytes(frame)
    subsampling = "444" if size < 128 else "420"
    return simplejpeg.encode_jpeg(
        np.ascontiguousarray(_fit(pixels, size, fit)), quality=quality, colorspace="RGB", colorsubsampling=subsampling
    )


def _can_be_kept(image: bytes) -> bool:
    """Whether it is an upright colour JPEG, which is stored unchanged."""
    return image[:2] == _JPEG and simplejpeg.decode_jpeg_header(image)[2] != "Gray" and _jpeg_turn(image) is None


def _fit(pixels: np.ndarray, size: int, fit: str) -> np.ndarray:
    height, width = pixels.shape[:2]
    if fit == "crop" and height != width:
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        pixels = pixels[top : top + side, left : left + side]
    elif fit == "letterbox" and height != width:
        longer = max(height, width)
        shape = max(1, round(size * height / longer)), max(1, round(size * width / longer))
        top, left = (size - shape[0]) // 2, (size - shape[1]) // 2
        canvas = np.zeros((size, size, 3), np.uint8)
        canvas[top : top + shape[0], left : left + shape[1]] = _resize(pixels, shape)
        return canvas
    return _resize(pixels, (size, size))


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """Resize a square frame (S, S, 3) to (size, size, 3) as conversion does."""
    return _resize(pixels, (size, size))


def _resize(pixels: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Lanczos to (H, W); much larger images are first box-averaged by an integer factor down to about twice that."""
    if pixels.shape[:2] == shape:
        return pixels
    image = Image.fromarray(np.ascontiguousarray(pixels))  # Pillow copies other layouts slowly
    return np.asarray(image.resize(shape[::-1], Image.Resampling.LANCZOS, reducing_gap=2.0))
