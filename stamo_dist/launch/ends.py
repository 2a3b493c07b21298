"""What an end of a run means, and whether it is started again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from stamo_dist.exit_codes import EXIT_INTERRUPTED, EXIT_NOT_EXPORTED, EXIT_PREEMPTED
from stamo_dist.launch.record import Event, Launch, What, since_submitted
from stamo_dist.launch.run_progress import newest_checkpoint, read_progress
from stamo_dist.run.folder import RunFolder


@dataclass(frozen=True)
class Verdict:
    """The meaning of an end of the run, and whether it is started again."""

    event: What
    again: bool
    reason: str


def newest_step(run: str | Path) -> int | None:
    """The step of the newest complete checkpoint, None without one."""
    return newest_checkpoint(Path(run) / "checkpoints")[0]


def avoided(history: Sequence[Event]) -> list[str]:
    """The failing nodes that the run is kept off since it was queued last."""
    return next((e.avoids for e in reversed(history) if e.event in ("submitted", "requeued")), [])


def stalled(history: Sequence[Event]) -> int:
    """Number of consecutive starts, since its submission, that ended without a newer checkpoint.

    Those that failed on nodes which the run is kept off now do not count.
    """
    best, count, ended = -1, 0, False
    off = set(avoided(history))
    for e in history:
        if e.event == "submitted":
            best, count, ended = -1, 0, False
        elif e.event == "started":
            count = 0 if (e.step or 0) > best else count  # a start whose end is not recorded brought it further
            best, ended = max(best, e.step or 0), False
        elif e.event in ("preempted", "failed") and not ended:  # an end may be recorded twice
            if (e.step or 0) > best:
                count = 0
            elif not e.blamed or not off.issuperset(e.blamed):
                count += 1
            best, ended = max(best, e.step or 0), True
    return count


def judge_exit(launch: Launch, code: int, job: str, blamed: Sequence[str] = ()) -> Verdict:
    """What to do after a start of `job` ended with the exit code `code`, `blamed`: because of these nodes.

    Code 2: the request is impossible, and a restart does not help. 76: training finished, but the model could not be
    exported. After any other code except 0 a run is started again, unless the last `max_restarts` restarts brought no
    newer checkpoint (an end requested by a signal always saves one). A command that does not train is only started
    again after a requested end, at most `max_restarts` times.
    """
    not_exported = f"trained, not exported: see the log, then `stamo export {launch.run_dir}`"
    last: dict[int, tuple[What, str]] = {
        0: ("finished", ""),
        2: ("failed", "refused, see the log"),
        EXIT_NOT_EXPORTED: ("failed", not_exported),
        EXIT_INTERRUPTED: ("stopped", "interrupted twice"),
    }
    if code in last:
        return Verdict(last[code][0], False, last[code][1])
    left, trains = code == EXIT_PREEMPTED, launch.command[:1] == ["train"]
    event: What = "preempted" if left else "failed"
    how = "it left to be started again" if left else f"it ended with code {code}"
    if not left and not trains:
        return Verdict("failed", False, how)
    history = [e for e in since_submitted(launch.run_dir) if e.event == "submitted" or e.job == job]
    count = stalled([*history, Event(event, step=newest_step(launch.run_dir), blamed=list(blamed))])
    if count > launch.max_restarts:
        return Verdict("failed", False, f"{how}, and {count} starts in a row brought it no further (max_restarts)")
    return Verdict(event, True, how)


def complete(run: str | Path) -> bool:
    """Whether the last step of the training is saved."""
    steps = read_progress(Path(run)).steps
    return steps is not None and (newest_step(run) or 0) >= steps


def trained(run: str | Path) -> bool:
    """Whether the run folder says that the training is finished: its last step is saved and exported."""
    return complete(run) and RunFolder(Path(run)).exported_step == newest_step(run)
