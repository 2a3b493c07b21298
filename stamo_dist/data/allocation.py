"""How many samples of each source are in each global batch: exact, in closed form, and as steady as can be.

Of its share of a batch, a source gets the integer part in every batch, in the same slots; the fractional remainders
of all shares fill the spare slots. The k-th spare sample of a source is due when the sum of its remainders reaches
k + phase, and the spare slots take the sources in the order in which they are due. So after any number of batches
every source is within two samples of its quota, and any stretch of the run is computed independently of what precedes
it.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.schedule import Schedule
from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.data import Data

_GOLDEN = 0.6180339887498949
_TINY = 1e-9  # of a sample
_LAST = 3  # samples beyond its part of a batch that a source needs to stay within its limit


@dataclass(frozen=True)
class Stretch:
    """A range of batches of one size in which no weight changes and no source is exhausted.

    Attributes:
        start: Its first batch.
        counts: int64 (sources,), samples of each source before it.
        slots: int64 (sources,), samples of each in every batch.
        rates: float64 (sources,), further samples per batch on average; they sum to `spare`.
        spare: Slots of a batch shared by the remainders.
        credit: float64 (sources,), samples by which each is behind its quota.
    """

    start: int
    counts: NDArray[np.int64]
    slots: NDArray[np.int64]
    rates: NDArray[np.float64]
    spare: int
    credit: NDArray[np.float64]

    def spares(self, first: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Sources of the spare slots of `count` batches from batch `start + first` on, and each source's earlier count.

        Returns int64 (count, spare) and (sources,).
        """
        n = len(self.rates)
        active = np.flatnonzero(self.rates)
        begin = np.zeros(n, np.int64)
        if not self.spare:
            return np.empty((count, 0), np.int64), begin
        start, wanted = first * self.spare, count * self.spare
        rates = self.rates[active]
        phase = (1 - (active * _GOLDEN) % 1) - self.credit[active]
        margin = 4 * (len(active) + int(np.abs(self.credit).sum()) + 1)  # the order by due time and the count differ so
        low = _due_before((start - margin) / self.spare, rates, phase) if start > margin else 0 * active
        high = _due_before((start + wanted + margin) / self.spare, rates, phase)
        source = np.repeat(np.arange(len(active)), high - low)
        item = np.arange(len(source)) + np.repeat(low - (high - low).cumsum() + (high - low), high - low)
        order = np.lexsort((source, (item + phase[source]) / rates[source]))
        before = start - int(low.sum())
        begin[active] = low + np.bincount(source[order[:before]], minlength=len(active))
        return active[source[order[before : before + wanted]]].reshape(count, self.spare), begin

    def counts_after(self, batches: int) -> NDArray[np.int64]:
        """Samples of each source before batch `start + batches`, (sources,)."""
        return self.counts + batches * self.slots + self.spares(batches, 0)[1]


class Allocation:
    """Shares that change at given batches, with caps on how much of a source is read.

    Args:
        weights: Per source: batch from which it holds → weight (0 or more); the first holds from batch 0.
        limits: Maximum samples of each source, inf for none. Once it is reached, the others share its part.
        batch: Samples of each global batch.

    Attributes:
        batches: The sizes of the global batches.
        stretches: One after the other.
        end: Samples until less than a batch is left; inf if a source has no limit.
    """

    def __init__(self, weights: Sequence[Mapping[int, float]], limits: Sequence[float], batch: int | BatchSizes):
        self._weights, self._limits = weights, np.asarray(limits, np.float64)
        self.batches = BatchSizes.of(batch)
        self.stretches: list[Stretch] = []
        changes = sorted({*self.batches.starts, *(int(at) for steps in weights for at in steps)})
        now, counts, quota = 0, np.zeros(len(weights), np.int64), np.zeros(len(weights))
        self.end = np.inf
        while True:
            size = self.batches.at(now)
            wanted = np.array([steps[max(at for at in steps if at <= now)] for steps in weights], np.float64)
            wanted[counts >= self._limits] = 0
            wanted /= wanted.max() or 1  # however small or large: their sum is a number
            share = wanted / (wanted.sum() or 1)
            ending = (wanted > 0) & (self._limits - counts < np.ceil(size * share) + _LAST)
            last = self._mixed(size, share, counts, quota, ending) if ending.any() else None
            if not wanted.sum() or (ending.any() and last is None):
                self.end = float(self.batches.before(now))
                return
            length = 1.0
            if last is not None:
                given = np.where(ending, last, 0)
                rest = share * ~ending
                quota += given + (size - given.sum()) * rest / max(rest.sum(), _TINY)
                stretch = Stretch(now, counts, last, np.zeros(len(weights)), 0, np.zeros(len(weights)))
            else:
                stretch = self._steady(now, size, share, counts, quota)
                length = min(float(next((c for c in changes if c > now), np.inf)) - now, self._lasts(stretch))
                quota = quota + share * size * (0 if length == np.inf else length)
            self.stretches.append(stretch)
            if length == np.inf:
                return
            now += int(length)
            counts = stretch.counts_after(int(length))
            quota = np.where(ending, counts, quota)

    @classmethod
    def of(cls, data: Data, frames: Sequence[int], global_batch: int | BatchSizes) -> Allocation:
        """The allocation of a recipe's sources in use; `frames`: number of frames of each."""
        used = list(zip(data.used.values(), frames, strict=True))
        return cls(
            [{step: w ** (1 / data.temperature) for step, w in s.weights(n).items()} for s, n in used],
            [np.inf if s.max_epochs is None else np.floor(s.max_epochs * n) for s, n in used],
            global_batch,
        )

    @property
    def identity(self) -> list[Any]:
        """JSON values that identify it, for the fingerprint."""
        return [self.batches.plain, self.end, [[s.start, s.slots.tolist(), s.rates.tolist()] for s in self.stretches]]

    @property
    def starts(self) -> NDArray[np.float64]:
        """The sample at which each stretch begins, (stretches,)."""
        return np.array([self.batches.before(stretch.start) for stretch in self.stretches], np.float64)

    def number(self, batch: int) -> int:
        """Which stretch a batch is in."""
        return bisect_right(self.stretches, batch, key=lambda stretch: stretch.start) - 1

    def counts(self, samples: int) -> NDArray[np.int64]:
        """Samples of each source in the batches that the first `samples` fill, (sources,)."""
        batch = self.batches.batches(int(min(samples, self.end)))
        if not self.stretches:  # less than one batch of data
            return np.zeros(len(self._limits), np.int64)
        stretch = self.stretches[self.number(batch)]
        return stretch.counts_after(batch - stretch.start)

    def _steady(
        self, now: int, size: int, share: NDArray[np.float64], counts: NDArray[np.int64], quota: NDArray[np.float64]
    ) -> Stretch:
        exact = size * share
        slots = np.floor(exact + _TINY).astype(np.int64)
        rates = np.where(exact - slots > _TINY, exact - slots, 0)
        spare = size - int(slots.sum())
        if spare and rates.sum():
            rates *= spare / rates.sum()
        return Stretch(now, counts, slots, rates, spare, np.where(rates > 0, quota - counts, 0))

    def _lasts(self, stretch: Stretch) -> float:
        """Number of batches for which no source exceeds its limit; at least one."""
        capped = np.isfinite(self._limits) & (stretch.slots + stretch.rates > 0)
        if not capped.any():
            return np.inf
        left = (self._limits - stretch.counts)[capped]
        low, high = 1, int((left / (stretch.slots + stretch.rates)[capped]).min()) + 4
        while low < high:
            middle = (low + high + 1) // 2
            fits = (stretch.counts_after(middle) <= self._limits).all()
            low, high = (middle, high) if fits else (low, middle - 1)
        return float(low)

    def _mixed(
        self,
        size: int,
        share: NDArray[np.float64],
        counts: NDArray[np.int64],
        quota: NDArray[np.float64],
        ending: NDArray[np.bool_],
    ) -> NDArray[np.int64] | None:
        """The batch with the remaining samples of the `ending` sources; None if they do not fill a batch."""
        left = np.minimum(self._limits - counts, size).astype(np.int64)
        slots = np.where(ending, left, 0)
        while slots.sum() > size:
            slots[slots.argmax()] -= 1
        others = (share > 0) & ~ending
        while missing := size - int(slots.sum()):
            open_ = others & (slots < left)
            if not open_.any():
                return None
            parts = np.where(open_, share, 0)
            exact = missing * parts / parts.sum()
            add = np.minimum(np.floor(exact), left - slots).astype(np.int64)
            if not add.any():  # rounding leaves less than one each: given to the sources furthest behind
                behind = np.where(open_, quota - counts + exact, -np.inf)
                add[np.argsort(-behind, kind="stable")[: min(missing, int(open_.sum()))]] = 1
            slots = slots + add
        return slots


def allocation_of(data: Data, frames: Sequence[int], global_batch: int | BatchSizes) -> Allocation | Schedule:
    """The allocation of a recipe; `frames`: number of frames of each source."""
    return (Allocation if data.shuffle.in_lanes else Schedule).of(data, frames, global_batch)


def _due_before(at: float, rates: NDArray[np.float64], phase: NDArray[np.float64]) -> NDArray[np.int64]:
    return np.ceil(rates * at - phase).clip(0).astype(np.int64)
