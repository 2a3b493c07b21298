"""Writing a checkpoint file: hashed while it is written, with early write-back by the kernel."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import io
import logging
import os
from pathlib import Path
from typing import Any

import xxhash

from stamo_dist.checkpoint.manifest import HASH, Stored

_log = logging.getLogger(__name__)
_PIECE = 4 << 20  # bytes of one write
_WRITE_BACK = 8 << 20  # bytes after which the kernel is asked to start write-back
_SYNC_FILE_RANGE_WRITE = 2


class Sink(io.RawIOBase):
    """A file that knows its checksum. Its first error is raised at the end."""

    def __init__(self, path: Path):
        self._path, self._fd = path, os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._digest, self._small = xxhash.xxh3_128(), bytearray()
        self._size = self._written = self._started = 0
        self._error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Large data is written directly; small data is buffered up to one piece."""
        view = memoryview(data).cast("B")
        self._size += len(view)
        if len(self._small) + len(view) < _PIECE:
            self._small += view
        else:
            self._empty()
            for at in range(0, len(view), _PIECE):
                self._put(view[at : at + _PIECE])
        return len(view)

    def _empty(self) -> None:
        small, self._small = self._small, bytearray()
        self._put(memoryview(small))

    def _put(self, piece: memoryview) -> None:
        self._digest.update(piece)
        if self._error is not None:
            return
        try:
            while piece:
                done = os.write(self._fd, piece)
                piece, self._written = piece[done:], self._written + done
        except OSError as e:
            self._error = e
        if self._written - self._started >= _WRITE_BACK:
            _begin_write_back(self._fd, self._started, self._written - self._started)
            self._started = self._written

    def tell(self) -> int:
        return self._size

    def writable(self) -> bool:
        return True

    def finish(self) -> Stored:
        """Sync and close.

        Raises:
            OSError: A write failed.
        """
        self._empty()
        try:
            if self._error is None:
                os.fsync(self._fd)
        except OSError as e:
            self._error = e
        with contextlib.suppress(OSError):
            os.close(self._fd)
        if self._error is not None:
            raise OSError(self._error.errno, self._error.strerror, str(self._path))
        return Stored(self._size, f"{HASH}:{self._digest.hexdigest()}")


def _find_sync_file_range() -> Any:
    try:
        call = ctypes.CDLL(None, use_errno=True).sync_file_range
    except (AttributeError, OSError):
        return None
    call.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    return call


_sync_file_range = _find_sync_file_range()


def _begin_write_back(fd: int, start: int, size: int) -> None:
    """Start the kernel's write-back of these bytes while more are written, where supported."""
    global _sync_file_range
    if _sync_file_range is None:
        return
    if _sync_file_range(fd, start, size, _SYNC_FILE_RANGE_WRITE) and ctypes.get_errno() in (
        errno.ENOSYS,
        errno.EINVAL,
        errno.ESPIPE,
        errno.EPERM,
    ):
        _log.warning("sync_file_range: %s; checkpoints are written back at their end", os.strerror(ctypes.get_errno()))
        _sync_file_range = None
