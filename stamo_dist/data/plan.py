"""Global batches of the training stream: which samples, of which sources, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.order import SourceOrder
from stamo_dist.data.schedule import Schedule

_AT_A_TIME = 1 << 15  # samples


@dataclass(frozen=True)
class Cursor:
    """A position in the mixture's stream: so many samples, over all ranks, were consumed."""

    samples: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Cursor:
        return cls(int(state["samples"]))


@dataclass(frozen=True)
class Position:
    """One rank's share of one global batch: the cursor after it, sample numbers and epochs, both (b,).

    `on_node`: int64 (n,), sample numbers of the shares of all ranks on its node.
    """

    after: Cursor
    samples: NDArray[np.int64]
    epochs: NDArray[np.int32]
    on_node: NDArray[np.int64]


@dataclass(frozen=True)
class BatchPlan:
    """Consecutive global batches.

    Attributes:
        samples: int64 (batches, global_batch), the mixture's sample numbers.
        epochs: int32, same shape: how often the source was gone through before.
    """

    samples: NDArray[np.int64]
    epochs: NDArray[np.int32]


class Planner:
    """Global batches by number, from the sources' schedule and orders.

    Args:
        schedule: Which source each position is taken from.
        orders: (sources,), which of a source's samples.
        global_batch: Samples per batch.
        seed: Of the run.
        shuffle: Shuffle each batch, so that every rank's share of it has every source.

    Attributes:
        at_a_time: Batches worth planning in one call.
    """

    def __init__(
        self, schedule: Schedule, orders: Sequence[SourceOrder], global_batch: int, seed: int, *, shuffle: bool
    ):
        self._schedule, self._orders, self._size = schedule, orders, global_batch
        self._seed, self._shuffle = seed, shuffle
        self.at_a_time = max(1, _AT_A_TIME // global_batch)

    def plan(self, batch: int, count: int) -> BatchPlan:
        """Batches `batch` up to `batch + count`; fewer where the data ends."""
        size = self._size
        interval = self._schedule.interval(batch * size, count * size)
        samples = np.empty(len(interval.source), np.int64)
        epochs = np.empty(len(interval.source), np.int32)
        for s in np.flatnonzero(interval.end > interval.begin):
            mine = interval.source == s
            samples[mine], epochs[mine] = self._orders[s].at(int(interval.begin[s]), int(interval.end[s]))
        whole = len(samples) // size
        samples, epochs = samples[: whole * size].reshape(whole, size), epochs[: whole * size].reshape(whole, size)
        if self._shuffle:
            order = _random_order(self._seed, batch, whole, size)
            samples, epochs = np.take_along_axis(samples, order, 1), np.take_along_axis(epochs, order, 1)
        return BatchPlan(samples, epochs)


def _random_order(seed: int, batch: int, count: int, size: int) -> NDArray[np.int64]:
    """A permutation for each of `count` batches, (count, size), that depends on the batch's number alone."""
    blocks = -(-size // 4)  # Philox gives four numbers per count
    numbers = np.random.Philox(key=[seed, 0xBA7C4], counter=[batch * blocks, 0, 0, 0]).random_raw(count * blocks * 4)
    return numbers.reshape(count, blocks * 4)[:, :size].argsort(axis=1, kind="stable")
