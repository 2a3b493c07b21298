"""Pairing video frames with rows, and checking the time windows of episodes in video files.

Rows and frames are the same moments in the same order. Times are only needed if the video has additional frames.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_tools.formats.decode import VideoInfo, probe, video_frames
from data_tools.formats.lerobot_files import Listed, VideoWindow
from data_tools.formats.source import Frames, check_lfs
from stamo_dist.errors import DataError

#: Fraction of the frame period by which a row's and its frame's time may differ (rounding).
TOLERANCE = 0.1
#: Headers read concurrently, as the scan waits for the file system.
THREADS = 8


def paired_frames(feature: str, window: VideoWindow, times: np.ndarray, fps: float) -> tuple[Frames, np.ndarray]:
    """The frames of the rows at `times` (T,), seconds since the episode begins.

    By order if there are as many frames as rows; else each row takes the frame at its own time.

    Returns:
        Frames, and when each is shown in the file, float64 (R,) s: by the rows' times if these agree with the
        video's. R is T, or T - 1 if the last row's frame is missing.

    Raises:
        DataError: Neither pairing is possible; gives both counts.
    """
    period, name = 1 / fps, window.path.name
    start = None if window.begins < period / 2 else window.begins - period / 2
    end = None if window.ends is None else window.ends - period / 2
    shown, frames = video_frames(window.path, start, end)
    wanted = window.begins + times
    if len(shown) == len(times):
        on_time = (np.abs(shown - wanted) <= TOLERANCE * period).all()
        return frames, wanted if on_time else shown
    numbers = _nearest(shown, wanted)
    agree = np.abs(shown[numbers] - wanted) <= TOLERANCE * period
    agree[1:] &= np.diff(numbers) > 0
    rows = len(times) - (not agree[-1])
    by_order = len(shown) == rows < len(times)
    if by_order:
        numbers = np.arange(rows)
    elif not agree[:rows].all() or not rows:
        t = int(np.argmin(agree))
        raise DataError(
            f"{feature}: {name} has {len(shown)} frames for {len(times)} rows, and {(~agree).sum()} rows have no frame "
            f"at their time, the first row {t} at {wanted[t]:.3f} s"
        )
    seconds = wanted[:rows] if agree[:rows].all() else shown[numbers[:rows]]
    return (lambda indices: frames(numbers[np.asarray(indices, np.int64)].tolist())), seconds


@dataclass(frozen=True)
class Windows:
    """Result of checking the episodes' videos.

    Attributes:
        faults: By episode: why it cannot be used.
        short: For episodes that lack only their last frame: the video that lacks it.
        hdr: By intact video, path relative to the dataset: "PQ", "HLG", or "" for standard dynamic range.
    """

    faults: dict[int, str]
    short: dict[int, str]
    hdr: dict[str, str]


def check_windows(root: Path, episodes: Sequence[Listed], fps: float) -> Windows:
    """Check the videos of a dataset's episodes by the episode table and the files' headers."""
    faults: dict[int, str] = {}
    short: dict[int, str] = {}
    windows: dict[Path, list[tuple[VideoWindow, Listed, str]]] = defaultdict(list)
    for episode in episodes:
        for feature, window in episode.videos.items():
            windows[window.path].append((window, episode, feature))
    with ThreadPoolExecutor(THREADS) as pool:
        headers = dict(zip(windows, pool.map(_header, windows), strict=True))
    for path, members in windows.items():
        header = headers[path]
        members.sort(key=lambda member: member[0].begins)
        for number, (window, episode, feature) in enumerate(members):
            fault = header if isinstance(header, str) else ""
            if isinstance(header, VideoInfo):
                lost = _lost_frames(window, episode.length, header, fps)
                if lost == 1 and episode.length > 1:
                    short[episode.index] = f"{feature}: {path.name}"
                fault = _fault(window, episode.length, header, fps)
            if number and (before := members[number - 1])[0].ends is not None:
                ends = before[0].ends
                if ends is not None and window.begins < ends - 0.5 / fps:
                    why = f"{path.name}: windows overlap: episode {before[1].index} ends at {ends:g} s, " + (
                        f"episode {episode.index} begins at {window.begins:g} s"
                    )
                    faults.setdefault(before[1].index, f"{feature}: {why}")
                    fault = fault or why
            if fault:
                faults.setdefault(episode.index, f"{feature}: {fault}")
    kinds = {
        path.relative_to(root).as_posix(): about.hdr for path, about in headers.items() if not isinstance(about, str)
    }
    return Windows(faults, short, kinds)


def _header(path: Path) -> VideoInfo | str:
    try:
        check_lfs(path)
        return probe(path)
    except DataError as e:
        return str(e)


def _lost_frames(window: VideoWindow, length: int, header: VideoInfo, fps: float) -> int:
    """How many of the episode's last frames lie beyond the end of the file."""
    if window.ends is None:
        return length - header.frames
    return max(0, round((window.ends - header.seconds) * fps))


def _fault(window: VideoWindow, length: int, header: VideoInfo, fps: float) -> str:
    if window.ends is None:
        return ""  # episodes that span a whole file are paired frame by frame when they are read
    seconds = window.ends - window.begins
    said = f"its window is {window.begins:g} s to {window.ends:g} s"
    if window.begins < 0 or seconds <= 0:
        return f"{said}, which is no stretch of time; mend from_timestamp and to_timestamp"
    if abs(seconds * fps - length) >= 1:
        return f"{said}, {seconds * fps:.1f} frames at {fps:g} fps, but it has {length} rows"
    if _lost_frames(window, length, header, fps) > 1:
        return f"{said}, but {window.path.name} ends at {header.seconds:.2f} s"
    return ""


def _nearest(shown: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Index of the time in `shown` (increasing) that is nearest to each in `wanted`."""
    right = np.clip(np.searchsorted(shown, wanted), 1, max(1, len(shown) - 1))
    right = np.minimum(right, len(shown) - 1)
    left = np.maximum(right - 1, 0)
    return np.where(wanted - shown[left] <= shown[right] - wanted, left, right)
