"""Reading and following the logs of a run's ranks, and finding the cause of a failure.

The cause is the first error line of the rank that failed first.
"""

from __future__ import annotations

import re
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from stamo_dist.errors import RunError
from stamo_dist.launch.record import folder, main_log, rank_log

_POLL = 0.3  # seconds
_LOOK = 2.0  # seconds between looks for further logs
_BLOCK = 1 << 16
_HEAD = re.compile(rb"^--- start .*?: rank \d+ of \d+ @ (\S+?),")
_TAIL = 1 << 17  # bytes read at the end of each log
_RANK = re.compile(r"^rank (\d+) of \d+(?: @ \S+)? failed(?: at (\S+))?:$")
#: Lines that begin another start of the run, or that follow a traceback but do not belong to it.
_START = re.compile(r"^--- start ")
#: Errors of ranks that only report the end of another rank.
_FOLLOWS = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|closed by (peer|remote)|remote process exited|Socket closed"
    r"|DistBackendError|DistNetworkError|TCPStore|ncclRemoteError|ncclSystemError|Gloo connect|No backend type"
    r"|Timed out (waiting|after)|recvBytes|BarrierTimeout",
    re.IGNORECASE,
)
_KILLED = (  # messages of srun, slurmstepd and our launcher about a process that logged no error
    re.compile(r"(oom[-_ ]kill|Out Of Memory)", re.IGNORECASE),
    re.compile(
        r"(^|\s)srun: error: \S+: tasks? [\d,-]+: (?!Exited|Terminated)"
        r"|^rank \d+ of \d+ failed with code 1(?:3[0-9]|[4-9]\d)"
    ),
)
_REFUSED = re.compile(r"^error: (.+)")


@dataclass
class JobLog:
    """A growing file, read line by line."""

    path: Path
    label: str = ""  # prefix of each line
    _at: int = 0
    _rest: bytes = b""
    _inode: int = field(default=0)

    def last(self, lines: int) -> list[str]:
        """The last so many lines (all: 0); `more` goes on after them."""
        found: deque[bytes] = deque()
        try:
            with self.path.open("rb") as f:
                size = f.seek(0, 2)
                block = size if not lines else _BLOCK
                start, text = size, b""
                while start > 0 and (not lines or text.count(b"\n") <= lines):
                    start = max(0, start - block)
                    f.seek(start)
                    text = f.read(size - start)
                found.extend(text.split(b"\n"))
                self._at, self._inode = size, self.path.stat().st_ino
        except OSError:
            return []
        self._rest = found.pop() if found else b""  # incomplete line
        kept = list(found)[-lines:] if lines else list(found)
        return self._labelled(kept)

    def more(self) -> list[str]:
        """The complete lines added since the last call; from the start if the file was replaced."""
        try:
            found = self.path.stat()
            if found.st_size < self._at or (self._inode and found.st_ino != self._inode):
                self._at, self._rest = 0, b""
            self._inode = found.st_ino
            if found.st_size == self._at:
                return []
            with self.path.open("rb") as f:
                f.seek(self._at)
                text = f.read()
        except OSError:
            return []
        self._at += len(text)
        *lines, self._rest = (self._rest + text).split(b"\n")
        return self._labelled(lines)

    def end(self) -> list[str]:
        """The last line, if it has no line end."""
        rest, self._rest = self._rest, b""
        return self._labelled([rest] if rest else [])

    def _labelled(self, lines: Sequence[bytes]) -> list[str]:
        said = []
        for line in lines:
            if self.label and (head := _HEAD.match(line)):  # a start, perhaps on another node
                self.label = f"{self.label.partition(' @ ')[0]} @ {head[1].decode()}"
            prefix = f"{self.label} | " if self.label else ""
            # A progress bar rewrites its line: only the last version counts.
            said.append(prefix + line.rstrip(b"\r").rpartition(b"\r")[2].decode(errors="replace"))
        return said


def ranks(run: Path) -> dict[int, Path]:
    """Rank → its log, for existing logs."""
    found = {
        int(m[1]): p for p in main_log(run).parent.glob("rank_*.log") if (m := re.fullmatch(r"rank_(\d+)", p.stem))
    }
    if main_log(run).is_file():
        found[0] = main_log(run)
    return dict(sorted(found.items()))


def by_hand(run: Path) -> bool:
    """Whether the run was started by `stamo train`, not submitted."""
    return (run / "resolved.yaml").is_file() and not (folder(run) / "launch.json").is_file()


def in_terminal(run: Path) -> str:
    """Where the output of such a run is."""
    return (
        f"{run}: was started by `stamo train`, so rank 0 printed into that terminal, and no log holds it; "
        f"`stamo status {run}` says how it does, {run / 'metrics.jsonl'} has every logged step"
    )


def choose(run: Path, rank: str | None) -> list[JobLog]:
    """The logs to show: rank 0's and the job's own, that of one rank, or "all", each line with its rank and node.

    Raises:
        RunError: There are no logs, or not that one.
    """
    there = ranks(run)
    tasks = {p.stem: p for p in sorted(main_log(run).parent.glob("task_*.log"))}  # of an array
    if not there and not tasks:
        if by_hand(run):
            raise RunError(in_terminal(run))
        raise RunError(f"{run}: no logs yet; `stamo status {run}` tells what it waits for")
    if rank == "all":
        return [JobLog(path, _who(path, f"rank {n}")) for n, path in there.items()] + _named(tasks)
    if rank is None:
        return [JobLog(there[0])] if 0 in there else _named(tasks) or [JobLog(p, f"rank {n}") for n, p in there.items()]
    if not rank.isdecimal() or int(rank) not in there:
        known = ", ".join(map(str, list(there)[:16])) + (" …" if len(there) > 16 else "")
        raise RunError(f"--rank {rank}: {run} has logs of the ranks {known}; or give all")
    return [JobLog(rank_log(run, int(rank)))]


def follow(
    logs: Sequence[JobLog], over: Callable[[], bool], choose: Callable[[], Sequence[JobLog]] = tuple
) -> Iterator[str]:
    """Yield added lines until `over` and no more arrive; `choose`: the logs that there are now."""
    logs, looked = list(logs), 0.0
    while True:
        ended = over()
        if ended or time.monotonic() > looked + _LOOK:
            known, looked = {log.path for log in logs}, time.monotonic()
            logs += [log for log in choose() if log.path not in known]
        fresh = [line for log in logs for line in log.more()]
        yield from fresh
        if ended and not fresh:
            yield from (line for log in logs for line in log.end())
            return
        time.sleep(_POLL)


def _named(files: Mapping[str, Path]) -> list[JobLog]:
    return [JobLog(path, name.replace("_", " ")) for name, path in files.items()]


def _who(path: Path, rank: str) -> str:
    """Label with the rank and its last node."""
    try:
        with path.open("rb") as f:
            heads = [m[1] for line in f if (m := _HEAD.match(line))]
    except OSError:
        heads = []
    return f"{rank} @ {heads[-1].decode()}" if heads else rank


@dataclass(frozen=True)
class Failure:
    """The last error of one rank."""

    rank: int
    time: str  # ISO time of the rank's machine; "" if unknown
    error: str
    refused: bool = False  # a user's error, which rank 0 usually reports, too

    @property
    def follows(self) -> bool:
        return follows(self.error)

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.error}"


def follows(error: str) -> bool:
    """Whether the error only reports that another rank has ended."""
    return _FOLLOWS.search(error) is not None


def first_error(run: str | Path, since: str = "") -> str:
    """The error line of the rank that failed first in the run's last start; "" if the logs have none.

    `since`: leave out failures before that time, as logs of runs started by hand do not tell starts apart.

    Errors that only report another rank's end are considered last, whatever the nodes' clocks say. A killed process
    logs no error; then the message of the scheduler or the launcher is used.
    """
    logs = main_log(run).parent
    others = sorted([*logs.glob("rank_*.log"), *logs.glob("task_*.log")])
    texts = {path: _last_start(path) for path in (main_log(run), *others)}
    failures = [failure for text in texts.values() for failure in _failures(text) if failure.time[:19] >= since[:19]]
    own = sorted((f for f in failures if not f.follows), key=lambda f: (f.refused, f.time, f.rank))
    main = texts[main_log(run)]
    said = _refused(main)
    if own:
        return said if own[0].refused and said else str(own[0])
    for pattern in _KILLED:
        for line in main:
            if pattern.search(line):
                return line.strip()
    if said:
        return said
    return str(min(failures, key=lambda f: (f.time, f.rank))) if failures else ""


def failures_of(run: str | Path, heads: Collection[str]) -> list[Failure]:
    """The failures that the ranks logged in one start, whose lines in the logs begin with one of `heads`."""
    files = [main_log(run), *sorted(main_log(run).parent.glob("rank_*.log"))]
    texts = (lines for lines in map(_last_start, files) if lines and lines[0].startswith(tuple(heads)))
    return [failure for lines in texts for failure in _failures(lines)]


def _last_start(path: Path) -> list[str]:
    try:
        with path.open("rb") as f:
            f.seek(max(0, f.seek(0, 2) - _TAIL))
            lines = f.read().decode(errors="replace").splitlines()
    except OSError:
        return []
    begins = [i for i, line in enumerate(lines) if _START.match(line)]
    return lines[begins[-1] :] if begins else lines


def _failures(lines: list[str]) -> Iterator[Failure]:
    for i, line in enumerate(lines):
        if match := _RANK.match(line):
            following = lines[i + 1 :]
            if refused := _refused(following[:2]):
                yield Failure(int(match[1]), match[2] or "", refused, refused=True)
            elif error := _raised(following):
                yield Failure(int(match[1]), match[2] or "", error)


def _refused(lines: list[str]) -> str:
    """The last user error; of a list of problems, the first one."""
    for i in reversed(range(len(lines))):
        if match := _REFUSED.match(lines[i]):
            listed = match[1].endswith(":") and i + 1 < len(lines)
            return lines[i + 1].strip(" -") if listed else match[1]
    return ""


def _raised(lines: list[str]) -> str:
    """The line of a traceback that names the exception; for a chain, the last exception's."""
    error, inside = "", False
    for line in lines:
        if line.startswith("Traceback "):
            inside = True
        elif _RANK.match(line) or _START.match(line):
            break
        elif inside and line and not line[0].isspace():
            error, inside = line.strip(), False
        elif error and not inside and line and not line.startswith(("During handling", "The above exception")):
            break
    return error
