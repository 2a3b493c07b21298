"""Global batches by number, from the allocation of their slots and the lanes of each source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.allocation import Allocation
from stamo_dist.data.lanes import Drawn, SourceLanes
from stamo_dist.data.plan import BatchPlan
from stamo_dist.recipe.batch_sizes import BatchSizes

_AT_A_TIME = 1 << 15  # samples


@dataclass(frozen=True)
class _Layout:
    """The layout of the slots of every batch of a stretch: those of the sources, then the spare ones.

    The slots of all sources are interleaved evenly, so that any range of slots contains each source in proportion to
    its share of the batch, and a contiguous range of its lanes.
    """

    source: NDArray[np.int64]  # (slots,)
    number: NDArray[np.int64]  # (slots,) index among its source's slots

    @classmethod
    def of(cls, slots: NDArray[np.int64]) -> _Layout:
        source = np.repeat(np.arange(len(slots)), slots)
        number = np.arange(len(source)) - np.repeat(slots.cumsum() - slots, slots)
        order = np.lexsort((source, (number + 0.5) / np.maximum(1, slots)[source]))
        return cls(source[order], number[order])


class LaneOrder:
    """The samples of any global batch, or of some of its slots.

    Args:
        allocation: The allocation of slots to sources.
        shards: Per source: number of each shard's first sample, and samples per shard, both int64 (shards,).
        batch: Samples of each global batch.
        lanes: Number of lanes of all sources together.
        seed: The run's.
    """

    def __init__(
        self,
        allocation: Allocation,
        shards: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
        batch: int | BatchSizes,
        lanes: int,
        seed: int,
    ):
        self._allocation, self._sizes, self.lanes = allocation, BatchSizes.of(batch), lanes
        self.sources = [
            SourceLanes(first, counts, allocation, s, lanes, seed) for s, (first, counts) in enumerate(shards)
        ]
        self._layout = lru_cache(maxsize=2)(lambda number: _Layout.of(allocation.stretches[number].slots))

    def share(self, number: int, of: int, batch: int = 0) -> NDArray[np.int64]:
        """Slots of one of `of` equal shares of a batch: a contiguous range, and thus contiguous lanes."""
        size = self._sizes.at(batch) // of
        return np.arange(number * size, (number + 1) * size)

    def at_a_time(self, slots: int) -> int:
        """Number of batches to plan per call, for this many slots."""
        return max(1, min(1024, _AT_A_TIME // slots))

    def plan(self, batch: int, count: int, slots: NDArray[np.int64] | None = None) -> BatchPlan:
        """Batches `batch` up to `batch + count`, fewer at the end of the data or of batches of that size.

        Only these `slots`, all when omitted.
        """
        slots = np.arange(self._sizes.at(batch)) if slots is None else slots
        end = batch + self._sizes.left(batch, count)
        if self._allocation.end != np.inf:
            end = min(end, self._sizes.batches(int(self._allocation.end)))
        parts = []
        while batch < end:
            number = self._allocation.number(batch)
            following = self._allocation.stretches[number + 1 : number + 2]
            until = int(min([end, *(stretch.start for stretch in following)]))
            parts.append(self._stretch(number, batch, until - batch, slots))
            batch = until
        samples = np.concatenate([samples for samples, _ in parts]) if parts else np.empty((0, len(slots)), np.int64)
        epochs = np.concatenate([epochs for _, epochs in parts]) if parts else np.empty((0, len(slots)), np.int32)
        return BatchPlan(samples, epochs)

    def _stretch(
        self, number: int, batch: int, count: int, slots: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
        stretch, layout = self._allocation.stretches[number], self._layout(number)
        first = batch - stretch.start
        batches = np.arange(first, first + count)[:, None]
        spare_source, spare_before = stretch.spares(first, count)
        samples, epochs = np.empty((count, len(slots)), np.int64), np.empty((count, len(slots)), np.int32)
        fixed = np.flatnonzero(slots < len(layout.source))
        spare = np.flatnonzero(slots >= len(layout.source))
        source, place = layout.source[slots[fixed]], layout.number[slots[fixed]]
        wanted = spare_source[:, slots[spare] - len(layout.source)]
        for s in np.union1d(source, wanted):
            lanes = self.sources[s].lanes(number)
            filled = spare_source == s
            # Number of its spare samples before each of the batches, and before each spare slot.
            turns = spare_before[s] + filled.cumsum().reshape(filled.shape) - filled
            had = spare_before[s] + filled.sum(1).cumsum()[:, None] - filled.sum(1)[:, None]
            before = stretch.counts[s] + batches * stretch.slots[s] + had
            mine = place[source == s]
            of = lanes.row[mine]
            lane, turn = lanes.lane(of, batches * lanes.width[of] + (mine - lanes.first[of]))
            row, column = np.nonzero(wanted == s)
            extra = turns[row, slots[spare][column] - len(layout.source)]
            spare_lane, spare_turn = lanes.lane(np.full(len(row), len(lanes.width)), extra)
            drawn = Drawn(
                np.append(before + mine, before[row, 0] + stretch.slots[s] + extra - had[row, 0]),
                np.append(lane, spare_lane),
                np.append(turn, spare_turn),
            )
            found, passes = self.sources[s].at(number, drawn)
            cut = count * len(mine)
            at = fixed[source == s]
            samples[:, at], epochs[:, at] = found[:cut].reshape(count, -1), passes[:cut].reshape(count, -1)
            samples[row, spare[column]], epochs[row, spare[column]] = found[cut:], passes[cut:]
        return samples, epochs
