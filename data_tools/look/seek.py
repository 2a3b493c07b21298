"""Reading one frame of a video by its time with a seek, independently of the conversion's decoding."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np

from data_tools.formats.decode import UNTIMED, turn_upright
from stamo_dist.errors import DataError

#: Seconds before the frame to seek to, tried in turn until a frame before it is decoded; None: the beginning.
MARGINS = (0, 10, None)


class _UntimedError(Exception):
    """Times of the frames do not increase."""


def picture_at(path: Path, seconds: float) -> np.ndarray | None:
    """The upright frame (H, W, 3) uint8 whose time is nearest to `seconds` since the start of playback.

    None: the file's frames cannot be identified by their times.

    Raises:
        DataError: The file is missing or corrupt, or has no frame there.
    """
    try:
        for margin in MARGINS:
            with av.open(str(path), metadata_errors="replace") as container:
                if container.format.name in UNTIMED:
                    return None
                if (found := _sought(container, seconds, margin)) is not None:
                    return found
    except _UntimedError:
        return None
    except (av.FFmpegError, OSError) as e:
        raise DataError(f"{path.name}: {e.strerror or e}") from e
    raise DataError(f"{path.name}: shows nothing at {seconds:.3f} s")


def _sought(container: Any, seconds: float, margin: int | None) -> np.ndarray | None:
    """The frame; None if the first decoded frame is already after it."""
    cover = av.stream.Disposition.attached_pic
    stream = next(s for s in container.streams.video if not s.disposition & cover)
    stream.codec_context.thread_count = 1
    wanted = Fraction(seconds) + Fraction(container.start_time or 0, av.time_base)
    target = stream.start_time or 0 if margin is None else int((wanted - margin) / stream.time_base)
    container.seek(target, stream=stream)
    before, at_before = None, Fraction(0)
    for frame in container.decode(stream):
        at = None if frame.pts is None else frame.pts * stream.time_base
        if at is None or (before is not None and at <= at_before):
            raise _UntimedError
        if at >= wanted:
            late = before is None and at - wanted > Fraction(1, 2) / (stream.average_rate or 30)
            if late and margin is not None:
                return None
            nearer = before if before is not None and wanted - at_before < at - wanted else frame
            return _upright(nearer, stream)
        before, at_before = frame, at
    return None if before is None else _upright(before, stream)


def _upright(frame: Any, stream: Any) -> np.ndarray:
    return np.ascontiguousarray(turn_upright(frame, stream)(frame.to_ndarray(format="rgb24")))
