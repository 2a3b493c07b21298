"""Signals that ask a run to stop: recorded here, handled at the next optimizer step.

A handler may not run a collective, and Python runs handlers only once the main thread is back in the interpreter,
which a thread inside a hung collective never is. So the signal's number is written to a pipe that a separate thread
reads; the loop reduces the received signals over the ranks together with the metrics.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from stamo_dist.distributed.rank import few_of
from stamo_dist.exit_codes import EXIT_INTERRUPTED, EXIT_PREEMPTED
from stamo_dist.run.folder import write_atomic

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
#: Seconds within which several SIGINTs count as one: a terminal, srun and torchrun all forward a Ctrl-C.
_ONE_REQUEST = 0.1
#: Seconds within which several SIGTERMs count as one: a scheduler's reaches a rank in several ways.
_ONE_END = 5.0
#: Seconds after the grace time at which this process ends itself.
_OVERTIME = 60.0
#: Seconds that recording a second SIGINT may take: it also ends what a disk holds up.
_RECORDING = 1.0


class ShutdownRequest:
    """Whether this process was asked to stop, and by which signal first.

    It ends at once, saved or not, at a second SIGINT or SIGTERM, a minute after the cluster's `grace` seconds are
    over, and while there is nothing to save (`nothing_to_save`). Made in the main thread. Processes that are
    forked off this one ignore the signals.
    """

    def __init__(self, rank: int = 0, grace: float | None = None) -> None:
        self.signal: signal.Signals | None = None
        self._rank, self._grace = rank, grace
        self._interrupted: float | None = None
        self._ended: float | None = None  # time of the first SIGTERM
        self._idle: str | None = None
        self._last: Callable[[], None] = _nothing
        self.before_interrupt: Callable[[], None] = _nothing  # called, for a second at most, at a second SIGINT
        out, into = os.pipe()
        os.set_blocking(into, False)
        for s in SIGNALS:
            signal.signal(s, _nothing)
        signal.set_wakeup_fd(into, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_ignore)
        threading.Thread(target=self._listen, args=(out,), name="signals", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # signals that arrived before this was created

    @property
    def asked(self) -> bool:
        return self.signal is not None

    @contextlib.contextmanager
    def nothing_to_save(self, doing: str, last: Callable[[], None]) -> Iterator[None]:
        """Inside, a present or earlier request ends this process at once, after calling `last`."""
        self._idle, self._last = doing, last
        if self.signal is not None:
            self._end(f"{self.signal.name} before {doing}", EXIT_PREEMPTED)
        yield
        self._idle, self._last = None, _nothing

    def _end(self, why: str, code: int) -> None:
        print(f"rank {self._rank}: {why}: leaving with code {code} to be started again", flush=True)
        with contextlib.suppress(Exception):
            self._last()
        os._exit(code)

    def _interrupt(self) -> None:
        recording = threading.Thread(target=self.before_interrupt, daemon=True)
        recording.start()
        recording.join(_RECORDING)
        os._exit(EXIT_INTERRUPTED)

    def _listen(self, pipe: int) -> None:
        while True:
            for number in os.read(pipe, 64):
                if number in SIGNALS:
                    self._receive(signal.Signals(number), time.monotonic())

    def _receive(self, number: signal.Signals, now: float) -> None:
        if number == signal.SIGINT:
            if self._interrupted is not None and now - self._interrupted > _ONE_REQUEST:
                self._interrupt()
            self._interrupted = self._interrupted or now
        if number == signal.SIGTERM:
            if self._ended is not None and now - self._ended > _ONE_END:
                self._end("a second SIGTERM", EXIT_PREEMPTED)
            self._ended = self._ended or now
        if self._idle is not None:
            self._end(f"{number.name} while {self._idle}", EXIT_PREEMPTED)
        if self.signal is None:
            self.signal = number
            if self._grace is not None:
                why = f"not left {_OVERTIME:g} s after the {self._grace:g} s of train.checkpoint.grace_seconds"
                timer = threading.Timer(self._grace + _OVERTIME, self._end, (why, EXIT_PREEMPTED))
                timer.daemon = True
                timer.start()
            print(f"rank {self._rank}: {number.name}: will save after the next steps and leave", flush=True)


def describe_requests(signals: Mapping[int, str]) -> str:
    """Text of rank → signal."""
    ranks: dict[str, list[int]] = {}
    for rank, name in sorted(signals.items()):
        ranks.setdefault(name, []).append(rank)
    return ", ".join(f"{name} on rank {few_of(of_name)}" for name, of_name in ranks.items())


@dataclass
class ShutdownBudget:
    """The time needed to leave on request, as last measured in this run, compared with the available time.

    `file` keeps the measurement over restarts; `seconds` is the available time, None if unknown.
    """

    file: Path
    seconds: float | None
    _said: bool = False

    def measured(self, step: float, save: float) -> list[str]:
        """Record the seconds of a step and a save; returns notes for the user the first time."""
        with contextlib.suppress(OSError):  # a full disk must not end the run
            write_atomic(self.file, json.dumps({"step_seconds": round(step, 3), "save_seconds": round(save, 3)}) + "\n")
        return self.notes()

    def notes(self) -> list[str]:
        """Notes for the user: none before the first measurement, and each only once."""
        try:
            found = json.loads(self.file.read_text())
            step, save = float(found["step_seconds"]), float(found["save_seconds"])
        except (OSError, ValueError, KeyError, TypeError):
            return []
        if self._said:
            return []
        self._said = True
        # A request is agreed on at the end of a step and takes effect after the next one.
        need = 2 * step + save
        text = f"asked to stop, it leaves within about {need:.1f} s (2 steps of {step:.2f} s, {save:.1f} s to save)"
        if self.seconds is None and "SLURM_JOB_ID" not in os.environ:
            return []  # Ctrl-C waits for as long as it takes
        if self.seconds is None:
            return [f"{text}; train.checkpoint.grace_seconds, the time the cluster gives for that, is not set"]
        if need <= self.seconds:
            return [f"{text}; the cluster gives {self.seconds:g} s (train.checkpoint.grace_seconds)"]
        return [
            f"WARNING: {text}, but the cluster gives {self.seconds:g} s (train.checkpoint.grace_seconds): it would be "
            "killed in between and lose the steps since its last checkpoint; get it more time (Slurm: "
            "--signal=USR1@SECONDS, GraceTime) or lower train.checkpoint.every"
        ]


def _nothing(*_: object) -> None:
    """A no-op: a handler must exist for the signal number to be written to the pipe."""


def _ignore() -> None:
    signal.set_wakeup_fd(-1)
    for s in SIGNALS:
        signal.signal(s, signal.SIG_IGN)
