"""Whether a run that ended is started again. A crash of its own is, while it makes progress in between."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from stamo_dist.exit_codes import EXIT_INTERRUPTED, EXIT_NOT_EXPORTED, EXIT_PREEMPTED
from stamo_dist.launch.look import newest_checkpoint
from stamo_dist.launch.record import Event, Launch, What, events


@dataclass(frozen=True)
class Verdict:
    """What an end of the run is, and whether it is started again."""

    event: What
    again: bool
    reason: str


def newest_step(run: str | Path) -> int | None:
    """The step of the newest checkpoint that was completed, None without one."""
    return newest_checkpoint(Path(run) / "checkpoints")[0]


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


def judge(launch: Launch, code: int, job: str) -> Verdict:
    """What to do after a start of `job` ended with the exit code `code`.

    Code 2 says that what was asked for cannot be done, and no restart changes that; 76 that it was trained to its end,
    and its model could not be written. After any other code but 0 a run is
    started again, unless `max_restarts` restarts in a row before brought it no further: an end that was asked for by a
    signal always does. A command that does not train is only started again if it was asked to end, and so often.
    """
    not_exported = f"trained, not exported: see the log, then `stamo export {launch.run_dir}`"
    last: dict[int, tuple[What, str]] = {
        0: ("finished", ""), 2: ("failed", "refused, see the log"), EXIT_NOT_EXPORTED: ("failed", not_exported),
        EXIT_INTERRUPTED: ("stopped", "interrupted twice"),
    }  # fmt: skip
    if code in last:
        return Verdict(last[code][0], False, last[code][1])
    left, trains = code == EXIT_PREEMPTED, launch.command[:1] == ["train"]
    event: What = "preempted" if left else "failed"
    how = "it left to be started again" if left else f"it ended with code {code}"
    if not left and not trains:
        return Verdict("failed", False, how)
    history = [e for e in events(launch.run_dir) if e.event == "submitted" or e.job == job]
    count = stalled([*history, Event(event, step=newest_step(launch.run_dir))])
    if count > launch.max_restarts:
        return Verdict("failed", False, f"{how}, and {count} starts in a row brought it no further (max_restarts)")
    return Verdict(event, True, how)
