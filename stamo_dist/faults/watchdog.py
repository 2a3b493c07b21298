"""Detects a hung run, reports which rank blocks it, and ends it so that it is started again.

Every rank has a thread that writes the progress of its training thread as a heartbeat (`heartbeats.py`). A rank without
progress for too long reports the run as hung; then all write their stacks to `logs/stack_rank_00003.txt`, the lowest
responding rank compares progress, and all exit. Nothing here needs a working network.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path

from stamo_dist.distributed.collectives import PATIENCE, barrier, broadcast, set_timeout
from stamo_dist.distributed.rank import World, few_of
from stamo_dist.exit_codes import EXIT_PREEMPTED
from stamo_dist.faults.heartbeats import Heartbeat, Heartbeats, blame
from stamo_dist.recipe.training import Train

#: Activity outside steps (as `stamo status` shows it) → the field of `train` that limits it.
PHASES = {
    "building": "setup_timeout",
    "saving": "save_timeout",
    "evaluating": "evaluate_timeout",
    "exporting": "export_timeout",
    "leaving": "setup_timeout",
}
_MARGIN = 60.0  # seconds by which the watchdog acts before the process group's timeout, which cannot name the late rank
#: Seconds that a rank without a launcher may take for one phase; no process would end it otherwise.
_LONELY = 30.0
_LOOKS = 4  # polls of the node's memory between two heartbeats; no disk access


class Watchdog:
    """Watches this rank from its first moment to `close`; every rank makes one.

    Until `ranks_connected`, only this rank's own lateness counts.

    Args:
        logs: The run's log folder, the same for every rank.
        world: This process's rank.
        limits: Of its `…_timeout` fields, seconds without progress after which the run counts as hung.
    """

    def __init__(self, logs: Path, world: World, limits: Train):
        self._logs, self._world, self._limits = logs, world, limits
        self._every = min(5.0, min(getattr(limits, field) for field in ("step_timeout", *PHASES.values())) / 10)
        self._beats: Heartbeats | None = None
        self._beat, self._since = Heartbeat(world.rank), time.monotonic()
        self._field = "setup_timeout"
        self._gone = False  # the run is hung; the progress at that time is reported
        self.saving_takes = 0.0  # seconds, as last measured: the time given to a rank that lost its launcher
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def ranks_connected(self) -> None:
        """All ranks are connected and from now on watch each other; every rank calls it."""
        name = f"watch_{os.getpid()}_{time.time_ns():x}"  # a rank left over from an earlier start must not interfere
        if self._world.is_main:
            for old in self._logs.glob("watch_*"):
                shutil.rmtree(old, ignore_errors=True)
            (self._logs / name).mkdir(parents=True)
        beats = Heartbeats(self._logs / broadcast(name), self._world.rank, silent=1 + 3 * self._every)
        with contextlib.suppress(OSError):
            beats.beat(self._now(dumped=False))
        barrier()
        beats.meet()
        self._beats = beats

    def mark(self, doing: str, step: int) -> None:
        """This rank begins `doing` in `step`; outside steps, `doing` begins with one of PHASES.

        The first step may take as long as building the model.
        """
        if self._gone:
            return
        self._since = time.monotonic()
        word = doing.split(maxsplit=1)[0]
        phase, before = word if word in PHASES else "", self._beat.phase
        self._beat = replace(self._beat, marks=self._beat.marks + 1, step=step, doing=doing, phase=phase)
        field = PHASES[phase] if phase else "step_timeout" if self._beat.finished else "setup_timeout"
        if field != self._field:
            self._field = field
            seconds = getattr(self._limits, field) + _MARGIN
            set_timeout(seconds if field == "step_timeout" else max(seconds, PATIENCE))
        if phase != before and self._beats is not None:
            with contextlib.suppress(OSError):
                self._beats.beat(self._now(dumped=False))

    def finished(self, step: int) -> None:
        """This rank has finished `step`; from the first on, the limit of steps applies."""
        self._beat = replace(self._beat, finished=step)
        self.mark("done with", step)

    def close(self) -> None:
        """Watch no longer."""
        self._closed.set()
        self._thread.join(timeout=10)
        set_timeout(PATIENCE)
        if self._beats is not None:
            self._beats.close()

    def _watch(self) -> None:
        beaten, pause = 0.0, self._every / _LOOKS
        looked = time.monotonic()
        while not self._closed.wait(pause):
            # While this process was stopped, as Slurm does with a suspended job, nothing could get further.
            if (stopped := time.monotonic() - looked - pause) > self._every:
                self._since += stopped
            looked = time.monotonic()
            field = self._field
            limit = getattr(self._limits, field)
            waited, lonely = time.monotonic() - self._since, launcher_is_gone()
            if lonely:
                limit = min(limit, max(_LONELY, 3 * self.saving_takes))
            late, beats = waited > limit, self._beats
            if beats is None:
                if late:
                    blame(self._logs, [])  # who is late cannot be told before all have met
                    self._leave_alone(f"{self._now(dumped=False)} (train.{field}: {limit:g})")
                continue
            with contextlib.suppress(OSError):  # a full disk must not block the watchdog
                if late and not lonely:
                    beats.say_hung(limit, f"train.{field}")
                if late or time.monotonic() >= beaten + self._every:
                    beaten = time.monotonic()
                    beats.beat(self._now(dumped=False))
            if late and lonely:
                self._leave_alone(f"what started it is gone, and it got no further: {self._now(dumped=False)}")
            elif late or beats.hung:
                self._leave(beats)

    def _now(self, *, dumped: bool) -> Heartbeat:
        return replace(self._beat, seconds=round(time.monotonic() - self._since, 1), dumped=dumped)

    def _dump(self) -> None:
        with contextlib.suppress(OSError), stack_file(self._logs, self._world.rank).open("w") as f:
            print(f"rank {self._world.rank}: {self._now(dumped=False)}", file=f, flush=True)
            faulthandler.dump_traceback(f, all_threads=True)

    def _leave_alone(self, why: str) -> None:
        self._dump()
        print(
            f"error: rank {self._world.rank} is hung: {why}; its stack is in "
            f"{stack_file(self._logs, self._world.rank)}. Leaving with code {EXIT_PREEMPTED} to be started again",
            flush=True,
        )
        os._exit(EXIT_PREEMPTED)

    def _leave(self, beats: Heartbeats) -> None:
        self._gone = True
        self._dump()
        last = self._now(dumped=True)
        for _ in range(3 * _LOOKS):  # until the others have done the same and their nodes have copied it
            with contextlib.suppress(OSError):
                beats.beat(last)
            time.sleep(self._every / _LOOKS)
        with contextlib.suppress(OSError):
            if beats.speaks():
                seen = beats.read()
                blame(self._logs, blocking(seen, self._world.size)[0])
                print(f"error: {diagnosis(seen, self._world.size, *beats.limit(), self._logs)}", flush=True)
            beats.leave(last)
        os._exit(EXIT_PREEMPTED)


def launcher_is_gone() -> bool:
    """Whether the launcher of this rank, which would end it, has been killed."""
    launcher = os.environ.get("STAMO_LAUNCHED")
    return launcher is not None and os.getppid() != int(launcher)


def diagnosis(beats: dict[int, Heartbeat], ranks: int, limit: float, field: str, logs: Path) -> str:
    """What a hung run says of the ranks that block it."""
    slowest, who = blocking(beats, ranks)
    shown = slowest or sorted(beats)[:1]
    last = "; ".join(f"rank {rank}: {beats[rank]}" for rank in shown[:4] if rank in beats)
    return (
        f"the run is hung: no progress for {limit:g} s ({field}): {who}. Last seen: {last or 'nothing'}. "
        f"The stacks of all that answer are in {logs}/stack_rank_*.txt. Leaving with code {EXIT_PREEMPTED} to be "
        "started again"
    )


def blocking(beats: dict[int, Heartbeat], ranks: int) -> tuple[list[int], str]:
    """(the ranks that block the run: those that do not respond, else those with the least progress; in words)."""
    silent = [rank for rank in range(ranks) if rank not in beats or not beats[rank].dumped]
    least = min((beat.marks for beat in beats.values()), default=0)
    behind = [rank for rank, beat in sorted(beats.items()) if beat.marks == least]
    if silent:
        return silent, f"{_names(silent)} no longer answer{'s' if len(silent) == 1 else ''} (stopped, dead or cut off)"
    if len(behind) < ranks:
        return behind, f"{_names(behind)} {'is' if len(behind) == 1 else 'are'} behind the others"
    return [], "all ranks are at the same place, so it is the network or what their stacks show"


def stack_file(logs: Path, rank: int) -> Path:
    return logs / f"stack_rank_{rank:05d}.txt"


def _names(ranks: list[int]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {few_of(ranks)}"
