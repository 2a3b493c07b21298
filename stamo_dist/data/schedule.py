"""The source of each position of the training stream, for the order of groups: exact, in closed form.

Weights give each source a share of the samples, constant over pieces of the run. The k-th sample of a source is due
when the source's quota (the integral of its share) reaches k + phase; the stream is all sources' samples in the order
in which they are due. So after any N samples every source is within one sample per source of its quota, and
any interval of the stream is computed independently of what precedes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stamo_dist.recipe.batch_sizes import BatchSizes
from stamo_dist.recipe.data import Data

_GOLDEN = 0.6180339887498949


@dataclass(frozen=True)
class Interval:
    """Positions [start, start + n) of the stream.

    Attributes:
        source: int64 (n,), the source of each.
        begin, end: int64 (sources,), each source's own positions in the interval are begin up to end, in order.
    """

    source: NDArray[np.int64]
    begin: NDArray[np.int64]
    end: NDArray[np.int64]


class Schedule:
    """Shares that change at given samples, with caps on how much of a source is read.

    Args:
        weights: Per source: sample from which it holds → weight (0 or more); the first holds from sample 0.
        limits: Maximum samples of each source, inf for none. Once it is reached, the others share its part.

    Attributes:
        starts: float64 (pieces,), the sample at which each piece begins.
        shares: float64 (pieces, sources), summing to 1 in each piece.
        end: Samples until all sources are exhausted; inf if one has no limit.
    """

    def __init__(self, weights: Sequence[Mapping[int, float]], limits: Sequence[float]):
        changes = sorted({0, *(int(at) for steps in weights for at in steps)})
        capacity = np.asarray(limits, np.float64)
        starts, shares, quotas = [], [], []
        now, quota = 0.0, np.zeros(len(weights))
        while True:
            wanted = np.array([_at(steps, now) for steps in weights])
            wanted[quota >= capacity] = 0
            following = next((c for c in changes if c > now), np.inf)
            if wanted.sum() == 0:
                self.end = float(round(now))
                break
            share = wanted / wanted.sum()
            starts.append(now)
            shares.append(share)
            quotas.append(quota)
            with np.errstate(divide="ignore", invalid="ignore"):
                until_full = np.where(share > 0, (capacity - quota) / share, np.inf)
            length = min(following - now, until_full.min())
            if length == np.inf:
                self.end = np.inf
                break
            full = until_full <= length
            quota = np.where(full, capacity, quota + share * length)
            now = following if length == following - now else now + length
        self.starts, self.shares = np.array(starts), np.array(shares).reshape(-1, len(weights))
        self._quotas = np.array(quotas).reshape(-1, len(weights))
        n = len(weights)
        # Spread over (0, 1], so that equal shares do not fall due together.
        self._phase = 1 - (np.arange(n) * _GOLDEN) % 1

    def quota(self, at: float) -> NDArray[np.float64]:
        """Samples of each source due after `at` samples, (sources,)."""
        at = min(max(at, 0.0), self.end)
        piece = max(0, int(np.searchsorted(self.starts, at, side="right")) - 1)
        return self._quotas[piece] + self.shares[piece] * (at - self.starts[piece])

    def interval(self, start: int, count: int) -> Interval:
        """The next `count` samples after `start`; fewer if all sources are exhausted before."""
        count = max(0, int(min(start + count, self.end)) - start)
        n = len(self._phase)
        margin = n + 1  # the order by due time and the count differ by less
        low, high = self._due_before(start - margin), self._due_before(start + count + margin)
        source = np.repeat(np.arange(n), high - low)
        item = np.arange(len(source)) + np.repeat(low - (high - low).cumsum() + (high - low), high - low)
        order = np.lexsort((source, self._due(source, item)))
        before = start - int(low.sum())
        head, window = order[:before], order[before : before + count]
        begin = low + np.bincount(source[head], minlength=n)
        return Interval(source[window], begin, begin + np.bincount(source[window], minlength=n))

    @classmethod
    def of(cls, data: Data, frames: Sequence[int], global_batch: int | BatchSizes) -> Schedule:
        """The schedule of a recipe's sources in use; `frames`: number of frames of each."""
        used, sizes = list(zip(data.used.values(), frames, strict=True)), BatchSizes.of(global_batch)
        return cls(
            [{sizes.before(at): w ** (1 / data.temperature) for at, w in s.weights(n).items()} for s, n in used],
            [np.inf if s.max_epochs is None else np.floor(s.max_epochs * n) for s, n in used],
        )

    @property
    def identity(self) -> list[Any]:
        """JSON values that identify it, for the fingerprint."""
        return [self.starts.tolist(), self.shares.tolist(), self.end]

    def counts(self, at: int) -> NDArray[np.int64]:
        """Samples of each source among the first `at`, (sources,)."""
        return self.interval(int(min(at, self.end)), 0).begin

    def _due_before(self, at: float) -> NDArray[np.int64]:
        return np.maximum(0, np.floor(self.quota(at) - self._phase + 1)).astype(np.int64)

    def _due(self, source: NDArray[np.int64], item: NDArray[np.int64]) -> NDArray[np.float64]:
        """When item `item` of `source` is due, float64 (n,)."""
        due = np.empty(len(source))
        for s in range(len(self._phase)):
            mine = source == s
            wanted = item[mine] + self._phase[s]
            # The last piece whose quota is below: a piece without a share adds nothing and is skipped.
            piece = np.searchsorted(self._quotas[:, s], wanted, side="left") - 1
            share = self.shares[piece, s]
            with np.errstate(divide="ignore"):
                due[mine] = self.starts[piece] + (wanted - self._quotas[piece, s]) / share
        return due


def _at(steps: Mapping[int, float], now: float) -> float:
    return steps[max(at for at in steps if at <= now)]
