"""Global batches of the training stream: samples, sources and order."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Cursor:
    """A position in the mixture's stream: the number of samples consumed over all ranks."""

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
    """Consecutive global batches of one size, or the same slots of each.

    Attributes:
        samples: int64 (batches, slots), the mixture's sample numbers.
        epochs: int32, same shape: number of earlier passes over the source.
    """

    samples: NDArray[np.int64]
    epochs: NDArray[np.int32]


class SampleOrder(Protocol):
    """The samples of any global batch, computed independently of earlier ones."""

    def plan(self, batch: int, count: int, slots: NDArray[np.int64] | None = None) -> BatchPlan:
        """Batches `batch` up to `batch + count`, fewer at the end of the data or of batches of that size.

        Only these `slots`, all when omitted.
        """

    def share(self, number: int, of: int, batch: int = 0) -> NDArray[np.int64]:
        """Slots of one of `of` equal shares of a batch, and of all others of its size."""

    def at_a_time(self, slots: int) -> int:
        """Number of batches to plan per call, for this many slots."""
