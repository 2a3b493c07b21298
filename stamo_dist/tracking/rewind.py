"""Removing steps that will be repeated from the end of a history, at a cost independent of the rest of the file."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stamo_dist.errors import RunError
from stamo_dist.run.folder import write_atomic
from stamo_dist.run.history import TooLongError, backwards, parsed
from stamo_dist.run.success import is_late

_SETTLED = 16  # after this many consecutive lines that stay, all earlier lines stay
_BEGIN = b'{"step": '  # as `MetricsFile` writes them
_STEP = re.compile(_BEGIN + rb"(\d+)[,}]")


@dataclass
class _End:
    """The result of examining the end of a file."""

    cut: int  # offset at which to cut
    kept: list[bytes] = field(default_factory=list)  # lines after the cut that are kept, last first
    damaged: list[bytes] = field(default_factory=list)  # unreadable lines, last first
    foreign: bool = False  # whether no line is a step's


def rewind(path: Path, step: int, guard: Callable[[], None] | None = None) -> list[str]:
    """Remove the lines of steps after `step` and a torn last line from a history; returns notes, one line each.

    The file is truncated in place. Late measurements of earlier steps after the cut are kept: they are stored in
    `PATH.kept` until they are appended again, so that a killed process loses nothing. Damaged lines are moved to
    `PATH.damaged`, and a file without any step line is renamed to `PATH.foreign`. `guard` raises if this process may
    no longer write.
    """
    if guard is not None:
        guard()
    _move_kept(path)
    if not path.exists():
        return []
    end = _look(path, step) if path.is_file() else _End(0, foreign=True)
    notes: list[str] = []
    if end.foreign:
        aside = _free(path, ".foreign")
        path.rename(aside)
        return [f"{path}: has no line of a step, so another program wrote it; it is {aside} now, and a new one begins"]
    if end.damaged:
        aside = path.with_name(f"{path.name}.damaged")
        _append(aside, b"".join(reversed(end.damaged)))
        count = "1 line" if len(end.damaged) == 1 else f"{len(end.damaged)} lines"
        notes.append(f"{path}: {count} at its end cannot be read; moved to {aside}")
    if end.kept:
        lines = b"".join(reversed(end.kept)).decode("latin-1")
        write_atomic(_kept(path), json.dumps({"at": end.cut, "lines": lines}))
        _move_kept(path)
    elif end.cut < path.stat().st_size:
        os.truncate(path, end.cut)
    return notes


def _look(path: Path, step: int) -> _End:
    staying: list[bytes] = []  # lines since the last one to remove
    settled = good = 0
    torn = b""
    with path.open("rb") as f:
        end = _End(f.seek(0, os.SEEK_END))
        try:
            for start, line in backwards(f):
                whole = line.endswith(b"\n")
                at, late = _step(line, step)
                good += at is not None
                if at is not None and at <= step and whole:
                    staying.append(line)
                    settled += not late
                    if settled == _SETTLED:
                        break
                    continue
                if at is None and whole:
                    end.damaged.append(line)
                elif at is None:
                    torn = line
                elif at <= step:  # the last line, without its end
                    staying.append(line + b"\n")
                end.cut, settled = start, 0
                end.kept += staying
                staying.clear()
        except TooLongError:
            end.foreign = True
    strange = torn[: len(_BEGIN)] != _BEGIN[: len(torn)]
    end.foreign |= not good and (bool(end.damaged) or strange)
    return end


def _step(line: bytes, resumed: int) -> tuple[float | None, bool]:
    """(step of a line, None of one that cannot be read; whether it is late). A later step is read from its head."""
    head = _STEP.match(line)
    if head and int(head[1]) > resumed and line.endswith(b"}\n"):
        return int(head[1]), False
    found = parsed(line)
    try:
        return (float(found["step"]), is_late(found)) if found is not None else (None, False)
    except (KeyError, ValueError, TypeError):
        return None, False


def _move_kept(path: Path) -> None:
    """Truncate the file and append the kept lines; idempotent."""
    kept = _kept(path)
    if not kept.exists():
        return
    try:
        found = json.loads(kept.read_text())
        cut, lines = int(found["at"]), found["lines"].encode("latin-1")
    except (ValueError, KeyError, TypeError, AttributeError):
        raise RunError(f"{kept}: is damaged; it is to hold lines of {path.name} while that is cut: delete it") from None
    if path.is_file() and path.stat().st_size >= cut:
        os.truncate(path, cut)
    _append(path, lines)
    kept.unlink()


def _kept(path: Path) -> Path:
    return path.with_name(f"{path.name}.kept")


def _append(path: Path, content: bytes) -> None:
    with path.open("ab") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _free(path: Path, suffix: str) -> Path:
    """An unused name: PATH.foreign, PATH.foreign-2, …"""
    names = (path.with_name(f"{path.name}{suffix}{f'-{i}' * (i > 1)}") for i in range(1, 10_000))
    return next(name for name in names if not name.exists())
