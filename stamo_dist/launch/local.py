"""The processes of a run on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from stamo_dist.distributed.rank import ReservedPort, cores
from stamo_dist.errors import RunError
from stamo_dist.exit_codes import EXIT_NOT_EXPORTED, EXIT_PREEMPTED
from stamo_dist.faults.signals import SIGNALS
from stamo_dist.launch.logs import first_error
from stamo_dist.launch.record import now, rank_log
from stamo_dist.run.lease import lease_folder

_GRACE = 10.0  # seconds for the other ranks to exit on their own after one has failed


class Rank(Protocol):
    """The used part of `subprocess.Popen`'s interface."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def send_signal(self, number: int) -> None: ...

    def kill(self) -> None: ...


def spawn(command: Sequence[str], environment: Mapping[str, str], output: IO[bytes] | None) -> Rank:
    """Start a command with these variables in addition to this process's."""
    # Its own session: a Ctrl-C in the terminal reaches only this process, which forwards it once.
    process: subprocess.Popen[bytes] = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
    )
    return process


Start = Callable[[Sequence[str], Mapping[str, str], IO[bytes] | None], Rank]


def launch_local(arguments: Sequence[str], processes: int, run: Path, start: Start = spawn) -> int:
    """Run `stamo ARGUMENTS` on `processes` local processes; returns the exit code of the first rank that failed, or 0.

    Rank 0 writes to this terminal, every other rank to its log below `run`. Signals sent to this process go to all
    ranks. `start` starts a rank in its own session.
    """
    before = _Before(run, processes)
    with Ranks([sys.executable, "-m", "stamo_dist.cli", *arguments], processes, run, start=start) as ranks:
        code = ranks.wait()
    if code == 2:
        before.restore()
    return code


class _Before:
    """The state of a run folder before the ranks' logs were opened, to which a refused run restores it."""

    def __init__(self, run: Path, processes: int):
        logs = [rank_log(run, rank) for rank in range(1, processes)]
        self._sizes = {log: log.stat().st_size if log.is_file() else None for log in logs}
        self._missing = [p for p in (rank_log(run, 0).parent, *rank_log(run, 0).parents[1:]) if not p.exists()]
        self._leases = lease_folder(run)
        self._starts = self._taken()

    def _taken(self) -> set[str]:
        """The files that every accepted start leaves there."""
        return {p.name for p in self._leases.glob("*")}

    def restore(self) -> None:
        """Remove the logs, unless a start has taken the folder since."""
        if self._taken() != self._starts:
            return
        with suppress(OSError):
            for log, size in self._sizes.items():
                if size is None:
                    log.unlink(missing_ok=True)
                else:
                    os.truncate(log, size)
            for folder in self._missing:
                folder.rmdir()


class Ranks:
    """The processes of one start of a run, as a context in which this process forwards its signals to them.

    Args:
        command: The command of each process.
        count: Number of processes.
        run: The run folder; all ranks but the first write to their logs there.
        main: Rank 0's output; this process's when omitted.
        env: Further environment variables of each process.
        forward: Called with a received signal instead of sending it to all ranks.
        start: Starts a rank.
    """

    def __init__(
        self,
        command: Sequence[str],
        count: int,
        run: Path,
        *,
        main: IO[bytes] | None = None,
        env: Mapping[str, str] | None = None,
        forward: Callable[[int], None] | None = None,
        start: Start = spawn,
    ):
        self._command, self._count, self._run, self._main = command, count, run, main
        self._env, self._forward, self._spawn = env or {}, forward or self.signal, start
        self._processes: list[Rank] = []
        self._began = now()
        self._stack = ExitStack()

    def __enter__(self) -> Ranks:
        def forward(number: int, frame: FrameType | None) -> None:
            self._forward(number)

        with ExitStack() as stack:
            stack.callback(self._kill)
            for s in SIGNALS:
                stack.callback(signal.signal, s, signal.signal(s, forward))
            # The mask is inherited: a rank gets these signals once it can handle them, and this process once all ranks
            # are started.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
            try:
                for rank in range(self._count):
                    self._start(rank, stack)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def signal(self, number: int) -> None:
        """Send a signal to all ranks that still run."""
        for p in self._processes:
            if p.poll() is None:
                p.send_signal(number)

    def wait(self, watch: Callable[[], None] = lambda: None) -> int:
        """The exit code of the first rank that failed, or 0; 128 + N for one that signal N killed.

        If one rank fails, the others would wait for it for ever, so they are killed after a grace period. `watch` is
        called several times a second.
        """
        ranks, first = self._processes, None
        deadline = float("inf")
        while None in (now := [p.poll() for p in ranks]):  # poll all: rank 0 may hang while another has failed
            failed = [(i, code) for i, code in enumerate(now) if code]
            if failed and first is None:
                rank, first = failed[0]
                deadline = time.monotonic() + (1.0 if first == 2 else _GRACE)  # 2: refused before anything started
                if rank and first > 2 and first not in (EXIT_PREEMPTED, EXIT_NOT_EXPORTED):
                    self._say(f"rank {rank} of {self._count} failed with code {first}; see {rank_log(self._run, rank)}")
            if time.monotonic() > deadline:
                for rank, p in enumerate(ranks):
                    if p.poll() is None:
                        self._say_killed(rank, first)
                        p.kill()
                deadline = float("inf")
            watch()
            time.sleep(0.05)
        codes = [p.returncode for p in ranks if p.returncode]
        code = first if first is not None else (codes[0] if codes else 0)
        return 128 - code if code < 0 else code

    def _start(self, rank: int, stack: ExitStack) -> None:
        if rank == 0:
            self._common = {
                "WORLD_SIZE": str(self._count),
                "LOCAL_WORLD_SIZE": str(self._count),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(stack.enter_context(ReservedPort()).number),
                "STAMO_LAUNCHED": str(os.getpid()),
                "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores() // self._count))),
            }
        log = rank_log(self._run, rank)
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            out = stack.enter_context(log.open("ab")) if rank else self._main
        except OSError as e:
            raise RunError(
                f"run_dir: {log.parent} cannot be written ({e.strerror}); choose another with --set run_dir=…"
            ) from e
        env = {**self._env, **self._common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        self._processes.append(self._spawn(self._command, env, out))

    def _say_killed(self, rank: int, first: int | None) -> None:
        if first != 2:
            self._say(f"rank {rank} of {self._count} did not end after the others: killed")
        elif rank == 0:  # whose words were the only ones to be seen here, but another rank refused
            self._say(f"error: {first_error(self._run, since=self._began)}")

    def _say(self, text: str) -> None:
        out = self._main or sys.stdout.buffer
        out.write(f"{text}\n".encode())
        out.flush()

    def _kill(self) -> None:
        for p in self._processes:
            if p.poll() is None:
                p.kill()
