"""The state of a run: from its record, its folder, and the scheduler if it still knows the job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from stamo_dist.launch.record import Event
from stamo_dist.launch.run_progress import Progress
from stamo_dist.launch.slurm import SlurmJob
from stamo_dist.run.lease import STALE
from stamo_dist.words import duration

Word = Literal[
    "queued",
    "starting",
    "running",
    "preempted",
    "requeued",
    "suspended",
    "finished",
    "failed",
    "stopped",
    "cancelled",
    "lost",
    "unknown",
]
LIVE = frozenset({"queued", "starting", "running", "preempted", "requeued", "suspended", "unknown"})
_LAST = frozenset({"finished", "failed", "cancelled", "stopped"})
#: Slurm's reasons for waiting → text.
_REASONS = {
    "Resources": "waits for free nodes",
    "Priority": "others come first",
    "Dependency": "waits for an earlier job",
    "DependencyNeverSatisfied": "an earlier job failed, so it never starts",
    "BeginTime": "may not start before",
    "JobHeldUser": "held; `scontrol release` lets it go",
    "job requeued in held state": "requeued and held; `scontrol release` lets it go",
    "JobHeldAdmin": "held by the administrator",
    "JobArrayTaskLimit": "as many tasks of its array as may run at once do",
    "PartitionDown": "the partition is down",
    "PartitionInactive": "the partition is inactive",
    "PartitionNodeLimit": "more or fewer nodes than the partition allows",
    "PartitionTimeLimit": "longer than the partition allows",
    "ReqNodeNotAvail": "nodes it asked for are down, drained or reserved",
    "BadConstraints": "no node is as it asks for",
    "InvalidAccount": "the account may not use this partition or does not exist",
    "InvalidQOS": "there is no such QOS",
    "AccountNotAllowed": "the partition does not take the account",
    "QOSNotAllowed": "the partition does not take the QOS",
    "launch failed requeued held": "it could not be started and is held; `scontrol release` lets it go",
}
#: How Slurm 22.05 words some of them.
_WORDED = {
    "Job's account not permitted": "AccountNotAllowed",
    "Job's QOS not permitted": "QOSNotAllowed",
}
#: Of these, those that no time mends.
_NEVER = frozenset({
    "PartitionNodeLimit", "PartitionTimeLimit", "BadConstraints", "InvalidAccount", "InvalidQOS", "AccountNotAllowed",
    "QOSNotAllowed",
})  # fmt: skip
#: Of these, those that a person has to end: Slurm's expected start means nothing.
_HELD = frozenset({
    "JobHeldUser", "JobHeldAdmin", "job requeued in held state", "launch failed requeued held", "PartitionDown",
    "PartitionInactive",
})  # fmt: skip
#: Slurm's job states other than waiting and running → our state and text.
_RARE: dict[str, tuple[Word, str]] = {
    "PENDING": ("stopped", _REASONS["DependencyNeverSatisfied"]),
    "SUSPENDED": ("suspended", "stopped by Slurm until others are done"),
    "REQUEUE_HOLD": ("stopped", "requeued and held; `scontrol release` lets it go"),
    "COMPLETING": ("preempted", "leaving its nodes"),
}
_ENDS = {
    "TIMEOUT": "the time limit came before it had left",
    "NODE_FAIL": "a node failed, and the job was not requeued",
    "OUT_OF_MEMORY": "Slurm killed it: out of memory",
    "BOOT_FAIL": "a node did not boot",
    "DEADLINE": "its deadline has passed",
    "FAILED": "the job failed",
}
_LAUNCH = "Slurm could not start it: its nodes need the run folder, to write its log, and the folder of the submission"


@dataclass(frozen=True)
class State:
    """A state as one word, with details."""

    word: Word
    detail: str = ""
    restarts: int = 0  # restarts since its submission

    @property
    def live(self) -> bool:
        """Whether it runs or will run."""
        return self.word in LIVE

    @property
    def training(self) -> bool:
        return self.word in ("starting", "running", "preempted")

    @property
    def title(self) -> str:
        """The word, with the number of restarts so far."""
        return f"{self.word} ×{self.restarts}" if self.restarts and self.live else self.word


def judge_state(
    progress: Progress,
    history: Sequence[Event],
    job: SlurmJob | None,
    *,
    asked: bool,
    watched: bool | None = None,
    trains: bool = False,
    again: str = "`stamo resume`",
    now: datetime | None = None,
) -> State:
    """The state of a run.

    Args:
        progress: The progress in its folder.
        history: Its events since the last submission.
        job: The scheduler's data on its newest job; None if unknown to it.
        asked: Whether the scheduler answered.
        watched: Whether a process on this machine supervises the run; None if not applicable.
        trains: Whether it is a training: finished when its folder says so, whatever its events say.
        again: The command by which it goes on.
        now: The current time.
    """
    now = now or datetime.now().astimezone()
    starts = sum(e.event == "started" for e in history)
    last = history[-1] if history else None
    if job is not None and job.active:
        return _active(progress, job, history, starts, now)
    if watched and last is not None and last.event == "submitted":
        return State("queued", "comes after the others that were submitted with it")
    if watched:
        return _running(progress, last, starts)
    restarts = max(0, starts - 1)
    over = _over(history, job)
    silent = not asked and last is not None and last.event == "submitted"  # again, perhaps for more steps
    if trains and progress.finished and not silent:
        state = State("finished")
    elif over is not None and over.event == "finished" and trains:
        state = State("stopped", _stood(progress))
    elif over is not None:
        state = _said(over, progress)
    elif progress.finished and not silent:
        state = State("finished")
    elif job is not None:
        state = _ended(progress, job)
    else:
        state = _unwatched(progress, last, again, asked=asked)
    return replace(state, restarts=restarts)


def _over(history: Sequence[Event], job: SlurmJob | None) -> Event | None:
    """The event that ended the run, unless it was started again, or Slurm says whether it was cancelled otherwise."""
    for event in reversed(history):
        otherwise = job is not None and (event.event == "cancelled") != (job.state == "CANCELLED")
        if event.event in _LAST and (event.event == "finished" or not otherwise):
            return event
        if event.event in ("started", "exporting", "requeued"):
            return None
    return None


def _active(progress: Progress, job: SlurmJob, history: Sequence[Event], starts: int, now: datetime) -> State:
    restarts = max(0, starts - 1)
    if job.state == "PENDING" and job.reason != "DependencyNeverSatisfied":
        return State("requeued" if starts else "queued", _waiting(job, now), starts)
    if job.state == "RUNNING":  # Slurm's word counts, not that of a recorded cancel
        last = next((e for e in reversed(history) if e.event != "cancelled"), None)
        return _running(progress, last, starts)
    last = history[-1] if history else None
    if job.state == "COMPLETING" and last is not None and last.event in _LAST:
        return replace(_said(last, progress), restarts=restarts)
    word, detail = _RARE.get(job.state, ("starting", job.state.lower()))
    return State(word, detail, restarts)


def _running(progress: Progress, last: Event | None, starts: int) -> State:
    restarts = max(0, starts - 1)
    if last is None or last.event == "submitted":
        return State("starting", restarts=restarts)
    if last.event in ("preempted", "requeued"):
        return State("preempted", last.reason, restarts)
    if last.event == "cancelled":
        return State("cancelled", "saving", restarts)
    if last.event == "started" and (progress.written or 0) < datetime.fromisoformat(last.time).timestamp():
        return State("starting", progress.phase, restarts)
    detail = "exporting" if last.event == "exporting" else progress.phase
    if last.event != "exporting" and progress.silence is not None and progress.silence > STALE:
        detail = f"no heartbeat for {duration(progress.silence)}"
    return State("running", _with(detail, progress.unsaved), restarts)


def _with(*details: str) -> str:
    return "; ".join(filter(None, details))


def _ended(progress: Progress, job: SlurmJob) -> State:
    """The state of a job whose end the scheduler still knows."""
    if job.state == "CANCELLED":
        return State("cancelled", _stood(progress))
    if job.state == "PREEMPTED":
        return State("stopped", "preempted, and the partition does not requeue; `stamo resume` goes on")
    if job.state == "COMPLETED":
        return State("stopped", _stood(progress))
    if job.state == "FAILED" and job.reason == "JobLaunchFailure":
        return State("failed", _LAUNCH)
    return State("failed", _ENDS.get(job.state, job.state.lower()))


def _unwatched(progress: Progress, last: Event | None, again: str, *, asked: bool) -> State:
    """The state of a run without supervisor or scheduler, judged by the heartbeat in its folder."""
    owner, silence = progress.owner, progress.silence
    beats = silence is not None and silence < STALE
    if owner is not None and not owner.ended and (owner.alive if owner.local else beats):
        return State("running", _with(f"{owner}", "" if asked else "Slurm does not answer", progress.unsaved))
    if not asked and last is not None:
        return State("unknown", ", ".join(filter(None, ("Slurm does not answer", _stood(progress)))))
    if owner is None and last is not None:
        gone = f"{again} goes on {_after(progress)}" if progress.step else "it never began to train"
        return State("lost", f"job {last.job} is gone; {gone}")
    if progress.end is not None and progress.end.word == "failed":
        at = _stood(progress)
        return State("failed", f"{progress.end.reason} ({at})" if at else progress.end.reason)
    if owner is None or owner.ended:
        how = " ".join(filter(None, (progress.end.reason if progress.end else "", _stood(progress))))
        return State("stopped", "; ".join(filter(None, (how, f"{again} goes on {_after(progress)}"))))
    return State("lost", f"{owner} is gone; {again} goes on {_after(progress)}")


def _waiting(job: SlurmJob, now: datetime) -> str:
    reason = job.reason if job.reason != "None" else ""
    plain = reason.partition(",")[0].strip("()")
    plain = next((name for words, name in _WORDED.items() if reason.startswith(words)), plain)
    known = _REASONS.get(plain) or _REASONS.get(reason.strip("()"))
    text = known or reason.replace("_", " ")
    if plain in _NEVER:
        return f"it never starts so: {text}; `stamo cancel`, mend the profile and submit again"
    if plain.startswith(("QOS", "Assoc", "MaxJobs")):
        text = f"a limit of your account: {reason}"
    if job.start is None or plain in _HELD:
        return text
    wait = (job.start - now).total_seconds()
    begin = f"{job.start:%H:%M}" if wait < 20 * 3600 else f"{job.start:%a %d %b %H:%M}"
    if plain == "BeginTime":
        return f"{text} {job.start:%H:%M:%S}"
    return ", ".join(part for part in (text, f"start expected {begin}") if part)


def _said(over: Event, progress: Progress) -> State:
    """The state after an event that ended the run."""
    stood = "" if over.event == "finished" else _stood(progress)
    return State(over.event, over.reason or stood)  # type: ignore[arg-type]


def _stood(progress: Progress) -> str:
    return f"at step {progress.step} of {progress.steps}" if progress.steps and progress.step < progress.steps else ""


def _after(progress: Progress) -> str:
    return f"after step {progress.checkpoint}" if progress.checkpoint else "from the start"
