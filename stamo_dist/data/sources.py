"""Opening converted sources, local or remote: their manifest, shards, and fetching raw shards when needed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic_core import from_json

import stamo_dist._streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.format import Reader, reader_from_json
from streaming.base.storage.download import CloudDownloader
from streaming.base.stream import Stream
from streaming.base.world import World

from stamo_dist.data.agreement import INDEX, check_content, check_shards
from stamo_dist.data.at_hand import check_files, is_remote, resolve
from stamo_dist.data.cache import SCRATCH, Cache, Hold, fetch_lock, hold
from stamo_dist.data.confined import check_index
from stamo_dist.data.episode_columns import EpisodeColumns, kept_columns, read_columns
from stamo_dist.data.hub import at_commit
from stamo_dist.data.schema import (
    EPISODES,
    MANIFEST,
    REPAIR,
    Episode,
    Manifest,
    first_entries,
    read_episodes,
    read_manifest,
)
from stamo_dist.data.shard_table import ShardTable
from stamo_dist.data.shards import MappedShard
from stamo_dist.errors import DataError

_log = logging.getLogger(__name__)
DEFAULT_CACHE = "~/.cache/stamo"
_DOWNLOAD = {"download_retry": 1, "download_timeout": 120.0, "validate_hash": None, "keep_zip": False, "split": None}
_LOCK_TIMEOUT = 3600.0
_ATTEMPTS = 5  # attempts to fetch a shard, with pauses of about 1, 2, 4 and 8 times _PAUSE
_PAUSE = 1.0  # seconds
#: Texts of errors for which retrying is useless.
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
    later: int = 0  # episodes added by growth that are not read

    def episodes(self, split: str) -> list[Episode]:
        """The episode table of a split, fetched if it is remote.

        Raises:
            DataError: It cannot be fetched, or is damaged.
        """
        return read_episodes(self.root, split, self._table(split))

    def columns(self, split: str) -> EpisodeColumns:
        """As `episodes`, but only the fields that training needs."""
        count = self._table(split)
        read = partial(read_columns, self.root, split, count)
        return kept_columns(self.cache.root, self.root / split / EPISODES, count, read)

    def _table(self, split: str) -> int:
        """Fetch the episode table if it is remote and not cached; returns the number of episodes to read."""
        path, count = self.root / split / EPISODES, self.manifest.splits[split].episodes
        if self.remote:
            path.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(path.with_suffix(".lock"), timeout=_LOCK_TIMEOUT):
                if not path.exists() or _lines(path) < count:  # the cached copy is from before a growth
                    _refresh(f"{self.remote}/{split}/{EPISODES}", path)
        return count


@dataclass(frozen=True)
class CameraShards:
    """One camera of one split.

    Attributes:
        remote: Source to fetch or unpack shards from; None: the raw shards are on local disk.
        hashes: Algorithm of the checksums that streaming verifies.
        shards: Table of the shards.
    """

    camera: str
    remote: str | None
    hashes: str | None
    cache: Cache
    shards: ShardTable
    action_dim: int
    proprio_dim: int

    @property
    def frames(self) -> int:
        return int(self.shards.samples.sum())

    @property
    def local(self) -> bool:
        """Whether the raw shards are permanently on local disk."""
        return self.remote is None

    def prepare(self, number: int) -> None:
        """Put raw shard `number` on local disk: download it, unpack it. One process of a node does it, others wait.

        Raises:
            DataError: It cannot be fetched, or does not match index.json.
        """
        if (held := self.hold(number, must=True)) is not None:
            held.close()

    def hold(self, number: int, *, must: bool) -> Hold | None:
        """`prepare` the shard, and keep it on local disk until the hold is closed; None if it is local permanently.

        Unless `must`, also None if another process is fetching it or shards in use fill the cache.

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
            raise DataError(f"{self.remote}: shard {path.name} cannot be had: {_said(e)}") from e

    def open(self, number: int) -> MappedShard:
        """`prepare` the shard, and map it.

        Raises:
            DataError: As `prepare`, or it is damaged.
        """
        with nullcontext() if self.local else self.hold(number, must=True) or nullcontext():
            return MappedShard(self.shards[number], cached=not self.local)

    def reader(self, number: int) -> Reader:
        """streaming's reader of shard `number`, created on demand: creating all would dominate opening a source."""
        return reader_from_json(self.shards.folder, "", self.shards.entry(number))

    def _fetch(self, number: int, must: bool) -> Hold | None:
        shard, entry = self.shards[number], self.shards.entry(number)
        path = Path(shard.path)
        path.unlink(missing_ok=True)  # of another size, so left by a killed process
        size = shard.nbytes + (entry["zip_data"]["bytes"] if entry["compression"] else 0)
        with self.cache.reserve(path, size, must=must) as scratch:
            if scratch is None:
                return None
            held: Hold = _try(partial(self._get, number, scratch), shard.path, is_remote(self.remote or ""))
            return held

    def _get(self, number: int, scratch: Path) -> Hold:
        """Fetch the shard; it gets its final name after its checksum was verified."""
        shard = self.shards[number]
        with tempfile.TemporaryDirectory(dir=scratch) as attempt:  # streaming takes an existing file for complete
            stream = Stream(remote=self.remote, local=attempt)
            stream.apply_default({**_DOWNLOAD, "validate_hash": self.hashes})
            stream.prepare_shard(self.reader(number))
            whole = Path(attempt) / Path(shard.path).name
            if _size(whole) != shard.nbytes:
                raise ValueError(f"{_size(whole)} bytes, but index.json says {shard.nbytes}")
            held = hold(str(whole))  # before other processes see it and may evict it
            assert held is not None, "nobody else knows the folder"
            whole.replace(shard.path)
        return held


def _lines(path: Path) -> int:
    with path.open("rb") as f:
        return sum(bool(line.strip()) for line in f)


def _said(error: Exception) -> str:
    """The text of an error; streaming reports every refusal of S3 as "not found"."""
    code = getattr(error, "response", {}).get("Error", {}).get("Code")
    return f"{error} (the store answered {code})" if code else str(error)


def _try(call: Callable[[], Any], what: str, remote: bool = True) -> Any:
    """Call it with retries on errors that may be transient."""
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


def open_source(path: str, cache: str | Cache = DEFAULT_CACHE, growth: int | None = None) -> OpenSource:
    """Read the manifest of a local or remote source.

    Args:
        path: Folder or URL.
        cache: Folder of remote sources.
        growth: Read it as it was after this many growths; None: as it is.

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
            remote = _pinned(resolved) if resolved.startswith("hf://") else resolved
            _download(f"{remote}/{MANIFEST}", fresh)
            manifest = read_manifest(Path(scratch))
            # A reconverted source gets a new folder, so nothing stale is read; a grown one keeps its folder.
            digest = hashlib.sha256(f"{resolved}\0{manifest.origin}".encode())
            folder = root / digest.hexdigest()[:16]
            folder.mkdir(exist_ok=True)
            fresh.replace(folder / MANIFEST)
    except OSError as e:
        raise DataError(f"data.cache: {root}: cannot be written: {e.strerror or e}") from e
    return OpenSource(path, folder, remote, cache, manifest)


def _pinned(url: str) -> str:
    try:
        pinned: str = _try(lambda: at_commit(url), url)
    except OSError as e:
        raise DataError(f"{url}: cannot be read: {e}") from e
    return pinned


def _refresh(remote: str, local: Path) -> None:
    """Fetch a small file, replacing it atomically for its readers."""
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
    remote = f"{source.remote}/{split}/{camera}" if source.remote else None
    expected = manifest.splits[split].frames
    where = str(folder / INDEX)
    entries, content = _read_index(remote, folder, expected)
    check_content(content, f"{split}/{camera}/{INDEX}", manifest, where)
    if any(entry["compression"] for entry in entries) and not source.remote:
        # Unpacked into the cache, because a source's folder may be read-only.
        name = hashlib.sha256(str(folder).encode() + content).hexdigest()[:16]
        remote, packed = str(folder), folder
        folder = source.cache.root / name
        entries, _ = _read_index(remote, folder, 0)
        check_files(str(packed), entries, packed=True)
    elif remote is None:
        check_files(str(folder), entries, packed=False)
    hashes = entries[0]["hashes"][0] if entries and entries[0]["hashes"] else None
    entries = first_entries(entries, expected)
    check_shards(entries, manifest, split, camera, where, grown=bool(source.later))
    if not expected:
        raise DataError(f"{where}: has no frames; {REPAIR}")
    shards = ShardTable.of(str(folder), entries, f"{split}/{camera}", manifest.checksums, keep=remote is not None)
    return CameraShards(camera, remote, hashes, source.cache, shards, manifest.action_dim, manifest.proprio_dim)


def _read_index(remote: str | None, folder: Path, frames: int) -> tuple[list[dict[str, Any]], bytes]:
    """The entries of index.json and its content; fetched if missing, and again if it has too few frames."""
    path = folder / "index.json"
    try:
        if remote:
            stream = Stream(remote=remote, local=str(folder))
            stream.apply_default(_DOWNLOAD)
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / ".index.lock", timeout=_LOCK_TIMEOUT):
                if not path.exists():
                    get = partial(stream.get_shards, _ALONE, allow_unsafe_types=False)
                    _try(get, remote, is_remote(remote))
                elif is_remote(remote) and _count(path) < frames:
                    _refresh(f"{remote}/index.json", path)
        content = path.read_bytes()
        entries: list[dict[str, Any]] = from_json(content)["shards"]
        other = {(entry["version"], entry["format"]) for entry in entries} - {(2, "mds")}
        if other:
            raise ValueError(f"has shards of another format or version: {other}")
        check_index(entries, str(path))
    except DataError:
        raise
    except Exception as e:  # every store raises its own
        raise DataError(f"{remote or folder}: index.json cannot be read: {e}") from e
    return entries, content


def _count(index: Path) -> int:
    return sum(shard["samples"] for shard in json.loads(index.read_bytes())["shards"])
