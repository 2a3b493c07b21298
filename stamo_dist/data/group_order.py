"""The sample order of groups: for runs begun before lanes existed, and for sources kept in stored order.

A source is cut into groups of whole shards, about `GROUP` samples each, in a new random arrangement every epoch.
Within a group, samples have the order of streaming's shuffle, so a source of one group has exactly streaming's order.
Streaming shuffles a whole epoch at once in every process; groups bound time and memory for large sources.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

import stamo_dist._streaming  # noqa: F401  # isort: skip  must precede streaming
from streaming.base.shuffle import get_shuffle

from stamo_dist.data.plan import BatchPlan
from stamo_dist.data.schedule import Schedule
from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.sampling import Shuffle

GROUP = 1 << 20
_AT_A_TIME = 1 << 15  # samples


class SourceOrder:
    """Position → sample number, for one source.

    Args:
        first: int64 (shards,), number of each shard's first sample in the mixture.
        counts: int64 (shards,), samples per shard.
        shuffle: How to shuffle within a group.
        seed: The run's.
        group: Samples that are shuffled at a time, rounded up to whole shards.

    Attributes:
        samples: Length of one epoch.
    """

    def __init__(
        self, first: NDArray[np.int64], counts: NDArray[np.int64], shuffle: Shuffle, seed: int, group: int = GROUP
    ):
        self._first, self._counts, self._shuffle, self._seed, self._size = first, counts, shuffle, seed, group
        self.samples = int(counts.sum())
        self._dtype = np.uint32 if int((first + counts).max()) < 2**32 else np.int64
        # Positions are requested consecutively, so only the last arrangement and group are cached.
        self._arrange = lru_cache(maxsize=1)(self._new_arrangement)
        self._group = lru_cache(maxsize=1)(self._new_group)

    def at(self, start: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        """Sample numbers int64 (n,) and epochs int32 (n,) of positions `start` up to `stop`."""
        samples = np.empty(stop - start, np.int64)
        epochs = np.empty(stop - start, np.int32)
        position = start
        while position < stop:
            epoch, offset = divmod(position, self.samples)
            _, ends = self._arrange(epoch)
            number = int(np.searchsorted(ends, offset, side="right"))
            take = min(stop - position, int(ends[number]) - offset)
            group = self._group(epoch, number)
            begin = offset - (int(ends[number]) - len(group))
            samples[position - start : position - start + take] = group[begin : begin + take]
            epochs[position - start : position - start + take] = epoch
            position += take
        return samples, epochs

    def _new_arrangement(self, epoch: int) -> tuple[list[NDArray[np.int64]], NDArray[np.int64]]:
        """The shards of each group of an epoch, and where each group ends."""
        shards = np.arange(len(self._counts))
        if self._shuffle.enabled and self.samples > self._size:
            shards = np.random.Generator(np.random.Philox(key=[self._seed, epoch])).permutation(shards)
        ends = self._counts[shards].cumsum()
        cuts = np.unique(np.searchsorted(ends, np.arange(self._size, self.samples, self._size)) + 1)
        groups = [part for part in np.split(shards, cuts) if len(part)]
        return groups, ends[np.cumsum([len(part) for part in groups]) - 1]

    def _new_group(self, epoch: int, number: int) -> NDArray[np.integer]:
        shards = self._arrange(epoch)[0][number]
        counts = self._counts[shards]
        numbers = np.arange(counts.sum()) + np.repeat(self._first[shards] - (counts.cumsum() - counts), counts)
        if self._shuffle.enabled:
            # Streaming seeds with seed + epoch: this sum must differ between the groups of an epoch.
            seed = (self._seed + number * 0x9E3779B1) % 2**31
            numbers = numbers[get_shuffle(self._shuffle.algorithm, counts, 1, seed, epoch, self._shuffle.block_size)]
        return numbers.astype(self._dtype)


class GroupOrder:
    """Global batches by number, from the schedule and the orders of the sources.

    Args:
        schedule: The source of each position.
        orders: (sources,), the order of each source's samples.
        global_batch: Samples of each batch.
        seed: Of the run.
        shuffle: Shuffle each batch, so that every rank's share contains every source.
    """

    def __init__(
        self,
        schedule: Schedule,
        orders: Sequence[SourceOrder],
        global_batch: int | BatchSizes,
        seed: int,
        *,
        shuffle: bool,
    ):
        self._schedule, self._orders, self._sizes = schedule, orders, BatchSizes.of(global_batch)
        self._seed, self._shuffle = seed, shuffle

    def share(self, number: int, of: int, batch: int = 0) -> NDArray[np.int64]:
        """Slots of one of `of` equal shares of a batch: every `of`-th, so that each share contains every source."""
        return np.arange(number, self._sizes.at(batch), of)

    def at_a_time(self, slots: int) -> int:
        """Number of batches to plan per call; all slots are planned, also those not requested."""
        return max(1, _AT_A_TIME // self._sizes.largest)

    def plan(self, batch: int, count: int, slots: NDArray[np.int64] | None = None) -> BatchPlan:
        """Batches `batch` up to `batch + count`, fewer at the end of the data or of batches of that size.

        Only these `slots`, all when omitted.
        """
        size, phase = self._sizes.at(batch), self._sizes.phase(batch)
        interval = self._schedule.interval(self._sizes.before(batch), self._sizes.left(batch, count) * size)
        samples = np.empty(len(interval.source), np.int64)
        epochs = np.empty(len(interval.source), np.int32)
        for s in np.flatnonzero(interval.end > interval.begin):
            mine = interval.source == s
            samples[mine], epochs[mine] = self._orders[s].at(int(interval.begin[s]), int(interval.end[s]))
        whole = len(samples) // size
        samples, epochs = samples[: whole * size].reshape(whole, size), epochs[: whole * size].reshape(whole, size)
        if self._shuffle:
            order = _random_order(self._seed, phase, batch, whole, size)
            samples, epochs = np.take_along_axis(samples, order, 1), np.take_along_axis(epochs, order, 1)
        return BatchPlan(samples, epochs) if slots is None else BatchPlan(samples[:, slots], epochs[:, slots])


def _random_order(seed: int, phase: int, batch: int, count: int, size: int) -> NDArray[np.int64]:
    """A permutation for each of `count` batches of a phase, (count, size), that depends on the batch's number alone."""
    blocks = -(-size // 4)  # Philox yields four numbers per counter value
    generator = np.random.Philox(key=[seed, 0xBA7C4], counter=[batch * blocks, phase, 0, 0])
    numbers = generator.random_raw(count * blocks * 4)
    return numbers.reshape(count, blocks * 4)[:, :size].argsort(axis=1, kind="stable")
