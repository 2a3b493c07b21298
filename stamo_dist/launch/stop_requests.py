"""Signals that ask a job's batch script to save and leave."""

from __future__ import annotations

import signal
import subprocess
import threading

from stamo_dist.faults.signals import SIGNALS


class Requests:
    """Requests to save and leave that reach this process alone (`scancel --full --signal=USR1`): srun passes them on.

    Those that come while srun does not run yet are passed on when it does. SIGTERM is not: Slurm sends it to every
    step itself, and a second one would end the processes before they have saved.
    """

    _PASSED_ON = frozenset({signal.SIGUSR1, signal.SIGUSR2})

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._srun: subprocess.Popen[bytes] | None = None
        self._early: set[signal.Signals] = set()

    def listen(self) -> None:
        """Receive them from now on; call it in the main thread, before any other one is started."""
        for s in SIGNALS:
            signal.signal(s, _nothing)  # the processes handle them; this one acts on their exit codes
        signal.pthread_sigmask(signal.SIG_BLOCK, self._PASSED_ON)
        threading.Thread(target=self._pass_on, name="requests", daemon=True).start()

    def pass_to(self, srun: subprocess.Popen[bytes] | None) -> None:
        with self._lock:
            self._srun = srun
            while srun is not None and self._early:
                srun.send_signal(self._early.pop())

    def _pass_on(self) -> None:
        while True:
            number = signal.Signals(signal.sigwait(self._PASSED_ON))
            with self._lock:
                if self._srun is None:
                    self._early.add(number)
                else:
                    self._srun.send_signal(number)


def _nothing(*_: object) -> None:
    """A no-op handler, so that the signal does not end this process."""
