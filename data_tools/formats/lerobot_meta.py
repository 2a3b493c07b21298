"""A LeRobotDataset's metadata as checked values: whatever is in the files, an error names the file and the field."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.formats.source import check_lfs
from stamo_dist.errors import DataError


@dataclass(frozen=True)
class Feature:
    """One entry of info.json's "features"."""

    name: str
    dtype: str
    shape: tuple[int, ...] | None  # None: the file does not say
    names: tuple[str, ...]
    depth: bool  # a depth map, not a picture
    where: str  # file and field, for errors

    @property
    def size(self) -> int:
        """Numbers a frame.

        Raises:
            DataError: info.json does not say.
        """
        if self.shape is None:
            raise DataError(f"{self.where}.shape: must be a list of whole numbers, e.g. [7]")
        return math.prod(self.shape)


@dataclass(frozen=True)
class Info:
    """meta/info.json."""

    fps: float
    features: Mapping[str, Feature]
    splits: Mapping[str, range]
    robot_type: str | None


def read_info(root: Path) -> Info:
    """Read meta/info.json.

    Raises:
        DataError: It is missing, no JSON, or a field is not what it must be.
    """
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise DataError(f"{root}: no meta/info.json: not a LeRobotDataset")
    info = read_object(path)
    features = info.get("features")
    if not isinstance(features, dict):
        raise DataError(f"{path}, features: must be an object of features, not {_shown(features)}")
    robot = info.get("robot_type")
    return Info(
        fps=_positive(info.get("fps"), f"{path}, fps"),
        features={name: _feature(name, about, f"{path}, features.{name}") for name, about in features.items()},
        splits=_splits(info.get("splits")),
        robot_type=robot if isinstance(robot, str) else None,
    )


def read_object(path: Path) -> dict[str, Any]:
    """A file with one JSON object.

    Raises:
        DataError: It is not.
    """
    return _object(read_text(path), str(path))


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(place, object) of each line of a JSON-lines file; lines end at a line feed only.

    Raises:
        DataError: A line is no JSON object.
    """
    for number, line in enumerate(read_text(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, _object(line, where)


def read_text(path: Path) -> str:
    """A file's UTF-8 text.

    Raises:
        DataError: It cannot be read, is a Git LFS pointer, or not UTF-8.
    """
    check_lfs(path)
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig")
    except OSError as e:
        raise DataError(f"{path}: cannot be read ({e.strerror})") from e
    except UnicodeDecodeError as e:
        line = data.count(b"\n", 0, e.start) + 1
        raise DataError(f"{path}, line {line}: not UTF-8 (byte {data[e.start]:#x}); save the file as UTF-8") from e


def whole(value: Any, where: str) -> int:
    """A whole number; also as text, or alone in a list.

    Raises:
        DataError: It is not.
    """
    number = _number(value)
    if number is None or number != int(number):
        raise DataError(f"{where}: must be a whole number, not {_shown(value)}")
    return int(number)


def seconds(value: Any, where: str) -> float:
    """A finite number, likewise.

    Raises:
        DataError: It is not.
    """
    number = _number(value)
    if number is None:
        raise DataError(f"{where}: must be a number of seconds, not {_shown(value)}")
    return number


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise DataError(f"{where}: not JSON: {e}") from e
    if not isinstance(value, dict):
        raise DataError(f"{where}: must be a JSON object, not {_shown(value)}")
    return value


def _feature(name: str, about: Any, where: str) -> Feature:
    if not isinstance(about, dict):
        raise DataError(f"{where}: must be an object with dtype and shape, not {_shown(about)}")
    shape = about.get("shape")
    if isinstance(shape, list) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        size: tuple[int, ...] | None = tuple(shape)
    else:
        size = None
    flags = [about, *(v for k in ("info", "video_info") if isinstance(v := about.get(k), dict))]
    depth = any(part.get("video.is_depth_map") or part.get("is_depth_map") for part in flags)
    return Feature(name, str(about.get("dtype")), size, tuple(_names(about.get("names"))), depth, where)


def _names(names: Any) -> list[str]:
    """A feature's names are a list, or lists in a dict such as {"motors": […]}, or missing."""
    if isinstance(names, Mapping):
        return [name for part in names.values() for name in _names(part)]
    return [str(name) for name in names] if isinstance(names, list) else []


def _splits(splits: Any) -> dict[str, range]:
    """From "splits": {"train": "0:45", …}; other notations are no ranges of episodes."""
    ranges = {}
    for name, text in splits.items() if isinstance(splits, dict) else ():
        first, _, last = str(text).partition(":")
        if first.isdecimal() and last.isdecimal():
            ranges[str(name)] = range(int(first), int(last))
    return ranges


def _positive(value: Any, where: str) -> float:
    number = _number(value)
    if number is None or number <= 0:
        raise DataError(f"{where}: must be a positive number of frames a second, not {_shown(value)}")
    return number


def _number(value: Any) -> float | None:
    if isinstance(value, list) and len(value) == 1:
        value = value[0]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _shown(value: Any) -> str:
    text = "null" if value is None else repr(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
