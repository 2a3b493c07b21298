"""Runs on this machine without a scheduler: a background process starts and restarts them.

It works through its runs one after the other. A run that leaves with code 75, or crashes, is started again as a
scheduler would do it.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

from stamo_dist.errors import RunError
from stamo_dist.faults.signals import SIGNALS
from stamo_dist.launch import supervisor
from stamo_dist.launch.ends import Verdict, judge_exit, newest_step
from stamo_dist.launch.local import Ranks
from stamo_dist.launch.notify import hidden, tell_end
from stamo_dist.launch.record import (
    Event,
    Launch,
    What,
    folder,
    hindrance,
    main_log,
    newest_first,
    now,
    process_command,
    rank_log,
    read,
    record,
    snapshot_command,
    unwritable,
)
from stamo_dist.launch.shell import before_the_run
from stamo_dist.run.folder import write_atomic
from stamo_dist.run.lease import Owner
from stamo_dist.words import counted, print_in_any_locale

_PATIENCE = 30.0  # seconds for the supervisor to start
_GRACE = 120.0  # seconds for a cancelled run to save and exit
_LOOK = 0.5  # seconds between polls for a cancel request
_PAUSE = 1.0  # seconds before a crashed run is restarted
_ENDED = "the process that looks after it was ended"


def start(runs: Sequence[str | Path]) -> str:
    """Run these runs in sequence in the background; each has its launch.json. Returns their common job id.

    Raises:
        RunError: The supervisor does not start.
    """
    log, first = folder(runs[0]) / "supervisor.log", read(runs[0]).snapshot
    words = ["-m", __name__] if first is None else snapshot_command(first, __name__, ())[1:]
    line = [sys.executable, *words, *map(str, runs)]
    with log.open("ab") as out:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True)
    deadline = time.monotonic() + _PATIENCE
    while not all((owner := supervisor.of(run)) is not None and owner.pid == process.pid for run in runs):
        if process.poll() is not None or time.monotonic() > deadline:
            raise RunError(f"the process that looks after {runs[0]} did not start; see {log}")
        time.sleep(0.02)
    return job_id(process.pid)


def job_id(pid: int) -> str:
    return f"local-{pid}"


def command(launch: Launch) -> list[str]:
    """The command of each process, preceded by the profile's modules and setup lines in the same shell."""
    words = process_command(launch)
    lines = before_the_run(launch.profile)
    return ["bash", "-c", "\n".join([*lines, 'exec "$@"']), "bash", *words] if lines else words


def cancel(run: str | Path) -> None:
    """Cancel the run: within a second it is asked to save and exit; it is not restarted. A waiting run is dropped.

    Raises:
        OSError: The request cannot be written.
    """
    record(run, Event("cancelled", job=read(run).job, step=newest_step(run)))


def cancelled(run: str | Path) -> bool:
    """Whether it was cancelled since its last submission."""
    for event in newest_first(run):
        if event.event in ("submitted", "cancelled"):
            return event.event == "cancelled"
    return False


class _Supervisor:
    def __init__(self) -> None:
        self.job = job_id(os.getpid())
        self._ending = False  # this process was asked to end
        self._ranks: Ranks | None = None
        self._looked = self._asked = 0.0  # time of the last poll; time of the cancel request, 0 without one

    def work(self, runs: Sequence[Path]) -> None:
        for s in SIGNALS:
            signal.signal(s, self._signal)
        me = json.dumps(asdict(Owner.this())) + "\n"
        for run in runs:
            write_atomic(folder(run) / supervisor.FILE, me)
        for run in runs:
            launch = read(run)
            while any(map(supervisor.busy, launch.after)) and not (self._ending or cancelled(run)):
                time.sleep(_LOOK)  # under another supervisor
            if cancelled(run):
                self._tell_end(launch, Event("cancelled", job=self.job))
                continue
            if why := _ENDED if self._ending else hindrance(launch):
                self._tell_end(launch, self._record_event(run, "stopped", reason=why))
            else:
                self._run(run, launch)

    def _run(self, run: Path, launch: Launch) -> None:
        restart, processes = 0, launch.nodes * launch.processes_per_node
        while True:
            self._record_event(run, "started", restart=restart, nodes=[socket.gethostname()], world_size=processes)
            try:
                code = self._start(run, launch, processes, restart)
            except (OSError, RunError) as e:
                print(f"{run}: {e}", flush=True)
                code = 2
            verdict = judge_exit(launch, code, self.job)
            if verdict.event == "failed" and (why := unwritable(run)):
                verdict = Verdict("failed", False, f"{verdict.reason}; {why}; `stamo resume {run}` goes on")
            if verdict.again and cancelled(run):
                return self._tell_end(launch, Event("cancelled", job=self.job))
            if verdict.again and self._ending:
                verdict = Verdict("stopped", False, _ENDED)
            last = self._record_event(run, verdict.event, restart=restart, reason=verdict.reason)
            if not verdict.again:
                return self._tell_end(launch, last)
            restart += 1
            self._record_event(run, "requeued", restart=restart)
            time.sleep(_PAUSE if verdict.event == "failed" else 0)

    def _start(self, run: Path, launch: Launch, processes: int, restart: int) -> int:
        self._asked = 0.0
        main_log(run).parent.mkdir(parents=True, exist_ok=True)
        node, head, when = socket.gethostname(), f"--- start {restart + 1} of job {self.job}", now()
        for rank in range(1, processes):
            with rank_log(run, rank).open("a") as other:
                other.write(f"{head}: rank {rank} of {processes} @ {node}, {when}\n")
        environment = {"PYTHONUNBUFFERED": "1", **launch.profile.get("environment", {}), **hidden(launch.profile)}
        with main_log(run).open("ab", buffering=0) as log:
            log.write(f"{head} on {node}: {counted(processes, 'process')}, {when}\n".encode())
            with Ranks(command(launch), processes, run, main=log, env=environment, forward=self._signal) as ranks:
                self._ranks = ranks
                try:
                    return ranks.wait(lambda: self._look(run, ranks))
                finally:
                    self._ranks = None

    def _signal(self, number: int, frame: FrameType | None = None) -> None:
        """Signal handler: SIGTERM and SIGINT end everything; the others make the current run save and restart."""
        self._ending |= number in (signal.SIGTERM, signal.SIGINT)
        if self._ranks is not None and not self._ending:
            self._ranks.signal(number)

    def _look(self, run: Path, ranks: Ranks) -> None:
        """Signal the run if it was cancelled."""
        moment = time.monotonic()
        if moment < self._looked + _LOOK:
            return
        self._looked = moment
        if not self._asked and (self._ending or cancelled(run)):
            self._asked = moment
            ranks.signal(signal.SIGTERM)
        elif self._asked and moment > self._asked + _GRACE:
            ranks.signal(signal.SIGKILL)

    def _record_event(self, run: Path, what: What, **about: Any) -> Event:
        event = Event(what, job=self.job, step=newest_step(run), **about)
        try:
            record(run, event)
        except OSError as e:  # never ends the run, nor those that come after it
            print(f"{run}: {what} could not be recorded ({e.strerror})", flush=True)
        return event

    def _tell_end(self, launch: Launch, event: Event) -> None:
        """Tell whom the profile names that the run has ended."""
        if said := tell_end(launch, event):
            with suppress(OSError), main_log(launch.run_dir).open("a") as log:
                log.write(f"job {self.job}: {said}\n")


if __name__ == "__main__":
    print_in_any_locale()
    _Supervisor().work([Path(run) for run in sys.argv[1:]])
