"""The time that a cluster gives a run between the request to leave and its kill."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

_SECOND_TERM = 5.0  # seconds after the first SIGTERM from which a second one ends a run at once
_KILL_WAIT = 30.0  # Slurm's default
SHORT = 60.0  # seconds within which a save of unknown length may not fit


def preemption_mode(config: Mapping[str, str], partition: Mapping[str, str]) -> str:
    """What a preemption does with jobs of the partition: "OFF" (there is none), REQUEUE, CANCEL, SUSPEND or GANG."""
    if config.get("PreemptType", "preempt/none").endswith("/none"):
        return "OFF"
    return (partition.get("PreemptMode") or config.get("PreemptMode", "OFF")).split(",")[-1]


def kill_wait(config: Mapping[str, str]) -> float:
    """Seconds between SIGTERM and SIGKILL."""
    found = duration(config.get("KillWait", ""))
    return _KILL_WAIT if found is None else found


def preemption_grace(config: Mapping[str, str], partition: Mapping[str, str]) -> float | None:
    """Seconds that a preempted run has to save; None if jobs of the partition are not preempted.

    Slurm sends SIGTERM at once and again after GraceTime, and SIGKILL after KillWait more. The second SIGTERM ends a
    run, unless it follows the first one closely.
    """
    if preemption_mode(config, partition) == "OFF":
        return None
    grace = duration(partition.get("GraceTime", "")) or 0.0
    return grace if grace > _SECOND_TERM else grace + kill_wait(config)


def leaving_takes(run: Path) -> float | None:
    """Seconds that the run needs to save and exit, as it last measured; None if it has not."""
    try:
        found = json.loads((run / "logs" / "leaving.json").read_text())
        return 2 * float(found["step_seconds"]) + float(found["save_seconds"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def too_short(run: Path, seconds: float, every: int, ephemeral_every: int | None) -> str | None:
    """A warning if the run may be killed before it has saved; `every`, `ephemeral_every`: steps between checkpoints."""
    takes, often = leaving_takes(run), min(every, ephemeral_every or every)
    lost = f"it would lose up to {often} steps; set train.checkpoint.ephemeral_every so that little is lost"
    if takes is not None and takes > seconds:
        return f"WARNING: asked to stop, this run has {seconds:g} s and needs about {takes:.1f} s to save: {lost}"
    if takes is None and ephemeral_every is None and seconds < SHORT:
        return (
            f"WARNING: asked to stop, this run has {seconds:g} s to save, and how long that takes has not been "
            f"measured: if it does not fit, {lost}"
        )
    return None


def duration(text: str) -> float | None:
    """`300 sec`, `2 min`, `00:05:00`, `1-00:00:00` or a number, in seconds; None if it is none of these."""
    if match := re.fullmatch(r"(?:(\d+)-)?(?:(\d+):)?(\d+):(\d+)", text):
        days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
    match = re.match(r"(\d+(?:\.\d+)?)\s*(sec|min|hour)?", text)
    return float(match[1]) * {"min": 60, "hour": 3600}.get(match[2] or "", 1) if match else None
