"""Opening the sources of a recipe: all are checked, then the data that training needs is written to one file.

A single process maps an anonymous file; of a node's ranks, one opens the sources for all (see `data.node`). Loader
workers inherit the file.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stamo_dist.data.cache import Cache
from stamo_dist.data.column_file import ColumnFile, anonymous
from stamo_dist.data.node import NodeShare
from stamo_dist.data.schema import Manifest
from stamo_dist.data.shard_table import ShardTable
from stamo_dist.data.sources import CameraShards, OpenSource, open_camera, open_source
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import Data, SourceConfig


class OpenedSources:
    """The sources in use, in the recipe's order.

    Attributes:
        file: The file with their tables.
        folders: Folders of each source; their manifests lack fields needed only for conversion.
        streams: Streams of each source, one per folder and camera.
    """

    def __init__(self, file: ColumnFile, cache: Cache):
        self.file = file
        self.folders: list[list[OpenSource]] = []
        self.streams: list[list[CameraShards]] = []
        for folders, streams in file.head["sources"]:
            self.folders.append(
                [
                    OpenSource(path, Path(root), remote, cache, Manifest.model_validate(manifest), later)
                    for path, root, remote, manifest, later in folders
                ]
            )
            self.streams.append([_unpacked(file, number, cache) for number in streams])


def open_all(data: Data, growth: Mapping[str, Sequence[int]], cache: Cache, node: NodeShare | None) -> OpenedSources:
    """Open the sources of a recipe, or use those opened by another process of the node.

    Args:
        data: The recipe's section.
        growth: Source → for each of its paths, the number of growths to read; others are read as they are.
        cache: Folder of remote sources.
        node: Sharing between the ranks of a node that start together.

    Raises:
        DataError: All problems of all sources at once.
    """

    def read() -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
        return _packed(*_read_all(data, growth, cache))

    return OpenedSources(anonymous(*read()) if node is None else node.once("sources", read), cache)


def _read_all(
    data: Data, growth: Mapping[str, Sequence[int]], cache: Cache
) -> tuple[list[list[OpenSource]], list[list[CameraShards]]]:
    """Every source's folders, and its cameras."""
    sources, problems = data.used, list[str]()
    streams: list[list[CameraShards]] = []
    seen: dict[tuple[str, str, str], str] = {}
    found: dict[str, list[OpenSource]] = {}
    for name, source in sources.items():
        streams.append([])
        pinned = [*growth[name], *[0] * len(source.paths)] if name in growth else [None] * len(source.paths)
        for path, grown in zip(source.paths, pinned, strict=False):
            try:
                found.setdefault(name, []).append(opened := open_source(path, cache, grown))
                problems += [f"data.sources.{name}: {p}" for p in _check(opened, source, data)]
                streams[-1] += _open_cameras(name, opened, source, seen, data.views)
            except DataError as e:
                problems += [f"data.sources.{name}: {line}" for line in str(e).splitlines()]
    if data.horizon:
        problems += _one_action_space({name: folders for name, folders in found.items() if sources[name].actions})
    if problems:
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError("\n".join([f"{head} in the data:", *(f"  - {p}" for p in problems)]))
    return list(found.values()), streams


def _check(opened: OpenSource, source: SourceConfig, data: Data) -> list[str]:
    problems = []
    size = opened.manifest.image_size
    if size != data.image_size:
        problems.append(
            f"{opened.path} has frames of {size} px, but data.image_size is {data.image_size}; convert it with "
            f"--size {data.image_size} or change data.image_size"
        )
    if source.cameras == []:
        problems.append(f"cameras is empty; name some of {', '.join(opened.manifest.cameras)}")
    return problems


def _open_cameras(
    name: str, opened: OpenSource, source: SourceConfig, seen: dict[tuple[str, str, str], str], views: int
) -> list[CameraShards]:
    streams, problems = [], []
    twice: dict[str, list[str]] = {}
    cameras = list(dict.fromkeys(opened.manifest.cameras if source.cameras is None else source.cameras))
    if views > 1:
        if len(cameras) < views:
            problems.append(
                f"{opened.path} has {len(cameras)} of the {views} cameras that data.views reads ({', '.join(cameras)})"
            )
        cameras = cameras[:views]
    for camera in cameras:
        key = (opened.remote or str(opened.root), source.split, camera)
        if key in seen:
            twice.setdefault(seen[key], []).append(camera)
        seen.setdefault(key, name)
        try:
            streams.append(open_camera(opened, source.split, camera))
        except DataError as e:
            problems.append(str(e))
    problems += [
        f"reads the same frames as data.sources.{other} ({opened.path}, split {source.split}, {', '.join(shared)}); "
        "name a source once and give it the sum of the weights"
        for other, shared in twice.items()
    ]
    if problems:
        raise DataError("\n".join(problems))
    return streams


def _one_action_space(found: dict[str, list[OpenSource]]) -> list[str]:
    """Check that all sources' actions have one meaning; sources without actions may be mixed in."""
    spaces: dict[tuple[int, str], list[str]] = {}
    for name, folders in found.items():
        for opened in folders:
            if opened.manifest.action_dim:
                space = (opened.manifest.action_dim, opened.manifest.convention)
                spaces.setdefault(space, []).append(name)
    if len(spaces) < 2:
        return []
    each = "; ".join(
        f"{', '.join(dict.fromkeys(names))}: {dim} numbers, {convention}" for (dim, convention), names in spaces.items()
    )
    return [f"data.sources: the actions mean different things ({each}); convert them with one --action convention"]


_CONVERSION: dict[str, Any] = {"checksums": {}, "skipped": [], "given": {}, "source_fingerprint": ""}
_OF_CAMERA = ("camera", "remote", "hashes", "action_dim", "proprio_dim")


def _packed(
    folders: Sequence[Sequence[OpenSource]], streams: Sequence[Sequence[CameraShards]]
) -> tuple[dict[str, Any], dict[str, NDArray[Any]]]:
    cameras, tables, sources = list[dict[str, Any]](), list[dict[str, Any]](), list[Any]()
    arrays: dict[str, NDArray[Any]] = {}
    for of_source, its_streams in zip(folders, streams, strict=True):
        numbers = range(len(cameras), len(cameras) + len(its_streams))
        for number, stream in zip(numbers, its_streams, strict=True):
            table, columns = stream.shards.packed(number)
            tables.append(table)
            cameras.append({field: getattr(stream, field) for field in _OF_CAMERA})
            arrays |= columns
        about = [
            (o.path, str(o.root), o.remote, o.manifest.model_copy(update=_CONVERSION).model_dump(mode="json"), o.later)
            for o in of_source
        ]
        sources.append((about, list(numbers)))
    return {"sources": sources, "cameras": cameras, "tables": tables}, arrays


def _unpacked(file: ColumnFile, number: int, cache: Cache) -> CameraShards:
    return CameraShards(cache=cache, shards=ShardTable.unpacked(file, number), **file.head["cameras"][number])
