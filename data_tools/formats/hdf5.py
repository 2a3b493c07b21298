"""What the HDF5 formats share: opening, lazy frames, and the properties all episodes of a source must agree on."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_tools.formats.source import Frames
from stamo_dist.errors import DataError

SUFFIXES = (".hdf5", ".h5")
#: Frames read at once, at least: a compressed chunk often holds several, and would be unpacked again for each.
RUN = 32


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file open for reading.

    Raises:
        DataError: It is truncated, no HDF5 file, or broken at a place that was read.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as e:
        raise DataError(f"{path}: not a whole HDF5 file ({e})") from e


def read_frames(path: Path, name: str) -> Frames:
    """Frames of a dataset (T, H, W, 3) uint8, read when they are asked for, in runs of whole chunks."""

    def frames(indices: Sequence[int]) -> Iterator[np.ndarray]:
        with open_file(path) as file:
            images = file[name]
            run = images.chunks[0] * -(-RUN // images.chunks[0]) if images.chunks else RUN
            block, start = images[:0], 0
            for i in indices:
                if not start <= i < start + len(block):
                    start = i - i % run
                    block = images[start : start + run]
                yield block[i - start]

    return frames


def numbered(group: h5py.Group, prefix: str) -> list[str]:
    """The keys PREFIX0, PREFIX1, … in the order of their numbers."""
    found = (re.fullmatch(rf"{prefix}(\d+)", key) for key in group)
    return [match[0] for match in sorted((m for m in found if m), key=lambda m: int(m[1]))]


def keys_below(group: h5py.Group) -> list[str]:
    """The datasets below a group with their types and shapes, for messages."""
    found: list[str] = []
    group.visititems(lambda k, v: found.append(f"{k} {v.dtype} {v.shape}") if isinstance(v, h5py.Dataset) else None)
    return found


def missing_keys(group: h5py.Group, keys: Sequence[str]) -> str | None:
    """What is missing of these datasets, with what there is; None if all are there."""
    if missing := [key for key in keys if not isinstance(group.get(key), h5py.Dataset)]:
        return f"no {', '.join(missing)}; it has {', '.join(keys_below(group)) or 'nothing'}"
    return None


def is_images(dataset: Any) -> bool:
    """RGB frames: uint8 (T, H, W, 3)."""
    return (
        isinstance(dataset, h5py.Dataset) and dataset.dtype == np.uint8 and dataset.ndim == 4 and dataset.shape[3] == 3
    )


def image_faults(group: h5py.Group, keys: Sequence[str]) -> list[str]:
    """Datasets that are not RGB frames."""
    wrong = (group[key] for key in keys if not is_images(group[key]))
    return [f"{d.name} is {d.dtype} {d.shape}, not uint8 RGB (T, H, W, 3)" for d in wrong]


def read_json(value: Any) -> dict[str, Any]:
    """A JSON object in an attribute or text; {} if it is none."""
    try:
        parsed = json.loads(value)
    except (TypeError, ValueError):
        return {}
    return parsed if isinstance(parsed, dict) else {}


def relative(src: Path, path: Path) -> str:
    """`path` below `src`, which may be the file itself."""
    return path.relative_to(src).as_posix() if src.is_dir() else path.name


def located(src: Path, file: str) -> Path:
    """The file that `relative` named."""
    return src / file if src.is_dir() else src


class Agreement:
    """Properties that must be the same in all episodes, and where each value was first seen."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[Any, str]] = {}

    def note(self, where: str, properties: Mapping[str, Any]) -> None:
        """Add one episode's properties (hashable values)."""
        for what, value in properties.items():
            self._seen.setdefault(what, {}).setdefault(value, where)

    def problems(self) -> list[str]:
        """One line for each property that differs."""
        return [
            f"{what} differ: "
            + "; ".join(f"{getattr(v, 'text', v)} in {where}" for v, where in values.items())
            + "; convert them separately"
            for what, values in self._seen.items()
            if len(values) > 1
        ]

    def __getitem__(self, what: str) -> Any:
        return next(iter(self._seen[what]))
