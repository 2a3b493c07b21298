"""Measuring a folder's disk: space, speed, and whether the operations that a run folder needs work."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

_CHUNK = 1 << 20
_SMALL = 50  # files to create, rename and remove


@dataclass(frozen=True)
class Disk:
    """Measurements of one folder; bytes and seconds. `error`: why measuring failed."""

    path: str
    kind: str = ""  # type of file system
    free: int = 0
    write: float = 0.0  # bytes per second, until they are on the disk
    read: float = 0.0  # bytes per second, bypassing this machine's cache if the file system allows it
    small: float = 0.0  # small files created, renamed and removed per second
    clock: float = 0.0  # seconds by which its time stamps are ahead of this machine's clock
    hard_links: bool = True
    error: str | None = None


def measure(path: str | Path, *, megabytes: int = 64, limit: float = 5.0) -> Disk:
    """Write, read and remove files in `path`, or its nearest existing parent, for about `limit` seconds at most."""
    given = Path(path).expanduser().absolute()
    folder = next(p for p in (given, *given.parents) if p.is_dir())
    scratch = folder / f".stamo-doctor-{os.uname().nodename}-{os.getpid()}"
    try:
        scratch.mkdir()
        try:
            return _measure(str(path), folder, scratch, megabytes, limit)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    except OSError as e:
        return Disk(str(path), kind=kind_of(folder), error=f"{e.strerror or e} ({folder})")


def _measure(path: str, folder: Path, scratch: Path, megabytes: int, limit: float) -> Disk:
    big, block = scratch / "big", os.urandom(_CHUNK)  # random: some file systems compress
    began = time.perf_counter()
    written = 0
    with big.open("wb", buffering=0) as f:
        while written < megabytes * _CHUNK and (time.perf_counter() - began < limit / 2 or not written):
            written += f.write(block)
        os.fsync(f.fileno())
        write = written / (time.perf_counter() - began)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    stamp = time.time()
    (scratch / "clock").touch()
    clock = (scratch / "clock").stat().st_mtime - stamp
    kind, free, read = kind_of(folder), room(folder), read_speed(big, limit / 2)
    small, links = _small_files(scratch, limit / 5), _links(scratch)
    return Disk(path, kind=kind, free=free, write=write, read=read, small=small, clock=clock, hard_links=links)


def read_speed(file: Path, limit: float = 2.5) -> float:
    """Reading speed of the file in bytes per second, measured for about `limit` seconds; 0 if it is empty."""
    with file.open("rb", buffering=0) as f:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        began, done = time.perf_counter(), 0
        while chunk := f.read(_CHUNK):
            done += len(chunk)
            if time.perf_counter() - began > limit:
                break
        return done / max(time.perf_counter() - began, 1e-9)


def room(folder: Path) -> int:
    """Bytes free for this user; quotas are not always taken into account."""
    found = os.statvfs(folder)
    return found.f_bavail * found.f_frsize


def kind_of(folder: Path) -> str:
    """The type of the file system that holds `folder`, "" if unknown."""
    at = str(folder.resolve())
    best, kind = "", ""
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            mount, found = line.split()[1:3]
            inside = at == mount or at.startswith(mount.rstrip("/") + "/")
            if inside and len(mount) >= len(best):
                best, kind = mount, found
    return kind


def _small_files(scratch: Path, limit: float) -> float:
    began, count = time.perf_counter(), 0
    while count < _SMALL and time.perf_counter() - began < limit:
        part, whole = scratch / "part", scratch / "whole"
        part.write_bytes(b"x")
        part.replace(whole)
        whole.unlink()
        count += 1
    return count / (time.perf_counter() - began)


def _links(scratch: Path) -> bool:
    try:
        os.link(scratch / "clock", scratch / "link")
    except OSError:
        return False
    return True
