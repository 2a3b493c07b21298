"""Getting the shards of coming batches onto local disk, and keeping what lies there within bounds."""

from __future__ import annotations

import logging
import os
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout

from stamo_dist.data.mixture import Mixture
from stamo_dist.data.plan import Position
from stamo_dist.data.sources import SCRATCH
from stamo_dist.errors import DataError

_log = logging.getLogger(__name__)
_THREADS = 8
_PATIENCE = 60.0  # seconds between two warnings about a shard that does not come
_TOUCH = 60.0  # seconds after which using a shard again is worth noting
_IN_USE = 600.0  # seconds for which a shard that was wanted is not removed: batches wait for their turn that long


class Fetcher:
    """Fetches the shards of a mixture `data.fetch_ahead` batches before they are read."""

    def __init__(self, mixture: Mixture):
        self._mixture, self._ahead = mixture, mixture.data.fetch_ahead
        self._timeout = mixture.data.timeout
        remote = not all(stream.local for stream in mixture.streams)
        self._threads = ThreadPoolExecutor(_THREADS, "fetch") if remote else None
        self._coming: dict[int, Future[None]] = {}
        self._touched: dict[int, float] = {}
        limit = mixture.data.cache_limit
        self._cache = Cache(Path(mixture.data.cache), limit * 1e9) if limit is not None and remote else None

    def ready(self, plan: Iterator[Position]) -> Iterator[Position]:
        """`plan`, each position once its shards are there."""
        if self._threads is None:
            yield from plan
            return
        waiting: deque[tuple[Position, list[int]]] = deque()
        for position in plan:
            waiting.append((position, shards := self._shards(position)))
            for number in shards:
                self._want(number)
            if len(waiting) > self._ahead:
                yield self._wait(*waiting.popleft())
        while waiting:
            yield self._wait(*waiting.popleft())

    def _shards(self, position: Position) -> list[int]:
        return np.unique(self._mixture.shard_of(position.samples)).tolist()

    def _want(self, number: int) -> None:
        now = time.monotonic()
        if now - self._touched.get(number, -_TOUCH) < _TOUCH:
            return
        self._touched[number] = now
        assert self._threads is not None
        self._coming[number] = self._threads.submit(self._fetch, number)

    def _fetch(self, number: int) -> None:
        path = self._mixture.shards[number].path
        try:
            os.utime(path)  # the cache removes what was used longest ago
        except OSError:
            self._mixture.prepare(number)
            if self._cache is not None:
                self._cache.trim()

    def _wait(self, position: Position, shards: list[int]) -> Position:
        for number in shards:
            future = self._coming.pop(number, None)
            waited = 0.0
            while future is not None:
                try:
                    future.result(timeout=_PATIENCE)
                    break
                except FutureTimeout:
                    waited += _PATIENCE
                    where = f"{self._mixture.shards[number].path} is still being fetched"
                    if waited >= self._timeout:
                        raise DataError(f"no batch for {waited:.0f} s (data.timeout): {where}") from None
                    _log.warning("waiting for a batch for %.0f s; %s", waited, where)
            if not os.path.exists(self._mixture.shards[number].path):
                self._mixture.prepare(number)  # removed by another process that shares the cache
        return position

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


class Cache:
    """A folder of shards that holds at most `limit` bytes; those used longest ago go first.

    A shard that is mapped can be removed: its pages stay until the last process lets go of it.
    """

    def __init__(self, root: Path, limit: float):
        self._root, self._limit = Path(os.path.realpath(root.expanduser())), limit

    def trim(self) -> None:
        """Remove shards until the folder is within its limit; one process at a time, the others pass."""
        try:
            with FileLock(self._root / ".trim.lock", timeout=0):
                self._trim()
        except Timeout:
            return

    def _trim(self) -> None:
        found = []
        for path in self._root.rglob("shard.*.mds"):
            if path.parent.name.startswith(SCRATCH):
                continue
            try:
                info = path.stat()
            except FileNotFoundError:
                continue
            found.append((info.st_mtime, info.st_size, path))
        total = sum(size for _, size, _ in found)
        for used, size, path in sorted(found):
            if total <= self._limit:
                return
            if time.time() - used < _IN_USE:
                _log.warning(
                    "the shard cache %s holds %.2f GB, all in use; raise data.cache_limit above %.2f",
                    self._root, total / 1e9, self._limit / 1e9,
                )  # fmt: skip
                return
            path.unlink(missing_ok=True)
            total -= size
