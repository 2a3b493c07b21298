"""Converted sources, wherever they are: their manifest, their shards, and raw shards on local disk when needed."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import stamo_dist._streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.format import Reader, reader_from_json
from streaming.base.format.mds.encodings import is_mds_encoding_safe
from streaming.base.storage.download import CloudDownloader
from streaming.base.stream import Stream
from streaming.base.world import World

from stamo_dist.data.cache import SCRATCH, Cache, Hold, fetch_lock, hold
from stamo_dist.data.episode_columns import EpisodeColumns, read_columns
from stamo_dist.data.schema import EPISODES, MANIFEST, Episode, Manifest, first_entries, read_episodes, read_manifest
from stamo_dist.data.shards import MappedShard, ShardLayout, ShardSpec
from stamo_dist.errors import DataError

_log = logging.getLogger(__name__)
DEFAULT_CACHE = "~/.cache/stamo"
_DOWNLOAD = {"download_retry": 1, "download_timeout": 120.0, "validate_hash": None, "keep_zip": False, "split": None}
_LOCK_TIMEOUT = 3600.0
_ATTEMPTS = 5  # to fetch a shard, with pauses of about 1, 2, 4 and 8 times _PAUSE between
_PAUSE = 1.0  # seconds
#: In an error's text: trying again is of no use.
_FINAL = ("403", "404", "Forbidden", "AccessDenied", "NoSuch", "No such file", "not found", "credentials")
_ALONE = World(num_nodes=1, ranks_per_node=1, workers_per_rank=1, worker=0)


@dataclass(frozen=True)
class OpenSource:
    """A source whose manifest was read.

    `root` is the local folder with the source's layout; for a remote source that is its cache, and `remote` its URL.
    """

    path: str
    root: Path
    remote: str | None
    cache: Cache
    manifest: Manifest
    later: int = 0  # episodes that came when it grew, and are not read

    def episodes(self, split: str) -> list[Episode]:
        """The episode table of a split, fetched if it is remote.

        Raises:
            DataError: It cannot be had, or is damaged.
        """
        return read_episodes(self.root, split, self._table(split))

    def columns(self, split: str) -> EpisodeColumns:
        """As `episodes`, but only what training needs."""
        return read_columns(self.root, split, self._table(split))

    def _table(self, split: str) -> int:
        """Fetch the episode table if it is remote and not here; how many episodes of it are read."""
        path, count = self.root / split / EPISODES, self.manifest.splits[split].episodes
        if self.remote:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT):
                if not path.exists() or _lines(path) < count:  # it has grown since
                    _refresh(f"{self.remote}/{split}/{EPISODES}", path)
        return count


@dataclass(frozen=True)
class CameraShards:
    """One camera of one split: a streaming Stream and its shards."""

    camera: str
    folder: Path
    frames: int
    stream: Stream
    cache: Cache
    entries: Sequence[dict[str, Any]]  # index.json's, one a shard
    shards: Sequence[ShardSpec]
    local: bool  # the raw shards are on local disk already
    action_dim: int
    proprio_dim: int

    def prepare(self, number: int) -> None:
        """Put raw shard `number` on local disk: download it, unpack it. One process of a node does, others wait.

        Raises:
            DataError: It cannot be had, or is not what index.json says.
        """
        if (held := self.hold(number, must=True)) is not None:
            held.close()

    def hold(self, number: int, *, must: bool) -> Hold | None:
        """`prepare` the shard, and keep it on local disk until the hold is closed; None where it is there for good.

        Unless it `must` be had now, None too where another process fetches it or shards in use take the cache's room.

        Raises:
            DataError: As `prepare`.
        """
        if self.local:
            return None
        shard = self.shards[number]
        path = Path(shard.path)
        try:
            while True:
                if _size(path) == shard.nbytes:
                    held = hold(shard.path)
                else:
                    with fetch_lock(path, _LOCK_TIMEOUT if must else 0):
                        held = hold(shard.path) if _size(path) == shard.nbytes else self._fetch(number, must)
                        if held is None and not must:
                            return None
                if held is not None:
                    return held
        except Timeout as e:
            if not must:
                return None
            raise DataError(f"{path}: another process holds {e.lock_file} for over {_LOCK_TIMEOUT:.0f} s") from None
        except Exception as e:  # every store raises its own
            raise DataError(f"{self.stream.remote or path.parent}: shard {path.name} cannot be had: {_said(e)}") from e

    def open(self, number: int) -> MappedShard:
        """`prepare` the shard, and map it.

        Raises:
            DataError: As `prepare`, or it is damaged.
        """
        with nullcontext() if self.local else self.hold(number, must=True) or nullcontext():
            return MappedShard(self.shards[number], cached=not self.local)

    def reader(self, number: int) -> Reader:
        """streaming's view of shard `number`, made when asked for: for all at once, it is most of opening a source."""
        return reader_from_json(str(self.folder), self.stream.split, self.entries[number])

    def _fetch(self, number: int, must: bool) -> Hold | None:
        shard, entry = self.shards[number], self.entries[number]
        path = Path(shard.path)
        path.unlink(missing_ok=True)  # of another size, so left by a process that was killed
        size = shard.nbytes + (entry["zip_data"]["bytes"] if entry["compression"] else 0)
        with self.cache.reserve(path, size, must=must) as scratch:
            if scratch is None:
                return None
            held: Hold = _try(partial(self._get, number, scratch), shard.path, is_remote(self.stream.remote or ""))
            return held

    def _get(self, number: int, scratch: Path) -> Hold:
        """Fetch the shard; it gets its name when its checksum was right, so it need not be verified again."""
        shard = self.shards[number]
        with tempfile.TemporaryDirectory(dir=scratch) as attempt:  # streaming takes what lies there for whole
            stream = copy.copy(self.stream)
            stream.local = attempt
            stream.prepare_shard(self.reader(number))
            whole = Path(attempt) / Path(shard.path).name
            if _size(whole) != shard.nbytes:
                raise ValueError(f"{_size(whole)} bytes, but index.json says {shard.nbytes}")
            held = hold(str(whole))  # before others see it, who may want its room
            assert held is not None, "nobody else knows the folder"
            whole.replace(shard.path)
        return held


def _lines(path: Path) -> int:
    with path.open("rb") as f:
        return sum(bool(line.strip()) for line in f)


def _said(error: Exception) -> str:
    """An error in words; streaming calls whatever S3 refuses "not found"."""
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return f"{error} (the store answered {code})" if code else str(error)


def _try(call: Callable[[], Any], what: str, remote: bool = True) -> Any:
    """Call it, again where the store may do better the next time."""
    attempts = _ATTEMPTS if remote else 1
    for attempt in range(attempts):
        try:
            return call()
        except Exception as e:  # every store raises its own
            if attempt == attempts - 1 or any(word in str(e) for word in _FINAL):
                raise
            pause = _PAUSE * 2**attempt * random.uniform(0.5, 1.5)
            _log.warning("%s: %s; trying again in %.0f s", what, e, pause)
            time.sleep(pause)
    raise AssertionError("unreachable")


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None


def is_remote(path: str) -> bool:
    """Whether `path` is a URL such as s3://bucket/source."""
    return "://" in path


def resolve(path: str) -> str:
    """One spelling for every way to name the same source."""
    return path.rstrip("/") if is_remote(path) else os.path.realpath(os.path.expanduser(path))


def open_source(path: str, cache: str | Cache = DEFAULT_CACHE, growth: int | None = None) -> OpenSource:
    """Read the manifest of a local or remote source.

    Args:
        path: Folder or URL.
        cache: Where remote sources are kept.
        growth: Read it as it was after it had grown that many times; None: as it is.

    Raises:
        DataError: Missing, empty, unfinished or unreachable.
    """
    opened = _open_source(path, open_cache(cache) if isinstance(cache, str) else cache)
    manifest = opened.manifest.as_of(growth)
    return replace(opened, manifest=manifest, later=opened.manifest.episodes - manifest.episodes)


def open_cache(folder: str, limit: float | None = None) -> Cache:
    """The cache that `data.cache` and `data.cache_limit` (GB) describe."""
    return Cache(Path(os.path.realpath(os.path.expanduser(folder))), None if limit is None else limit * 1e9)


def _open_source(path: str, cache: Cache) -> OpenSource:
    resolved, root = resolve(path), cache.root
    if not is_remote(resolved):
        folder = Path(resolved)
        return OpenSource(path, folder, None, cache, read_manifest(folder))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root, prefix=SCRATCH) as scratch:
            fresh = Path(scratch) / MANIFEST
            _download(f"{resolved}/{MANIFEST}", fresh)
            manifest = read_manifest(Path(scratch))
            # A source that was converted anew gets a new folder, so nothing stale is read; one that grew keeps its own.
            digest = hashlib.sha256(f"{resolved}\0{manifest.origin}".encode())
            folder = root / digest.hexdigest()[:16]
            folder.mkdir(exist_ok=True)
            fresh.replace(folder / MANIFEST)
    except OSError as e:
        raise DataError(f"data.cache: {root}: cannot be written: {e.strerror or e}") from e
    return OpenSource(path, folder, resolved, cache, manifest)


def _refresh(remote: str, local: Path) -> None:
    """Fetch a small file that others may be reading."""
    with tempfile.TemporaryDirectory(dir=local.parent, prefix=SCRATCH) as scratch:
        _download(remote, Path(scratch) / local.name)
        os.replace(Path(scratch) / local.name, local)


def _download(remote: str, local: Path) -> None:
    try:
        _try(lambda: CloudDownloader.direct_download(remote, str(local), 60.0), remote)
    except Exception as e:  # every store raises its own
        raise DataError(f"{remote}: cannot be read: {_said(e)}") from e


def open_camera(source: OpenSource, split: str, camera: str) -> CameraShards:
    """The shards of one camera, checked against index.json and the manifest.

    Args:
        source: From `open_source`.
        split: One of the manifest's splits.
        camera: One of the manifest's cameras.

    Raises:
        DataError: The split or camera does not exist, the index is unreadable, or shards are missing or of the wrong
            size.
    """
    manifest = source.manifest
    if split not in manifest.splits:
        raise DataError(f"{source.path}: has no split {split!r}, only {', '.join(manifest.splits) or 'none'}")
    if camera not in manifest.cameras:
        raise DataError(f"{source.path}: has no camera {camera!r}, only {', '.join(manifest.cameras) or 'none'}")
    folder = source.root / split / camera
    stream = Stream(remote=f"{source.remote}/{split}/{camera}" if source.remote else None, local=str(folder))
    expected = manifest.splits[split].frames
    entries = _read_index(stream, folder, expected)
    if any(entry["compression"] for entry in entries) and not source.remote:
        # Unpacked in the cache, because a source's folder may be read-only.
        name = hashlib.sha256(str(folder).encode() + (folder / "index.json").read_bytes()).hexdigest()[:16]
        stream = Stream(remote=str(folder), local=str(source.cache.root / name))
        entries = _read_index(stream, source.cache.root / name, 0)
        _check_files(folder, entries, packed=True)
        folder = source.cache.root / name
        local = False
    else:
        local = source.remote is None
        if local:
            _check_files(folder, entries, packed=False)
    entries = first_entries(entries, expected)
    frames = sum(entry["samples"] for entry in entries)
    if frames != expected or not frames:
        raise DataError(f"{folder}: index.json counts {frames} frames, the manifest {expected}; convert it again")
    layouts: dict[ShardLayout, ShardLayout] = {}
    shards = [_spec(folder, entry, f"{split}/{camera}", manifest.checksums, layouts) for entry in entries]
    for layout in layouts:
        if unsafe := [e for e in layout.encodings if not is_mds_encoding_safe(e)]:
            raise DataError(f"{folder}: has columns of type {', '.join(unsafe)}, which may run code; convert it again")
    return CameraShards(
        camera, folder, frames, stream, source.cache, entries, shards, local, manifest.action_dim, manifest.proprio_dim
    )


def _read_index(stream: Stream, folder: Path, frames: int) -> list[dict[str, Any]]:
    """The entries of index.json; fetched if it is not there, and again if it counts fewer frames."""
    stream.apply_default(_DOWNLOAD)
    path = folder / "index.json"
    try:
        if stream.remote:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".index.lock", timeout=_LOCK_TIMEOUT):
                if not path.exists():
                    get = partial(stream.get_shards, _ALONE, allow_unsafe_types=False)
                    _try(get, stream.remote, is_remote(stream.remote))
                elif is_remote(stream.remote) and _count(path) < frames:
                    _refresh(f"{stream.remote}/index.json", path)
        index = json.loads(path.read_bytes())
        entries = index["shards"]
        other = {(entry["version"], entry["format"]) for entry in entries} - {(2, "mds")}
        if other:
            raise ValueError(f"has shards of another format or version: {other}")
        if entries and entries[0]["hashes"]:
            stream.validate_hash = entries[0]["hashes"][0]
    except Exception as e:  # every store raises its own
        raise DataError(f"{stream.remote or folder}: index.json cannot be read: {e}") from e
    return entries


def _count(index: Path) -> int:
    return sum(shard["samples"] for shard in json.loads(index.read_bytes())["shards"])


def _spec(
    folder: Path,
    entry: dict[str, Any],
    prefix: str,
    checksums: Mapping[str, str],
    layouts: dict[ShardLayout, ShardLayout],
) -> ShardSpec:
    sizes = tuple(size or None for size in entry["column_sizes"])
    layout = ShardLayout(tuple(entry["column_names"]), tuple(entry["column_encodings"]), sizes)
    raw = entry["raw_data"]
    digest = checksums.get(f"{prefix}/{raw['basename']}")
    if digest is None:
        digest = hashlib.sha256(json.dumps(entry, sort_keys=True).encode()).hexdigest()
    # Equal layouts share one object, which keeps what is sent to workers small.
    layout = layouts.setdefault(layout, layout)
    return ShardSpec(str(folder / raw["basename"]), int(raw["bytes"]), int(entry["samples"]), layout, digest)


def _check_files(folder: Path, shards: Sequence[dict[str, Any]], *, packed: bool) -> None:
    with os.scandir(folder) as entries:
        sizes = {entry.name: entry.stat().st_size for entry in entries}
    bad = []
    for shard in shards:
        info = (packed and shard["zip_data"]) or shard["raw_data"]
        size = sizes.get(info["basename"])
        if size != info["bytes"]:
            what = "missing" if size is None else f"{size} bytes, index.json says {info['bytes']}"
            bad.append(f"{info['basename']} ({what})")
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        raise DataError(
            f"{folder}: {len(bad)} of {len(shards)} shards are missing or damaged: {', '.join(bad[:3])}{more}; "
            "run `stamo data convert` again"
        )
