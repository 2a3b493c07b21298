"""Frames of shard after shard on their way through the device: one shard is read while another is encoded.

A thread decodes and sends ahead, the caller computes, another thread writes what has come back.
"""

from __future__ import annotations

import queue
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import repeat
from types import TracebackType

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from stamo_dist.data.prefetcher import Prefetcher
from stamo_dist.data.shards import MappedShard
from stamo_dist.device import Device, Fetched, Sent

_AHEAD = 3  # batches
_TOGETHER = 8  # frames that a thread decodes in one go
_UNWRITTEN = 2  # shards whose rows may wait


@dataclass(frozen=True)
class Frames:
    """A batch of frames of one shard, uint8 (b, H, W, 3); `last`: the shard ends with it."""

    shard: int
    images: Tensor
    last: bool
    sent: Sent | None = None

    def on_device(self) -> Tensor:
        return self.images if self.sent is None else self.sent.receive()["images"]


def decoded(
    shards: Sequence[int], open_shard: Callable[[int], MappedShard], batch: int, size: int, pool: ThreadPoolExecutor
) -> Iterator[Frames]:
    """The frames of the shards, batch by batch as their own order cuts them.

    Raises:
        DataError: A shard or a frame cannot be read.
    """
    for number in shards:
        shard = open_shard(number)
        for start in range(0, len(shard), batch):
            stop = min(len(shard), start + batch)
            images = np.empty((stop - start, size, size, 3), np.uint8)
            pieces = [images[i : i + _TOGETHER] for i in range(0, len(images), _TOGETHER)]
            for _ in pool.map(_fill, repeat(shard), range(start, stop, _TOGETHER), pieces):
                pass
            yield Frames(number, torch.from_numpy(images), stop == len(shard))


def _fill(shard: MappedShard, first: int, images: NDArray[np.uint8]) -> None:
    for i, image in enumerate(images, first):
        shard.frame(i, image)


def ahead(frames: Iterator[Frames], device: Device) -> Iterator[Frames]:
    """The same, read in a thread and on their way to the device."""

    def make() -> Frames:
        found = next(frames)
        if not device.is_gpu:
            return found
        return replace(found, sent=device.send({"images": device.pin(found.images)}))

    with closing(Prefetcher(make, device, _AHEAD)) as prefetcher:
        while True:
            try:
                found = prefetcher.take()
            except StopIteration:
                return
            yield found


class Writer:
    """Writes the rows of whole shards in a thread; leaving it waits for all, and raises what went wrong."""

    def __init__(self, write: Callable[[int, NDArray[np.generic]], None], device: Device):
        self._write, self._device = write, device
        self._pool = ThreadPoolExecutor(1, "writer")
        self._rows: list[Fetched] = []
        self._writing = queue.SimpleQueue[Future[None]]()

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._wait(0)
        self._pool.shutdown(cancel_futures=error is not None)

    def put(self, frames: Frames, rows: Tensor) -> None:
        """Rows of a batch that may still be computed on the device."""
        self._rows.append(self._device.fetch(rows))
        if frames.last:
            self._writing.put(self._pool.submit(self._finish, frames.shard, self._rows))
            self._rows = []
            self._wait(_UNWRITTEN)

    def _finish(self, shard: int, rows: list[Fetched]) -> None:
        self._write(shard, np.concatenate([part.wait().numpy() for part in rows]))

    def _wait(self, left: int) -> None:
        while self._writing.qsize() > left:
            self._writing.get().result()
