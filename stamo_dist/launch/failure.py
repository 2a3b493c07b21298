"""Why a run failed: the first error line of the rank that failed first, found in its logs."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from stamo_dist.launch.record import main_log

_TAIL = 1 << 17  # bytes at the end of each log
_RANK = re.compile(r"^rank (\d+) of \d+(?: @ \S+)? failed(?: at (\S+))?:$")
#: What begins another start of the run, or is somebody else's line after a traceback.
_START = re.compile(r"^--- start ")
#: What the ranks say to whom another one's end is all that happened.
_FOLLOWS = re.compile(
    r"Connection (closed|reset|refused)|Broken pipe|closed by (peer|remote)|remote process exited|Socket closed"
    r"|DistBackendError|DistNetworkError|TCPStore|ncclRemoteError|ncclSystemError|Gloo connect|No backend type"
    r"|Timed out (waiting|after)|recvBytes|BarrierTimeout",
    re.IGNORECASE,
)
_KILLED = (  # what srun, slurmstepd and our launcher say about a process that had no last word
    re.compile(r"(oom[-_ ]kill|Out Of Memory)", re.IGNORECASE),
    re.compile(
        r"(^|\s)srun: error: \S+: tasks? [\d,-]+: (?!Exited|Terminated)"
        r"|^rank \d+ of \d+ failed with code 1(?:3[0-9]|[4-9]\d)"
    ),
)
_REFUSED = re.compile(r"^error: (.+)")


@dataclass(frozen=True)
class Failure:
    """What one rank said at its end."""

    rank: int
    time: str  # ISO, of that rank's machine; "" where it is not known
    error: str
    refused: bool = False  # a user's error, which rank 0 mostly says as well

    @property
    def follows(self) -> bool:
        """Whether it only tells that another rank has gone."""
        return _FOLLOWS.search(self.error) is not None

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.error}"


def first_error(run: str | Path) -> str:
    """The error line of the rank that failed first in the run's last start; "" where the logs have none.

    An error that only tells of another rank's end comes after all others, whatever the nodes' clocks say. A process
    that was killed leaves no word of its own; then what the scheduler or the launcher said about it counts.
    """
    logs = main_log(run).parent
    others = sorted([*logs.glob("rank_*.log"), *logs.glob("task_*.log")])
    texts = {path: _last_start(path) for path in (main_log(run), *others)}
    failures = [failure for text in texts.values() for failure in _failures(text)]
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
    """The last user's error; of a list of problems the first one."""
    for i in reversed(range(len(lines))):
        if match := _REFUSED.match(lines[i]):
            listed = match[1].endswith(":") and i + 1 < len(lines)
            return lines[i + 1].strip(" -") if listed else match[1]
    return ""


def _raised(lines: list[str]) -> str:
    """The line of a traceback that names the exception: of the last one of a chain."""
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
