"""Notices that a run no longer gets on, says which rank holds it up, and ends it so that it is started again.

Every rank has a thread that looks at how far its training thread got and writes that to `logs/watch_…/rank_00003.json`.
A rank without progress for too long leaves word in the same folder; then all write where they are to
`logs/stack_rank_00003.txt`, compare, and leave. Nothing here needs a working network.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stamo_dist.engine.preempt import EXIT_PREEMPTED, few_of
from stamo_dist.engine.processes import PATIENCE, broadcast, set_timeout
from stamo_dist.engine.world import World

_MARGIN = 60.0  # seconds: the watchdog comes before the process group, which cannot say who is late
_HUNG = "hung"


@dataclass(frozen=True)
class Heartbeat:
    """How far one rank got."""

    rank: int
    marks: int = 0  # passed since the start; every rank passes the same ones in the same order
    step: int = 0
    doing: str = "starting"
    seconds: float = 0.0  # for how long
    finished: int = 0  # the last step it finished
    dumped: bool = False  # it knows that the run is hung and wrote its stack

    def __str__(self) -> str:
        return f"{self.doing} step {self.step} for {self.seconds:.0f} s, step {self.finished} was its last"


class Watchdog:
    """Watches this rank from the first finished step to `close`; every rank makes one, at the same time.

    Args:
        logs: The run's folder for logs, the same for every rank.
        world: Who this is.
        limit: Seconds without progress after which the run counts as hung.
    """

    def __init__(self, logs: Path, world: World, limit: float):
        self._logs, self._world, self._limit = logs, world, limit
        self._every = min(5.0, limit / 10)
        name = f"watch_{os.getpid()}_{time.time_ns():x}"  # a rank cut off in an earlier start must not mix in
        if world.is_main:
            for old in logs.glob("watch_*"):
                shutil.rmtree(old, ignore_errors=True)
            (logs / name).mkdir(parents=True)
        self._folder = logs / broadcast(name)
        self._file = self._folder / f"rank_{world.rank:05d}.json"
        self._beat, self._since = Heartbeat(world.rank), time.monotonic()
        self._armed = False
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def mark(self, doing: str, step: int) -> None:
        """This rank begins something: `doing` and `step` make a phrase."""
        self._since = time.monotonic()
        self._beat = replace(self._beat, marks=self._beat.marks + 1, step=step, doing=doing)

    def finished(self, step: int) -> None:
        """This rank has finished `step`; from the first on, being late counts."""
        self.mark("done with", step)
        self._beat = replace(self._beat, finished=step)
        if not self._armed:
            self._armed = True
            set_timeout(self._limit + _MARGIN)

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join(timeout=10)
        set_timeout(PATIENCE)
        with contextlib.suppress(OSError):
            self._file.unlink()
            self._folder.rmdir()  # by the last rank

    def _watch(self) -> None:
        while not self._closed.wait(self._every):
            late = self._armed and time.monotonic() - self._since > self._limit
            with contextlib.suppress(OSError):  # a full disk hangs nobody
                self._write(dumped=False)
                if late:
                    (self._folder / _HUNG).touch()
            if late or (self._folder / _HUNG).exists():
                self._leave()

    def _now(self, *, dumped: bool) -> Heartbeat:
        return replace(self._beat, seconds=round(time.monotonic() - self._since, 1), dumped=dumped)

    def _write(self, *, dumped: bool) -> None:
        part = self._file.with_suffix(".tmp")
        part.write_text(json.dumps(asdict(self._now(dumped=dumped))))
        part.replace(self._file)

    def _leave(self) -> None:
        with contextlib.suppress(OSError):
            with stack_file(self._logs, self._world.rank).open("w") as f:
                print(f"rank {self._world.rank}: {self._now(dumped=False)}", file=f, flush=True)
                faulthandler.dump_traceback(f, all_threads=True)
            self._write(dumped=True)
            time.sleep(3 * self._every)  # until the others have done the same
            beats = _read(self._folder)
            answering = [rank for rank, beat in beats.items() if beat.dumped]
            if self._world.rank == min(answering, default=self._world.rank):
                print(f"error: {diagnosis(beats, self._world.size, self._limit, self._logs)}", flush=True)
        os._exit(EXIT_PREEMPTED)


def diagnosis(beats: dict[int, Heartbeat], ranks: int, limit: float, logs: Path) -> str:
    """Who holds the run up: ranks that do not answer, else those that got least far."""
    silent = [rank for rank in range(ranks) if rank not in beats or not beats[rank].dumped]
    least = min((beat.marks for beat in beats.values()), default=0)
    behind = [rank for rank, beat in sorted(beats.items()) if beat.marks == least]
    if silent:
        who = f"{_names(silent)} no longer answer{'s' if len(silent) == 1 else ''} (stopped, dead or cut off)"
        slowest = silent
    elif len(behind) < ranks:
        who, slowest = f"{_names(behind)} {'is' if len(behind) == 1 else 'are'} behind the others", behind
    else:
        who, slowest = "all ranks are at the same place, so it is the network or what their stacks show", behind[:1]
    last = "; ".join(f"rank {rank}: {beats[rank]}" for rank in slowest[:4] if rank in beats)
    return (
        f"the run is hung: no progress for {limit:g} s (train.step_timeout): {who}. Last seen: {last or 'nothing'}. "
        f"The stacks of all that answer are in {logs}/stack_rank_*.txt. Leaving with code {EXIT_PREEMPTED} to be "
        "started again"
    )


def stack_file(logs: Path, rank: int) -> Path:
    return logs / f"stack_rank_{rank:05d}.txt"


def _read(folder: Path) -> dict[int, Heartbeat]:
    beats: dict[int, Heartbeat] = {}
    for file in folder.glob("rank_*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            found: dict[str, Any] = json.loads(file.read_text())
            beats[found["rank"]] = Heartbeat(**found)
    return beats


def _names(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {few_of(ranks)}"
