"""A folder of fetched shards that several processes share, within a limit.

A shard is in use as long as any process has a shared lock (flock) on its file: a process that prefetches it keeps a
`Hold`, one that maps it locks it with the map. Locked shards are not removed, so a removed shard is mapped nowhere and
its space is freed. The kernel drops the locks of a process that dies.
"""

from __future__ import annotations

import fcntl
import logging
import os
import re
import shutil
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

_log = logging.getLogger(__name__)
SCRATCH = ".fetch-"  # prefix of folders with incomplete files
_LOCKS = ".locks"  # folder beside the shards with one lock per shard, held while it is fetched
_OF_SHARD = re.compile(rf"{re.escape(SCRATCH)}(\d+)-(.+)")  # bytes reserved, name of the shard
_ABANDONED = 3600.0  # seconds after which an unlocked scratch folder is taken for that of a killed process
_SLACK = 0.05  # fraction of the limit evicted beyond what is needed, so that the folder is not scanned for every shard
_PAUSE = 0.5  # seconds between two scans of a folder that is full of shards in use
_PATIENCE = 2.0  # seconds to wait for released shards to be unmapped before the limit is exceeded
_LOCK_TIMEOUT = 600.0


class Hold:
    """Keeps a file in its cache until it is closed or the process ends."""

    def __init__(self, fd: int):
        self._fd = fd

    def there(self) -> bool:
        """Whether the file still exists: it may be removed by a process that ignores the locks."""
        return os.fstat(self._fd).st_nlink > 0

    def close(self) -> None:
        """Release the file; marks it as used just now."""
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
    """Lock a file against removal; None if it is missing."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    if lock_shared(fd):
        return Hold(fd)
    os.close(fd)
    return None


def lock_shared(fd: int) -> bool:
    """Lock an open file, and maps made of it, against removal; False if it was already removed."""
    fcntl.flock(fd, fcntl.LOCK_SH)
    return os.fstat(fd).st_nlink > 0


def fetch_lock(path: Path, timeout: float) -> FileLock:
    """The lock that is held while the shard at `path` is fetched."""
    lock = path.parent / _LOCKS / f"{path.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(lock, timeout=timeout)


class Cache:
    """A folder of shards of at most `limit` bytes, including those being fetched; None: no limit.

    The least recently used shards are removed first, those in use never.
    """

    def __init__(self, root: Path, limit: float | None = None):
        self.root, self.limit = root, limit
        self._looked = -_PAUSE  # time when no room was found last
        self._warned = False

    @contextmanager
    def reserve(self, path: Path, size: int, *, must: bool) -> Iterator[Path | None]:
        """A folder beside `path` to fetch it into, with room for `size` bytes; the caller holds its `fetch_lock`.

        None if shards in use take the room, unless `must`: then the limit is exceeded, with a warning.
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
        """Create the folder if there is room; does not scan again within `pause` seconds of a scan that found none."""
        if self.limit is None:
            (self.root / ".used").unlink(missing_ok=True)  # a process with a limit counts anew
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
        """Bytes in the folder at the last count, and those reserved since; None if unknown."""
        try:
            return int((self.root / ".used").read_text())
        except (OSError, ValueError):
            return None

    def _record(self, used: int) -> None:
        (self.root / ".used").write_text(str(used))

    def trim(self) -> None:
        """Remove files left by killed processes, and shards until the folder is within its limit, if it has one."""
        with FileLock(self.root / ".trim.lock", timeout=_LOCK_TIMEOUT):
            used = self._evict(float("inf") if self.limit is None else self.limit)
            self._record(used)

    def _evict(self, target: float, slack: float = 0.0) -> int:
        """Count the bytes; if they exceed `target`, remove unused shards until they are `slack` less.

        Returns the remaining bytes.
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
        """Bytes in the folder; and for each complete shard the time of last use, size and path."""
        total, shards = 0, []
        for folder, inside, names in os.walk(self.root):  # skips files that vanish meanwhile
            for name in inside[:]:
                if name.startswith(SCRATCH):
                    inside.remove(name)
                    total += _in_flight(Path(folder) / name, names)
            for name in names:
                if name.startswith("shard.") and name.endswith(".mds"):
                    path = os.path.join(folder, name)
                    with suppress(FileNotFoundError):
                        info = os.stat(path)
                        shards.append((info.st_mtime, info.st_size, path))
                        total += info.st_size
        return total, shards


def _in_flight(scratch: Path, names: Collection[str]) -> int:
    """Bytes that the fetch into this folder will take; if its process was killed, 0, and the folder is removed.

    `names`: the files that were beside it when it was seen. A fetch that has ended since counts as its shard.
    """
    if of_shard := _OF_SHARD.fullmatch(scratch.name):
        shard = scratch.parent / of_shard[2]
        try:
            with fetch_lock(shard, timeout=0):
                if scratch.exists():
                    shutil.rmtree(scratch, ignore_errors=True)
                    return 0
                return 0 if shard.name in names else shard.stat().st_size
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
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # NFS grants exclusive locks only on files opened for writing
    except FileNotFoundError:
        return True
    except OSError:
        return False  # owned by another user
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True
