"""`samples.jsonl`: the samples that each step actually read, for comparing runs; enabled by `train.log_samples`."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from stamo_dist.data.loader import Batch
from stamo_dist.distributed.rank import World
from stamo_dist.tracking.metrics_file import MetricsFile

_NAMES = ("sample", "source")  # all other fields of a batch are content


class SampleLog:
    """One line per step: the samples of the global batch in the mixture's order, and a checksum of each one's content.

    Taken from the batches that were trained on, not from the plan. Every rank has one; only rank 0's writes. On
    resumption the lines of steps that will be run again are dropped. `guard` raises if this process may not write.

    Attributes:
        notes: Lines on problems of the file.
    """

    def __init__(self, path: Path, step: int, world: World, guard: Callable[[], None] | None = None):
        self._world, self._path, self._guard = world, path, guard
        self._file = MetricsFile(path, step, guard) if world.is_main else None
        self.notes = self._file.notes if self._file is not None else []

    def write(self, step: int, batch: Batch) -> None:
        """Every rank calls it with its share of the global batch, on the CPU."""
        mine = list(zip(batch.sample.tolist(), checksums(batch), strict=True))
        shares = [mine]
        if dist.is_initialized():
            shares = [[]] * self._world.size
            dist.gather_object(mine, shares if self._world.is_main else None, dst=0)
        if self._file is not None:
            rows = [row for dealt in zip(*shares, strict=True) for row in dealt]  # rank r holds rows r, r + ranks, …
            self._file.write({"step": step, "samples": [s for s, _ in rows], "checksums": [c for _, c in rows]})

    def rewind(self, step: int) -> None:
        """Remove the steps after `step`."""
        if self._file is not None:
            self._file.close()
            self._file = MetricsFile(self._path, step, self._guard)

    def sync(self) -> None:
        if self._file is not None:
            self._file.sync()

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def checksums(batch: Batch) -> list[int]:
    """CRC-32 of each sample's content in the batch: augmented frames, latents, actions, …; length b."""
    parts = [value for name, value in vars(batch).items() if torch.is_tensor(value) and name not in _NAMES]
    rows = [value.contiguous().view(torch.uint8).reshape(len(batch), -1).numpy() for value in parts]
    sums = [0] * len(batch)
    for part in rows:
        sums = [zlib.crc32(row, so_far) for row, so_far in zip(part, sums, strict=True)]
    return sums
