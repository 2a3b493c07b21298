"""Where the ranks of a run leave word of how far they got: one file a node on the shared disk.

Every rank writes its own heartbeat to a folder in its node's memory. The lowest rank of the node that still does so
puts those of all into `logs/watch_…/node_00000.json`, named by the node's lowest rank. That the run is hung stands in
`hung`, in the shared folder and, for those who need not look there, in the node's.
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

_HUNG = "hung"
_PREFIX = "stamo-watch-"
_NEVER = -1e18  # seconds of a clock
_FORGOTTEN = 86400.0  # seconds without a beat after which a folder in memory belongs to nobody


@dataclass(frozen=True)
class Heartbeat:
    """How far one rank got."""

    rank: int
    marks: int = 0  # passed since the start; every rank passes the same ones in the same order
    step: int = 0
    doing: str = "starting"
    phase: str = ""  # what it does that is no step, in one word
    seconds: float = 0.0  # for how long
    finished: int = 0  # the last step it finished
    dumped: bool = False  # it knows that the run is hung and wrote its stack

    def __str__(self) -> str:
        return f"{self.doing} step {self.step} for {self.seconds:.0f} s, step {self.finished} was its last"


class Heartbeats:
    """Of all ranks of a run, as one of them sees them.

    Args:
        shared: The same folder for every rank; it exists.
        rank: Who this is.
        silent: Seconds without a beat after which a rank of the node no longer speaks for it.
    """

    def __init__(self, shared: Path, rank: int, silent: float):
        self._shared, self._rank, self._silent = shared, rank, silent
        memory, prefix = _memory(), in_memory(shared.parent)
        _clear(memory, prefix, shared.name)
        self._node = memory / f"{prefix}{shared.name}"
        self._first: int | None = None  # the node's lowest, once they have met
        self._told: list[dict[str, Any]] = []  # what this rank wrote last for its node

    def meet(self) -> None:
        """All ranks have beaten once, so that those of one node know each other."""
        self._first = min((rank for rank, _ in self._of_node()), default=self._rank)

    def beat(self, mine: Heartbeat) -> None:
        """Leave word; once they have met, the node's lowest rank also passes on what was said in it, and to it.

        Raises:
            OSError: There is no room.
        """
        self._node.mkdir(mode=0o700, exist_ok=True)  # anew, where a logout has cleared the user's memory
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
        """Whether a rank has said so, as far as this node knows."""
        return (self._node / _HUNG).exists()

    def say_hung(self, limit: float, field: str) -> None:
        """This rank is late by `limit`, which is the recipe's `field`; the first to say so counts.

        Raises:
            OSError: There is no room.
        """
        if not self.hung:
            if not (self._shared / _HUNG).exists():
                _replace(self._shared / _HUNG, [limit, field])
            _replace(self._node / _HUNG, None)

    def limit(self) -> tuple[float, str]:
        """What `say_hung` was given."""
        try:
            limit, field = json.loads((self._shared / _HUNG).read_text())
            return float(limit), str(field)
        except (OSError, ValueError, TypeError):
            return 0.0, "train.step_timeout"

    def speaks(self) -> bool:
        """Whether this is the lowest rank that answers. Who is not the lowest of its node opens no file of another."""
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
        """The last of every rank that left one."""
        found = {beat.rank: beat for file in self._shared.glob("node_*.json") for beat in _beats(file)}
        return found | {rank: beat for rank, (_, beat) in self._of_node()}

    def close(self) -> None:
        """Take this rank's word away; the last of the node takes away all."""
        with contextlib.suppress(OSError):
            self._mine.unlink(missing_ok=True)
            if not any(self._of_node()):
                shutil.rmtree(self._node, ignore_errors=True)
                self._file.unlink(missing_ok=True)
                self._shared.rmdir()  # by the last node

    def leave(self, last: Heartbeat) -> None:
        """This process ends, and its last word stays for the others; the last of the node takes away what is its own.

        Raises:
            OSError: There is no room.
        """
        _replace(self._mine, [_NEVER, asdict(last)])
        if not self._living():
            shutil.rmtree(self._node, ignore_errors=True)

    def _living(self) -> list[int]:
        """Ranks of the node that leave word."""
        now = time.monotonic()
        return [rank for rank, (at, _) in self._of_node() if now - at < self._silent]

    @property
    def _mine(self) -> Path:
        return self._node / f"rank_{self._rank:05d}.json"

    @property
    def _file(self) -> Path:
        return self._shared / f"node_{self._first:05d}.json"

    def _of_node(self) -> Iterator[tuple[int, tuple[float, Heartbeat]]]:
        """Rank → (when it left word, by the node's clock; the word)."""
        for file in self._node.glob("rank_*.json"):
            with contextlib.suppress(OSError, ValueError, TypeError):
                at, found = json.loads(file.read_text())
                yield found["rank"], (float(at), Heartbeat(**found))


def in_memory(logs: Path) -> str:
    """How the names of a run's folders in its nodes' memory begin."""
    run = hashlib.sha256(str(logs.resolve()).encode()).hexdigest()[:12]
    return f"{_PREFIX}{os.getuid()}-{run}-"


def heartbeat_of_main(logs: Path) -> Heartbeat | None:
    """Rank 0's, of the newest start that writes to the folder; None where there is none."""
    newest = max(logs.glob("watch_*/node_00000.json"), key=_when, default=None)
    return next((beat for beat in _beats(newest) if beat.rank == 0), None) if newest is not None else None


def _beats(file: Path) -> list[Heartbeat]:
    with contextlib.suppress(OSError, ValueError, TypeError):
        return [Heartbeat(**found) for found in json.loads(file.read_text())]
    return []


def _replace(path: Path, content: Any) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    part.write_text(json.dumps(content))
    part.replace(path)


def _memory() -> Path:
    """A place that the ranks of a node share and no disk is behind; where there is none, one for temporary files."""
    memory = Path("/dev/shm")
    return memory if os.access(memory, os.W_OK) else Path(tempfile.gettempdir())


def _clear(memory: Path, of_run: str, name: str) -> None:
    """Delete what earlier starts of this run left behind as they were killed, and what nobody has touched for long."""
    for folder in memory.glob(f"{_PREFIX}{os.getuid()}-*"):
        earlier = folder.name.startswith(of_run) and folder.name != of_run + name
        if earlier or time.time() - _when(folder) > _FORGOTTEN:
            shutil.rmtree(folder, ignore_errors=True)


def _when(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return time.time()
