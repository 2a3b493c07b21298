"""The loader: this rank's batches of a mixture, each with the position that follows it."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, NamedTuple
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stamo_dist.data.fetch import CacheUse, Fetcher
from stamo_dist.data.frame_cache import CacheSpec
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.plan import Cursor, Position, SampleOrder
from stamo_dist.data.pool import Pool
from stamo_dist.data.prefetcher import Prefetcher
from stamo_dist.data.reader import BatchReader, ReaderSpec
from stamo_dist.data.shards import OpenShards
from stamo_dist.device import CPU, Device, Sent
from stamo_dist.errors import RunError

_log = logging.getLogger(__name__)
_FIRST = 16  # batches planned before the first is read; then four times as many each time
_FEW = 16  # shards kept mapped for reading a few frames
_HELD = 2  # batches that the consumer may hold; further ones are copied


@dataclass
class Batch:
    """One rank's share of a global batch.

    Attributes:
        images: uint8 (b, H, W, 3), RGB: the frames at t.
        sample: int64 (b,), the mixture's sample numbers.
        source: int64 (b,), index into `Mixture.sources`.
        cursor: Position after this batch, the same on every rank.
        replaced: bool (b,), rows whose unreadable frame was replaced by another one of its source.
        latents: (b, C, h, w) float16 or bfloat16 with `latents: cached`.
        views: uint8 (b, views − 1, H, W, 3), frames of the source's further cameras at t.
        state, target_state: float32 (b, tokens, dim), cached states of the frames at t and t + ahead.
        next_states: float32 (b, horizon, tokens, dim), in place of `target_state` with `CachedStates.each`: those of
            the frames t + 1, t + 2, …; 0 from number `ahead` on.
        ahead: int64 (b,), frames from t to the target; less than the horizon if the episode ends before.
        target: uint8 (b, H, W, 3), the frames at t + ahead.
        actions: float32 (b, horizon, A), taken at t, t + 1, …; 0 if `mask` is false.
        mask: bool (b, horizon), whether the action exists.
        proprio: float32 (b, P) at t; 0 beyond a source's own dimensions.
        sent: The same tensors on their way to the GPU, where the loader was given one.

    Fields that the recipe does not need are None.
    """

    images: Tensor
    sample: Tensor
    source: Tensor
    cursor: Cursor
    replaced: Tensor | None = None
    latents: Tensor | None = None
    views: Tensor | None = None
    state: Tensor | None = None
    target_state: Tensor | None = None
    next_states: Tensor | None = None
    ahead: Tensor | None = None
    target: Tensor | None = None
    actions: Tensor | None = None
    mask: Tensor | None = None
    proprio: Tensor | None = None
    sent: Sent | None = None

    def __len__(self) -> int:
        return len(self.sample)

    def cameras(self) -> Tensor:
        """uint8 (b, views, H, W, 3): frames of all cameras at t."""
        first = self.images[:, None]
        return first if self.views is None else torch.cat([first, self.views], dim=1)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`: where it was sent there, what the device does from now on waits for it to arrive."""
        if self.sent is not None:
            arrived: dict[str, Any] = self.sent.receive()
            return replace(self, sent=None, **arrived)
        return self._each(lambda t: t.to(device, non_blocking=True))

    def send(self, device: Device) -> Batch:
        """A copy in page-locked memory; begins to copy it to the device on a stream of its own, beside all else."""
        pinned = self._each(device.pin)
        return replace(pinned, sent=device.send(pinned._tensors()))

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` samples, views of this one."""
        return [self._each(lambda t, i=i: t[i : i + size]) for i in range(0, len(self), size)]

    def _each(self, change: Any) -> Batch:
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if torch.is_tensor(value)}


class CachedStates(NamedTuple):
    """The cached states to read: of the frames at t and t + ahead, or of each frame from t to t + ahead."""

    fingerprint: str  # fingerprint of the StaMo tokenizer
    each: bool = False


class CacheKeys(NamedTuple):
    """The caches read in place of frames: with `latents: cached` the latents of this VAE's fingerprint; states."""

    latents: str | None = None
    states: CachedStates | None = None


NO_CACHE = CacheKeys()


@dataclass(frozen=True)
class Sharing:
    """Sharing of the global batch and the cache with other processes.

    Attributes:
        groups: Virtual workers of this process, a power of two; each one's samples are contiguous.
        node: Ranks that share the cache, including this one; None: this one alone.
    """

    groups: int = 1
    node: range | None = None


ALONE = Sharing()


def build_loader(
    mixture: Mixture,
    *,
    rank: int,
    world_size: int,
    cursor: Cursor,
    device: Device = CPU,
    workers: int | None = None,
    caches: CacheKeys = NO_CACHE,
    sharing: Sharing = ALONE,
) -> Loader:
    """The batches of one rank, from `cursor` on, until the data ends (never, without `max_epochs`).

    Args:
        mixture: What to read.
        rank, world_size: Of this process; `world_size` divides the global batch.
        cursor: Where to begin.
        device: To a GPU, batches are sent ahead: they lie in page-locked memory and are on their way there.
        workers: Processes that decode, 0 for this one; the recipe's `data.workers` when omitted.
        caches: Caches to read in place of frames.
        sharing: The process's share of a batch, and of the node's cache.

    Raises:
        DataError: Cached latents or states are requested and missing.
        RunError: The processes do not fit the batch, or a worker cannot be started.
    """
    sizes = mixture.batches
    if any(size % world_size for size in sizes.sizes):
        raise RunError(f"{world_size} processes cannot share a global batch of {sizes}")
    if sizes.before(sizes.batches(cursor.samples)) != cursor.samples:
        raise RunError(f"position {cursor.samples} is not between two global batches of {sizes}")
    spec = None
    if mixture.data.latents == "cached":
        if caches.latents is None:
            raise ValueError("latents: cached needs the fingerprint of the VAE")
        spec = mixture.find_cache("latents", caches.latents)
    states = caches.states
    targets = None if states is None else mixture.find_cache("states", states.fingerprint)
    workers = mixture.data.workers if workers is None else workers
    found = _Caches(spec, targets, each=states is not None and states.each)
    share = _RankShare(rank, world_size, sharing.groups, sharing.node or range(rank, rank + 1))
    return Loader(mixture, share, found, cursor, device=device, workers=workers)


def cache_use(mixture: Mixture, *, world_size: int, node: range, cursor: Cursor) -> CacheUse | None:
    """Cache space that the processes with the ranks `node` need from `cursor` on; None without remote shards."""
    plan = _positions(mixture, _RankShare(node[0], world_size, 1, node), cursor)
    return CacheUse.of(mixture, plan, cursor.samples)


@dataclass(frozen=True)
class _RankShare:
    """The share of each global batch that a process reads: of each of `groups` contiguous groups, one share.

    `node`: ranks of all processes on its node.
    """

    rank: int
    world_size: int
    groups: int
    node: range

    def slots(self, order: SampleOrder, batch: int) -> NDArray[np.int64]:
        """Slots of global batch number `batch` that the node's processes read, process by process, in reading order."""
        groups = [0]
        while len(groups) < self.groups:  # ordered by halves, so that the sums of a step's groups form one binary tree
            groups = [k for first in groups for k in (first, first + len(groups))]
        shares = self.groups * self.world_size
        numbers = [rank + k * self.world_size for rank in self.node for k in groups]
        return np.concatenate([order.share(number, shares, batch) for number in numbers])


@dataclass(frozen=True)
class _Caches:
    """The caches read in place of frames, and whether states of each frame up to the target are read."""

    latents: CacheSpec | None
    states: CacheSpec | None
    each: bool


class Loader:
    """Iterates over Batches; made by `build_loader`. Close it to end its workers.

    Raises:
        DataError: A shard or sample is missing or corrupt, or does not arrive in time.
        RunError: A worker died.
    """

    def __init__(
        self, mixture: Mixture, share: _RankShare, caches: _Caches, cursor: Cursor, *, device: Device, workers: int
    ):
        self._mixture = mixture
        self._latents, states = caches.latents, caches.states
        data = mixture.data
        self._depth = workers * data.prefetch
        spec = ReaderSpec(
            file=mixture.file,
            shards=mixture.shards,
            shard_source=mixture.shard_source,
            sources=mixture.sources,
            image_size=data.image_size,
            batch=mixture.batches.largest // share.world_size,
            slots=self._depth + _HELD + 1,
            seed=mixture.seed,
            augment=data.augment.model_dump() if data.augment.active else None,
            latents=caches.latents,
            states=states,
            each=caches.each,
            views=[camera.shards for camera in mixture.views[1:]],
            window=mixture.window and replace(mixture.window, target=mixture.window.target and states is None),
            skip=data.on_bad_sample == "skip",
            cache=str(mixture.cache.root),
        )
        self._buffers = spec.memory()
        self._free = list(range(spec.slots))  # the slot freed last is reused first: it is still in the CPU's cache
        self._reader = None if workers else BatchReader(spec, self._buffers)
        self._pool = Pool(spec, self._buffers, workers, stuck=self._where, timeout=data.timeout) if workers else None
        self._fetcher = Fetcher(mixture, _positions(mixture, share, cursor))
        self._coming: deque[tuple[Cursor, int]] = deque()  # position after each batch, and its rows
        self._prefetcher = Prefetcher(lambda: self._read().send(device), device) if device.is_gpu else None
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RunError("the loader is closed; build another one from the last batch's cursor")
        try:
            return self._prefetcher.take() if self._prefetcher else self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the workers and threads; delivered batches stay valid."""
        self._closed = True
        if self._prefetcher is not None:
            self._prefetcher.close()
        if self._pool is not None:
            self._pool.close()
        self._fetcher.close()
        self._buffers.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Batch:
        if self._reader is not None:
            slot, rows = self._next_slot()
            wrong = self._reader.fill(slot, rows)
            self._reader.forget(unused := self._fetcher.done())
        else:
            assert self._pool is not None
            # Submitted batches must not wait for a shard of a later batch, nor for its cache space.
            while len(self._pool) < self._depth and (self._fetcher.ready() or not len(self._pool)):
                self._pool.submit(*self._next_slot())
            slot, wrong = self._pool.take()
            self._pool.forget(unused := self._fetcher.done())
        self._fetcher.release(unused)
        for problem in wrong:
            _log.warning("skipped: %s", problem)
        return self._deliver(slot, *self._coming.popleft())

    def _next_slot(self) -> tuple[int, int]:
        """Write the next sample numbers into a free slot; returns it and its rows. `_deliver` always keeps one free."""
        position = next(self._fetcher)
        slot, rows = self._free.pop(), len(position.samples)
        self._coming.append((position.after, rows))
        views = self._buffers.rows(slot, rows)
        views["samples"][:], views["epochs"][:] = position.samples, position.epochs
        return slot, rows

    def _where(self, slot: int) -> str:
        number = int(self._buffers.rows(slot, 1)["shard"][0])
        source = self._mixture.sources[self._mixture.shard_source[number]]
        return f"source {source}, {self._mixture.shards[number].path}"

    def _deliver(self, slot: int, cursor: Cursor, rows: int) -> Batch:
        memory = self._buffers.memory(slot)
        if self._free:
            # The tensors keep the array alive through all views, so the slot is free once the array is collected.
            finalize(memory, self._free.append, slot).atexit = False
        else:
            memory = memory.copy()
            self._free.append(slot)
        views = self._buffers.views(memory, rows)
        samples = views.pop("samples").copy()
        del views["epochs"], views["shard"]
        tensors: dict[str, Any] = {name: torch.from_numpy(view) for name, view in views.items() if name != "latents"}
        if self._latents is not None:
            dtype = torch.float16 if self._latents.precision == "float16" else torch.bfloat16
            tensors["latents"] = torch.from_numpy(views["latents"].view(np.int16)).view(dtype)
        source = torch.from_numpy(self._mixture.source_of(samples))
        return Batch(sample=torch.from_numpy(samples), source=source, cursor=cursor, **tensors)


def _positions(mixture: Mixture, share: _RankShare, cursor: Cursor) -> Iterator[Position]:
    batch, few = mixture.batches.batches(cursor.samples), _FIRST
    while True:
        slots = share.slots(mixture.order, batch)
        own = share.node.index(share.rank) * (len(slots) // len(share.node))
        mine = slice(own, own + len(slots) // len(share.node))
        plan = mixture.plan(batch, min(few, mixture.order.at_a_time(len(slots))), slots)
        if not len(plan.samples):
            return
        few *= 4
        for samples, epochs in zip(plan.samples, plan.epochs, strict=True):
            batch += 1
            yield Position(Cursor(mixture.batches.before(batch)), samples[mine], epochs[mine], samples)


def first_frames(mixture: Mixture, count: int) -> Tensor:
    """The first `count` frames of the mixture's order, uint8 (count, H, W, 3), the same in every process."""
    frames = torch.empty(count, mixture.data.image_size, mixture.data.image_size, 3, dtype=torch.uint8)
    shards = OpenShards(mixture.shards, _FEW, mixture.views[0].open)
    samples, batch = np.empty(0, np.int64), 0
    while len(samples) < count and len(found := mixture.plan(batch, -(-count // mixture.batches.at(batch))).samples):
        samples, batch = np.append(samples, found), batch + len(found)
    samples = np.resize(samples, count)
    for out, sample, number in zip(frames.numpy(), samples, mixture.shard_of(samples), strict=True):
        shards[number].frame(int(sample - mixture.first[number]), out)
    return frames
