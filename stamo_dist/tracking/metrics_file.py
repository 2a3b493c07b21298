"""`metrics.jsonl`: one line a logged step."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stamo_dist.errors import RunError
from stamo_dist.run.history import Sample, last_objects, parsed, sample
from stamo_dist.run.success import KEY, is_late
from stamo_dist.tracking.rewind import rewind

_LATE = f'"{KEY}/'.encode()


class MetricsFile:
    """Appends JSON lines; on resumption drops the lines of steps that will be run again.

    Non-finite numbers, which JSON lacks, become null. Lines that a full disk rejects are written with the next one.
    `guard` raises if this process may no longer write.

    Attributes:
        notes: Lines on problems of the file.

    Raises:
        RunError: It cannot be opened.
    """

    def __init__(self, path: Path, resumed_step: int, guard: Callable[[], None] | None = None):
        try:
            self.notes = rewind(path, resumed_step, guard)
            self._file, self._guard, self._waiting = path.open("ab", buffering=0), guard, b""
        except PermissionError as e:
            raise RunError(f"{path}: cannot be opened ({e.strerror}); make it yours or move it away") from e

    def write(self, line: dict[str, Any]) -> None:
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self._waiting += json.dumps(known).encode() + b"\n"
        if self._guard is not None:
            self._guard()
        self._flush()

    def sync(self) -> None:
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._file.close()

    def _flush(self) -> None:
        whole = os.fstat(self._file.fileno()).st_size
        try:
            rest = memoryview(self._waiting)
            while rest:
                rest = rest[self._file.write(rest) or 0 :]
            self._waiting = b""
        except OSError:  # a partial line must not remain
            with contextlib.suppress(OSError):
                self._file.truncate(whole)


def read_metrics(path: Path) -> Sample:
    """Step lines of a metrics.jsonl; for a long one, evenly spaced lines and the last ones."""
    return sample(path, _of_step)


def last_metrics(path: Path, step: int) -> dict[str, Any] | None:
    """The last step line up to `step`; None if there is none."""
    return next(last_objects(path, lambda line: _of_step(line) and line["step"] <= step, within=None), None)


def read_late(path: Path) -> dict[int, dict[str, Any]]:
    """Step → its later background measurements; reads the whole file."""
    with contextlib.suppress(FileNotFoundError), path.open("rb") as f:
        late = (parsed(line) for line in f if _LATE in line)
        return {line["step"]: line for line in late if line is not None and "step" in line and is_late(line)}
    return {}


def _of_step(line: dict[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and not is_late(line)
