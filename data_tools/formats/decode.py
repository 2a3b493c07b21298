"""Frames of video files by their presentation times, with PyAV.

Times come from the container, so only requested frames are decoded. The decoder has one thread: FFmpeg's own
threads deadlock when a forked worker closes a decoder, and the converter runs one process a core anyway.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from data_tools.formats.source import Frames
from stamo_dist.errors import DataError

#: Seek to a keyframe if that saves decoding this many frames; for fewer, flushing the decoder costs more.
FRAMES_WORTH_A_SEEK = 8
#: Rates that differ by less than this fraction count as equal: durations are rounded (Matroska: to ms).
SAME_RATE = 0.02
#: A stream may end this many seconds before the duration in its header.
END_TOLERANCE = 0.5
#: Seconds to seek further back if a seek ended after its target, which some indices cause.
SEEK_MARGIN = 10
#: Containers without presentation times, whose frames are numbered from the beginning.
UNTIMED = ("avi",)
#: Transfer characteristics of high dynamic range (ISO/IEC 23091-2): its levels differ from standard dynamic range.
HDR = {16: "PQ", 18: "HLG"}
#: Before version 17, PyAV's colour conversion always had one thread.
_RGB: dict[str, Any] = {"format": "rgb24"} | ({"threads": 1} if int(av.__version__.split(".")[0]) >= 17 else {})


@dataclass(frozen=True)
class VideoInfo:
    """What a video's header says."""

    seconds: float  # duration
    frames: int
    rate_hz: float  # average frames per second
    width: int  # as stored, before any rotation
    height: int
    hdr: str = ""  # an HDR transfer characteristic; "" for standard dynamic range


def probe(path: Path) -> VideoInfo:
    """Read a video's header; a file whose header has no frame count or no duration is read through once.

    Raises:
        DataError: The file is missing, not a video, without frames, or detectably truncated.
    """
    with _opened(path) as (container, stream):
        seconds, frames = _declared_seconds(container, stream), stream.frames
        nominal = float(stream.average_rate or 0)
        width, height = stream.codec_context.width, stream.codec_context.height
        hdr = HDR.get(int(stream.codec_context.color_trc or 0), "")
    if not seconds or not frames:
        times, _ = video_frames(path)
        frames = len(times)
        seconds = float(times[-1]) + (float(np.median(np.diff(times))) if frames > 1 else 1.0)
    average = frames / seconds
    rate = nominal if abs(nominal - average) < SAME_RATE * average else average
    return VideoInfo(seconds, frames, rate, width, height, hdr)


def video_frames(path: Path, start: float | None = None, end: float | None = None) -> tuple[np.ndarray, Frames]:
    """The frames of a video that are shown at `start` <= time < `end`, in seconds since the file begins to play.

    Only this part of the file is read. Frames are turned upright as the video's display matrix (or its older `rotate`
    tag) asks, and converted to RGB with the video's own colour matrix.

    Returns:
        times float64 (T,), increasing, and the Frames, (H, W, 3) uint8; a number given twice yields its frame twice.

    Raises:
        DataError: The file is missing, no video, truncated or corrupt, or has no frame in this part. While iterating:
            a frame is corrupt, or the decoder gives fewer frames than the container lists.
    """
    with _opened(path) as (container, stream):
        base = stream.time_base
        origin = round(Fraction(container.start_time or 0, av.time_base) / base)
        # 1 µs: finer than any video's time base, coarser than float64 rounding.
        first, last = (None if s is None else origin + math.ceil(Fraction(s - 1e-6) / base) for s in (start, end))
        timeline = _timeline(container, stream, first, last)
        if timeline.by_order:
            container.seek(stream.start_time or 0, stream=stream)
            timeline = _timeline(container, stream, None, None)
    bounds = [-(2**62) if first is None else first, 2**62 if last is None else last]
    part = np.arange(*np.searchsorted(timeline.ticks, bounds))
    if not len(part):
        where = "" if start is None and end is None else f" between {start or 0:g} s and {end or math.inf:g} s"
        raise DataError(f"{path.name}: no video frame{where}")

    def frames(wanted: Sequence[int]) -> Iterator[np.ndarray]:
        return _decoded(path, timeline, part[np.asarray(wanted, np.int64)])

    return (timeline.ticks[part] - origin) * float(base), frames


@dataclass(frozen=True)
class _Timeline:
    """The frames of a part of a video, in the order of presentation, and the keyframes among them."""

    ticks: np.ndarray  # (T,) int64, increasing; in the stream's unit
    keys: np.ndarray  # (K,) int64, increasing; K >= 1, and the first is not after the first frame
    by_order: bool  # True: it covers the whole video, and the decoder emits frames with these times in this order

    def key_before(self, number: int) -> int:
        """Number of the last keyframe that is not after this frame."""
        key = self.keys[max(0, np.searchsorted(self.keys, self.ticks[number], side="right") - 1)]
        return int(np.searchsorted(self.ticks, key))


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The open container and its first video stream, with a single-threaded decoder.

    Raises:
        DataError: The file is missing or has no video, or FFmpeg reports an error, here or inside the block.
    """
    if not path.is_file():
        raise DataError(f"{path.name}: no such video file")
    try:
        with av.open(str(path), metadata_errors="replace") as container:
            cover = av.stream.Disposition.attached_pic
            stream = next((s for s in container.streams.video if not s.disposition & cover), None)
            if stream is None:
                raise DataError(f"{path.name}: has no video stream")
            stream.codec_context.thread_count = 1
            yield container, stream
    except av.FFmpegError as e:
        raise DataError(f"{path.name}: truncated or corrupt video ({e.strerror or e})") from e


def _declared_seconds(container: Any, stream: Any) -> float | None:
    """The video's end by its header, in seconds since the start of playback; None if the header has none."""
    if stream.duration:
        ends = ((stream.start_time or 0) + stream.duration) * stream.time_base
        return float(ends - Fraction(container.start_time or 0, av.time_base))
    if tag := stream.metadata.get("DURATION"):  # Matroska: HH:MM:SS.fraction
        with suppress(ValueError):
            hours, minutes, seconds = tag.split(":")
            return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    # The container's duration includes audio, which may be longer.
    if container.duration and len(container.streams) == 1:
        return container.duration / av.time_base
    return None


def _timeline(container: Any, stream: Any, first: int | None, last: int | None) -> _Timeline:
    """Frames from the keyframe before `first` until `last`, without decoding them.

    A video with reordered frames (B-frames) whose presentation times all equal decoding times has no real
    presentation times; its frames then take the decoding times in order.

    Raises:
        DataError: The file ends before its header says, or a frame has no time.
    """
    name, packets = Path(container.name).name, 0
    shown: list[tuple[Any, Any, bool]] = []  # presentation time, decoding time, keyframe
    for packet in _packets(container, stream, first):
        # A packet's presentation time is never before its decoding time.
        if last is not None and packet.dts is not None and packet.dts >= last:
            break
        if packet.is_corrupt:
            raise DataError(f"{name}: truncated: the file ends within a frame")
        packets += packet.size > 0
        if packet.size and not packet.is_discard and not _hidden(packet, stream):
            shown.append((packet.pts, packet.dts, packet.is_keyframe))
    else:
        if packets < stream.frames and first is None:
            raise DataError(f"{name}: truncated: {packets} of {stream.frames} frames")
        _check_end(container, stream, max((pts or dts or 0 for pts, dts, _ in shown), default=None), last)
    reordered = stream.codec_context.has_b_frames and all(pts == dts for pts, dts, _ in shown)
    by_order = container.format.name in UNTIMED or reordered
    timed = [(dts if by_order else pts, key) for pts, dts, key in shown]
    if any(tick is None for tick, _ in timed):
        raise DataError(f"{name}: frames have no presentation time; remux it, e.g. into mkv")
    ticks = np.unique(np.array([tick for tick, _ in timed], np.int64))
    keys = np.unique(np.array([tick for tick, key in timed if key], np.int64))
    return _Timeline(ticks, keys if len(keys) else ticks[:1], by_order)


def _check_end(container: Any, stream: Any, final: int | None, last: int | None) -> None:
    """Raises DataError when the final frame is long before `last` and before the end that the header says."""
    declared = _declared_seconds(container, stream)
    if final is None or declared is None:
        return
    begins = float(Fraction(container.start_time or 0, av.time_base))
    ends = float(final * stream.time_base) - begins + 1 / float(stream.average_rate or 1)
    if last is not None:
        declared = min(declared, float(last * stream.time_base) - begins)
    if ends < declared - END_TOLERANCE:
        raise DataError(f"{Path(container.name).name}: truncated: its frames end at {ends:.2f} s of {declared:.2f} s")


def _hidden(packet: Any, stream: Any) -> bool:
    """Whether a packet's frame is only a reference and never shown (RFC 6386, 9.1: show_frame)."""
    return stream.codec_context.name in ("vp8", "libvpx") and not bytes(packet)[0] & 0x10


def _packets(container: Any, stream: Any, target: int | None) -> Iterator[Any]:
    """Packets from a keyframe shown at or before `target`, or from the beginning; then an empty one as a flush."""
    if target is not None:
        for margin in (0, SEEK_MARGIN):
            with suppress(av.FFmpegError):  # a file without an index
                container.seek(target - round(margin / stream.time_base), stream=stream)
                packets = container.demux(stream)
                head = next(packets)
                if head.is_keyframe and head.pts is not None and head.pts <= target:
                    return chain([head], packets)
        container.seek(stream.start_time or 0, stream=stream)
    return container.demux(stream)


def _decoded(path: Path, timeline: _Timeline, wanted: np.ndarray) -> Iterator[np.ndarray]:
    """The frames with these numbers in the timeline, in order; seeks where that saves decoding."""
    convert, turn = VideoReformatter(), None
    with _opened(path) as (container, stream):
        at, image = -1, np.empty(0, np.uint8)
        frames: Iterator[tuple[int, Any]] = iter(())
        for done, number in enumerate(wanted.tolist()):
            if number != at:
                key = timeline.key_before(number)
                if at < 0 or (key > at + FRAMES_WORTH_A_SEEK and not timeline.by_order):
                    frames = _numbered(container, stream, timeline, number)
                at, frame = next(((k, f) for k, f in frames if k >= number), (-1, None))
                if frame is None or at != number or frame.is_corrupt:
                    begins = Fraction(container.start_time or 0, av.time_base)
                    raise DataError(
                        f"{path.name}: the decoder gave {done} of {len(wanted)} frames; the one at "
                        f"{float(int(timeline.ticks[number]) * stream.time_base - begins):.3f} s is "
                        + ("corrupt" if at == number else "missing")
                    )
                turn = turn or turn_upright(frame, stream)
                image = np.ascontiguousarray(turn(convert.reformat(frame, **_RGB).to_ndarray()))
            yield image


def _numbered(container: Any, stream: Any, timeline: _Timeline, number: int) -> Iterator[tuple[int, Any]]:
    """Decoded frames with their numbers in the timeline, from at least `number` on."""
    packets = _packets(container, stream, None if timeline.by_order else int(timeline.ticks[number]))
    decoded = (frame for packet in packets for frame in stream.decode(packet))
    if timeline.by_order:
        yield from enumerate(decoded)
        return
    for frame in decoded:
        k = len(timeline.ticks) if frame.pts is None else int(np.searchsorted(timeline.ticks, frame.pts))
        if k < len(timeline.ticks) and timeline.ticks[k] == frame.pts:
            yield k, frame


def turn_upright(frame: Any, stream: Any) -> Callable[[np.ndarray], np.ndarray]:
    """The function that turns (H, W, 3) upright.

    The display matrix (a b u; c d v; x y w) takes column p and row q of the stored picture to column ap + cq + x and
    row bp + dq + y (ISO/IEC 14496-12, 6.2.2); only quarter turns and mirrorings are applied.
    """
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
        a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5]
    else:
        quarters = round(float(stream.metadata.get("rotate", 0)) / 90) % 4  # clockwise
        a, b, c, d = ((1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0))[quarters]
    swapped = abs(b) > abs(a)
    rows = slice(None, None, -1 if (b if swapped else d) < 0 else 1)
    columns = slice(None, None, -1 if (c if swapped else a) < 0 else 1)
    return lambda image: (image.swapaxes(0, 1) if swapped else image)[rows, columns]
