"""A checkpoint as named tensors, of which any range can be read: what every format is to a reader."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stamo_dist.checkpoint.state_writer import DTYPES, FILE, INDEX, NUMEL, OFFSET, PIECES, START, as_bytes, file_of
from stamo_dist.distributed.ranges import AVERAGE, MOMENTS, WEIGHT, Range
from stamo_dist.errors import CheckpointError

_AT_ONCE = 1 << 26  # elements read between two updates of a progress bar; bounds the memory of a read
_THREADS = 4
_MOST_OPEN = 256


class Source(ABC):
    """What a checkpoint holds.

    Attributes:
        shapes: Of the weights that it has, by name: trained ones, others and buffers.
        trained: Names of those with moments.
        averaged: Whether it has an average.
    """

    shapes: dict[str, tuple[int, ...]]
    trained: set[str]
    averaged: bool

    @abstractmethod
    def step(self, name: str) -> float:
        """AdamW's step of a trained parameter."""

    @abstractmethod
    def fill(self, ranges: Sequence[Range]) -> None:
        """Read the ranges' parts into place; moments that the checkpoint lacks are zero.

        Raises:
            KeyError: It lacks another part.
        """

    @abstractmethod
    def dtype(self, part: str, name: str) -> torch.dtype | None:
        """As which a part of a tensor is stored; None where it is not."""

    def whole(self, part: str) -> dict[str, Tensor]:
        """Every tensor of one part, on the CPU."""
        dtypes = {name: dtype for name in self.shapes if (dtype := self.dtype(part, name))}
        found = {name: torch.empty(self.shapes[name], dtype=dtype) for name, dtype in dtypes.items()}
        for some in batches([Range(name, 0, t.numel(), {part: t}) for name, t in found.items()]):
            self.fill(some)
        return found


def batches(ranges: Sequence[Range]) -> Iterator[list[Range]]:
    """The ranges in order, a bounded number of elements at a time."""
    ends = itertools.accumulate(r.numel for r in ranges)
    for _, some in itertools.groupby(zip(ends, ranges, strict=True), key=lambda pair: pair[0] // _AT_ONCE):
        yield [r for _, r in some]


def make_zero(target: Tensor, part: str, name: str) -> None:
    """Where a checkpoint lacks a part: moments are zero until the first step.

    Raises:
        KeyError: It is another part.
    """
    if part not in MOMENTS:
        raise KeyError(f"the checkpoint lacks {part}.{name}")
    target.zero_()


def put_back(flat: Tensor, live: Tensor) -> None:
    """Copy a flattened tensor that was filled into the live one, where it is a copy of it."""
    if not live.is_contiguous():
        assert flat.numel() == live.numel(), "only whole tensors lie in another order"
        live.copy_(flat.view(live.shape))


class StateSource(Source):
    """A checkpoint of this version, of which a process maps the index and reads the bytes it wants.

    Raises:
        CheckpointError: The index is not what this version writes.
    """

    def __init__(self, folder: Path):
        self._folder = folder
        try:
            index = json.loads((folder / INDEX).read_bytes())
            self._tensors: dict[str, Any] = index["tensors"]
            self._steps: dict[str, float] = index["steps"]
            self._pieces = np.load(folder / PIECES, mmap_mode="r", allow_pickle=False)
            ends = itertools.accumulate(t["pieces"] for t in self._tensors.values())
            counted = zip(self._tensors.items(), ends, strict=True)
            self._rows = {key: (end - tensor["pieces"], end) for (key, tensor), end in counted}
            self.shapes = {
                key.removeprefix(f"{WEIGHT}."): tuple(t["shape"])
                for key, t in self._tensors.items()
                if key.startswith(f"{WEIGHT}.")
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
            raise CheckpointError(f"{folder}: {INDEX} and {PIECES} are not what this version writes: {e}") from e
        self.trained = {name for name in self.shapes if f"{MOMENTS[0]}.{name}" in self._tensors}
        self.averaged = any(key.startswith(f"{AVERAGE}.") for key in self._tensors)

    def step(self, name: str) -> float:
        return self._steps.get(name, 0.0)

    def dtype(self, part: str, name: str) -> torch.dtype | None:
        found = self._tensors.get(f"{part}.{name}")
        return found and DTYPES[found["dtype"]]

    def fill(self, ranges: Sequence[Range]) -> None:
        wanted = [(r, part) for r in ranges for part in r.parts]
        with _Files(self._folder) as files, ThreadPoolExecutor(_THREADS) as pool:
            for _ in pool.map(lambda want: self._fill(*want, files=files), wanted):
                pass

    def _fill(self, r: Range, part: str, *, files: _Files) -> None:
        target, stored = r.flat(part), self.dtype(part, r.name)
        if stored is None:
            make_zero(target, part, r.name)
        else:
            direct = target.device.type == "cpu" and target.dtype == stored and target.is_contiguous()
            buffer = target if direct else torch.empty(r.numel, dtype=stored)
            self._read(r, part, buffer, files)
            if not direct:
                target.copy_(buffer)
        put_back(target, r.parts[part])

    def _read(self, r: Range, part: str, into: Tensor, files: _Files) -> None:
        done = 0
        for rank, skip, numel, offset in self.pieces(part, r):
            at = offset + skip * into.dtype.itemsize
            files.read(rank, at, as_bytes(into.narrow(0, done, numel)))
            done += numel

    def pieces(self, part: str, r: Range) -> Iterator[tuple[int, int, int, int]]:
        """Where a range lies: process that wrote it, elements to skip of its piece, how many, the piece's offset.

        Raises:
            CheckpointError: The index lacks some of it.
        """
        first, end = self._rows[f"{part}.{r.name}"]
        rows = self._pieces[first:end]
        at, wanted = r.start, r.start + r.numel
        row = int(np.searchsorted(rows[:, START], at, side="right")) - 1
        while at < wanted:
            if row >= len(rows):
                raise CheckpointError(f"{self._folder}: {PIECES} lacks elements of {part}.{r.name}")
            begin = int(rows[row, START])
            numel = min(begin + int(rows[row, NUMEL]), wanted) - at
            yield int(rows[row, FILE]), at - begin, numel, int(rows[row, OFFSET])
            at, row = at + numel, row + 1


class _Files:
    """The processes' files, opened when they are read."""

    def __init__(self, folder: Path):
        self._folder, self._lock = folder, threading.Lock()
        self._open: dict[int, int] = {}

    def __enter__(self) -> _Files:
        return self

    def __exit__(self, *error: object) -> None:
        for fd in self._open.values():
            os.close(fd)

    def read(self, rank: int, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` on."""
        with self._opened(rank) as fd:
            while into:
                got = os.preadv(fd, [into], offset)
                if not got:
                    raise CheckpointError(f"{self._folder / file_of(rank)}: ends before what its index says")
                into, offset = into[got:], offset + got

    @contextlib.contextmanager
    def _opened(self, rank: int) -> Iterator[int]:
        with self._lock:
            fd = self._open.get(rank)
            kept = fd is not None or len(self._open) < _MOST_OPEN
            if fd is None:
                fd = os.open(self._folder / file_of(rank), os.O_RDONLY)
                if kept:
                    self._open[rank] = fd
        try:
            yield fd
        finally:
            if not kept:
                os.close(fd)
