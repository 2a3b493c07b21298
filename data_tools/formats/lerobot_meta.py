"""Type-checked access to a LeRobotDataset's metadata; every error names the file and the field."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.formats.checked import flag, rate, read_object, shown
from stamo_dist.errors import DataError


@dataclass(frozen=True)
class LeRobotFeature:
    """One entry of info.json's "features"."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None  # None: not stated
    names: tuple[str, ...]
    depth: bool  # a depth map, not RGB
    where: str  # file and field, for errors

    @property
    def size(self) -> int:
        """Numbers per frame.

        Raises:
            DataError: info.json does not state it.
        """
        if self.shape is None:
            raise DataError(f"{self.where}.shape: must be a list of whole numbers, e.g. [7]")
        return math.prod(self.shape)

    @property
    def frame_size(self) -> tuple[int, int] | None:
        """(H, W) of a camera's frames, whose colours may come first or last; None if that is not stated."""
        if self.shape is None or len(self.shape) != 3 or 0 in self.shape:
            return None
        return self.shape[1:] if self.shape[0] in (1, 3) else self.shape[:2]


@dataclass(frozen=True)
class Info:
    """meta/info.json."""

    fps: float
    features: Mapping[str, LeRobotFeature]
    splits: Mapping[str, range]
    robot_type: str | None


def read_info(root: Path) -> Info:
    """Read meta/info.json.

    Raises:
        DataError: It is missing, not JSON, or a field has another type.
    """
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise DataError(f"{root}: no meta/info.json: not a LeRobotDataset")
    info = read_object(path)
    features = info.get("features")
    if not isinstance(features, dict):
        raise DataError(f"{path}, features: must be an object of features, not {shown(features)}")
    robot = info.get("robot_type")
    return Info(
        fps=rate(info.get("fps"), f"{path}, fps"),
        features={name: _feature(name, about, f"{path}, features.{name}") for name, about in features.items()},
        splits=_splits(info.get("splits")),
        robot_type=robot if isinstance(robot, str) else None,
    )


def _feature(name: str, about: Any, where: str) -> LeRobotFeature:
    if not isinstance(about, dict):
        raise DataError(f"{where}: must be an object with dtype and shape, not {shown(about)}")
    shape = about.get("shape")
    if isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        size: tuple[int, ...] | None = tuple(shape)
    else:
        size = None
    flags = [about, *(v for k in ("info", "video_info") if isinstance(v := about.get(k), dict))]
    depth = any(
        flag(part[key], f"{where}, {key}")
        for part in flags
        for key in ("video.is_depth_map", "is_depth_map")
        if part.get(key) is not None
    )
    return LeRobotFeature(name, str(about.get("dtype")), size, tuple(_names(about.get("names"))), depth, where)


def _names(names: Any) -> list[str]:
    """A feature's names are a list, or lists in a dict such as {"motors": […]}, or missing."""
    if isinstance(names, Mapping):
        return [name for part in names.values() for name in _names(part)]
    return [str(name) for name in names] if isinstance(names, list) else []


def _splits(splits: Any) -> dict[str, range]:
    """From "splits": {"train": "0:45", …}; other notations are ignored."""
    ranges = {}
    for name, text in splits.items() if isinstance(splits, dict) else ():
        first, _, last = str(text).partition(":")
        if first.isdecimal() and last.isdecimal():
            ranges[str(name)] = range(int(first), int(last))
    return ranges
