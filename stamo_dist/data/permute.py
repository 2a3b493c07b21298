"""Random permutations without tables: any element is computed directly, vectorised over arrays.

A Feistel network over two mixed digits (a, b with a·b just above the size) is a permutation of a·b numbers; those that
land beyond the size are sent on until they land within it (Black and Rogaway, Ciphers with Arbitrary Finite Domains).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_ODD = np.uint64(0x9E3779B97F4A7C15)


def mixed(*values: NDArray[np.integer] | int) -> NDArray[np.uint64]:
    """A 64-bit hash of each row of values that broadcast against each other; order matters."""
    state = np.zeros(1, np.uint64)
    for value in values:
        state = _scramble((state ^ np.asarray(value).astype(np.uint64)) + _ODD)
    return state


def permuted(index: NDArray[np.int64], size: NDArray[np.int64], key: NDArray[np.uint64]) -> NDArray[np.int64]:
    """The image of each index under permutation `key` of range(size); all three (n,), 0 ≤ index < size."""
    height = np.ceil(np.sqrt(size)).astype(np.int64)
    width = -(-size // height)
    out = index.copy()
    todo = np.arange(len(index))
    while len(todo):
        out[todo] = _step(out[todo], height[todo], width[todo], key[todo])
        todo = todo[out[todo] >= size[todo]]
    return out


def _step(
    index: NDArray[np.int64], height: NDArray[np.int64], width: NDArray[np.int64], key: NDArray[np.uint64]
) -> NDArray[np.int64]:
    """A permutation of range(height · width)."""
    left, right = np.divmod(index.astype(np.uint64), width.astype(np.uint64))
    heights, widths = height.astype(np.uint64), width.astype(np.uint64)
    for number in range(0, _ROUNDS, 2):
        left = (left + (_scramble(key + right + np.uint64(number << 40)) >> np.uint64(32))) % heights
        right = (right + (_scramble(key + left + np.uint64((number + 1) << 40)) >> np.uint64(32))) % widths
    return (left * widths + right).astype(np.int64)


def _scramble(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood, 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
