"""Which process on this machine looks after a run: `supervisor.json` in the run's `launch/` identifies it."""

from __future__ import annotations

import json
from pathlib import Path

from stamo_dist.launch.record import folder, newest_first
from stamo_dist.run.lease import Owner

FILE = "supervisor.json"


def of(run: str | Path) -> Owner | None:
    """The run's current or last supervisor."""
    try:
        return Owner(**json.loads((folder(run) / FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None


def supervised(run: str | Path) -> bool | None:
    """Whether the run has a live supervisor; None if only another machine can tell."""
    owner = of(run)
    if owner is None:
        return False
    return owner.alive if owner.local else None


def is_local(job: str) -> bool:
    """Whether the id is that of a local job."""
    return job.startswith("local-")


def busy(run: str | Path) -> bool:
    """Whether the run waits or runs under a supervisor on this machine."""
    if not supervised(run):
        return False
    last = next(newest_first(run), None)
    return last is None or last.event not in ("finished", "failed", "stopped", "cancelled")
