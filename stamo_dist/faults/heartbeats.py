"""Heartbeats of the ranks of a run: one file per node on the shared disk.

Every rank writes its own heartbeat to a folder in its node's memory. The lowest rank of the node that still
writes copies all of them into `logs/watch_…/node_00000.json`, named by the node's lowest rank. If the run is hung, a
file `hung` is written to the shared folder and copied to the nodes' folders, so that not every rank polls the disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stamo_dist.paths import canonical

_HUNG = "hung"
_BLAMED = "hung.json"  # in the run's logs, for the launcher
_PREFIX = "stamo-watch-"
_NEVER = -1e18  # seconds of a clock
_FORGOTTEN = 86400.0  # seconds without a heartbeat after which a folder in memory is abandoned


@dataclass(frozen=True)
class Heartbeat:
    """The progress of one rank."""

    rank: int
    marks: int = 0  # number of phases passed since the start; the same sequence on every rank
    step: int = 0
    doing: str = "starting"
    phase: str = ""  # current activity outside steps, one word
    seconds: float = 0.0  # for how long
    finished: int = 0  # last finished step
    dumped: bool = False  # it has noticed that the run is hung and written its stack

    def __str__(self) -> str:
        return f"{self.doing} step {self.step} for {self.seconds:.0f} s, step {self.finished} was its last"


class Heartbeats:
    """The heartbeats of all ranks of a run, seen from one of them.

    Args:
        shared: An existing folder, the same for every rank.
        rank: This rank.
        silent: Seconds without a heartbeat after which a rank no longer writes for its node.
    """

    def __init__(self, shared: Path, rank: int, silent: float):
        self._shared, self._rank, self._silent = shared, rank, silent
        memory, prefix = _memory(), in_memory(shared.parent)
        _clear(memory, prefix, shared.name)
        self._node = memory / f"{prefix}{shared.name}"
        self._first: int | None = None  # the node's lowest rank, once they have met
        self._told: list[dict[str, Any]] = []  # last content written by this rank for its node

    def meet(self) -> None:
        """Call when all ranks have written once, so that those of one node find each other."""
        self._first = min((rank for rank, _ in self._of_node()), default=self._rank)

    def beat(self, mine: Heartbeat) -> None:
        """Write a heartbeat; after `meet`, the node's lowest rank also copies files to and from the shared folder.

        Raises:
            OSError: There is no room.
        """
        self._node.mkdir(mode=0o700, exist_ok=True)  # create it again if a logout has cleared the user's memory
        _replace(self._mine, [time.monotonic(), asdict(mine)])
        if self._first is None or self._rank != min(self._living(), default=self._rank):
            return
        if (self._shared / _HUNG).exists() and not self.hung:
            _replace(self._node / _HUNG, None)
        told = [asdict(beat) for _, (_, beat) in sorted(self._of_node())]
        if told != self._told:
            _replace(self._file, told)
            self._told = told

    @property
    def hung(self) -> bool:
        """Whether a rank has reported the run as hung, as far as this node knows."""
        return (self._node / _HUNG).exists()

    def say_hung(self, limit: float, field: str) -> None:
        """Report that this rank exceeded `limit`, the recipe's `field`; the first report counts.

        Raises:
            OSError: There is no room.
        """
        if not self.hung:
            if not (self._shared / _HUNG).exists():
                _replace(self._shared / _HUNG, [limit, field])
            _replace(self._node / _HUNG, None)

    def limit(self) -> tuple[float, str]:
        """The arguments of `say_hung`."""
        try:
            limit, field = json.loads((self._shared / _HUNG).read_text())
            return float(limit), str(field)
        except (OSError, ValueError, TypeError):
            return 0.0, "train.step_timeout"

    def speaks(self) -> bool:
        """Whether this is the lowest responding rank. Only the lowest of a node reads other nodes' files."""
        mine = [rank for rank, (_, beat) in self._of_node() if beat.dumped]
        if self._rank != min(mine, default=self._rank):
            return False
        for file in sorted(self._shared.glob("node_*.json")):
            if file == self._file:
                break
            if any(beat.dumped and beat.rank < self._rank for beat in _beats(file)):
                return False
        return True

    def read(self) -> dict[int, Heartbeat]:
        """The last heartbeat of every rank that has one."""
        found = {beat.rank: beat for file in self._shared.glob("node_*.json") for beat in _beats(file)}
        return found | {rank: beat for rank, (_, beat) in self._of_node()}

    def close(self) -> None:
        """Remove this rank's heartbeat; the last rank of the node removes the folder."""
        with contextlib.suppress(OSError):
            self._mine.unlink(missing_ok=True)
            if not any(self._of_node()):
                shutil.rmtree(self._node, ignore_errors=True)
                self._file.unlink(missing_ok=True)
                self._shared.rmdir()  # removed by the last node

    def leave(self, last: Heartbeat) -> None:
        """End, but leave the last heartbeat for the others; the last rank of the node removes its folder.

        Raises:
            OSError: There is no room.
        """
        _replace(self._mine, [_NEVER, asdict(last)])
        if not self._living():
            shutil.rmtree(self._node, ignore_errors=True)

    def _living(self) -> list[int]:
        """Ranks of the node that write heartbeats."""
        now = time.monotonic()
        return [rank for rank, (at, _) in self._of_node() if now - at < self._silent]

    @property
    def _mine(self) -> Path:
        return self._node / f"rank_{self._rank:05d}.json"

    @property
    def _file(self) -> Path:
        return self._shared / f"node_{self._first:05d}.json"

    def _of_node(self) -> Iterator[tuple[int, tuple[float, Heartbeat]]]:
        """Rank → (time of its heartbeat by the node's clock, heartbeat)."""
        for file in self._node.glob("rank_*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                at, found = json.loads(file.read_text())
                yield found["rank"], (float(at), Heartbeat(**found))


def in_memory(logs: Path) -> str:
    """Name prefix of a run's folders in its nodes' memory."""
    run = hashlib.sha256(canonical(logs).encode()).hexdigest()[:12]
    return f"{_PREFIX}{os.getuid()}-{run}-"


def heartbeat_of_main(logs: Path) -> Heartbeat | None:
    """Rank 0's heartbeat, of the newest start that writes to the folder; None if there is none."""
    newest = max(logs.glob("watch_*/node_00000.json"), key=_when, default=None)
    return next((beat for beat in _beats(newest) if beat.rank == 0), None) if newest is not None else None


def blame(logs: Path, ranks: list[int]) -> None:
    """Leave a note that a start hung, and which ranks block it ([]: it is not known); a note with ranks counts."""
    with contextlib.suppress(OSError):
        if ranks or not (logs / _BLAMED).exists():
            _replace(logs / _BLAMED, ranks)


def hung_ranks(logs: Path) -> list[int] | None:
    """The note of `blame`; None without one."""
    try:
        return [int(rank) for rank in json.loads((logs / _BLAMED).read_text())]
    except (OSError, ValueError, TypeError):
        return None


def forget_blame(logs: Path) -> None:
    with contextlib.suppress(OSError):
        (logs / _BLAMED).unlink(missing_ok=True)


def _beats(file: Path) -> list[Heartbeat]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Heartbeat(**found) for found in json.loads(file.read_text())]
    return []


def _replace(path: Path, content: Any) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    part.write_text(json.dumps(content))
    part.replace(path)


def _memory() -> Path:
    """A folder in memory shared by the ranks of a node; if there is none, the folder for temporary files."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def _clear(memory: Path, of_run: str, name: str) -> None:
    """Delete folders of killed earlier starts of this run, and any not touched for long."""
    for folder in memory.glob(f"{_PREFIX}{os.getuid()}-*"):
        earlier = folder.name.startswith(of_run) and folder.name != of_run + name
        if earlier or time.time() - _when(folder) > _FORGOTTEN:
            shutil.rmtree(folder, ignore_errors=True)


def _when(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()
