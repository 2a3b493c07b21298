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
_Place = tuple[int, int]  # of a shard: view, number
_IN_USE = 600.0  # seconds for which a shard that was wanted is not removed: batches wait for their turn that long


class Fetcher:
    """Fetches the shards of a mixture `data.fetch_ahead` batches before they are read."""

    def __init__(self, mixture: Mixture):
        self._mixture, self._ahead = mixture, mixture.data.fetch_ahead
        self._timeout = mixture.data.timeout
        remote = not all(stream.local for view in mixture.views for stream in view.streams)
        self._threads = ThreadPoolExecutor(_THREADS, "fetch") if remote else None
        self._coming: dict[_Place, Future[None]] = {}
        self._touched: dict[_Place, float] = {}
        limit = mixture.data.cache_limit
        self._cache = Cache(Path(mixture.data.cache), limit * 1e9) if limit is not None and remote else None

    def ready(self, plan: Iterator[Position]) -> Iterator[Position]:
        """The positions of `plan`, each yielded once its shards are on local disk."""
        if self._threads is None:
            yield from plan
            return
        waiting: deque[tuple[Position, list[_Place]]] = deque()
        for position in plan:
            waiting.append((position, places := self._places(position)))
            for place in places:
                self._want(place)
            if len(waiting) > self._ahead:
                yield self._wait(*waiting.popleft())
        while waiting:
            yield self._wait(*waiting.popleft())

    def _places(self, position: Position) -> list[_Place]:
        return [
            (v, number)
            for v, view in enumerate(self._mixture.views)
            for number in np.unique(view.shard_of(position.samples)).tolist()
        ]

    def _path(self, place: _Place) -> str:
        return self._mixture.views[place[0]].shards[place[1]].path

    def _prepare(self, place: _Place) -> None:
        self._mixture.views[place[0]].prepare(place[1])

    def _want(self, place: _Place) -> None:
        now = time.monotonic()
        if now - self._touched.get(place, -_TOUCH) < _TOUCH:
            return
        self._touched[place] = now
        assert self._threads is not None
        self._coming[place] = self._threads.submit(self._fetch, place)

    def _fetch(self, place: _Place) -> None:
        try:
            os.utime(self._path(place))  # the cache removes what was used longest ago
        except OSError:
            self._prepare(place)
            if self._cache is not None:
                self._cache.trim()

    def _wait(self, position: Position, places: list[_Place]) -> Position:
        for place in places:
            future = self._coming.pop(place, None)
            waited = 0.0
            while future is not None:
                try:
                    future.result(timeout=_PATIENCE)
                    break
                except FutureTimeout:
                    waited += _PATIENCE
                    where = f"{self._path(place)} is still being fetched"
                    if waited >= self._timeout:
                        raise DataError(f"no batch for {waited:.0f} s (data.timeout): {where}") from None
                    _log.warning("waiting for a batch for %.0f s; %s", waited, where)
            if not os.path.exists(self._path(place)):
                self._prepare(place)  # removed by another process that shares the cache
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
                    self._root,
                    total / 1e9,
                    self._limit / 1e9,
                )
                return
            path.unlink(missing_ok=True)
            total -= size
