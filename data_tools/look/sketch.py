"""Moments and quantiles of billions of vectors in one pass and constant memory.

Sums are exact up to float64 rounding. Quantiles come from a histogram whose bins are the float32 numbers that share
sign, exponent and the first BITS bits of the mantissa (log-linear bins as in HdrHistogram; the relative error bound is
that of DDSketch, Masson et al. 2019, arXiv:1908.10693): every order statistic is known to RELATIVE_ERROR of its value,
whatever the distribution, and exactly at zero and at both ends. Merging adds counts, so the order and the number of
processes do not matter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BITS = 10
#: Half a bin, relative to its value; denormal numbers (below 1.2e-38) count as zero.
RELATIVE_ERROR = 2.0 ** -(BITS + 1)
_SHIFT = 23 - BITS
_KEYS = 1 << (32 - _SHIFT)


@dataclass
class Moments:
    """Count, mean, sum of squared deviations, minimum and maximum of each of D dimensions, float64 (D,)."""

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    low: NDArray[np.float64]
    high: NDArray[np.float64]

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> Moments:
        """Moments of (N, D) finite vectors, N > 0."""
        values = vectors.astype(np.float64)
        mean = values.mean(0)
        return cls(len(values), mean, ((values - mean) ** 2).sum(0), values.min(0), values.max(0))

    def merge(self, other: Moments) -> Moments:
        """Moments of the union (Chan, Golub and LeVeque 1979, eq. 2.1)."""
        count = self.count + other.count
        delta = other.mean - self.mean
        return Moments(
            count,
            self.mean + delta * (other.count / count),
            self.squares + other.squares + delta**2 * (self.count * other.count / count),
            np.minimum(self.low, other.low),
            np.maximum(self.high, other.high),
        )

    @property
    def std(self) -> NDArray[np.float64]:
        """Population standard deviation."""
        return np.sqrt(self.squares / self.count)


@dataclass
class Quantiles:
    """The histogram of each of D dimensions: `keys` uint64, sorted, dimension and bin; `counts` int64."""

    keys: NDArray[np.uint64]
    counts: NDArray[np.int64]

    @classmethod
    def of(cls, vectors: NDArray[np.float32]) -> Quantiles:
        """Histogram of (N, D) finite vectors."""
        bits = np.ascontiguousarray(vectors, np.float32).view(np.uint32)
        # Keys in numerical order: the bits of negative floats grow as the number decreases, so they are inverted.
        ordered = np.where(bits >> 31, ~bits, bits | 0x8000_0000).astype(np.uint32) >> _SHIFT
        offsets = np.arange(vectors.shape[1], dtype=np.uint64) * _KEYS
        keys, counts = np.unique(ordered + offsets, return_counts=True)
        return cls(keys.astype(np.uint64), counts.astype(np.int64))

    def merge(self, other: Quantiles) -> Quantiles:
        """Histogram of the union."""
        keys, where = np.unique(np.concatenate([self.keys, other.keys]), return_inverse=True)
        counts = np.zeros(len(keys), np.int64)
        np.add.at(counts, where, np.concatenate([self.counts, other.counts]))
        return Quantiles(keys, counts)

    def at(self, shares: Sequence[float], moments: Moments) -> NDArray[np.float64]:
        """Quantiles as numpy.quantile interpolates them, float64 (len(shares), D).

        Each order statistic is off by at most RELATIVE_ERROR of its value.

        Args:
            shares: Between 0 and 1.
            moments: Moments of the same vectors.
        """
        positions = np.asarray(shares, np.float64) * (moments.count - 1)
        below, above = np.floor(positions).astype(np.int64), np.ceil(positions).astype(np.int64)
        out = np.empty((len(positions), len(moments.mean)))
        for d in range(out.shape[1]):
            a, b = self._order_statistics(d, below, moments), self._order_statistics(d, above, moments)
            out[:, d] = a + (b - a) * (positions - below)
        return out

    def outside(self, low: NDArray[np.float64], high: NDArray[np.float64]) -> NDArray[np.int64]:
        """Number of values of each dimension below `low` or above `high` (D,), judged by bin centres."""
        dimension = (self.keys // np.uint64(_KEYS)).astype(np.int64)
        middles = _middle(self.keys % np.uint64(_KEYS))
        out = (middles < low[dimension]) | (middles > high[dimension])
        return np.bincount(dimension[out], self.counts[out], minlength=len(low)).astype(np.int64)

    def _order_statistics(self, d: int, ranks: NDArray[np.int64], moments: Moments) -> NDArray[np.float64]:
        first, last = np.searchsorted(self.keys, np.array([d, d + 1], np.uint64) * np.uint64(_KEYS))
        middles = _middle(self.keys[first:last] - np.uint64(d * _KEYS)).clip(moments.low[d], moments.high[d])
        values = middles[np.searchsorted(np.cumsum(self.counts[first:last]), ranks, side="right")]
        values[ranks == 0] = moments.low[d]
        values[ranks == moments.count - 1] = moments.high[d]
        return values


def _middle(bins: NDArray[np.uint64]) -> NDArray[np.float64]:
    """The centre of each bin."""
    first = bins.astype(np.uint32) << _SHIFT
    ends = np.stack([first, first | ((1 << _SHIFT) - 1)])
    bits = np.where(ends >> 31, ends & 0x7FFF_FFFF, ~ends).astype(np.uint32)
    middle = bits.view(np.float32).astype(np.float64).mean(0)
    return np.where(np.abs(middle) < np.finfo(np.float32).tiny, 0.0, middle)
