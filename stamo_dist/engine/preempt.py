"""Signals that ask a run to stop: remember them here, act on them at the next optimizer boundary.

A handler may not run a collective, so it only sets a flag. The loop reduces the flag over the ranks with the metrics.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

#: Exit code of a run that saved and left because it was asked to: resubmit it and it goes on.
EXIT_PREEMPTED = 75

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)


class Stop:
    """Whether this process was asked to stop. A second SIGINT stops at once."""

    def __init__(self) -> None:
        self.signal: str | None = None
        self._owner = os.getpid()
        for s in _SIGNALS:
            signal.signal(s, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._owner:  # a forked loader worker: the training process decides
            return
        if self.signal == "SIGINT" and number == signal.SIGINT:
            os._exit(130)
        self.signal = signal.Signals(number).name

    @property
    def asked(self) -> bool:
        return self.signal is not None
