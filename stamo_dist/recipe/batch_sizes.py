"""The size of each global batch of a run, which may change at given steps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any


@dataclass(frozen=True)
class BatchSizes:
    """Sizes of the global batches 0, 1, 2, … of a run, in phases of one size.

    Attributes:
        starts: The first batch of each phase, increasing from 0.
        sizes: Samples of each batch of a phase; neighbouring phases differ.
    """

    starts: tuple[int, ...]
    sizes: tuple[int, ...]

    @classmethod
    def of(cls, value: int | Mapping[Any, int] | BatchSizes) -> BatchSizes:
        """From `train.global_batch`: one size, or step → size from there on, in the order of steps."""
        if isinstance(value, BatchSizes):
            return value
        steps = [(int(at), size) for at, size in value.items()] if isinstance(value, Mapping) else [(0, value)]
        kept = [steps[0], *(new for old, new in pairwise(steps) if old[1] != new[1])]
        return cls(tuple(at for at, _ in kept), tuple(size for _, size in kept))

    @property
    def plain(self) -> int | dict[str, int]:
        """As JSON: one size, or step → size."""
        if len(self.sizes) == 1:
            return self.sizes[0]
        return {str(at): size for at, size in zip(self.starts, self.sizes, strict=True)}

    @property
    def largest(self) -> int:
        return max(self.sizes)

    def phase(self, batch: float) -> int:
        """Number of the phase that a batch is in."""
        return bisect_right(self.starts, batch) - 1

    def at(self, batch: int) -> int:
        """Samples of a batch."""
        return self.sizes[self.phase(batch)]

    def left(self, batch: int, most: int) -> int:
        """Number of batches of the same size from this one on, at most `most`."""
        following = self.starts[self.phase(batch) + 1 :]
        return min(most, following[0] - batch) if following else most

    def before(self, batch: int) -> int:
        """Samples of all batches before this one."""
        phase = self.phase(batch)
        return self._before[phase] + (batch - self.starts[phase]) * self.sizes[phase]

    def batches(self, samples: int) -> int:
        """Number of batches that the first `samples` of the run fill."""
        phase = bisect_right(self._before, samples) - 1
        return self.starts[phase] + (samples - self._before[phase]) // self.sizes[phase]

    @cached_property
    def _before(self) -> list[int]:
        """Samples before each phase."""
        before = [0]
        for (start, end), size in zip(pairwise(self.starts), self.sizes, strict=False):
            before.append(before[-1] + (end - start) * size)
        return before

    def __str__(self) -> str:
        first, *later = zip(self.starts, self.sizes, strict=True)
        return ", ".join([str(first[1]), *(f"{size} after step {at}" for at, size in later)])
