"""Pictures in ROS messages: sensor_msgs/Image and CompressedImage."""

from __future__ import annotations

from typing import Any

import numpy as np

from stamo_dist.errors import DataError

RAW = "sensor_msgs/msg/Image"
COMPRESSED = "sensor_msgs/msg/CompressedImage"
TYPES = (RAW, COMPRESSED)
#: Encoding → bytes per pixel, and the indices of red, green and blue.
ENCODINGS = {
    "rgb8": (3, (0, 1, 2)),
    "8UC3": (3, (2, 1, 0)),
    "bgr8": (3, (2, 1, 0)),
    "rgba8": (4, (0, 1, 2)),
    "bgra8": (4, (2, 1, 0)),
    "8UC4": (4, (2, 1, 0)),
    "mono8": (1, (0, 0, 0)),
    "8UC1": (1, (0, 0, 0)),
}
DEPTH = ("16UC1", "mono16", "32FC1", "64FC1")
#: First bytes of the supported encoded images: JPEG, PNG.
_BEGIN = (b"\xff\xd8", b"\x89PNG")


def image_fault(message: Any) -> str | None:
    """Why a topic cannot be used as a camera, judged by its first message; None if it can."""
    if message.__msgtype__ == RAW:
        if message.encoding in ENCODINGS:
            return None
        return f"depth, {message.encoding}" if message.encoding in DEPTH else f"encoding {message.encoding!r}"
    kind = message.format
    if "compressedDepth" in kind or any(kind.startswith(depth) for depth in DEPTH):
        return f"depth, {kind!r}"
    return None if bytes(message.data[:4]).startswith(_BEGIN) else f"format {kind!r}, neither JPEG nor PNG"


def picture(message: Any) -> np.ndarray | bytes:
    """uint8 (H, W, 3), or the JPEG or PNG bytes unchanged.

    Raises:
        DataError: The encoding is not supported, or bytes are missing.
    """
    if message.__msgtype__ == COMPRESSED:
        content = bytes(message.data)
        if not content.startswith(_BEGIN):
            raise DataError(f"format {message.format!r}, neither JPEG nor PNG")
        return content
    if message.encoding not in ENCODINGS:
        raise DataError(f"encoding {message.encoding!r}; read are {', '.join(ENCODINGS)}")
    size, channels = ENCODINGS[message.encoding]
    height, width, step = message.height, message.width, message.step
    if step < width * size or len(message.data) < height * step or not height * width:
        raise DataError(f"{len(message.data)} bytes are no picture of {height} rows of {step} bytes, {width} pixels")
    rows = np.asarray(message.data)[: height * step].reshape(height, step)[:, : width * size]
    pixels = rows.reshape(height, width, size)
    return pixels if channels == (0, 1, 2) and size == 3 else pixels[..., list(channels)]
