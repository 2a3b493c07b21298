"""The loader: a mixture → this rank's batches, each with the position that follows it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any
from weakref import finalize

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stamo_dist.data.latents import LatentSpec, find_latents
from stamo_dist.data.mixture import Mixture
from stamo_dist.data.pool import Pool
from stamo_dist.data.reader import Reader, ReaderSpec, Slots, SlotShape, Work
from stamo_dist.data.shards import OpenShards
from stamo_dist.errors import RunError

_HELD = 2  # batches the consumer may hold before it gets copies
_FETCH_AHEAD = 16  # batches whose remote shards are fetched in advance
_FETCH_THREADS = 8


@dataclass(frozen=True)
class Cursor:
    """A position in the mixture: `sample_in_epoch` samples, counted over all ranks, of `epoch` were consumed."""

    epoch: int = 0
    sample_in_epoch: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Cursor:
        return cls(int(state["epoch"]), int(state["sample_in_epoch"]))


@dataclass
class Batch:
    """One rank's share of a global batch.

    Attributes:
        images: uint8 (b, H, W, 3), RGB.
        sample: int64 (b,), the mixture's sample numbers.
        source: int64 (b,), index into `Mixture.sources`.
        cursor: Position after this batch, the same on every rank.
        latents: (b, C, h, w) float16 or bfloat16 with `latents: cached`, else None.
    """

    images: Tensor
    sample: Tensor
    source: Tensor
    cursor: Cursor
    latents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.sample)

    def to(self, device: torch.device | str) -> Batch:
        """The batch on `device`; from pinned memory the copy overlaps with what the device is doing."""
        return self._each(lambda t: t.to(device, non_blocking=True))

    def pin(self) -> Batch:
        """A copy in page-locked memory."""
        return self._each(lambda t: t.pin_memory())

    def split(self, size: int) -> list[Batch]:
        """Micro-batches of at most `size` samples, views of this one."""
        return [self._each(lambda t, i=i: t[i : i + size]) for i in range(0, len(self), size)]

    def _each(self, change: Any) -> Batch:
        latents = None if self.latents is None else change(self.latents)
        return replace(
            self, images=change(self.images), sample=change(self.sample), source=change(self.source), latents=latents
        )


def build_loader(
    mixture: Mixture, *, rank: int, world_size: int, ranks_per_node: int, cursor: Cursor, pin_memory: bool,
    workers: int | None = None, latents: str | None = None,
) -> Loader:  # fmt: skip
    """The batches of one rank, from `cursor` on, without end.

    Args:
        mixture: What to read.
        rank, world_size, ranks_per_node: Of this process; `world_size` divides the global batch.
        cursor: Where to begin.
        pin_memory: Deliver page-locked batches (where there is a GPU).
        workers: Processes that decode, 0 for this one; the recipe's `data.workers` when omitted.
        latents: With `latents: cached`, the fingerprint of the VAE whose cache to read.

    Raises:
        DataError: Cached latents are asked for and not there.
        RunError: The processes do not fit the batch, or a worker cannot be started.
    """
    if mixture.global_batch % world_size or world_size % ranks_per_node:
        raise RunError(
            f"{world_size} processes, {ranks_per_node} per node, cannot share a global batch of {mixture.global_batch}"
        )
    spec = None
    if mixture.data.latents == "cached":
        if latents is None:
            raise ValueError("latents: cached needs the fingerprint of the VAE")
        spec = find_latents(mixture.shards, latents)
    nodes = world_size // ranks_per_node
    # Streaming deals a global batch to the nodes first and to the ranks of a node then.
    offset = rank % ranks_per_node * nodes + rank // ranks_per_node
    workers = mixture.data.workers if workers is None else workers
    pin = pin_memory and torch.cuda.is_available()
    return Loader(
        mixture, offset=offset, world_size=world_size, cursor=cursor, pin=pin, workers=workers, latents=spec
    )  # fmt: skip


class Loader:
    """Iterates over Batches for ever; made by `build_loader`. Close it to end its workers.

    Raises:
        DataError: A shard or sample is missing or corrupt.
        RunError: A worker died.
    """

    def __init__(
        self, mixture: Mixture, *, offset: int, world_size: int, cursor: Cursor, pin: bool, workers: int,
        latents: LatentSpec | None,
    ):  # fmt: skip
        self._mixture = mixture
        self._latents = latents
        per_rank = mixture.global_batch // world_size
        data = mixture.data
        self._depth = workers * data.prefetch
        shape = SlotShape(per_rank, data.image_size, latents.shape if latents else None)
        self._slots = Slots(shape, self._depth + _HELD + 1)
        self._free = list(range(self._slots.count))  # the slot freed last goes first: it is still in the cache
        augment = data.augment
        spec = ReaderSpec(
            shards=mixture.shards,
            source=[mixture.sources[mixture.stream_source[stream]] for stream in mixture.shard_stream],
            slots=shape,
            count=self._slots.count,
            seed=mixture.seed,
            augment=(augment.crop, augment.brightness, augment.contrast) if augment.active else None,
            latents=latents,
        )
        self._reader = None if workers else Reader(spec, self._slots)
        self._pool = Pool(spec, self._slots, workers) if workers else None
        self._fetcher = _Fetcher(mixture)
        self._plan = self._fetcher.ready(_positions(mixture, offset, world_size, cursor))
        self._coming: deque[tuple[Cursor, NDArray[np.int64]]] = deque()
        self._ahead = Ahead(lambda: self._read().pin()) if pin else None
        self._closed = False

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        if self._closed:
            raise RunError("the loader is closed; build another one from the last batch's cursor")
        try:
            return self._ahead.take() if self._ahead else self._read()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers and threads; batches that were delivered stay valid."""
        self._closed = True
        if self._ahead is not None:
            self._ahead.close()
        if self._pool is not None:
            self._pool.close()
        self._fetcher.close()
        self._slots.close()

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> Batch:
        if self._reader is not None:
            work = self._work()
            self._reader.fill(work)
        else:
            assert self._pool is not None
            while len(self._pool) < self._depth:
                self._pool.submit(self._work())
            work = self._pool.take()
        cursor, samples = self._coming.popleft()
        return self._deliver(work, cursor, samples)

    def _work(self) -> Work:
        """The next batch to read, in a free slot: `_deliver` always leaves one."""
        cursor, after, samples = next(self._plan)
        self._coming.append((after, samples))
        slot = self._free.pop()
        self._slots.samples(slot, len(samples))[:] = samples
        return Work(slot, cursor.epoch, len(samples))

    def _deliver(self, work: Work, cursor: Cursor, samples: NDArray[np.int64]) -> Batch:
        images = self._slots.images(work.slot, len(samples))
        latents = None
        keep = bool(self._free)
        if self._latents is not None:
            bits = self._slots.latents(work.slot, len(samples))
            dtype = torch.float16 if self._latents.precision == "float16" else torch.bfloat16
            latents = torch.from_numpy(bits.view(np.int16)).view(dtype).clone()
        # The tensor keeps the array alive, through all of its views, so the slot is free once the array is gone.
        batch_images = torch.from_numpy(images)
        if keep:
            finalize(images, self._free.append, work.slot).atexit = False
        else:
            batch_images = batch_images.clone()
            self._free.append(work.slot)
        source = torch.from_numpy(self._mixture.source_of(samples))
        return Batch(batch_images, torch.from_numpy(samples), source, cursor, latents)


def _positions(
    mixture: Mixture, offset: int, world_size: int, cursor: Cursor
) -> Iterator[tuple[Cursor, Cursor, NDArray[np.int64]]]:
    """For each batch: the position before it, the one after it, and this rank's sample numbers."""
    size = mixture.global_batch
    while True:
        if cursor.sample_in_epoch + size > mixture.epoch_size:
            cursor = Cursor(cursor.epoch + 1, 0)
        order = mixture.plan(cursor.epoch)[cursor.sample_in_epoch :]
        whole = len(order) // size
        mine = order[: whole * size].reshape(whole, size)[:, offset::world_size].copy()
        del order
        for i, samples in enumerate(mine):
            after = Cursor(cursor.epoch, cursor.sample_in_epoch + size)
            if i == whole - 1:
                after = Cursor(cursor.epoch + 1, 0)
            yield cursor, after, samples
            cursor = after


class _Fetcher:
    """Puts the shards of coming batches on local disk, some batches ahead."""

    def __init__(self, mixture: Mixture):
        self._mixture = mixture
        self._remote = not all(stream.local for stream in mixture.streams)
        self._threads = ThreadPoolExecutor(_FETCH_THREADS, "fetch") if self._remote else None
        self._shards: dict[int, Future[None]] = {}

    def ready(
        self, plan: Iterator[tuple[Cursor, Cursor, NDArray[np.int64]]]
    ) -> Iterator[tuple[Cursor, Cursor, NDArray[np.int64]]]:
        """`plan`, each batch once its shards are there."""
        if not self._remote:
            yield from plan
        waiting: deque[tuple[Cursor, Cursor, NDArray[np.int64]]] = deque()
        for position in plan:
            self._want(position[2])
            waiting.append(position)
            if len(waiting) > _FETCH_AHEAD:
                oldest = waiting.popleft()
                for number in np.unique(self._mixture.shard_of(oldest[2])).tolist():
                    self._shards[number].result()
                yield oldest

    def _want(self, samples: NDArray[np.int64]) -> None:
        assert self._threads is not None
        for number in np.unique(self._mixture.shard_of(samples)).tolist():
            if number not in self._shards:
                self._shards[number] = self._threads.submit(self._mixture.prepare, number)

    def close(self) -> None:
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)


class Ahead:
    """Calls `make` in a thread, `depth` times ahead of `take`, until that raises; `take` raises it in its turn."""

    def __init__(self, make: Callable[[], Batch], depth: int = 2):
        self._make = make
        self._made: queue.Queue[Batch | BaseException] = queue.Queue(depth)
        self._closed = threading.Event()
        # A new thread begins on the first GPU, and would make a context there.
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._thread = threading.Thread(target=self._run, name="pin", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        if self._device is not None:
            torch.cuda.set_device(self._device)
        made: Batch | BaseException | None = None
        while not isinstance(made, BaseException):
            try:
                made = self._make()
            except BaseException as e:
                made = e
            while True:
                if self._closed.is_set():
                    return
                with suppress(queue.Full):
                    self._made.put(made, timeout=1)
                    break

    def take(self) -> Batch:
        made = self._made.get()
        if isinstance(made, BaseException):
            raise made
        return made

    def close(self) -> None:
        """End the thread; one that is still waiting for data ends after that."""
        self._closed.set()
        with suppress(queue.Empty):
            while True:
                self._made.get_nowait()
        self._thread.join(timeout=5)


def first_frames(mixture: Mixture, count: int) -> Tensor:
    """The first `count` frames of the mixture's order, uint8 (count, H, W, 3), the same in every process."""
    frames = torch.empty(count, mixture.data.image_size, mixture.data.image_size, 3, dtype=torch.uint8)
    shards = OpenShards(mixture.shards)
    samples = np.resize(mixture.plan(0)[:count], count)
    for out, sample, number in zip(frames.numpy(), samples, mixture.shard_of(samples), strict=True):
        mixture.prepare(number)
        shards[number].frame(int(sample - mixture.first[number]), out)
    return frames
