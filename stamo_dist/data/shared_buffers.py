"""Shared memory for batches, and its layout. Free of torch: loader workers import it."""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Every field begins this many bytes after a multiple of 32. libjpeg-turbo writes rows that are aligned to 32 bytes
#: around the cache, which costs a twentieth of the decoding time; rows are multiples of 32 bytes, so 16 keeps all of
#: them off.
_SHIFT, _UNIT = 16, 32


@dataclass(frozen=True)
class BufferField:
    """One array of a slot: (batch, *shape) of dtype."""

    name: str
    dtype: str
    shape: tuple[int, ...] = ()


#: In every slot: sample numbers, epochs (how often their source was gone through before), the shard that is being read
#: (first row only), and whether the row holds another frame because its own could not be read.
COMMON_FIELDS = (
    BufferField("samples", "<i8"),
    BufferField("epochs", "<i4"),
    BufferField("shard", "<i8"),
    BufferField("replaced", "|b1"),
)


class SharedBuffers:
    """Memory for `count` batches of at most `batch` samples that several processes map.

    It is reused, because the kernel takes as long to provide fresh shared pages as the decoder to fill
    them. It is anonymous: it is not in /dev/shm nor bounded by that mount, and is freed
    with the last process that maps it.
    """

    def __init__(self, fields: Sequence[BufferField], batch: int, count: int, fd: int | None = None):
        self.fields = {field.name: field for field in (*COMMON_FIELDS, *fields)}
        self.batch, self.count = batch, count
        self._layout: dict[str, tuple[int, int, np.dtype[Any], tuple[int, ...]]] = {}
        end = 0
        for field in self.fields.values():
            at, dtype = -(-end // _UNIT) * _UNIT + _SHIFT, np.dtype(field.dtype)
            size = dtype.itemsize * prod(field.shape) * batch
            self._layout[field.name] = (at, size, dtype, (batch, *field.shape))
            end = at + size
        self._stride = -(-end // mmap.PAGESIZE) * mmap.PAGESIZE
        self.fd = anonymous_file(self._stride * count, "stamo-batches") if fd is None else fd
        self._map = mmap.mmap(self.fd, self._stride * count)
        self._filled = [self.views(self.memory(slot)) for slot in range(count)]

    def memory(self, slot: int) -> NDArray[np.uint8]:
        """The whole memory of a slot; arrays made by `views` keep it alive."""
        return np.frombuffer(self._map, np.uint8, self._stride, slot * self._stride)

    def views(self, memory: NDArray[np.uint8], rows: int | None = None) -> dict[str, NDArray[Any]]:
        """Each field of a slot by name, (rows, *shape): the first `rows`, all when omitted."""
        return {
            name: memory[at : at + size].view(dtype).reshape(shape)[:rows]
            for name, (at, size, dtype, shape) in self._layout.items()
        }

    def rows(self, slot: int, count: int) -> dict[str, NDArray[Any]]:
        """The first `count` rows of each field of a slot, for filling it."""
        fields = self._filled[slot]
        return fields if count == self.batch else {name: field[:count] for name, field in fields.items()}

    def close(self) -> None:
        """Close the descriptor; batches still referenced keep the memory."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def anonymous_file(size: int, name: str) -> int:
    """A descriptor of memory that other processes can inherit; `name` is shown in /proc."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create(name, os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, size)
    return fd
