"""Videos of people: a folder of video files, cut into episodes by timestamp, without actions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np

from data_tools.formats import remarks
from data_tools.formats.decode import VideoInfo, probe, video_frames
from data_tools.formats.source import EpisodeData, EpisodeRef, Film, Scan, find_files, walk
from data_tools.formats.video_presets import PRESETS, Given, Listing
from data_tools.formats.video_segments import Segment, once, read_labels, read_table
from stamo_dist.errors import DataError

SUFFIXES = (".mp4", ".webm", ".mkv", ".avi", ".mov")
#: Suffixes of videos that are not read.
OTHERS = (".m4v", ".mpg", ".mpeg", ".wmv", ".flv", ".ts", ".mts", ".m2ts", ".3gp", ".ogv", ".vob", ".gif", ".apng")
#: A segment may exceed its video by this many seconds and is then cut.
END_TOLERANCE = 0.5


@dataclass
class VideoReader:
    """Reads a video file, or all .mp4, .webm, .mkv, .avi and .mov below a folder.

    Each video is one episode, or each of its segments is. Frames are selected by timestamps, so variable and mixed
    frame rates are supported; the rate of the source is the median over its videos' average rates. There are no
    actions and no proprio.

    Args:
        src: File or folder.
        segments: Table(s) of segments, CSV or JSON: video, start, end (seconds or HH:MM:SS.mmm), text, and optionally
            id and split; every row must fit its video. With a preset, its annotation files if they are not below `src`.
        labels: JSON with one instruction a video: {VIDEO: text} or a list of {video, text}.
        preset: ssv2, epic, egoexo4d, ego4d or egodex; see data_tools/formats/video_presets.py for their layouts.
        cameras: The one camera's name, "video" when omitted. egoexo4d: "ego" (when omitted), "exo", or a cam_id.
        window: Seconds around a description that has a moment but no interval (ego4d, egoexo4d).
        min_frames: Shorter segments are left out and counted.
    """

    src: Path
    segments: Sequence[Path] | None = None
    labels: Path | None = None
    preset: Literal["ssv2", "epic", "egoexo4d", "ego4d", "egodex"] | None = None
    cameras: Sequence[str] | None = None
    window: float = 4.0
    min_frames: int = 2

    def scan(self) -> Scan:
        self._check_options()
        shelf = _VideoIndex(self.root, find_files(self.src, SUFFIXES))
        listing = self._listing(shelf)
        if not listing.segments:
            raise DataError(f"{', '.join(map(str, listing.files)) or self.src}: no segments in it")
        once(listing.segments)
        placed = [(segment, shelf.place(segment, strict=self.preset is None)) for segment in listing.segments]
        if self.preset is None:
            _check_rows(placed)
        absent = [segment for segment, at in placed if at.absent]
        if len(absent) == len(placed):
            raise DataError(f"{self.src}: none of the {len(absent)} annotated videos is there, e.g. {absent[0].video}")
        known = [(segment, at.part) for segment, at in placed if at.part is not None]
        usable = [(s, part) for s, part in known if part.frames >= self.min_frames]
        return Scan(
            episodes=[self._reference(segment, part, listing.camera) for segment, part in usable],
            files=sorted({part.path for _, part in known}),
            cameras=[listing.camera],
            action=None,
            proprio_dim=0,
            bad=[f"{s.id or s.where}: {at.fault}" for s, at in placed if at.fault and not at.absent],
            rate_hz=shelf.rates[1],
            options={
                "preset": self.preset,
                "annotations": {path.name: sha256(path.read_bytes()).hexdigest() for path in listing.files},
                "window": self.window,
                "min_frames": self.min_frames,
                "left_out_as_too_short": len(known) - len(usable),
                "left_out_as_video_not_there": len(absent),
                "rates_hz": dict(zip(("min", "median", "max"), shelf.rates, strict=True)),
            },
            notes=[
                *self._unread(),
                *self._short([s for s, part in known if part.frames < self.min_frames]),
                *_absent(absent),
                *remarks.hdr_videos(shelf.hdr),
                *listing.notes,
            ],
        )

    def read(self, episode: EpisodeRef) -> EpisodeData:
        times, frames = video_frames(self.root / episode.file, episode.private["start"], episode.private["end"])
        nothing = np.zeros((len(times), 0), np.float32)
        camera, film = episode.private["camera"], Film(self.root / episode.file, times)
        return EpisodeData({camera: frames}, times, actions=nothing, proprio=nothing, films={camera: film})

    @property
    def root(self) -> Path:
        """The folder that paths are relative to."""
        return self.src if self.src.is_dir() else self.src.parent

    def _unread(self) -> list[str]:
        """A note on the videos below `src` whose suffix is none of SUFFIXES."""
        if self.src.is_file():
            return []
        counts = Counter(suffix for path in walk(self.src) if (suffix := path.suffix.lower()) in OTHERS)
        said = ", ".join(f"{n} {suffix}" for suffix, n in sorted(counts.items()))
        return [f"left out: {said} (read are {', '.join(SUFFIXES)}; convert them, e.g. with ffmpeg)"] if said else []

    def _short(self, segments: Sequence[Segment]) -> list[str]:
        """A note on the segments that have fewer than `min_frames` frames."""
        if not segments:
            return []
        return [
            f"left out: {len(segments)} shorter than {self.min_frames} frames (--set min_frames=1 takes them): "
            f"{_few(segments)}"
        ]

    def _check_options(self) -> None:
        problems = []
        if self.preset is not None and self.preset not in PRESETS:
            problems.append(f"preset: {self.preset!r} must be one of {', '.join(PRESETS)}")
        if self.preset is not None and self.labels is not None:
            problems.append("labels: not with a preset, which brings its own")
        if self.cameras is not None and len(self.cameras) != 1:
            problems.append(f"cameras: {', '.join(self.cameras)}: a source of videos has one camera")
        if not self.window > 0:
            problems.append(f"window: {self.window} must be positive")
        if self.min_frames < 1:
            problems.append(f"min_frames: {self.min_frames} must be at least 1")
        if problems:
            raise DataError("\n".join(problems))

    def _listing(self, shelf: _VideoIndex) -> Listing:
        tables = [Path(path) for path in self.segments or ()]
        camera = self.cameras[0] if self.cameras else ""
        if self.preset is not None:
            try:
                return PRESETS[self.preset](Given(self.root, shelf.videos, tables, camera, self.window))
            except (KeyError, TypeError, AttributeError, ValueError) as e:
                raise DataError(f"{self.src}: its annotations are not as {self.preset}'s are ({e!r})") from e
        if tables:
            segments = [segment for path in tables for segment in read_table(path)]
        else:
            segments = [Segment(name, name, id=name) for name in map(shelf.name, shelf.videos)]
        if self.labels is None:
            return Listing(segments, tables, camera or "video")
        texts = self._labels(self.labels, shelf)
        labelled = [replace(s, text=s.text or texts.get(shelf.find(s.video)[0], "")) for s in segments]
        return Listing(labelled, [*tables, self.labels], camera or "video")

    def _labels(self, path: Path, shelf: _VideoIndex) -> dict[Path | None, str]:
        found = {name: (shelf.find(name), text) for name, text in read_labels(path).items()}
        if faults := [f"  - {fault}" for ((_, fault), _) in found.values() if fault]:
            raise DataError("\n".join([f"{path}: labels of {len(faults)} unknown videos:", *faults]))
        return {video: text for (video, _), text in found.values()}

    def _reference(self, segment: Segment, part: _Part, camera: str) -> EpisodeRef:
        file = part.path.relative_to(self.root).as_posix()
        whole = part.start is None and part.end is None
        times = {} if whole else {"start": segment.start, "end": segment.end}
        return EpisodeRef(
            id=segment.id or (file if whole else f"{file}@{segment.start:.3f}"),
            file=file,
            key="" if whole else f"{segment.start:.3f}",
            length=part.frames,
            task=segment.task,
            instruction=segment.text,
            split=segment.split,
            meta={**segment.meta, "video": file, **times},
            private={"start": part.start, "end": part.end, "camera": camera},
        )


@dataclass(frozen=True)
class _Part:
    """A segment of an existing video."""

    path: Path
    start: float | None  # None: the video's beginning
    end: float | None  # None: its end
    frames: int


@dataclass(frozen=True)
class _Place:
    """The result of locating a segment."""

    part: _Part | None = None
    fault: str = ""  # why there is no part
    absent: bool = False  # because its video is not there
    broken: bool = False  # because its video is broken


class _VideoIndex:
    """The existing videos by the names that annotations use: path or name, with or without suffix."""

    def __init__(self, root: Path, videos: Sequence[Path]):
        self.root = root
        self.videos = videos
        self._by_name: dict[str, list[Path]] = {}
        self._infos: dict[Path, VideoInfo | str] = {}
        for path in videos:
            relative = path.relative_to(root)
            for name in {relative.as_posix(), relative.with_suffix("").as_posix(), path.name, path.stem}:
                self._by_name.setdefault(name, []).append(path)

    @property
    def rates(self) -> tuple[float, float, float]:
        """Minimum, median and maximum average rate (Hz) of the probed videos."""
        rates = [info.rate_hz for info in self._infos.values() if isinstance(info, VideoInfo)] or [0.0]
        return round(min(rates), 3), round(float(np.median(rates)), 3), round(max(rates), 3)

    @property
    def hdr(self) -> dict[str, str]:
        """For each intact probed video, by name: "PQ", "HLG", or "" for standard dynamic range."""
        return {self.name(path): info.hdr for path, info in self._infos.items() if isinstance(info, VideoInfo)}

    def name(self, path: Path) -> str:
        return path.relative_to(self.root).as_posix()

    def find(self, name: str) -> tuple[Path | None, str]:
        """The video of this name in an annotation, or why there is none."""
        paths = self._by_name.get(name, [])
        if len(paths) > 1:
            return None, f"{name} may be any of {', '.join(map(self.name, paths[:5]))}; give its path"
        return (paths[0], "") if paths else (None, f"{name}: no such video in this folder")

    def place(self, segment: Segment, strict: bool) -> _Place:
        """Locate a segment; unless `strict`, one that exceeds its video is cut at the video's end."""
        path, fault = (None, segment.fault) if segment.fault else self.find(segment.video)
        if path is None:
            return _Place(fault=fault, absent=not segment.fault and segment.video not in self._by_name)
        if path not in self._infos:
            try:
                self._infos[path] = probe(path)
            except DataError as e:
                self._infos[path] = str(e)
        info = self._infos[path]
        if isinstance(info, str):
            return _Place(fault=info, broken=True)
        if segment.start >= info.seconds or (strict and (segment.end or 0) > info.seconds + END_TOLERANCE):
            until = "its end" if segment.end is None else f"{segment.end:g} s"
            return _Place(fault=f"{segment.start:g} s to {until} is beyond the video's end at {info.seconds:.2f} s")
        end = segment.end if segment.end is not None and segment.end < info.seconds else None
        if not segment.start and end is None:
            return _Place(_Part(path, None, None, info.frames))
        frames = round(((end or info.seconds) - segment.start) * info.rate_hz)
        return _Place(_Part(path, segment.start, end, frames))


def _absent(segments: Sequence[Segment]) -> list[str]:
    """A note on the segments whose video is missing."""
    if not segments:
        return []
    return [f"left out: {len(segments)} annotated segments whose video is not there: {_few(segments)}"]


def _few(segments: Sequence[Segment], shown: int = 3) -> str:
    rest = len(segments) - shown
    return ", ".join(s.id or s.where for s in segments[:shown]) + (f" and {rest} more" if rest > 0 else "")


def _check_rows(placed: Sequence[tuple[Segment, _Place]]) -> None:
    """Raises DataError with all segments that do not fit their videos; segments of broken videos are not included."""
    faults = [f"  - {s.where}: {at.fault}" for s, at in placed if at.fault and not at.broken]
    if faults:
        raise DataError("\n".join([f"{len(faults)} of {len(placed)} segments cannot be used:", *faults]))
