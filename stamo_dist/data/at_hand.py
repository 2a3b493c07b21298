"""Checks of sources against a recipe, using manifests, tables and file sizes. Needs no numpy.

`misfits` is used when sources are opened, remote ones included; `look` by the commands that check before a start.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stamo_dist.data.agreement import INDEX, check_content, check_shards
from stamo_dist.data.schema import EPISODES, REPAIR, Episode, Manifest, first_entries, read_manifest
from stamo_dist.demo import made_by
from stamo_dist.errors import DataError
from stamo_dist.paths import canonical
from stamo_dist.recipe.data import Data, SourceConfig
from stamo_dist.recipe.layers import did_you_mean
from stamo_dist.recipe.load import Loaded

_EACH = 64  # up to this many shards, all sizes are checked when a folder is opened; beyond, the first and last


@dataclass(frozen=True)
class Misfit:
    """A problem as text that names the source, and the recipe field it contradicts."""

    field: str
    text: str


#: Path and manifest of each folder of each source.
Found = Mapping[str, Sequence[tuple[str, Manifest]]]


#: A data set of the Hugging Face Hub, or a folder or file of one.
HUB = re.compile(r"hf://datasets/(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[^/]+))?(/(?P<path>.+?))?/?")
HUB_FORM = "write hf://datasets/OWNER/NAME, with @REVISION and /PATH if need be"


def is_remote(path: str) -> bool:
    """Whether `path` is a URL such as s3://bucket/source."""
    return "://" in path


def resolve(path: str) -> str:
    """Canonical path or URL of a source."""
    return path.rstrip("/") if is_remote(path) else canonical(os.path.expanduser(path))


def cameras_of(manifest: Manifest, source: SourceConfig, views: int) -> list[str]:
    """The existing cameras of a folder that the recipe reads."""
    asked = list(dict.fromkeys(manifest.cameras if source.cameras is None else source.cameras))
    return [camera for camera in asked[: views if views > 1 else None] if camera in manifest.cameras]


def misfits(data: Data, found: Found) -> list[Misfit]:
    """Contradictions between the folders found and the recipe's section, or among the folders."""
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
            near = did_you_mean(camera, manifest.cameras)
            hint = f"; {near}" if near else ""
            yield Misfit(f"{field}.cameras", f"{field}: {path}: has no camera {camera!r}, only {there}{hint}")
    asked = list(dict.fromkeys(manifest.cameras if source.cameras is None else source.cameras))
    if len(asked) < data.views > 1:
        text = f"has {len(asked)} of the {data.views} cameras that data.views reads ({', '.join(asked)})"
        yield Misfit("data.views", f"{field}: {path} {text}")


def _read_twice(
    name: str, source: SourceConfig, path: str, cameras: Sequence[str], read: dict[tuple[str, str, str], str]
) -> Iterator[Misfit]:
    """`read`: source that reads each (path, split, camera); updated."""
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
    """Sources with actions must share one action space."""
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
    """All problems that training would refuse in local sources; remote ones are not checked."""
    problems, found = list[Misfit](), dict[str, list[tuple[str, Manifest]]]()
    for name, source in data.used.items():
        for path in source.paths:
            if is_remote(path):
                if path.startswith("hf://") and not HUB.fullmatch(path):
                    problems.append(Misfit(f"data.sources.{name}.path", f"data.sources.{name}: {path}: {HUB_FORM}"))
                continue
            try:
                found.setdefault(name, []).append((path, read_manifest(Path(path).expanduser())))
            except (DataError, OSError) as e:
                demo = f"; `{command}` makes it" if (command := made_by(path)) else ""
                problems.append(Misfit(f"data.sources.{name}.path", f"data.sources.{name}: {e}{demo}"))
    problems += misfits(data, found)
    for name, folders in found.items():
        source = data.sources[name]
        for path, manifest in folders:
            if source.split in manifest.splits:
                cameras = cameras_of(manifest, source, data.views)
                wrong = damage(Path(path).expanduser(), manifest, source.split, cameras)
                problems += [Misfit(f"data.sources.{name}.path", f"data.sources.{name}: {line}") for line in wrong]
    return problems


def to_encode(loaded: Loaded, *, every: bool = True) -> Iterator[Misfit]:
    """What `stamo encode` has to write of local sources before the recipe can be trained; see `not_encoded`."""
    recipe = loaded.recipe
    kind, field, value = {
        "tokenizer": ("latents", "data.latents", recipe.data.latents),
        "policy": ("states", "policy.targets", recipe.policy.targets),
        "vae": ("", "", ""),
    }[recipe.stage]
    missing = not_encoded(recipe.data, kind, every=every) if value == "cached" else []
    if missing:
        text = f"{field}: cached, but there are no {kind} of {'all' if every else 'any'} shards in {', '.join(missing)}"
        yield Misfit(field, f"{text}; run `{loaded.command('encode')}`, or set {field}: online")


def not_encoded(data: Data, kind: str, *, every: bool = True) -> list[str]:
    """Local folders, SOURCE/SPLIT/CAMERA, without a cache of this kind ("latents", "states") beside their shards.

    `every`: of each shard, else of any. Folders that `look` finds wrong are left out.
    """
    missing = []
    for source in data.used.values():
        for path in source.paths:
            with contextlib.suppress(DataError, OSError, ValueError, KeyError, TypeError):
                folder = Path(path).expanduser()
                for camera in cameras_of(read_manifest(folder), source, data.views):
                    place = folder / source.split / camera
                    needed = len(json.loads((place / INDEX).read_bytes())["shards"]) if every else 1
                    if not any(len(list(cache.glob("shard.*.json"))) >= needed for cache in place.glob(f"{kind}-*")):
                        missing.append(f"{path}/{source.split}/{camera}")
    return missing


def damage(folder: Path, manifest: Manifest, split: str, cameras: Sequence[str], *, every: bool = False) -> list[str]:
    """Files of a split that are missing, of another size than written, or not those of the manifest.

    `every`: see `check_files`.
    """
    problems = []
    if not (folder / split / EPISODES).is_file():
        problems.append(f"{folder / split / EPISODES}: missing; {REPAIR}")
    for camera in cameras:
        place = folder / split / camera
        try:
            content = (place / INDEX).read_bytes()
            check_content(content, f"{split}/{camera}/{INDEX}", manifest, str(place / INDEX))
            entries: list[dict[str, Any]] = json.loads(content)["shards"]
            packed = any(entry["compression"] for entry in entries)
            check_files(str(place), entries, packed=packed, every=every)
            counted = first_entries(entries, manifest.splits[split].frames)
            check_shards(counted, manifest, split, camera, str(place / INDEX))
        except DataError as e:
            problems.append(str(e))
        except (OSError, ValueError, KeyError, TypeError) as e:
            problems.append(f"{place}: index.json cannot be read: {e}; {REPAIR}")
    return problems


def check_files(folder: str, entries: Sequence[dict[str, Any]], *, packed: bool, every: bool = False) -> None:
    """Check that the shards exist with the sizes in index.json; of many, only the first and last unless `every`.

    The others are compared when they are mapped, and by `stamo data check`.

    Raises:
        DataError: Some are missing or have another size; then all shards of the folder are counted.
    """
    files = [(packed and entry["zip_data"]) or entry["raw_data"] for entry in entries]
    if not every and len(files) > _EACH and not any(_wrong(folder, file) for file in (files[0], files[-1])):
        return
    bad = [wrong for file in files if (wrong := _wrong(folder, file))]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{folder}: {len(bad)} of {len(files)} shards are missing or damaged: {', '.join(bad[:3])}{more}; {REPAIR}"
        )


def _wrong(folder: str, file: Mapping[str, Any]) -> str:
    """What is wrong with a shard's file, or nothing."""
    try:
        size = os.stat(os.path.join(folder, file["basename"])).st_size
    except FileNotFoundError:
        return f"{file['basename']} (missing)"
    return "" if size == file["bytes"] else f"{file['basename']} ({size} bytes, index.json says {file['bytes']})"


def too_far(data: Data) -> Iterator[Misfit]:
    """Whether data.horizon exceeds the longest episode; only if all sources are local."""
    if not data.horizon:
        return
    longest = 0
    for source in data.used.values():
        for path in source.paths:
            if is_remote(path):
                return
            try:
                for length in _lengths(Path(path).expanduser() / source.split / EPISODES):
                    if length >= (source.horizon or data.horizon):
                        return
                    longest = max(longest, length)
            except (OSError, ValidationError):
                return  # who reads the table says what is wrong with it
    yield Misfit(
        "data.horizon",
        f"data.horizon: {data.horizon} frames, but the longest episode of all sources has {longest}; "
        f"set data.horizon: {max(1, longest - 1)} or less",
    )


def _lengths(table: Path) -> Iterator[int]:
    with table.open("rb") as lines:
        yield from (Episode.model_validate_json(line).length for line in lines if line.strip())
