"""Whether a run that ended is started again. A crash of its own is, while it makes progress in between."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stamo_dist.engine.preempt import EXIT_INTERRUPTED, EXIT_PREEMPTED
from stamo_dist.launch.record import Event, What, events

_MARKER = "checkpoint.json"


@dataclass(frozen=True)
class Verdict:
    """What an end of the run is, and whether it is started again."""

    event: What
    again: bool
    reason: str


def newest_step(run: str | Path) -> int | None:
    """The step of the newest checkpoint that was completed, None without one."""
    markers = Path(run).glob(f"checkpoints/step_*/{_MARKER}")
    return max((int(m[1]) for p in markers if (m := re.fullmatch(r"step_(\d+)", p.parent.name))), default=None)


def stalled(history: Iterable[Event]) -> int:
    """How many ends in a row, since it was submitted, left the newest checkpoint where it was."""
    best, count = -1, 0
    for e in history:
        if e.event == "submitted":
            best, count = -1, 0
        elif e.event == "started":
            best = max(best, e.step or 0)
        elif e.event in ("preempted", "failed"):
            count = count + 1 if (e.step or 0) <= best else 0
            best = max(best, e.step or 0)
    return count


def judge(run: str | Path, code: int, max_restarts: int) -> Verdict:
    """What to do after a start of the run ended with the exit code `code`.

    Code 2 says that what was asked for cannot be done, and no restart changes that. After any other code but 0 the run
    is started again, unless `max_restarts` restarts in a row before brought it no further: an end that was asked for
    by a signal always does.
    """
    if code == 0:
        return Verdict("finished", False, "")
    if code == 2:
        return Verdict("failed", False, "refused, see the log")
    if code == EXIT_INTERRUPTED:
        return Verdict("stopped", False, "interrupted twice")
    left = code == EXIT_PREEMPTED
    event: What = "preempted" if left else "failed"
    how = "it left to be started again" if left else f"it ended with code {code}"
    count = stalled([*events(run), Event(event, step=newest_step(run))])
    if count > max_restarts:
        return Verdict("failed", False, f"{how}, and {count} starts in a row brought it no further (max_restarts)")
    return Verdict(event, True, how)
