"""Taking the steps that will be run again off the end of a history, at a cost that what stays has no part in."""

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

_SETTLED = 16  # lines of steps that stay, one after another: all above them stay too
_BEGIN = b'{"step": '  # as `MetricsFile` writes them
_STEP = re.compile(_BEGIN + rb"(\d+)[,}]")


@dataclass
class _End:
    """What is wrong at the end of a file."""

    cut: int  # where it is to end
    kept: list[bytes] = field(default_factory=list)  # lines behind the cut that are to stay, the last one first
    damaged: list[bytes] = field(default_factory=list)  # lines that cannot be read, the last one first
    foreign: bool = False  # no line of it is of a step


def rewind(path: Path, step: int, guard: Callable[[], None] | None = None) -> list[str]:
    """Cut the lines of steps after `step` off a history, and a torn last one; what to tell of it, a line each.

    It is cut in place. What was measured late of an earlier step stands behind the cut and stays: it is in
    `PATH.kept` until it is at its new place, so that a process that is killed meanwhile loses nothing. Damaged lines
    go to `PATH.damaged`, and a file without any line of a step becomes `PATH.foreign`. `guard` raises where this
    process may not write any more.
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
    staying: list[bytes] = []  # since the last line that does not stay
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
    """Cut the file off and add the lines behind the cut that are to stay; a second time changes nothing."""
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
    """A name that no file has: PATH.foreign, PATH.foreign-2, …"""
    names = (path.with_name(f"{path.name}{suffix}{f'-{i}' * (i > 1)}") for i in range(1, 10_000))
    return next(name for name in names if not name.exists())
