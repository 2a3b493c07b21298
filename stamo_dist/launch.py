"""Start the processes of a run on this machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from stamo_dist.engine.preempt import EXIT_PREEMPTED
from stamo_dist.engine.world import free_port

_GRACE = 10.0  # seconds for the other ranks to leave by themselves once one has ended with an error


class Rank(Protocol):
    """What is used of a `subprocess.Popen`."""

    returncode: int | None

    def poll(self) -> int | None: ...

    def send_signal(self, number: int) -> None: ...

    def kill(self) -> None: ...


def spawn(arguments: Sequence[str], environment: dict[str, str], output: IO[bytes] | None) -> Rank:
    """Start `stamo ARGUMENTS` with these variables beside this process's own."""
    command = [sys.executable, "-m", "stamo_dist.cli", *arguments]
    # Its own session: a Ctrl-C in the terminal reaches this process only, which passes it on once.
    process: subprocess.Popen[bytes] = subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=output, stderr=output, start_new_session=True
    )
    return process


def launch_local(arguments: Sequence[str], processes: int, logs: Path, start: Callable[..., Rank] = spawn) -> int:
    """Run `stamo ARGUMENTS` on `processes` local processes; returns the exit code of the first rank that failed, or 0.

    Rank 0 writes to this terminal, every other rank to `logs/rank_NNNNN.log`. Signals sent to this process go to all
    ranks. When one rank fails, the others would wait for it for ever: they are killed after a grace period. `start`
    starts a rank, in a session of its own.
    """
    logs.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "STAMO_LAUNCHED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(max(1, cores // processes))),
    }
    ranks: list[Rank] = []
    files: list[IO[bytes]] = []

    def forward(number: int, frame: FrameType | None) -> None:
        for p in ranks:
            if p.poll() is None:
                p.send_signal(number)

    signals = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = {s: signal.signal(s, forward) for s in signals}
    # Inherited: a rank gets these once it can act on them, and this process once it has all ranks to pass them on to.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
    try:
        for rank in range(processes):
            out: IO[bytes] | None = None
            if rank:
                out = (logs / f"rank_{rank:05d}.log").open("ab")
                files.append(out)
            ranks.append(start(arguments, {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}, out))
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        return _wait(ranks, logs)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for p in ranks:
            if p.poll() is None:
                p.kill()
        for f in files:
            f.close()
        for s, handler in before.items():
            signal.signal(s, handler)


def _wait(ranks: list[Rank], logs: Path) -> int:
    first: int | None = None
    deadline = float("inf")
    while any(p.poll() is None for p in ranks):
        failed = [(i, p.returncode) for i, p in enumerate(ranks) if p.returncode not in (None, 0)]
        if failed and first is None:
            rank, first = failed[0]
            deadline = time.monotonic() + (1.0 if first == 2 else _GRACE)  # 2: refused before anything started
            if rank and first > 2 and first != EXIT_PREEMPTED:
                print(
                    f"rank {rank} of {len(ranks)} failed with code {first}; see {logs}/rank_{rank:05d}.log", flush=True
                )
        if time.monotonic() > deadline:
            for rank, p in enumerate(ranks):
                if p.poll() is None:
                    print(f"rank {rank} of {len(ranks)} did not end after the others: killed", flush=True)
                    p.kill()
            deadline = float("inf")
        time.sleep(0.05)
    codes = [p.returncode for p in ranks if p.returncode]
    code = first if first is not None else (codes[0] if codes else 0)
    return 128 - code if code < 0 else code
