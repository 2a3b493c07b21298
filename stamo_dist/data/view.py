"""The shards of one camera of every folder of a mixture."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.cache import Hold
from stamo_dist.data.shard_table import Shards
from stamo_dist.data.shards import MappedShard
from stamo_dist.data.sources import CameraShards


class CameraView:
    """Concatenated streams, their shards, and each shard's first sample.

    All cameras of a folder hold the same timesteps in the same order: a sample number means the same timestep in every
    view; the bounds between shards may differ.

    Attributes:
        shards: Of all streams.
        first: int64 (shards,), number of each shard's first sample.
        shard_stream: int64 (shards,), index into `streams`.
        samples: Number of samples.
    """

    def __init__(self, streams: Sequence[CameraShards]):
        self.streams = streams
        self.shards = Shards([stream.shards for stream in streams])
        counts = self.shards.samples
        self.samples = int(counts.sum())
        self.first: NDArray[np.int64] = counts.cumsum() - counts
        self.shard_stream = np.repeat(np.arange(len(streams)), np.diff(self.shards.starts))

    def shard_of(self, samples: NDArray[np.int64]) -> NDArray[np.int64]:
        """Index into `shards` of each sample number."""
        return np.searchsorted(self.first, samples, side="right") - 1

    def prepare(self, number: int) -> None:
        """Put raw shard `number` on local disk, if it is remote or packed.

        Raises:
            DataError: It cannot be had.
        """
        stream, of_stream = self._place(number)
        stream.prepare(of_stream)

    def hold(self, number: int, *, must: bool) -> Hold | None:
        """`prepare` the shard and keep it on local disk until the hold is closed; see `CameraShards.hold`.

        Raises:
            DataError: It cannot be had.
        """
        stream, of_stream = self._place(number)
        return stream.hold(of_stream, must=must)

    def open(self, number: int) -> MappedShard:
        """`prepare` the shard, and map it.

        Raises:
            DataError: It cannot be had, or is damaged.
        """
        stream, of_stream = self._place(number)
        return stream.open(of_stream)

    def local(self, number: int) -> bool:
        """Whether shard `number` is permanently on local disk."""
        return self._place(number)[0].local

    def remote(self) -> NDArray[np.bool_]:
        """bool (shards,): shards that are not permanently on local disk."""
        return ~np.array([stream.local for stream in self.streams], bool)[self.shard_stream]

    def _place(self, number: int) -> tuple[CameraShards, int]:
        stream, of_stream = self.shards.place(number)
        return self.streams[stream], of_stream
