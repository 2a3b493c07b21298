"""Writes small real videos whose frames tell their number."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

SIDE = 64
FAST: dict[str, dict[str, str]] = {
    "libx264": {"preset": "ultrafast", "crf": "10", "x264-params": "scenecut=0"},
    "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8", "crf": "10"},
    "libsvtav1": {"preset": "12", "crf": "20", "svtav1-params": "lp=1"},
}


def picture(number: int) -> np.ndarray:
    """(64, 64, 3) uint8: the number's bits in the upper half; below, red on the left and blue on the right."""
    image = np.zeros((SIDE, SIDE, 3), np.uint8)
    for bit in range(8):
        image[: SIDE // 2, bit * 8 : bit * 8 + 8] = 255 * (number >> bit & 1)
    image[SIDE // 2 :, : SIDE // 2] = (255, 0, 0)
    image[SIDE // 2 :, SIDE // 2 :] = (0, 0, 255)
    return image


def number(image: np.ndarray) -> int:
    """What `picture` was given; fails when the image does not lie upright."""
    left, right = image[48, 16].astype(int), image[48, 48].astype(int)
    assert left[0] > left[2] + 80, "the left is not red"
    assert right[2] > right[0] + 80, "the right is not blue"
    return sum(int(image[12, bit * 8 + 4].mean() > 127) << bit for bit in range(8))


def film(
    path: Path,
    frames: int | Sequence[np.ndarray] = 40,
    *,
    codec: str = "libx264",
    rate: int = 30,
    times: Sequence[float] | None = None,
    gop: int = 10,
    b_frames: int = 0,
    rotation: tuple[float, bool, bool] | None = None,
    container_options: dict[str, str] | None = None,
    transfer: int | None = None,
) -> Path:
    """Encode `frames` pictures (or these images), at `rate` or at these `times` in seconds.

    `transfer`: of BT.2020; 16 is PQ, 18 HLG.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    images = [picture(n) for n in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=container_options or {}) as out:
        stream: Any = out.add_stream(codec, rate=rate, options=FAST.get(codec, {}))
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        context = stream.codec_context
        context.thread_count, context.gop_size, context.max_b_frames = 1, gop, b_frames
        if transfer is not None:
            context.color_trc, context.color_primaries, context.colorspace = transfer, 9, 9
        if codec == "mpeg4":
            context.bit_rate = 4_000_000
        if rotation is not None:
            stream.set_display_rotation(rotation[0], hflip=rotation[1], vflip=rotation[2])
        base = Fraction(1, rate) if times is None else Fraction(1, 1000)
        context.time_base = base
        for n, image in enumerate(images):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image))
            frame.pts, frame.time_base = n if times is None else round(times[n] * 1000), base
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def cut(path: Path, share: float, to: Path | None = None) -> Path:
    """Keep the first part of a file's bytes, as a broken download does."""
    data = path.read_bytes()
    to = to or path
    to.write_bytes(data[: int(len(data) * share)])
    return to
