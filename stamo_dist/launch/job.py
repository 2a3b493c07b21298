"""The process run by a job's batch script: it starts one process per task, waits, and decides what follows.

Slurm signals the processes themselves to stop (USR1 before the time limit, TERM when it preempts); they save and exit
with code 75. Only this process requeues the job, and only if Slurm has not done so itself. A run that crashes is
started again as long as it makes progress in between.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # at once: a signal before the handler is set would end this process; srun inherits the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})

import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from stamo_dist.distributed.rank import EXPORTS_LATER, free_port
from stamo_dist.exit_codes import EXIT_INTERRUPTED, EXIT_NOT_EXPORTED, EXIT_PREEMPTED
from stamo_dist.faults.signals import SIGNALS
from stamo_dist.launch import rank, slurm
from stamo_dist.launch.record import (
    Event,
    Launch,
    What,
    main_log,
    newest_first,
    now,
    read,
    record,
    since_submitted,
    task_log,
)
from stamo_dist.launch.run_progress import newest_checkpoint
from stamo_dist.run.folder import RunFolder
from stamo_dist.words import counted

_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.*)")
_SIGNALS = {  # as srun writes them
    "Hangup": 1, "Interrupt": 2, "Quit": 3, "Aborted": 6, "Bus error": 7, "Killed": 9, "User defined signal 1": 10,
    "Segmentation fault": 11, "User defined signal 2": 12, "Terminated": 15, "Out Of Memory": 9,
}  # fmt: skip
_TO_STOP = {128 + s for s in (1, 10, 12, 15)}  # exit codes of processes stopped by a signal before they could handle it
_AT_WORK = ("started", "exporting")
_WAIT = 20  # seconds for the other tasks to report once one has ended
#: Variables of the batch step, which srun would apply to its own step.
_NOT_FOR_SRUN = frozenset({
    "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE", "SLURM_CPU_BIND", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_DISTRIBUTION",
    "MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
})  # fmt: skip


class Job:
    """One start of one job (of one task of an array)."""

    def __init__(self, launch: Launch):
        env = os.environ
        self.launch, self.run = launch, Path(launch.run_dir)
        self.task = env.get("SLURM_ARRAY_TASK_ID")
        self.id = env["SLURM_JOB_ID"] if self.task is None else f"{env['SLURM_ARRAY_JOB_ID']}_{self.task}"
        self.restart = int(env.get("SLURM_RESTART_COUNT") or 0)
        self.nodes = slurm.expand(env["SLURM_JOB_NODELIST"])
        self.log = main_log(self.run) if self.task is None or launch.tasks == 1 else task_log(self.run, self.task)
        self._first: int | None = None  # exit code of the task that failed first

    def work(self) -> int:
        """Run the processes; returns the exit code of the batch script."""
        for s in SIGNALS:
            signal.signal(s, _nothing)  # the processes handle them; this one acts on their exit codes
        usable = [n for n in self.launch.node_counts or [len(self.nodes)] if n <= len(self.nodes)]
        exports = self._exporting()
        if not usable and not exports:  # Slurm may give an export no more nodes than it kept
            self._tell("failed", reason=f"got {len(self.nodes)} nodes, and runs on {self.launch.node_counts}")
            return 2
        srun = slurm.tool("srun")
        if srun is None:
            self._tell("failed", reason="there is no srun: the profile's environment or setup lines hide it from PATH")
            return 2
        self._note_what_slurm_did()
        if exports:
            self._tell("started", nodes=self.nodes[:1], world_size=1)
            return self._settle(self._export(srun))
        self.nodes = self.nodes[: max(usable)]
        count = len(self.nodes) * self.launch.processes_per_node
        self._tell("started", nodes=self.nodes, world_size=count)
        self._say(
            f"--- start {self.restart + 1} of job {self.id} on {','.join(self.nodes)}: "
            f"{counted(count, 'process')}, {now()}"
        )
        code = self._srun(step(self.launch, self.nodes, task=self.task or "0", srun=srun))
        if code == 0 and self._exports_later and RunFolder(self.run).exported_step != newest_step(self.run):
            code = self._export(srun)
        return self._settle(code)

    @property
    def _exports_later(self) -> bool:
        """Whether this process does the export after the training, so that the other nodes are released."""
        return len(self.nodes) > 1 and self.launch.command[:1] == ["train"] and self.task is None

    def _exporting(self) -> bool:
        """Whether training has finished and only its export was interrupted."""
        mine = (e.event for e in newest_first(self.run) if e.job == self.id)
        return bool(self.restart) and next((e for e in mine if e in _AT_WORK), None) == "exporting"

    def _export(self, srun: str) -> int:
        """Release all nodes but one, and export the model there."""
        self._tell("exporting", nodes=self.nodes[:1])
        if len(self.nodes) > 1:
            try:
                slurm.shrink(self.id, 1)
            except slurm.SlurmError as e:
                self._say(f"job {self.id}: keeps its nodes while it exports: {e}")
        self._say(f"--- job {self.id} exports on {self.nodes[0]}, {now()}")
        alone = replace(self.launch, command=["export", str(self.run)], processes_per_node=1)
        code = self._srun(step(alone, self.nodes[:1], srun=srun))
        return code if code in (0, EXIT_PREEMPTED) else EXIT_NOT_EXPORTED

    def _note_what_slurm_did(self) -> None:
        """Record a node failure of the previous start, which could not do so itself."""
        last = next((e for e in newest_first(self.run) if e.job == self.id), None)
        if self.restart and last is not None and last.event in (*_AT_WORK, "preempted", "stopped"):
            self._tell("requeued", reason="by Slurm: its nodes failed" if last.event in _AT_WORK else "by Slurm")

    def _srun(self, command: Sequence[str]) -> int:
        env = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_SRUN}
        env |= {
            rank.RUN: str(self.run),
            rank.LOG: str(self.log),
            rank.START: str(self.restart + 1),
            "MASTER_PORT": str(free_port()),
        }
        env |= {EXPORTS_LATER: "1"} if self._exports_later else {}
        env["SLURM_EXPORT_ENV"] = "ALL"
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, start_new_session=True)
        reader = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        reader.start()
        code = process.wait()
        reader.join(5)
        code = self._first if self._first is not None and code else code
        code = 128 - code if code < 0 else code
        return EXIT_PREEMPTED if code in _TO_STOP else code

    def _listen(self, stream: Any) -> None:
        """Read srun's output, which names the tasks in the order in which they ended."""
        for raw in stream:
            line = raw.decode(errors="replace").rstrip()
            self._say(line)
            match = _ENDED.match(line)
            if match and self._first is None:
                number = re.search(r"exit code (\d+)", match[3])
                by = next((128 + n for words, n in _SIGNALS.items() if match[3].startswith(words)), 1)
                self._first = int(number[1]) if number else by

    def _settle(self, code: int) -> int:
        verdict = judge_exit(self.launch, code, self.id)
        if verdict.event == "finished":
            self._tell("finished")
            return 0
        fate = self._fate()
        # Slurm may be configured to requeue jobs that end with this code (RequeueExit).
        over = 1 if code == EXIT_PREEMPTED else code
        if fate == "cancelled":
            if not self._cancelled():
                self._tell("cancelled", reason="scancel")
            return over
        if fate == "queued":  # so Slurm ended it, whatever the exit code
            reason = verdict.reason if code == EXIT_PREEMPTED else f"Slurm ended it before it had left (code {code})"
            self._tell("preempted", reason=reason)
            self._tell("requeued", reason="by Slurm")
            self._say(f"job {self.id}: preempted: {reason}; Slurm has queued it again already")
            return code
        self._tell(verdict.event, reason=verdict.reason)
        self._say(f"job {self.id}: {verdict.event}: {verdict.reason}")
        return self._requeue(verdict, code) if verdict.again else over

    def _fate(self) -> str:
        """What Slurm will do with this job: cancelled | queued | "" (nothing, or unknown)."""
        if self._cancelled():
            return "cancelled"
        try:
            return slurm.fate(self.id, self.restart)
        except slurm.SlurmError as e:
            self._say(f"job {self.id}: {e}")
            return ""

    def _requeue(self, verdict: Verdict, code: int) -> int:
        self._tell("requeued", reason=verdict.reason)
        try:
            slurm.requeue(self.id)
        except slurm.SlurmError as e:
            if self._fate() == "queued":
                return code
            reason = f"could not be queued again: {e}; `stamo resume {self.run}` goes on"
            self._tell("stopped", reason=reason)
            self._say(f"job {self.id}: {reason}")
            return EXIT_PREEMPTED
        self._say(f"job {self.id}: queued again")
        return code

    def _cancelled(self) -> bool:
        """Whether `stamo cancel` ended it since its last submission."""
        ids = (None, self.id, self.id.partition("_")[0])
        return any(e.event == "cancelled" and e.job in ids for e in since_submitted(self.run))

    def _tell(self, what: What, **about: Any) -> None:
        record(self.run, Event(what, job=self.id, restart=self.restart, step=newest_step(self.run), **about))

    def _say(self, text: str) -> None:
        print(text, flush=True)


@dataclass(frozen=True)
class Verdict:
    """The meaning of an end of the run, and whether it is started again."""

    event: What
    again: bool
    reason: str


def newest_step(run: str | Path) -> int | None:
    """The step of the newest complete checkpoint, None without one."""
    return newest_checkpoint(Path(run) / "checkpoints")[0]


def stalled(history: Iterable[Event]) -> int:
    """Number of consecutive ends, since its submission, without a newer checkpoint."""
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


def judge_exit(launch: Launch, code: int, job: str) -> Verdict:
    """What to do after a start of `job` ended with the exit code `code`.

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
    count = stalled([*history, Event(event, step=newest_step(launch.run_dir))])
    if count > launch.max_restarts:
        return Verdict("failed", False, f"{how}, and {count} starts in a row brought it no further (max_restarts)")
    return Verdict(event, True, how)


def step(launch: Launch, nodes: Sequence[str] | int, *, task: str = "0", srun: str = "srun") -> list[str]:
    """The srun command of a start on these nodes (or this many); `task`: of an array that divides one command."""
    profile, per_node = launch.profile, launch.processes_per_node
    count = nodes if isinstance(nodes, int) else len(nodes)
    assert launch.snapshot is not None, "submit takes one"
    container = profile.get("container") or {}
    flags = [f"--container-image={container['image']}"] if container else []
    flags += [f"--container-mounts={','.join(container['mounts'])}"] if container.get("mounts") else []
    where = [] if isinstance(nodes, int) else [f"--nodelist={','.join(nodes)}"]
    return [
        srun, f"--nodes={count}", f"--ntasks={count * per_node}", f"--ntasks-per-node={per_node}", *where,
        f"--cpus-per-task={profile.get('cpus_per_gpu', 1)}", f"--wait={_WAIT}", "--kill-on-bad-exit=0", "--export=ALL",
        "--input=none", *flags, *profile.get("srun", ()), profile.get("python") or sys.executable,
        f"{launch.snapshot}/code/run.py", "stamo_dist.launch.rank",
        *(word.replace("{task}", task) for word in launch.command),
    ]  # fmt: skip


def _nothing(*_: object) -> None:
    """A no-op handler, so that the signal does not end this process."""


def main(runs: list[str]) -> int:
    if len(runs) == 1:
        return Job(read(runs[0])).work()
    job = Job(read(runs[int(os.environ["SLURM_ARRAY_TASK_ID"])]))
    file = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for out in (1, 2):  # the task's own run folder, which Slurm cannot set
        os.dup2(file, out)
    return job.work()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
