"""Whether the sources are what a recipe asks of them: by manifests, tables and the sizes of files. Needs no numpy.

`misfits` serves whoever opens sources, remote ones too; `look` the commands that look before anything is started.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stamo_dist.data.schema import EPISODES, REPAIR, Episode, Manifest, read_manifest
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import Data, SourceConfig

_EACH = 64  # shards of a folder of which every size is looked at when it is opened; of more, the first's and the last's


@dataclass(frozen=True)
class Misfit:
    """What is wrong, in words that name the source, and the field of the recipe that says otherwise."""

    field: str
    text: str


#: Path and manifest of each folder of each source.
Found = Mapping[str, Sequence[tuple[str, Manifest]]]


def is_remote(path: str) -> bool:
    """Whether `path` is a URL such as s3://bucket/source."""
    return "://" in path


def resolve(path: str) -> str:
    """One spelling for every way to name the same source."""
    if is_remote(path):
        return path.rstrip("/")
    path = os.path.expanduser(path)
    folder, name = os.path.split((path if os.path.isabs(path) else os.path.join(os.getcwd(), path)).rstrip("/"))
    real = os.path.join(_real(folder), name)
    return os.path.realpath(real) if name in ("", ".", "..") or os.path.islink(real) else real


@lru_cache(maxsize=64)
def _real(folder: str) -> str:
    """Of the folder in which many sources lie: a look at each folder above it is a request to a shared disk."""
    return os.path.realpath(folder)


def cameras_of(manifest: Manifest, source: SourceConfig, views: int) -> list[str]:
    """The cameras that are read of a folder, of those that it has."""
    asked = list(dict.fromkeys(manifest.cameras if source.cameras is None else source.cameras))
    return [camera for camera in asked[: views if views > 1 else None] if camera in manifest.cameras]


def misfits(data: Data, found: Found) -> list[Misfit]:
    """What of the folders that were found is not as the recipe's section says, or does not go together."""
    problems = list[Misfit]()
    read: dict[tuple[str, str, str], str] = {}
    for name, folders in found.items():
        source = data.sources[name]
        for path, manifest in folders:
            problems += _of_folder(name, source, data, path, manifest)
            problems += _read_twice(name, source, path, cameras_of(manifest, source, data.views), read)
    if data.horizon:
        problems += _action_spaces({name: folders for name, folders in found.items() if data.sources[name].actions})
    return problems


def _of_folder(name: str, source: SourceConfig, data: Data, path: str, manifest: Manifest) -> Iterator[Misfit]:
    field = f"data.sources.{name}"
    if manifest.image_size != data.image_size:
        yield Misfit(
            "data.image_size",
            f"{field}: {path} has frames of {manifest.image_size} px, but data.image_size is {data.image_size}; "
            f"convert it with --size {data.image_size} or change data.image_size",
        )
    there = ", ".join(manifest.cameras) or "none"
    if source.split not in manifest.splits:
        splits = ", ".join(manifest.splits) or "none"
        yield Misfit(f"{field}.split", f"{field}: {path}: has no split {source.split!r}, only {splits}")
    if source.cameras == []:
        yield Misfit(f"{field}.cameras", f"{field}: cameras is empty; name some of {there}")
    for camera in dict.fromkeys(source.cameras or ()):
        if camera not in manifest.cameras:
            yield Misfit(f"{field}.cameras", f"{field}: {path}: has no camera {camera!r}, only {there}")
    asked = list(dict.fromkeys(manifest.cameras if source.cameras is None else source.cameras))
    if len(asked) < data.views > 1:
        text = f"has {len(asked)} of the {data.views} cameras that data.views reads ({', '.join(asked)})"
        yield Misfit("data.views", f"{field}: {path} {text}")


def _read_twice(
    name: str, source: SourceConfig, path: str, cameras: Sequence[str], read: dict[tuple[str, str, str], str]
) -> Iterator[Misfit]:
    """`read`: what was read so far, by which source; added to."""
    twice: dict[str, list[str]] = {}
    for camera in cameras:
        key = (resolve(path), source.split, camera)
        if key in read:
            twice.setdefault(read[key], []).append(camera)
        read.setdefault(key, name)
    for other, shared in twice.items():
        what = f"{path}, split {source.split}, {', '.join(shared)}"
        yield Misfit(
            f"data.sources.{name}.path",
            f"data.sources.{name}: reads the same frames as data.sources.{other} ({what}); "
            "name a source once and give it the sum of the weights",
        )


def _action_spaces(found: Found) -> Iterator[Misfit]:
    """Actions of one batch must mean the same; sources without actions may be mixed in."""
    spaces: dict[tuple[int, str], list[str]] = {}
    for name, folders in found.items():
        for _, manifest in folders:
            if manifest.action_dim:
                spaces.setdefault((manifest.action_dim, manifest.convention), []).append(name)
    if len(spaces) > 1:
        each = "; ".join(
            f"{', '.join(dict.fromkeys(names))}: {dim} numbers, {convention}"
            for (dim, convention), names in spaces.items()
        )
        text = f"the actions mean different things ({each}); convert them with one --action convention"
        yield Misfit("data.sources", f"data.sources: {text}")


def look(data: Data) -> list[Misfit]:
    """What training would refuse of the sources on this machine's disks, all at once; remote ones are not looked at."""
    problems, found = list[Misfit](), dict[str, list[tuple[str, Manifest]]]()
    for name, source in data.used.items():
        for path in source.paths:
            if is_remote(path):
                continue
            try:
                found.setdefault(name, []).append((path, read_manifest(Path(path).expanduser())))
            except (DataError, OSError) as e:
                problems.append(Misfit(f"data.sources.{name}.path", f"data.sources.{name}: {e}"))
    problems += misfits(data, found)
    for name, folders in found.items():
        source = data.sources[name]
        for path, manifest in folders:
            if source.split in manifest.splits:
                wrong = damage(Path(path).expanduser(), source.split, cameras_of(manifest, source, data.views))
                problems += [Misfit(f"data.sources.{name}.path", f"data.sources.{name}: {line}") for line in wrong]
    return problems


def damage(folder: Path, split: str, cameras: Sequence[str], *, every: bool = False) -> list[str]:
    """What is missing of a split, or not of the size that was written; `every`: see `check_files`."""
    problems = []
    if not (folder / split / EPISODES).is_file():
        problems.append(f"{folder / split / EPISODES}: missing; {REPAIR}")
    for camera in cameras:
        place = folder / split / camera
        try:
            entries: list[dict[str, Any]] = json.loads((place / "index.json").read_bytes())["shards"]
            packed = any(entry["compression"] for entry in entries)
            check_files(str(place), entries, packed=packed, every=every)
        except DataError as e:
            problems.append(str(e))
        except (OSError, ValueError, KeyError, TypeError) as e:
            problems.append(f"{place}: index.json cannot be read: {e}; {REPAIR}")
    return problems


def check_files(folder: str, entries: Sequence[dict[str, Any]], *, packed: bool, every: bool = False) -> None:
    """Whether the shards lie there with the sizes that index.json says; of many the first and the last, or `every`.

    The others are compared when they are mapped, and by `stamo data check`.

    Raises:
        DataError: Some are missing, or of another size; all of the folder are counted then.
    """
    files = [(packed and entry["zip_data"]) or entry["raw_data"] for entry in entries]
    if not every and len(files) > _EACH and not any(_wrong(f, _size(folder, f)) for f in (files[0], files[-1])):
        return
    with os.scandir(folder) as there:
        sizes = {file.name: file.stat().st_size for file in there}
    bad = [wrong for file in files if (wrong := _wrong(file, sizes.get(file["basename"])))]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{folder}: {len(bad)} of {len(files)} shards are missing or damaged: {', '.join(bad[:3])}{more}; {REPAIR}"
        )


def _size(folder: str, file: Mapping[str, Any]) -> int | None:
    try:
        return os.stat(os.path.join(folder, file["basename"])).st_size
    except FileNotFoundError:
        return None


def _wrong(file: Mapping[str, Any], size: int | None) -> str:
    if size == file["bytes"]:
        return ""
    what = "missing" if size is None else f"{size} bytes, index.json says {file['bytes']}"
    return f"{file['basename']} ({what})"


def too_far(data: Data) -> Iterator[Misfit]:
    """Whether data.horizon is more than any episode has frames, where all sources are on this machine's disks."""
    if not data.horizon:
        return
    longest = 0
    for source in data.used.values():
        for path in source.paths:
            if is_remote(path):
                return
            for length in _lengths(Path(path).expanduser() / source.split / EPISODES):
                if length >= (source.horizon or data.horizon):
                    return
                longest = max(longest, length)
    yield Misfit(
        "data.horizon",
        f"data.horizon: {data.horizon} frames, but the longest episode of all sources has {longest}; "
        f"set data.horizon: {max(1, longest - 1)} or less",
    )


def _lengths(table: Path) -> Iterator[int]:
    try:
        with table.open("rb") as lines:
            yield from (Episode.model_validate_json(line).length for line in lines if line.strip())
    except (OSError, ValidationError):
        return  # who reads the table says what is wrong with it
