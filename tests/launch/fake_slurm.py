"""A Slurm in this process: its commands, jobs whose scripts run as far as a test lets them, and faults."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, tzinfo
from pathlib import Path
from unittest import mock

from stamo_dist.launch import job as batch
from stamo_dist.launch.record import read

AWAY = "slurm_load_jobs error: Unable to contact slurm controller (connect failure)"
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT")
#: Slurm's state → what status may say. "unknown" besides, while Slurm does not answer.
SAID = {
    "PENDING": {"queued", "requeued"},
    "RUNNING": {"starting", "running", "preempted"},
    "COMPLETING": {"preempted", "failed", "stopped"},
    "FAILED": {"failed", "stopped"},
    "TIMEOUT": {"failed", "stopped"},
    "CANCELLED": {"cancelled"},
    "COMPLETED": set[str](),
}


class Clock(datetime):
    """The machine's, which jumps."""

    ahead = 0.0

    @classmethod
    def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]
        return datetime.now(tz) + timedelta(seconds=cls.ahead)


class Killed(BaseException):
    """SIGKILL."""


class Script(threading.Thread):
    """The batch script of one start of a job; it stops where it waits for srun or sleeps, until it is driven on."""

    def __init__(self, run: Path, env: dict[str, str]):
        super().__init__(daemon=True)
        self.at, self.code, self.kill_after_requeue = "begin", -9, False
        self._run, self._env, self._order = run, env, 0
        self._failure: BaseException | None = None
        self._mine, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self.start()

    @property
    def over(self) -> bool:
        return self.at == "over"

    def drive(self, order: int = 0) -> None:
        """Go on to the next stop; `order`: srun's exit code, or -9 to be killed."""
        self._order = order
        with mock.patch.dict(os.environ, self._env):
            self._mine.release()
            self._theirs.acquire()
        if self._failure is not None:
            raise self._failure

    def stop(self, where: str) -> int:
        self.at = where
        self._theirs.release()
        self._mine.acquire()
        if self._order == -9:
            raise Killed
        return self._order

    def run(self) -> None:
        self._mine.acquire()
        try:
            self.code = batch.Job(read(self._run), batch.Requests()).work()
        except Killed:
            pass
        except BaseException as e:
            self._failure = e
        self.at = "over"
        self._theirs.release()


@dataclass
class FakeJob:
    """One job, and whether a user ended it."""

    id: str
    run: Path
    comment: str
    state: str = "PENDING"
    reason: str = "None"
    restarts: int = 0
    late: bool = False  # its time limit has passed
    cancelled: bool = False  # for Slurm
    unwanted: bool = False  # to be ended, says `stamo cancel`, which came when Slurm was ending it already
    script: Script | None = None
    text: str = ""  # of the script
    excluded: frozenset[str] = frozenset()
    node: str = ""

    @property
    def busy(self) -> bool:
        return self.script is not None and not self.script.over

    @property
    def shown(self) -> str:
        return self.state


@dataclass
class FakeSlurm:
    """The controller. `away`: it does not answer; `slow`: it does what the next command asks, which then times out."""

    jobs: dict[str, FakeJob] = field(default_factory=dict)
    away: bool = False
    slow: bool = False
    forgotten: dict[str, FakeJob] = field(default_factory=dict)
    nodes: tuple[str, ...] = ("n1", "n2", "n3")

    def allocate(self, job: FakeJob) -> str:
        """The first node that it may have."""
        job.node = next(node for node in self.nodes if node not in job.excluded)
        return job.node

    @property
    def newest(self) -> FakeJob:
        return max((self.jobs | self.forgotten).values(), key=lambda job: int(job.id))

    def execute(self, command: Sequence[str], stdin: str | None, cwd: str | None) -> subprocess.CompletedProcess[str]:
        words = [Path(command[0]).name, *command[1:]]
        if self.away:
            return subprocess.CompletedProcess(words, 1, "", AWAY)
        answer: Callable[..., str] = getattr(self, f"_{words[0]}")
        try:
            said = answer(*words[1:])
        except ValueError as e:
            return subprocess.CompletedProcess(words, 1, "", str(e))
        if self.slow:
            self.slow = False
            raise subprocess.TimeoutExpired(words, 30)
        return subprocess.CompletedProcess(words, 0, said, "")

    def settle(self, job: FakeJob) -> None:
        """The script has ended: so has the job, unless it is queued again."""
        assert job.script is not None
        if job.state == "COMPLETING":
            job.state = "CANCELLED" if job.cancelled else "TIMEOUT"
        elif job.state == "RUNNING":
            job.state = "FAILED" if job.script.code else "COMPLETED"

    def again(self, job: FakeJob) -> None:
        """Queue it again."""
        assert not any((job.cancelled, job.unwanted)), "a job that a user has cancelled is queued again"
        job.state, job.reason, job.late = "PENDING", "BeginTime", False
        job.restarts += 1

    def end(self, job: FakeJob) -> None:
        """A user ends it."""
        job.cancelled = True
        job.state = "COMPLETING" if job.state == "RUNNING" or job.busy else "CANCELLED"

    def _sbatch(self, *words: str) -> str:
        asked = next((word.partition("=")[2] for word in words if word.startswith("--exclude=")), "")
        if "--test-only" in words:
            return self._test(asked)
        text = Path(words[-1]).read_text()
        line = next(line for line in text.splitlines() if line.startswith("exec "))
        comment = next((word.partition("=")[2] for word in words if word.startswith("--comment=")), "")
        job = FakeJob(str(len(self.jobs) + len(self.forgotten) + 1), Path(shlex.split(line)[-1]), comment)
        excluded = re.search(r"(?m)^#SBATCH --exclude=(.*)$", text)
        job.text, job.excluded = text, _listed(excluded[1] if excluded else "")
        self.jobs[job.id] = job
        return f"Submitted batch job {job.id}\n"

    def _test(self, excluded: str) -> str:
        if not set(self.nodes) - _listed(excluded):
            raise ValueError("allocation failure: Requested node configuration is not available")
        return ""

    def _squeue(self, *words: str) -> str:
        form = next(word.partition("=")[2] for word in words if word.startswith("--format="))
        lines = []
        for job in self.jobs.values():
            nodes = job.node if job.state in ("RUNNING", "COMPLETING") else ""
            values = {"i": job.id, "F": job.id, "T": job.state, "r": job.reason, "S": "N/A", "N": nodes, "D": "1"}
            values |= {"M": "1:00", "l": "10:00", "P": "low", "u": "me", "j": "toy", "k": job.comment}
            lines.append(re.sub(r"%(\w)", lambda m, values=values: values[m[1]], form))
        return "\n".join(lines) + "\n"

    def _update(self, id: str, excluded: str) -> str:
        job = self.jobs.get(id.partition("=")[2])
        if job is None or job.state != "PENDING":
            raise ValueError("Job is no longer pending execution")
        job.excluded = _listed(excluded.partition("=")[2])
        assert set(self.nodes) - job.excluded, "no node is left"
        return ""

    def _scontrol(self, *words: str) -> str:
        if words[0] == "update":
            return self._update(*words[1:])
        if words[:2] == ("write", "batch_script"):
            return self.jobs[words[2]].text
        job = self.jobs.get(words[-1])
        if words[0] == "requeue":
            if job is None or job.state in ENDED or job.state == "PENDING":
                raise ValueError(f"Job/step already completing or completed for job {words[-1]}")
            script = job.script
            self.again(job)
            if script is not None and script.kill_after_requeue:
                raise Killed  # KillWait=0: the script has no time for another word
            return ""
        assert words[:3] == ("--oneliner", "show", "job"), words
        if job is None:
            raise ValueError("slurm_load_jobs error: Invalid job id specified")
        ran = "00:10:30" if job.late else "00:01:00"
        return (
            f"JobId={job.id} JobState={job.state} Reason={job.reason} Restarts={job.restarts} RunTime={ran} "
            f"TimeLimit=00:10:00 PreemptTime=None\n"
        )

    def _scancel(self, *words: str) -> str:
        job = self.jobs.get(words[-1])
        if job is not None and job.state in ("PENDING", "RUNNING"):
            self.end(job)
        return ""  # also for a job that has ended, that Slurm is ending already, or that it does not know


def _listed(nodes: str) -> frozenset[str]:
    return frozenset(nodes.split(",")) - {""}
