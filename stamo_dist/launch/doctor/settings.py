"""Settings of a Slurm cluster that prevent a run from saving, being requeued and continuing."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from datetime import datetime

from stamo_dist.exit_codes import EXIT_PREEMPTED
from stamo_dist.launch import grace
from stamo_dist.launch.doctor.verdict import Finding

_AREA = "Slurm's settings"
_SKEW = 5.0  # seconds


def read_settings(text: str) -> dict[str, str]:
    """`Key = Value` lines of `scontrol show config`, and the controller's time under "as of"."""
    found = {}
    for line in text.splitlines():
        if match := re.match(r"Configuration data as of (\S+)", line):
            found["as of"] = match[1]
        elif match := re.match(r"(\S+)\s*= (.*)", line):
            found[match[1]] = match[2].strip()
    return found


def judge_settings(
    config: Mapping[str, str], partition: Mapping[str, str], *, leaving: float | None, now: datetime
) -> Iterator[Finding]:
    """Findings on the cluster's and the partition's settings.

    `leaving`: seconds that the run needs to save and exit, if measured. `now`: this machine's time.
    """
    yield from _accounting(config)
    yield from _killing(config)
    yield from _preemption(config, partition, leaving)
    yield from _requeueing(config)
    if config.get("as of"):
        ahead = (now - datetime.fromisoformat(config["as of"])).total_seconds()
        if abs(ahead) > _SKEW:
            what = f"this machine's clock is {ahead:+.0f} s from the controller's"
            fix = "have both keep time by NTP (chrony); munge refuses credentials beyond 5 minutes"
            yield Finding("warning", _AREA, what, fix)
    if config.get("PropagateResourceLimits", "ALL") == "ALL":
        what = "jobs get the resource limits (ulimit) of the shell that submits"
        fix = "raise `ulimit -n` and `ulimit -l` before submitting where the nodes' report below complains"
        yield Finding("note", _AREA, what, fix)


def _accounting(config: Mapping[str, str]) -> Iterator[Finding]:
    kept = grace.duration(config.get("MinJobAge", ""))
    if not config.get("AccountingStorageType", "").endswith("/slurmdbd"):
        after = f"; Slurm forgets a job {kept:.0f} s after its end (MinJobAge)" if kept is not None else ""
        what = f"accounting is off, so sacct knows nothing{after}"
        fix = "nothing to do: `stamo status` asks squeue and scontrol, and reads the run folder"
        yield Finding("note", _AREA, what, fix)
    else:
        yield Finding("fine", _AREA, "accounting is on")


def _killing(config: Mapping[str, str]) -> Iterator[Finding]:
    tracking = config.get("ProctrackType", "").rpartition("/")[2]
    if tracking in ("linuxproc", "pgid"):
        what = (
            f"proctrack/{tracking} loses processes: what ignores SIGTERM or left its group survives "
            "its job and holds on to the GPU beside the next one"
        )
        fix = (
            "have the administrator set ProctrackType=proctrack/cgroup; a run folder is safe from such a leftover, a "
            "GPU is not: look for foreign processes with nvidia-smi when a job runs out of memory"
        )
        yield Finding("warning", _AREA, what, fix)
    elif tracking:
        yield Finding("fine", _AREA, f"proctrack/{tracking} ends all processes of a job")


def _preemption(config: Mapping[str, str], partition: Mapping[str, str], leaving: float | None) -> Iterator[Finding]:
    mode = grace.preemption_mode(config, partition)
    given = grace.preemption_grace(config, partition)
    if given is None:
        yield Finding("fine", _AREA, "jobs of this partition are not preempted")
        return
    if mode == "CANCEL":
        what = "preempted jobs are cancelled, not requeued (PreemptMode=CANCEL)"
        fix = (
            "`stamo resume RUN` submits such a run again where it stopped; or use a partition with PreemptMode=REQUEUE"
        )
        yield Finding("warning", _AREA, what, fix)
    elif mode in ("SUSPEND", "GANG"):
        what = (
            f"preempted jobs are stopped and keep their memory (PreemptMode={mode}): a run that is "
            "stopped longer than its time-outs is taken for hung and started again"
        )
        fix = "set train.step_timeout above the longest suspension, or use a partition with PreemptMode=REQUEUE"
        yield Finding("warning", _AREA, what, fix)
    term, wait = grace.duration(partition.get("GraceTime", "")) or 0.0, grace.kill_wait(config)
    signalled = "send_user_signal" in config.get("SlurmctldParameters", "") + config.get("PreemptParameters", "")
    need = f"; leaving took {leaving:.1f} s when last measured" if leaving is not None else ""
    if leaving is not None and leaving > given:
        what = (
            f"a preempted run has {term:g} s (GraceTime) and {wait:g} s (KillWait) to save{need}: it "
            "would be killed in between"
        )
        fix = (
            "save more often with train.checkpoint.ephemeral_every, so that little is lost, or ask for a longer "
            "GraceTime"
        )
        yield Finding("error", _AREA, what, fix)
    elif not term:
        what = (
            f"preemption gives no grace time (GraceTime=0): all signals at once, SIGKILL {wait:g} s "
            f"later (KillWait){need}"
        )
        fix = (
            "set train.checkpoint.ephemeral_every so that little is lost when the save does not fit, or ask for a "
            "GraceTime"
        )
        yield Finding("warning", _AREA, what, fix)
    else:
        yield Finding("fine", _AREA, f"a preempted run has {given:g} s (GraceTime) to save{need}")
    if not signalled:
        what = "before preemption there is no user signal, only SIGTERM (no send_user_signal)"
        fix = "nothing to do: SIGTERM makes a run save and leave too; newer Slurm: PreemptParameters=send_user_signal"
        yield Finding("note", _AREA, what, fix)


def _requeueing(config: Mapping[str, str]) -> Iterator[Finding]:
    if config.get("JobRequeue") == "0":
        what = "jobs are not requeued by default (JobRequeue=0)"
        fix = "nothing to do: `stamo submit` asks for it; a script of your own needs #SBATCH --requeue"
        yield Finding("note", _AREA, what, fix)
    if _covers(config.get("RequeueExitHold", ""), EXIT_PREEMPTED):
        what = (
            f"RequeueExitHold={config['RequeueExitHold']} takes in code {EXIT_PREEMPTED}, with which "
            "a run leaves to be started again: it is held then"
        )
        fix = f"have the administrator take {EXIT_PREEMPTED} out; `scontrol release JOB` lets it go on"
        yield Finding("warning", _AREA, what, fix)
    elif _covers(config.get("RequeueExit", ""), EXIT_PREEMPTED):
        what = (
            f"RequeueExit={config['RequeueExit']}: a run that left to be started again is queued "
            "again even where it cannot do so itself"
        )
        yield Finding("fine", _AREA, what)
    expiry = re.search(r"cred_expire=(\d+)", config.get("AuthInfo", ""))
    delay = int(expiry[1]) if expiry else 120
    if delay > 30:
        what = f"a requeued job waits {delay + 1} s before it can start (AuthInfo cred_expire, 120 by default)"
        fix = "ask the administrator for AuthInfo=cred_expire=30 if preemptions are frequent"
        yield Finding("note", _AREA, what, fix)


def _covers(codes: str, code: int) -> bool:
    for part in codes.split(","):
        low, _, high = part.partition("-")
        if low.isdecimal() and int(low) <= code <= int(high if high.isdecimal() else low):
            return True
    return False
