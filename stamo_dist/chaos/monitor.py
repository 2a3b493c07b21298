"""Watching a run folder while its run is active."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_TAIL = 1 << 14  # bytes read from a file's end to find its last complete line


class HungError(Exception):
    """The run made no progress for too long."""


@dataclass(frozen=True)
class TrainingStart:
    """A start of a run that reached training."""

    after: int  # the step it continued from
    processes: int
    time: str = ""  # in whole seconds


class Monitor:
    """Args:
    path: The run folder.
    patience: Seconds without a change after which the run counts as hung.
    poll: Seconds between two looks.
    """

    def __init__(self, path: Path, patience: float, poll: float = 0.002):
        self.path, self._patience, self._poll = path, patience, poll
        self._metrics, self._seen, self._step = path / "metrics.jsonl", (0, 0), 0

    def step(self) -> int:
        """The last logged step, 0 before the first."""
        try:
            info = self._metrics.stat()
            if (now := (info.st_ino, info.st_size)) != self._seen:
                with self._metrics.open("rb") as f:
                    f.seek(max(0, info.st_size - _TAIL))
                    lines = f.read().split(b"\n")[:-1]
                self._step = json.loads(lines[-1])["step"] if lines else 0
                self._seen = now
        except (OSError, ValueError):
            pass
        return self._step

    def begun(self) -> list[TrainingStart]:
        """All starts so far that reached training, in order."""
        try:
            lines = [json.loads(line) for line in (self.path / "starts.jsonl").read_text().splitlines()]
        except (OSError, ValueError):
            return []
        return [TrainingStart(line["after step"], line["processes"], line["time"]) for line in lines]

    def unfinished(self) -> set[str]:
        """Checkpoints that are incomplete: being written, or left by a dead process."""
        folder = self.path / "checkpoints"
        try:
            names = {p.name for p in folder.iterdir()}
        except OSError:
            return set()
        unmarked = {n for n in names if n.startswith("step_") and not (folder / n / "checkpoint.json").exists()}
        return unmarked | {n for n in names if n.startswith(".step_")}

    def until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait for the condition.

        Raises:
            HungError: The folder did not change for too long; the message names `what` was expected.
        """
        alive: Any = None
        deadline = 0.0
        while not condition():
            now = (self.step(), len(self.begun()), len(self.unfinished()))
            if now != alive:
                alive, deadline = now, time.monotonic() + self._patience
            if time.monotonic() > deadline:
                raise HungError(f"it did not {what} within {self._patience:g} s")
            time.sleep(self._poll)


def tail(log: Path) -> list[str]:
    """The last lines that the starts printed."""
    try:
        return log.read_text(errors="replace").splitlines()[-12:]
    except OSError:
        return []
