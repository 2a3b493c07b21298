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

from data_tools.formats.source import Frames, in_runs
from stamo_dist.errors import DataError

SUFFIXES = (".hdf5", ".h5")
#: What an episode's attribute or dataset of its outcome is called.
SUCCESS = ("success", "is_success", "task_success")


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file open for reading.

    Raises:
        DataError: It is truncated, no HDF5 file, broken at a place that was read, or not laid out as expected there.
    """
    try:
        with h5py.File(path, "r") as file:
            yield file
    except (OSError, KeyError, RuntimeError) as e:
        raise DataError(f"{path}: not a whole HDF5 file ({e})") from e
    except (TypeError, ValueError, AttributeError, IndexError) as e:
        raise DataError(f"{path}: not laid out as expected ({type(e).__name__}: {e})") from e


def read_frames(path: Path, name: str) -> Frames:
    """Frames of a dataset (T, H, W, 3) uint8, read when they are asked for, in runs of whole chunks."""

    def frames(indices: Sequence[int]) -> Iterator[np.ndarray]:
        with open_file(path) as file:
            yield from in_runs(file[name], indices)

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


def read_json(node: h5py.Group, name: str) -> dict[str, Any]:
    """A JSON object in an attribute of a group; {} if there is no such attribute.

    Raises:
        DataError: It is something else; names file and attribute.
    """
    value = node.attrs.get(name)
    if value is None:
        return {}
    try:
        parsed = json.loads(text(value))
    except ValueError as e:
        raise DataError(f"{node.file.filename}: {node.name}: attribute {name} is no JSON ({e})") from e
    if not isinstance(parsed, dict):
        raise DataError(f"{node.file.filename}: {node.name}: attribute {name} is no JSON object")
    return parsed


def text(value: Any) -> str:
    """An attribute or a scalar in words: strings and bytes as they are, the first of a list."""
    if isinstance(value, h5py.Dataset):
        value = value[()]
    if isinstance(value, np.ndarray):
        value = value.ravel()[0] if value.size else ""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def success(episode: h5py.Group) -> bool | None:
    """Whether an episode succeeded, by an attribute of it or the last of a dataset's values; None: it does not say."""
    for name in SUCCESS:
        for value in (episode.attrs.get(name), episode.get(name)):
            if value is not None and not isinstance(value, h5py.Group) and (said := _flag(value)) is not None:
                return said
    return None


def _flag(value: Any) -> bool | None:
    values = np.asarray(value[()] if isinstance(value, h5py.Dataset) else value).ravel()
    if not values.size:
        return None
    if values.dtype.kind in "SUO":
        return {"true": True, "1": True, "false": False, "0": False}.get(text(values[-1]).lower())
    return bool(values[-1])


def numeric(group: h5py.Group) -> list[str]:
    """The keys below a group of numbers (T, …) that are no pictures, with their shapes, for messages."""
    found: list[str] = []

    def note(key: str, node: Any) -> None:
        if isinstance(node, h5py.Dataset) and node.ndim in (1, 2) and np.issubdtype(node.dtype, np.number):
            found.append(f"{key} {node.shape[1:]}" if node.ndim > 1 else key)

    group.visititems(note)
    return found


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
