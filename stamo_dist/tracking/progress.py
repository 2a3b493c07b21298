"""The progress of a run on the terminal or in its log."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TransferSpeedColumn

from stamo_dist.words import duration


class TrainingProgress:
    """A live bar on a terminal; elsewhere a plain line every `every` seconds. Silent on all ranks but the first."""

    def __init__(self, steps: int, start: int, *, shown: bool, every: float = 10.0):
        self._steps, self._every, self._shown = steps, every, shown
        self._console = Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._last = 0.0
        self._began, self._from = time.perf_counter(), start
        if shown and self._console.is_terminal:
            columns = (TextColumn("{task.completed}/{task.total}"), BarColumn(None), TextColumn("{task.description}"))
            self._bar = Progress(*columns, console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("starting", total=steps, completed=start)

    def update(self, step: int, loss: float, samples_per_second: float, wait: float, mfu: float | None) -> None:
        if not self._shown:
            return
        now = time.perf_counter()
        eta = (now - self._began) / max(1, step - self._from) * (self._steps - step)
        parts = [f"loss {loss:.4f}", f"{samples_per_second:.1f} samples/s", f"data wait {wait:.0%}"]
        if mfu is not None:
            parts.append(f"MFU {mfu:.0%}")
        text = "  ".join([*parts, f"ETA {duration(eta)}"])
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=step, description=text)
        elif now - self._last >= self._every or step == self._steps:
            self._last = now
            self.say(f"step {step}/{self._steps}  {text}")

    def say(self, text: str) -> None:
        if self._shown:
            self._console.print(text, highlight=False, soft_wrap=True)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class BytesProgress:
    """Progress of a long read: a bar on a terminal, elsewhere a plain line every `every` seconds."""

    def __init__(self, what: str, *, shown: bool, every: float = 10.0):
        self.total = 0
        self._what, self._every, self._shown = what, every, shown
        self._done, self._last = 0, time.perf_counter()
        self._console = Console()
        self._bar: Progress | None = None
        self._task: TaskID | None = None

    def __enter__(self) -> BytesProgress:
        if self._shown and self._console.is_terminal:
            columns = (TextColumn("{task.description}"), BarColumn(None), DownloadColumn(), TransferSpeedColumn())
            self._bar = Progress(*columns, console=self._console, transient=True)
            self._task = self._bar.add_task(f"reading {self._what}", total=None)
            self._bar.start()
        return self

    def advance(self, count: int) -> None:
        """`count` more bytes were read."""
        self._done += count
        now = time.perf_counter()
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._done, total=self.total)
        elif self._shown and now - self._last >= self._every:
            self._last = now
            text = f"reading {self._what}: {self._done / 1e9:.1f} of {self.total / 1e9:.1f} GB"
            self._console.print(text, highlight=False, soft_wrap=True)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
