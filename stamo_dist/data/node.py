"""Sharing data that one rank of a node reads: a file in shared memory, which the others wait for and map.

The file has a name only while the ranks start: once all have opened it the name is removed, and its memory is freed
with the last process. The reading rank holds a lock on it; an unlocked file was left by a killed start, is ignored, and
is removed by the next start.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from numpy.typing import NDArray

from stamo_dist.data.column_file import ColumnFile, anonymous, write
from stamo_dist.errors import DataError, RunError, StamoError

_log = logging.getLogger(__name__)
#: Head and arrays of a ColumnFile.
Content = tuple[Mapping[str, Any], Mapping[str, NDArray[Any]]]
#: Memory first; if it is full or missing, the folder for temporary files.
PLACES = ("/dev/shm", tempfile.gettempdir())
PATIENCE = 600.0  # seconds that a rank waits if no rank is reading
LINGER = 10.0  # seconds that a rank that exits early waits for the others to open its file
_PAUSE = 0.02
#: Environment variables that, with the run, distinguish two starts on a node.
_START = (
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_RESTART_COUNT",
    "STAMO_START",
    "STAMO_LAUNCHED",
    "SLURM_JOB_ID",
    "SLURM_STEP_ID",
    "SLURM_RESTART_COUNT",
)


class NodeShare:
    """Shared files of a rank's start; `close` it at the end.

    Args:
        run: The run folder, the same in all ranks.
        ranks: Number of ranks of the node.
        rank: This process's rank on the node; the first one reads.
    """

    def __init__(self, run: str, ranks: range, rank: int):
        self._ranks, self._local = ranks, rank - ranks[0]
        start = [os.path.abspath(run), str(ranks[0]), *(os.environ.get(name, "") for name in _START)]
        self._key = hashlib.sha256("\0".join(start).encode()).hexdigest()[:16]
        self._written: dict[str, ColumnFile] = {}

    def once(self, what: str, read: Callable[[], Content]) -> ColumnFile:
        """The data read by the first rank of the node; every rank calls it with the same names in the same order.

        Raises:
            StamoError: Raised by `read`, in every rank.
            RunError: The first rank does not arrive.
        """
        if len(self._ranks) == 1:
            return anonymous(*read())
        name = f"{what}-{self._key}"
        if self._local:
            return self._take(name)
        with _reserved(name) as publish:
            try:
                head, arrays = read()
            except Exception as e:
                path, file = publish({"error": str(e), "refused": isinstance(e, StamoError)}, {})
                self._written[path] = file
                self.close()
                raise
            path, file = publish(head, arrays)
        self._written[path] = file
        return file

    def met(self) -> None:
        """All ranks have opened the files: remove their names."""
        for path in self._written:
            with suppress(OSError):
                os.unlink(path)
                os.rmdir(os.path.dirname(path))  # by the last start
        self._written.clear()

    def close(self) -> None:
        """As `met`, but wait a little for ranks that have not opened the files."""
        deadline = time.monotonic() + LINGER
        for file in self._written.values():
            while 0 in os.pread(file.fd, len(self._ranks) - 1, 1) and time.monotonic() < deadline:
                time.sleep(_PAUSE)
        self.met()

    def _take(self, name: str) -> ColumnFile:
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            for place in PLACES:
                path = os.path.join(_folder(place), name)
                if (fd := _held(path)) is not None:
                    file = ColumnFile(fd)
                    os.pwrite(fd, b"\1", self._local)
                    if (error := file.head.get("error")) is not None:
                        raise (DataError if file.head["refused"] else RunError)(error)
                    return file
                if (fd := _held(f"{path}.new")) is not None:
                    os.close(fd)
                    deadline = time.monotonic() + PATIENCE
            time.sleep(_PAUSE)
        raise RunError(
            f"{os.path.join(_folder(PLACES[0]), name)}: rank {self._ranks[0]} should write there what it reads of the "
            f"data for this node, and has not begun within {PATIENCE:.0f} s; look into its log, and whether the ranks "
            f"of a node share {PLACES[0]}"
        )


@contextmanager
def _reserved(name: str) -> Iterator[Callable[..., tuple[str, ColumnFile]]]:
    """Create a locked file that shows that a rank is reading; yields the function that publishes it."""
    places, reserved = iter(PLACES), list[tuple[str, int]]()

    def reserve() -> None:
        for place in places:
            try:
                reserved.append(_create(place, f"{name}.new"))
                return
            except OSError as e:
                _log.warning("%s: %s; what the node reads is shared elsewhere", e.filename or place, e.strerror or e)
        raise RunError(f"{' and '.join(PLACES)}: cannot be written; make room in one of them for the node's indexes")

    def publish(head: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]) -> tuple[str, ColumnFile]:
        while True:
            path, fd = reserved[-1]
            try:
                write(fd, head, arrays)
            except OSError as e:
                _log.warning("%s: %s; what the node reads is shared elsewhere", path, e.strerror or e)
                reserve()
                continue
            os.rename(path, path.removesuffix(".new"))
            return path.removesuffix(".new"), ColumnFile(os.dup(fd))

    try:
        reserve()
        yield publish
    finally:
        for path, fd in reserved:
            os.close(fd)
            with suppress(FileNotFoundError):
                os.unlink(path)


def _folder(place: str) -> str:
    return os.path.join(place, f"stamo-start-{os.getuid()}")


def _create(place: str, name: str) -> tuple[str, int]:
    """A new file, locked, and its descriptor."""
    folder = _folder(place)
    while True:
        with suppress(FileExistsError):
            os.mkdir(folder, 0o700)
        with suppress(FileNotFoundError):  # another start has just removed the folder
            return _create_in(folder, name)


def _create_in(folder: str, name: str) -> tuple[str, int]:
    """Create a locked file in `folder`, after removing files of killed processes."""
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(lock).st_uid != os.getuid():
            raise PermissionError(errno.EPERM, "belongs to another user", folder)
        fcntl.flock(lock, fcntl.LOCK_EX)
        for left in os.listdir(folder):
            path = os.path.join(folder, left)
            if (fd := _held(path)) is not None:
                os.close(fd)
            else:
                with suppress(FileNotFoundError):
                    os.unlink(path)
        path = os.path.join(folder, name)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(fd, fcntl.LOCK_EX)
        return path, fd
    finally:
        os.close(lock)


def _held(path: str) -> int | None:
    """A descriptor of the file, if it exists and its writer is alive."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return fd
    os.close(fd)
    return None
