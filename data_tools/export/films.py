"""Encoding the frames of many episodes into few video files, as LeRobot v3 stores them."""

from __future__ import annotations

from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.frame import PictureType
from numpy.typing import NDArray

CODEC = "h264"
PIXELS = "yuv420p"
#: A keyframe every second frame, so that a random one is decoded fast, as LeRobot's own writer sets it.
_OPTIONS = {"crf": "18", "preset": "fast", "g": "2", "bf": "0"}


class FilmWriter:
    """The video files of one camera; an episode is in one file.

    Args:
        path: Maps the number of a file to its path.
        size: Side of the square frames in pixels; even.
        rate: Frames per second.
        file_bytes: A file that has more gets no further episode.
    """

    def __init__(self, path: Any, size: int, rate: Fraction, file_bytes: int):
        self._path, self._size, self._rate, self._most = path, size, rate, file_bytes
        self._file = -1
        self._container: Any = None

    def write(self, frames: Iterable[NDArray[np.uint8]]) -> tuple[int, float, float]:
        """Append an episode; returns the number of its file, and when it begins and ends there, in seconds."""
        if self._container is None or self._written() > self._most:
            self._next()
        first = self._frames
        for image in frames:
            frame = av.VideoFrame.from_ndarray(image, format="rgb24").reformat(format=PIXELS)
            frame.pts, frame.time_base = self._frames, 1 / self._rate
            frame.pict_type = PictureType.I if self._frames == first else PictureType.NONE
            self._container.mux(self._stream.encode(frame))
            self._frames += 1
        return self._file, float(first / self._rate), float(self._frames / self._rate)

    def close(self) -> None:
        """Finish the current file."""
        if self._container is not None:
            self._container.mux(self._stream.encode(None))
            self._container.close()
            self._container = None

    def _written(self) -> int:
        return Path(self._container.name).stat().st_size

    def _next(self) -> None:
        self.close()
        self._file, self._frames = self._file + 1, 0
        path: Path = self._path(self._file)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._container = av.open(str(path), "w")
        self._stream = self._container.add_stream("libx264", rate=self._rate, options=_OPTIONS)
        self._stream.width = self._stream.height = self._size
        self._stream.pix_fmt, self._stream.time_base = PIXELS, 1 / self._rate
