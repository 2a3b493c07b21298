"""Shared by the HDF5 formats: opening files, lazy frames, and properties that all episodes of a source must share."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from data_tools.formats.checked import an_object, is_text, parse
from data_tools.formats.source import Frames, in_runs
from stamo_dist.errors import DataError

SUFFIXES = (".hdf5", ".h5")
#: Names of an episode's attribute or dataset that tells whether it succeeded.
SUCCESS = ("success", "is_success", "task_success")


@contextmanager
def open_file(path: Path) -> Iterator[h5py.File]:
    """An HDF5 file open for reading.

    Raises:
        DataError: It is truncated, not an HDF5 file, damaged where it was read, or has another layout; or parts of it
            lie in other files, which could be any of this machine.
    """
    try:
        with h5py.File(path, "r") as file:
            now = path.stat()
            if elsewhere := _elsewhere(str(path), now.st_size, now.st_mtime_ns):
                raise DataError(
                    f"{path}: {elsewhere} lies in another file, which is not read; copy it into this one (h5repack)"
                )
            yield file
    except (OSError, KeyError, RuntimeError) as e:
        reason = str(e).encode("utf-8", "replace").decode()
        raise DataError(f"{path}: not a whole HDF5 file ({reason})") from e
    except (TypeError, ValueError, AttributeError, IndexError) as e:
        raise DataError(f"{path}: not laid out as expected ({type(e).__name__}: {e})") from e


@lru_cache(maxsize=256)
def _elsewhere(path: str, size: int, changed: int) -> str:
    """The first link or dataset of a file (of this size and time of change) that lies in another one; "" if none."""
    with h5py.File(path, "r") as file:

        def linked(name: bytes, info: Any) -> bytes | None:
            return name if info.type == h5py.h5l.TYPE_EXTERNAL else None

        def stored(name: bytes) -> bytes | None:
            found = h5py.h5o.open(file.id, name)
            if not isinstance(found, h5py.h5d.DatasetID):
                return None
            how = found.get_create_plist()
            return name if how.get_external_count() or how.get_layout() == h5py.h5d.VIRTUAL else None

        with suppress(OSError, RuntimeError, KeyError):  # damaged: what is read of it will say so
            name = file.id.links.visit(linked, info=True) or h5py.h5o.visit(file.id, stored)
            return (name or b"").decode("utf-8", "backslashreplace")
    return ""


def read_frames(path: Path, name: str) -> Frames:
    """Frames of a dataset (T, H, W, 3) uint8, read lazily in runs of whole chunks."""

    def frames(indices: Sequence[int]) -> Iterator[np.ndarray]:
        with open_file(path) as file:
            yield from in_runs(file[name], indices)

    return frames


def numbered(group: h5py.Group, prefix: str) -> list[str]:
    """The keys PREFIX0, PREFIX1, … in the order of their numbers."""
    found = (re.fullmatch(rf"{prefix}(\d+)", key) for key in group)
    return [match[0] for match in sorted((m for m in found if m), key=lambda m: int(m[1]))]


def demonstrations(path: Path, file: h5py.File, layout: str) -> tuple[h5py.Group, list[str]]:
    """The group `data` of a file, and its keys demo_0, demo_1, …

    Raises:
        DataError: There is no such group: the file has another layout.
    """
    data = file.get("data")
    demos = numbered(data, "demo_") if isinstance(data, h5py.Group) else []
    if not demos:
        raise DataError(f"{path}: no group data/demo_0: not {layout}'s HDF5 layout")
    return data, demos


def keys_below(group: h5py.Group) -> list[str]:
    """The datasets below a group with their types and shapes, for messages."""
    found: list[str] = []
    group.visititems(lambda k, v: found.append(f"{k} {v.dtype} {v.shape}") if isinstance(v, h5py.Dataset) else None)
    return found


def node(group: h5py.Group, key: str) -> Any:
    """The dataset or group of this key; None if it is missing or a broken link."""
    try:
        return group.get(key)
    except (KeyError, OSError, TypeError):
        return None


class OpenOnce(h5py.Group):
    """A group that caches its opened nodes, and those below them.

    Opening a node costs h5py more than reading its shape. The file must not change meanwhile.
    """

    def __init__(self, group: h5py.Group):
        super().__init__(group.id)
        self._nodes: dict[str, Any] = {}
        self._names: list[str] | None = None

    def __getitem__(self, name: Any) -> Any:
        if name not in self._nodes:
            if self._lacks(name):
                raise KeyError(name)
            found = super().__getitem__(name)
            self._nodes[name] = OpenOnce(found) if isinstance(found, h5py.Group) else found
        return self._nodes[name]

    def get(self, name: Any, default: Any = None, **which: bool) -> Any:
        if which:
            return super().get(name, default, **which)
        try:
            return self[name]
        except KeyError:
            return default

    def __contains__(self, name: Any) -> bool:
        return name in self._nodes or (not self._lacks(name) and super().__contains__(name))

    def __iter__(self) -> Iterator[str]:
        if self._names is None:
            self._names = list(super().__iter__())
        return iter(self._names)

    def _lacks(self, name: Any) -> bool:
        """Whether a name without slashes is certainly missing."""
        return isinstance(name, str) and "/" not in name and name not in list(self)


def node_once(group: h5py.Group, key: str) -> Any:
    """As `node`, with the cache of `OpenOnce` if the group is one."""
    found = node(group, key)
    return OpenOnce(found) if isinstance(found, h5py.Group) else found


def is_rows(found: Any) -> bool:
    """A dataset with rows."""
    return isinstance(found, h5py.Dataset) and found.shape is not None and found.ndim > 0


def is_texts(found: Any) -> bool:
    """A dataset of strings."""
    return (
        isinstance(found, h5py.Dataset)
        and found.shape is not None
        and (found.dtype.kind == "S" or h5py.check_string_dtype(found.dtype) is not None)
    )


def missing_keys(group: h5py.Group, keys: Sequence[str]) -> str | None:
    """A message on which of these row datasets are missing and which exist; None if none is missing."""
    if missing := [key for key in keys if not is_rows(node(group, key))]:
        return f"no {', '.join(missing)}; it has {', '.join(keys_below(group)) or 'nothing'}"
    return None


def number_faults(group: h5py.Group, keys: Sequence[str], axes: tuple[int, ...] | None = (1, 2)) -> list[str]:
    """Messages on existing datasets that are not numeric or do not have this number of axes (None: any)."""
    wrong = (
        found
        for found in (group[key] for key in keys)
        if found.dtype.kind not in "fiub" or (axes and found.ndim not in axes)
    )
    form = " or ".join({1: "(T,)", 2: "(T, D)"}[n] for n in axes or (2,))
    return [f"{found.name} is {found.dtype} {found.shape}, not numbers {form}" for found in wrong]


def others(group: h5py.Group, prefix: str) -> list[str]:
    """Keys that begin with the episodes' prefix but are not episodes: no number follows, or it is not a group."""
    known = set(numbered(group, prefix))
    return [key for key in group if key.startswith(prefix) and key not in known]


def left_out(path: Path, found: Sequence[str]) -> list[str]:
    """A note on the keys that `others` returns."""
    return [f"left out: {', '.join(found)} of {path.name}, which are no episodes by their names"] if found else []


def is_images(dataset: Any) -> bool:
    """RGB frames: uint8 (T, H, W, 3)."""
    return (
        isinstance(dataset, h5py.Dataset) and dataset.dtype == np.uint8 and dataset.ndim == 4 and dataset.shape[3] == 3
    )


def image_faults(group: h5py.Group, keys: Sequence[str]) -> list[str]:
    """Messages on datasets that are not RGB frames."""
    wrong = (group[key] for key in keys if not is_images(group[key]))
    return [f"{d.name} is {d.dtype} {d.shape}, not uint8 RGB (T, H, W, 3)" for d in wrong]


def read_json(node: h5py.Group, name: str) -> dict[str, Any]:
    """The JSON object in an attribute of a group; {} if the attribute is missing.

    Raises:
        DataError: It is not a JSON object; names file and attribute.
    """
    where = place(node, name)
    said = attribute_text(node, name)
    return an_object(parse(said, where), where) if said is not None else {}


def place(node: h5py.Group, name: str) -> str:
    """File and attribute, for messages."""
    return f"{node.file.filename}: {node.name}: attribute {name}"


def attribute(node: h5py.Group, name: str) -> Any:
    """An attribute as a Python value; an array of one is unwrapped; None if it is missing."""
    value = node.attrs.get(name)
    if isinstance(value, h5py.Empty):
        return None
    if isinstance(value, np.ndarray) and value.size == 1:
        value = value.ravel()[0]
    return value.item() if isinstance(value, np.generic) and not isinstance(value, np.bytes_ | np.str_) else value


def attribute_text(node: h5py.Group, name: str) -> str | None:
    """A string attribute; None if it is missing.

    Raises:
        DataError: It is not a string; names file and attribute.
    """
    value = attribute(node, name)
    if value is None:
        return None
    if not isinstance(value, bytes | str):
        raise DataError(f"{place(node, name)} must be a text, not {type(value).__name__} {value!r:.40}")
    try:
        return text(value)
    except DataError as e:
        raise DataError(f"{place(node, name)}: {e}") from e


def text(value: Any) -> str:
    """An attribute or scalar as text: strings and bytes unchanged, the first item of a list.

    Raises:
        DataError: It is not UTF-8.
    """
    if isinstance(value, h5py.Dataset):
        value = value[()]
    if isinstance(value, np.ndarray):
        value = value.ravel()[0] if value.size else ""
    said = value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else str(value)
    if not is_text(said):
        raise DataError(f"not UTF-8: {value!r:.60}")
    return said


def success(episode: h5py.Group) -> bool | None:
    """Whether an episode succeeded, by an attribute or the last value of a dataset; None if neither exists."""
    for name in SUCCESS:
        for value in (attribute(episode, name), node(episode, name)):
            if value is not None and not isinstance(value, h5py.Group) and (said := _flag(value)) is not None:
                return said
    return None


def _flag(value: Any) -> bool | None:
    if isinstance(value, h5py.Dataset):
        value = value[()] if value.shape is not None else ()
    values = np.asarray(value).ravel()
    if not values.size or values.dtype.kind not in "SUObiuf":
        return None
    last = values[-1]
    if values.dtype.kind in "SUO":
        said = last.decode("utf-8", "replace") if isinstance(last, bytes) else str(last)
        return {"true": True, "1": True, "false": False, "0": False}.get(said.lower())
    return bool(last) if last in (0, 1) else None


def numeric(group: h5py.Group) -> list[str]:
    """Keys of numeric datasets (T, …) below a group, except images, with their shapes, for messages."""
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
    """Properties that must be equal in all episodes, and the episode in which each value was first seen."""

    def __init__(self) -> None:
        self._seen: dict[str, dict[Any, str]] = {}

    def note(self, where: str, properties: Mapping[str, Any]) -> None:
        """Add one episode's properties, which must be hashable."""
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
