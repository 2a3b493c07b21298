"""Progress of a conversion, on a terminal and in logs."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

#: Called with the frames converted and the episodes skipped since the last call.
Show = Callable[[int, int], None]
#: Seconds between log lines without a terminal.
EVERY = 30.0


class ConversionProgress:
    """A bar on standard error with frames/s, ETA and skipped episodes; in a log a line every half minute.

    Args:
        total: Frames in all, as far as known.
        done: Frames that were converted earlier.
        quiet: Show nothing.
        what: Verb shown for the work.
    """

    def __init__(self, total: int, done: int, quiet: bool, what: str = "convert"):
        self.total, self.before, self.done, self.skipped = total, done, done, 0
        self.quiet, self.what = quiet, what
        self.started = self.last = time.monotonic()
        self.bar: Any = None

    def __enter__(self) -> ConversionProgress:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bar

        console = Console(file=sys.stderr)
        if not self.quiet and console.is_terminal:
            self.bar = Bar(
                TextColumn(self.what),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("frames · {task.fields[said]} · ETA"),
                TimeRemainingColumn(),
                console=console,
            )
            self.bar.start()
            self.line = self.bar.add_task(self.what, total=self.total, completed=self.done, said="–")
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self.bar.stop()

    def show(self, frames: int, skipped: int) -> None:
        """Count frames that are done and episodes that were skipped."""
        self.done += frames
        self.skipped += skipped
        now = time.monotonic()
        fps = (self.done - self.before) / max(1e-9, now - self.started)
        said = f"{fps:,.0f} frames/s" + (f" · {self.skipped} episodes skipped" if self.skipped else "")
        if self.bar:
            self.bar.update(self.line, completed=self.done, said=said)
        elif not self.quiet and now - self.last > EVERY:
            self.last = now
            left = (self.total - self.done) / fps / 60 if fps else 0.0
            print(
                f"{self.what}: {self.done:,} of {self.total:,} frames · {said} · {left:.0f} min left",
                file=sys.stderr,
                flush=True,
            )
