"""Arrays and a JSON head in one file that several processes map. Free of torch: loader workers import it."""

from __future__ import annotations

import json
import mmap
import os
import struct
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stamo_dist.data.shared_buffers import anonymous_file

_LENGTH = struct.Struct("<Q")
_ALIGNED = 64
#: Bytes at the beginning reserved for the sharing protocol.
RESERVED = 4096


class ColumnFile:
    """A mapped file written by `write`; its pages take memory when first read, once per node.

    Args:
        fd: Open for reading; kept open as long as the object lives.

    Attributes:
        fd: As given.
        head: The JSON object written beside the arrays.
    """

    def __init__(self, fd: int):
        self.fd = fd
        weakref.finalize(self, os.close, fd)
        self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_READ)
        (size,) = _LENGTH.unpack_from(self._map, RESERVED)
        begin = RESERVED + _LENGTH.size
        written = json.loads(self._map[begin : begin + size])
        self.head: dict[str, Any] = written["head"]
        self._arrays: dict[str, tuple[str, list[int], int]] = written["arrays"]
        self._data = _aligned(begin + size)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> NDArray[Any]:
        dtype, shape, at = self._arrays[name]
        return np.frombuffer(self._map, dtype, int(np.prod(shape)), self._data + at).reshape(shape)


def write(fd: int, head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> None:
    """Fill an empty file.

    Raises:
        OSError: There is no space.
    """
    places, end = dict[str, tuple[str, tuple[int, ...], int]](), 0
    for name, array in arrays.items():
        places[name] = (array.dtype.str, array.shape, end)
        end = _aligned(end + array.nbytes)
    text = json.dumps({"head": head, "arrays": places}).encode()
    begin = RESERVED + _LENGTH.size
    with open(os.dup(fd), "wb") as file:
        file.seek(RESERVED)
        file.write(_LENGTH.pack(len(text)) + text)
        for name, array in arrays.items():
            file.seek(_aligned(begin + len(text)) + places[name][2])
            file.write(np.ascontiguousarray(array).tobytes())
        file.truncate(_aligned(begin + len(text)) + end)


def anonymous(head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> ColumnFile:
    """An unnamed file, for this process and those that inherit its descriptor."""
    fd = anonymous_file(0, "stamo-columns")
    write(fd, head, arrays)
    return ColumnFile(fd)


def _aligned(at: int) -> int:
    return -(-at // _ALIGNED) * _ALIGNED
