"""Opening the sources of a recipe: all are checked, then the data that training needs is written to one file.

A single process maps an anonymous file; of a node's ranks, one opens the sources for all (see `data.node`). Loader
workers inherit the file.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from stamo_dist.data.at_hand import cameras_of, misfits
from stamo_dist.data.cache import Cache
from stamo_dist.data.column_file import ColumnFile, anonymous
from stamo_dist.data.node import NodeShare
from stamo_dist.data.schema import Manifest
from stamo_dist.data.shard_table import ShardTable
from stamo_dist.data.sources import CameraShards, OpenSource, open_camera, open_source
from stamo_dist.errors import DataError
from stamo_dist.recipe.data import Data


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
    problems = list[str]()
    found: dict[str, list[OpenSource]] = {name: [] for name in data.used}
    for name, source in data.used.items():
        pinned = [*growth[name], *[0] * len(source.paths)] if name in growth else [None] * len(source.paths)
        for path, grown in zip(source.paths, pinned, strict=False):
            with _said_of(name, problems):
                found[name].append(open_source(path, cache, grown))
    folders = {name: [(opened.path, opened.manifest) for opened in of_source] for name, of_source in found.items()}
    problems += [misfit.text for misfit in misfits(data, folders)]
    streams: list[list[CameraShards]] = []
    for name, source in data.used.items():
        streams.append([])
        for opened in found[name]:
            if source.split not in opened.manifest.splits:
                continue
            for camera in cameras_of(opened.manifest, source, data.views):
                with _said_of(name, problems):
                    streams[-1].append(open_camera(opened, source.split, camera))
    if problems:
        head = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise DataError("\n".join([f"{head} in the data:", *(f"  - {p}" for p in problems)]))
    return list(found.values()), streams


@contextmanager
def _said_of(name: str, problems: list[str]) -> Iterator[None]:
    try:
        yield
    except DataError as e:
        problems += [f"data.sources.{name}: {line}" for line in str(e).splitlines()]


_CONVERSION: dict[str, Any] = {"checksums": {}, "prefixes": {}, "skipped": [], "given": {}, "source_fingerprint": ""}
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
