"""A folder of fetched shards that several processes share, within a limit.

A shard is in use as long as any process has a shared lock (flock) on its file: who reads it ahead keeps a `Hold`, who
maps it locks it with the map. What is locked is not removed, so what is removed is mapped nowhere, and the folder takes
the room that its files say. The kernel drops the locks of a process that dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_log = logging.getLogger(__name__)
SCRATCH = ".fetch-"  # prefix of folders that hold what is not whole
_LOCKS = ".locks"  # folder beside the shards with one lock a shard, held while it is fetched
_OF_SHARD = re.compile(rf"{re.escape(SCRATCH)}(\d+)-(.+)")  # bytes that it may take, name of the shard
_ABANDONED = 3600.0  # seconds after which a scratch folder without a lock was left by a process that was killed
_SLACK = 0.05  # of the limit: evicted beyond what is needed, so that the folder is not looked through for every shard
_PAUSE = 0.5  # seconds between two looks through a folder that is full of shards in use
_PATIENCE = 2.0  # seconds in which shards that were given back may be unmapped before the limit is overrun
_LOCK_TIMEOUT = 600.0


class Hold:
    """Keeps a file in its cache until it is closed or the process ends."""

    def __init__(self, fd: int):
        self._fd = fd

    def there(self) -> bool:
        """Whether the file still has a name: somebody may remove it who knows nothing of locks."""
        return os.fstat(self._fd).st_nlink > 0

    def close(self) -> None:
        """Give it back; it counts as used last now."""
        if self._fd >= 0:
            with suppress(OSError):
                os.utime(self._fd)
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Hold:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def hold(path: str) -> Hold | None:
    """Lock a file against removal; None where it is not there."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if lock_shared(fd):
        return Hold(fd)
    os.close(fd)
    return None


def lock_shared(fd: int) -> bool:
    """Lock an open file, and maps made of it, against removal; False where it was removed before."""
    fcntl.flock(fd, fcntl.LOCK_SH)
    return os.fstat(fd).st_nlink > 0


def fetch_lock(path: Path, timeout: float) -> FileLock:
    """The lock that is held while the shard at `path` is fetched."""
    lock = path.parent / _LOCKS / f"{path.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock, timeout=timeout)


class Cache:
    """A folder of shards that takes at most `limit` bytes, those being fetched included; None: as many as come.

    Those used longest ago are removed first, those in use never.
    """

    def __init__(self, root: Path, limit: float | None = None):
        self.root, self.limit = root, limit
        self._looked = -_PAUSE  # when no room was found last
        self._warned = False

    @contextmanager
    def reserve(self, path: Path, size: int, *, must: bool) -> Iterator[Path | None]:
        """A folder beside `path` to fetch it into, with room for `size` bytes; whoever asks has its `fetch_lock`.

        None where shards in use take the room, unless it `must` be: then the limit is overrun, with a warning.
        """
        scratch = path.parent / f"{SCRATCH}{size}-{path.name}"
        made, deadline = self._make(scratch, size, pause=_PAUSE), time.monotonic() + _PATIENCE
        while must and not made:
            time.sleep(0.05)
            made = self._make(scratch, size, pause=0, overrun=time.monotonic() > deadline)
        try:
            yield scratch if made else None
        finally:
            if made:
                shutil.rmtree(scratch, ignore_errors=True)

    def _make(self, scratch: Path, size: int, *, pause: float, overrun: bool = False) -> bool:
        """Make the folder if there is room; not looked for within `pause` of the last look that found none."""
        if self.limit is None:
            (self.root / ".used").unlink(missing_ok=True)  # who has a limit counts anew
            self._fresh(scratch)
            return True
        if time.monotonic() < self._looked + pause:
            return False
        with FileLock(self.root / ".trim.lock", timeout=_LOCK_TIMEOUT):
            used = self._recorded()
            if used is None or used + size > self.limit:
                used = self._evict(self.limit - size, slack=_SLACK * self.limit)
            fits = used + size <= self.limit
            if fits or overrun:
                self._fresh(scratch)
                used += size
            self._record(used)
        if not fits:
            self._looked = time.monotonic()
        if not fits and overrun and not self._warned:
            self._warned = True
            _log.warning(
                "the shards in use in the cache %s take %.2f GB, more than the %.2f GB it may hold; raise "
                "data.cache_limit",
                self.root,
                used / 1e9,
                self.limit / 1e9,
            )
        return fits or overrun

    @staticmethod
    def _fresh(scratch: Path) -> None:
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()

    def _recorded(self) -> int | None:
        """Bytes in the folder as they were last counted, and what was reserved since; None where that is not known."""
        try:
            return int((self.root / ".used").read_text())
        except (OSError, ValueError):
            return None

    def _record(self, used: int) -> None:
        (self.root / ".used").write_text(str(used))

    def trim(self) -> None:
        """Remove what killed processes left, and shards until the folder is within its limit, where there is one."""
        with FileLock(self.root / ".trim.lock", timeout=_LOCK_TIMEOUT):
            used = self._evict(float("inf") if self.limit is None else self.limit)
            self._record(used)

    def _evict(self, target: float, slack: float = 0.0) -> int:
        """Count what is there; where it is more than `target`, remove shards that nobody uses until it is `slack` less.

        Returns the bytes that stay.
        """
        total, shards = self._count()
        if total > target:
            target -= slack
        for _, size, path in sorted(shards):
            if total <= target:
                break
            if _remove(path):
                total -= size
        return total

    def _count(self) -> tuple[int, list[tuple[float, int, str]]]:
        """Bytes in the folder; when each whole shard was used last, its size and its path."""
        total, shards = 0, []
        for folder, inside, names in os.walk(self.root):  # which passes over what vanishes meanwhile
            for name in inside[:]:
                if name.startswith(SCRATCH):
                    inside.remove(name)
                    total += _in_flight(Path(folder) / name)
            for name in names:
                if name.startswith("shard.") and name.endswith(".mds"):
                    path = os.path.join(folder, name)
                    with suppress(FileNotFoundError):
                        info = os.stat(path)
                        shards.append((info.st_mtime, info.st_size, path))
                        total += info.st_size
        return total, shards


def _in_flight(scratch: Path) -> int:
    """Bytes that the fetch into this folder takes or will take; 0, and it is removed, if whoever fetched was killed."""
    if of_shard := _OF_SHARD.fullmatch(scratch.name):
        try:
            with fetch_lock(scratch.parent / of_shard[2], timeout=0):
                shutil.rmtree(scratch, ignore_errors=True)
                return 0
        except Timeout:
            return int(of_shard[1])
        except OSError:
            return 0
    size = 0
    with suppress(FileNotFoundError):
        if time.time() - scratch.stat().st_mtime > _ABANDONED:
            shutil.rmtree(scratch, ignore_errors=True)
            return 0
        for entry in os.scandir(scratch):
            with suppress(FileNotFoundError):
                size += entry.stat().st_size
    return size


def _remove(path: str) -> bool:
    """Remove a shard unless it is in use."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS locks for writing only what is open for it
    except FileNotFoundError:
        return True
    except OSError:
        return False  # of another user
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
