"""`metrics.jsonl`: one line a logged step."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stamo_dist.run.success import is_late


class MetricsFile:
    """Appends JSON lines; on resumption drops the lines of steps that will be run again.

    Numbers that are not finite, which JSON does not know, become null. Lines for which the disk has no room are
    written with the next one. `guard` raises where this process may not write any more.
    """

    def __init__(self, path: Path, resumed_step: int, guard: Callable[[], None] | None = None):
        if path.exists():
            lines = [line for line in path.read_text().splitlines() if _step(line) <= resumed_step]
            tmp = path.with_suffix(".jsonl.tmp")
            tmp.write_text("".join(line + "\n" for line in lines))
            tmp.replace(path)
        self._file, self._guard, self._waiting = path.open("ab", buffering=0), guard, b""

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
        except OSError:  # half a line must not stay
            with contextlib.suppress(OSError):
                self._file.truncate(whole)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the torn last line of a killed run
        return float("inf")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps' whole lines of a metrics.jsonl."""
    return [line for line in _lines(path) if not is_late(line)]


def read_late(path: Path) -> dict[int, dict[str, Any]]:
    """Step → what was measured of it later, beside the training."""
    return {line["step"]: line for line in _lines(path) if is_late(line)}


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if _step(line) != float("inf")]
