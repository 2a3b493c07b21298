"""Prefetching the shards of coming batches to local disk, and releasing those no longer needed."""

from __future__ import annotations

import logging
import math
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.cache import Cache, Hold
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.plan import Position
from stamo_dist.data.reader import Place
from stamo_dist.data.shards import mappings_allowed
from stamo_dist.errors import DataError

_log = logging.getLogger(__name__)
THREADS = 8  # threads of a process for prefetching, and as many for shards that a batch waits for
_PATIENCE = 60.0  # seconds between two warnings about a shard that does not arrive
#: Limits of the look-ahead, in samples of all processes (each computes their order) and in batches: enough to see every
#: shard in use, and to fetch the next ones before they are read.
_AHEAD_SAMPLES, _AHEAD_BATCHES = 1 << 17, 256


def batches_ahead(mixture: Mixture) -> int:
    """Number of batches to look ahead, as far as the cache has room for their shards."""
    by_itself = min(_AHEAD_BATCHES, _AHEAD_SAMPLES // mixture.batches.largest)
    return max(mixture.data.fetch_ahead, by_itself)


def places_of(mixture: Mixture, samples: NDArray[np.int64]) -> list[Place]:
    """The shards that hold these samples, in all views."""
    return [(v, n) for v, view in enumerate(mixture.views) for n in np.unique(view.shard_of(samples)).tolist()]


@dataclass(frozen=True)
class Upcoming:
    """A position of the plan, the shards it needs, and the remote shards that its node fetches for it.

    The latter include all processes of the node, which share the cache.
    """

    position: Position
    places: list[Place]
    on_node: list[Place]


@dataclass(frozen=True)
class CacheUse:
    """Cache space that a plan's next positions need on one node.

    Attributes:
        shards: Maximum number of remote shards that are partly read at one time.
        needed: Bytes of these and of those fetched meanwhile: with less, shards are fetched repeatedly.
        batch: Maximum bytes of the shards of one batch.
        everything: Bytes of all remote shards.
    """

    shards: int
    needed: int
    batch: int
    everything: int

    @classmethod
    def of(cls, mixture: Mixture, plan: Iterator[Position], begin: int) -> CacheUse | None:
        """Of a plan that begins after so many samples; None if all shards are on local disk."""
        remote = [view.remote() for view in mixture.views]
        all_sizes = np.concatenate([v.shards.nbytes[r] for v, r in zip(mixture.views, remote, strict=True)])
        if not len(all_sizes):
            return None
        sizes: dict[Place, int] = {}
        samples, sizes_of = min(_AHEAD_SAMPLES, mixture.num_samples), mixture.batches  # of few data at most one pass
        count = max(1, sizes_of.batches(begin + samples) - sizes_of.batches(begin))
        first, last, batch = dict[Place, int](), dict[Place, int](), 0
        for i, position in enumerate(islice(plan, count)):
            places = [(v, n) for v, n in places_of(mixture, position.on_node) if remote[v][n]]
            sizes |= {(v, n): int(mixture.views[v].shards.nbytes[n]) for v, n in places if (v, n) not in sizes}
            batch = max(batch, sum(sizes[place] for place in places))
            for place in places:
                first.setdefault(place, i)
                last[place] = i
        begun, size = np.zeros(count + 1, np.int64), np.zeros(count + 1, np.int64)
        for place in first:
            for at, sign in ((first[place], 1), (last[place] + 1, -1)):
                begun[at] += sign
                size[at] += sign * sizes[place]
        everything = int(all_sizes.sum())
        needed = min(int(size.cumsum().max()) + THREADS * int(all_sizes.max()), everything)
        return cls(int(begun.cumsum().max()), needed, batch, everything)

    def check(self, cache: Cache) -> None:
        """Raises:
        DataError: One batch does not fit into the cache.
        """
        if cache.limit is not None and self.batch > cache.limit:
            raise DataError(
                f"data.cache_limit: {cache.limit / 1e9:.3g} GB, but the shards of one batch take "
                f"{self.batch / 1e9:.3g} GB on each node; set {_at_least(self.batch)} or more, better "
                f"{_at_least(self.needed)}, which the {self.shards:,} shards in use at once and those to come need"
            )

    def line(self, cache: Cache) -> str:
        """A line for the user: needed and available space."""
        needed = (
            f"cache: {self.shards:,} shards in use at once, and those to come, need {self.needed / 1e9:.3g} GB on each "
            "node"
        )
        if cache.limit is None:
            return f"{needed}; without data.cache_limit all {self.everything / 1e9:.3g} GB come to lie in {cache.root}"
        given = f"{needed}, data.cache_limit gives {cache.limit / 1e9:.3g} in {cache.root}"
        if cache.limit >= self.needed:
            return given
        return f"{given}: shards are fetched late, and again and again; set {_at_least(self.needed)}"


def _at_least(size: int) -> str:
    """Bytes in GB, rounded up to three digits."""
    unit = 10.0 ** (math.floor(math.log10(size)) - 2)
    return f"{math.ceil(size / unit) * unit / 1e9:.3g}"


class Fetcher:
    """Yields the positions of a plan once their shards are on local disk, where they stay until the batch is `done`.

    It looks ahead as far as the cache has room for the shards of all batches not yet done.
    """

    def __init__(self, mixture: Mixture, plan: Iterator[Position]):
        self._mixture, self._plan = mixture, plan
        self._ahead, self._timeout = batches_ahead(mixture), mixture.data.timeout
        self._limit, self._files = mixture.cache.limit, mappings_allowed()
        self._coming: deque[Upcoming] = deque()
        self._reading: deque[Upcoming] = deque()
        self._uses: Counter[Place] = Counter()  # shard → number of positions not yet done
        self._on_node: Counter[Place] = Counter()
        self._bytes = 0  # of the shards in `_on_node`
        self._fetching: dict[Place, Future[Hold | None]] = {}
        self._held: dict[Place, Hold] = {}
        remote = not all(stream.local for view in mixture.views for stream in view.streams)
        self._threads = ThreadPoolExecutor(THREADS, "fetch") if remote else None
        self._urgent = ThreadPoolExecutor(THREADS, "fetch-now") if remote else None
        if self._threads is not None:
            self._threads.submit(mixture.cache.trim)
        self._next = self._upcoming()

    def __iter__(self) -> Fetcher:
        return self

    def __next__(self) -> Position:
        self._look_ahead()
        if not self._coming:
            if self._next is None:
                raise StopIteration
            self._take()
        upcoming = self._coming.popleft()
        self._reading.append(upcoming)
        self._wait(upcoming)
        return upcoming.position

    def ready(self) -> bool:
        """Whether the next position is available without waiting."""
        self._look_ahead()
        return bool(self._coming) and not any(place in self._fetching for place in self._coming[0].places)

    def done(self) -> list[Place]:
        """The oldest position handed out has been read. Returns the shards that no position needs any more.

        They can be removed once they are `released`.
        """
        upcoming = self._reading.popleft()
        for place in upcoming.on_node:
            self._on_node[place] -= 1
            if not self._on_node[place]:
                del self._on_node[place]
                self._bytes -= self._size(place)
        self._uses.subtract(upcoming.places)
        unused = [place for place in upcoming.places if not self._uses[place]]
        for place in unused:
            del self._uses[place]
        return unused

    def release(self, places: Iterable[Place]) -> None:
        """Allow the cache to remove these shards."""
        for place in places:
            if (held := self._held.pop(place, None)) is not None:
                held.close()

    def __len__(self) -> int:
        """Number of shards needed by positions handed out or within the look-ahead."""
        return len(self._uses)

    def close(self) -> None:
        """Stop the threads; a running fetch finishes on its own."""
        for threads in (self._threads, self._urgent):
            if threads is not None:
                threads.shutdown(wait=False, cancel_futures=True)
        self.release(list(self._held))
        for future in list(self._fetching.values()):
            future.add_done_callback(_give_back)

    def _upcoming(self) -> Upcoming | None:
        position = next(self._plan, None)
        if position is None:
            return None
        places, on_node = places_of(self._mixture, position.samples), list[Place]()
        if self._limit is not None and self._threads is not None:
            on_node = [place for place in places_of(self._mixture, position.on_node) if not self._local(place)]
        return Upcoming(position, places, on_node)

    def _look_ahead(self) -> None:
        """Start fetching the next shards, and retry deferred ones."""
        for place, future in list(self._fetching.items()):
            if future.done() and not future.exception():
                if (held := future.result()) is None:
                    self._fetch(place, must=False)
                else:
                    self._held[place] = held
                    del self._fetching[place]
        while self._next is not None and len(self._coming) <= self._ahead and self._fits(self._next):
            self._take()

    def _fits(self, upcoming: Upcoming) -> bool:
        if len(self._uses) + len(upcoming.places) > self._files:
            return False
        more = sum(self._size(place) for place in upcoming.on_node if place not in self._on_node)
        return self._limit is None or self._bytes + more <= self._limit

    def _take(self) -> None:
        upcoming = self._next
        assert upcoming is not None
        for place in upcoming.on_node:
            if not self._on_node[place]:
                self._bytes += self._size(place)
            self._on_node[place] += 1
        for place in upcoming.places:
            if not self._uses[place] and not self._local(place):
                self._fetch(place, must=False)
            self._uses[place] += 1
        self._coming.append(upcoming)
        self._next = self._upcoming()

    def _fetch(self, place: Place, *, must: bool) -> None:
        threads = self._urgent if must else self._threads
        assert threads is not None, "only what is remote is fetched"
        view, number = place
        self._fetching[place] = threads.submit(partial(self._mixture.views[view].hold, number, must=must))

    def _wait(self, upcoming: Upcoming) -> None:
        for place in upcoming.places:
            if place in self._held and not self._held[place].there():
                self.release([place])
                self._fetch(place, must=True)
        waited = 0.0
        while missing := [place for place in upcoming.places if place in self._fetching]:
            for place in missing:
                future = self._fetching[place]
                if future.done() and not future.exception() and future.result() is None:
                    self._fetch(place, must=True)
            place = missing[0]
            try:
                held = self._fetching[place].result(timeout=_PATIENCE)
            except FutureTimeout:
                waited += _PATIENCE
                where = f"{self._mixture.views[place[0]].shards[place[1]].path} is still being fetched"
                if waited >= self._timeout:
                    raise DataError(f"no batch for {waited:.0f} s (data.timeout): {where}") from None
                _log.warning("waiting for a batch for %.0f s; %s", waited, where)
                continue
            if held is not None:
                self._held[place] = held
                del self._fetching[place]

    def _size(self, place: Place) -> int:
        return int(self._mixture.views[place[0]].shards.nbytes[place[1]])

    def _local(self, place: Place) -> bool:
        return self._mixture.views[place[0]].local(place[1])


def _give_back(future: Future[Hold | None]) -> None:
    with suppress(CancelledError, Exception):
        if (held := future.result()) is not None:
            held.close()
