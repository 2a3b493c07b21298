"""Leases on a run folder: each start of a run acquires one, and only the newest lease's owner may write.

The lease's number is a fencing token. `RUN/.leases/00000007` is created exclusively, so of two simultaneous starts one
gets the number. It names its owner; its modification time is the owner's heartbeat. A process whose number is no
longer the newest is fenced off: it notices before it commits anything, and stops. A process that finds the newest
owner dead takes the next number. `00000007.end` beside it says why that start ended, if not as it should.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Literal

from stamo_dist.errors import RunError, StamoError, one_line
from stamo_dist.run.folder import RunFolder

FOLDER, _EARLIER = ".leases", ".generations"  # the second name is that of earlier versions
BEAT = 10.0  # seconds between heartbeats
STALE = 90.0  # seconds without one after which an owner on another machine counts as dead
_KEPT = 32  # past leases whose files are kept
_NUMBER = re.compile(r"\d{8}")
_LOCK = ".lock"
_END = ".end"  # of the file beside a lease with how its start ended


class FencedError(RunError):
    """A newer start of the same run has taken the folder over."""


@dataclass(frozen=True)
class Owner:
    """One process, told apart from every other one, on any machine, at any time."""

    node: str
    boot: str  # of the machine
    namespace: str  # pid namespace, within which process ids are comparable
    pid: int
    started: str  # in ticks since boot, as process ids are reused
    job: str | None = None  # of the scheduler
    restarts: int = 0
    ended: bool = False

    @classmethod
    def this(cls) -> Owner:
        return cls.of(os.getpid())

    @classmethod
    def of(cls, pid: int) -> Owner:
        """A process on this machine."""
        job, restarts = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT") or 0)
        return cls(socket.gethostname(), _boot(), _namespace(), pid, _started(pid) or "", job, restarts)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.node}"

    @property
    def local(self) -> bool:
        return (self.boot, self.namespace) == (_boot(), _namespace())

    @property
    def alive(self) -> bool:
        """Whether the process exists; only for a local one."""
        return _started(self.pid) == self.started

    def superseded_by(self, other: Owner) -> bool:
        """Whether the scheduler has restarted the same job: the earlier start is fenced off, even if still running."""
        return self.job is not None and self.job == other.job and self.restarts < other.restarts


@dataclass(frozen=True)
class LeaseEnd:
    """Why a start ended that neither finished nor left as it was asked to."""

    word: Literal["failed", "stopped"]
    reason: str  # one line


@dataclass(frozen=True)
class LastStart:
    """The newest lease of a run folder; all None if there never was one."""

    owner: Owner | None = None
    silence: float | None = None  # seconds since its last heartbeat, by this machine's clock
    end: LeaseEnd | None = None


class RunLease:
    """The lease of one start. Created by `acquire`."""

    def __init__(self, file: Path, owner: Owner, notes: list[str], lock: IO[str] | None):
        self.number, self.notes = int(file.name), notes
        self._file, self._owner, self._lock = file, owner, lock
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
        self._thread.start()

    def __enter__(self) -> RunLease:
        return self

    def __exit__(self, kind: object, exception: BaseException | None, *_: object) -> None:
        self.end(LeaseEnd("failed", one_line(exception)) if isinstance(exception, Exception) else None)

    def check(self) -> None:
        """Raise unless this start is the newest.

        Raises:
            FencedError: A newer start has taken over.
        """
        newer, run = self._file.with_name(f"{self.number + 1:08d}"), self._file.parent.parent
        if newer.exists() or not self._file.exists() or lease_folder(run) != self._file.parent:
            by = _read(newer)
            raise FencedError(
                f"{run}: a newer start of this run{f', {by},' if by else ''} has taken the folder "
                f"over; this one (lease {self.number}) has stopped and written nothing since"
            )

    def end(self, why: LeaseEnd | None = None) -> None:
        """Release the folder, and record why, unless the start finished or left as it was asked to."""
        self._over.set()
        self._thread.join()
        tmp = self._file.with_name(f".{self._file.name}.tmp")
        with contextlib.suppress(OSError, FencedError):
            self.check()
            if why is not None:
                self._file.with_suffix(_END).write_text(json.dumps(asdict(why)))
            tmp.write_text(json.dumps({**asdict(self._owner), "ended": True}))
            tmp.replace(self._file)
        if self._lock is not None:
            self._lock.close()

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with contextlib.suppress(OSError):
                os.utime(self._file)


def acquire(run: Path, *, patience: float = 60.0, stale: float = STALE, say: Callable[[str], None] = print) -> RunLease:
    """Take the run folder for this process.

    A live owner gets `patience` seconds to exit; one on another machine counts as alive while its heartbeat is
    younger than `stale` seconds. One that the scheduler has restarted is fenced off at once.

    Raises:
        RunError: Another process is training here, or the folder cannot be written.
    """
    try:
        return _acquire(run, patience, stale, say)
    except OSError as e:
        raise RunError(f"{run}: cannot be written ({e.strerror}); make room or choose another run_dir") from e


@contextlib.contextmanager
def nothing_if_refused(run: Path) -> Iterator[None]:
    """Inside, a user's error in a run's first start, before anything was described, takes back what it made there."""
    missing = [path for path in (run, *run.parents) if not path.exists()]
    try:
        yield
    except StamoError:
        newest = _newest(run) if run.is_dir() and not RunFolder(run).resolved.exists() else None
        owner = _read(newest) if newest is not None else None
        if newest is not None and owner == replace(Owner.this(), ended=True) and int(newest.name) == 1:
            with contextlib.suppress(OSError):  # another start may follow, or has left files here
                newest.with_suffix(_END).unlink(missing_ok=True)
                newest.unlink()
                newest.parent.rmdir()
                (run / _LOCK).unlink(missing_ok=True)
                for folder in (RunFolder(run).checkpoints, RunFolder(run).logs, *missing):
                    with contextlib.suppress(OSError):
                        folder.rmdir()
        raise


def lease_folder(run: Path) -> Path:
    """The folder of a run's leases, shared by all its starts, including those of earlier versions."""
    earlier = run / _EARLIER
    return earlier if earlier.is_dir() else run / FOLDER


def last_start(run: Path) -> LastStart:
    """The newest lease of the run folder; read-only.

    A heartbeat from the future is as old as it is ahead: a clock has jumped.
    """
    try:
        newest = _newest(run)
        if newest is None:
            return LastStart()
        owner, silence = _read(newest), abs(time.time() - newest.stat().st_mtime)
    except OSError:
        return LastStart()
    return LastStart(owner, silence, _read_end(newest) if owner is not None and owner.ended else None)


def _acquire(run: Path, patience: float, stale: float, say: Callable[[str], None]) -> RunLease:
    me = Owner.this()
    lock: IO[str] | None = None
    deadline: float | None = None
    while True:
        folder = lease_folder(run)
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock or _flock(run / _LOCK)
        newest = _newest(run)
        holder = _read(newest) if newest is not None else None
        hindrance, note = _judge(newest, holder, me, stale, locked=lock is not None)
        if hindrance is None:
            lease = _claim(folder, 1 if newest is None else int(newest.name) + 1, me, [note] if note else [], lock)
            if lease is not None:
                return lease
            continue
        now = time.monotonic()
        if deadline is None:
            wait = patience if holder is None or holder.local else max(patience, 1.2 * stale)
            deadline = now + wait
            say(f"{run}: {hindrance}; waiting for it to end, for {wait:.0f} s at most")
        if now > deadline:
            raise RunError(f"{run}: {hindrance}; stop it or choose another run_dir")
        time.sleep(0.2)


def _newest(run: Path) -> Path | None:
    """The newest lease under both folder names, as a start of an earlier version may be in between."""
    found = list[tuple[str, str]]()
    for folder in (FOLDER, _EARLIER):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            found += [(name, folder) for name in os.listdir(run / folder) if _NUMBER.fullmatch(name)]
    return run / max(found)[1] / max(found)[0] if found else None


def _judge(
    newest: Path | None, holder: Owner | None, me: Owner, stale: float, *, locked: bool
) -> tuple[str | None, str | None]:
    """(the reason that prevents taking over, else None; a note about taking over)."""
    if newest is None or (holder is not None and holder.ended):
        return None, None
    if holder is not None and holder.superseded_by(me):
        return None, f"{holder} belongs to an earlier start of job {me.job} and is fenced off"
    if holder is not None and holder.local and holder.alive:
        return f"{holder} is still training here", None
    if holder is not None and (holder.local or (locked and holder.boot == me.boot)):
        return None, f"{holder} was training here and is dead: took over"
    silence = _age(newest)
    if silence < stale:
        return f"{holder or 'another process'} is still training here (heartbeat {max(0, silence):.0f} s ago)", None
    return None, f"{holder or 'another process'} was training here and has been silent for {silence:.0f} s: took over"


def _claim(folder: Path, number: int, me: Owner, notes: list[str], lock: IO[str] | None) -> RunLease | None:
    """Create the lease; None if another process was faster. The file appears with its content, never empty."""
    file = folder / f"{number:08d}"
    part = folder / f".{number}.{me.node}.{me.pid}"
    try:
        part.write_text(json.dumps(asdict(me)))
        os.link(part, file)
    except (FileExistsError, FileNotFoundError):  # or a start that was refused took the folder away
        return None
    except OSError:  # file system without hard links
        try:
            with file.open("x") as f:
                f.write(part.read_text())
        except FileExistsError:
            return None
    finally:
        part.unlink(missing_ok=True)
    for old in folder.iterdir():
        if old.stem.isdecimal() and int(old.stem) <= number - _KEPT:
            old.unlink(missing_ok=True)
    return RunLease(file, me, notes, lock)


def _read(file: Path) -> Owner | None:
    try:
        return Owner(**json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _read_end(file: Path) -> LeaseEnd | None:
    try:
        return LeaseEnd(**json.loads(file.with_suffix(_END).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def _age(file: Path) -> float:
    """Seconds since the file was touched, by the clock of the file system that holds it."""
    probe = file.with_name(f".clock.{socket.gethostname()}.{os.getpid()}")
    try:
        probe.touch()
        return probe.stat().st_mtime - file.stat().st_mtime
    except OSError:
        return 0.0
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)


def _flock(path: Path) -> IO[str] | None:
    """Lock within one machine: it ends with its process, so having it proves that no other one there is alive.

    Not getting it proves nothing: forked loader workers inherit it and may outlive their process.
    """
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _namespace() -> str:
    try:
        return os.readlink("/proc/self/ns/pid")
    except OSError:
        return ""


def _started(pid: int) -> str | None:
    """Start time of a process, None if it does not exist or is a zombie."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    fields = stat.rpartition(")")[2].split()  # the name before it may contain any character
    return None if fields[0] in "ZX" else fields[19]
