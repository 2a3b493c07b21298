"""The process run by a job's batch script: it starts one process per task, waits, and decides what follows.

Slurm signals the processes themselves to stop (USR1 before the time limit, TERM when it preempts); they save and exit
with code 75. Only this process requeues the job, and only if Slurm has not done so itself. A run that crashes is
started again as long as it makes progress in between.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":  # at once: a signal before the handler is set would end this process; srun inherits the mask
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})

import contextlib
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stamo_dist.distributed.rank import EXPORTS_LATER, ReservedPort
from stamo_dist.exit_codes import EXIT_NOT_EXPORTED, EXIT_PREEMPTED
from stamo_dist.faults.heartbeats import forget_blame
from stamo_dist.launch import container, failing, rank, slurm
from stamo_dist.launch.ends import Verdict, avoided, complete, judge_exit, newest_step, trained
from stamo_dist.launch.notify import hidden, tell_end
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
    unwritable,
)
from stamo_dist.launch.step import GPU, step
from stamo_dist.launch.stop_requests import Requests
from stamo_dist.words import counted, print_in_any_locale

_ENDED = re.compile(r"srun: error: (\S+): tasks? ([\d,-]+): (.*)")
_SIGNALS = {  # as srun writes them
    "Hangup": 1, "Interrupt": 2, "Quit": 3, "Aborted": 6, "Bus error": 7, "Killed": 9, "User defined signal 1": 10,
    "Segmentation fault": 11, "User defined signal 2": 12, "Terminated": 15, "Out Of Memory": 9,
}  # fmt: skip
_TO_STOP = {128 + s for s in (1, 10, 12, 15)}  # exit codes of processes stopped by a signal before they could handle it
_AT_WORK = ("started", "exporting")
_PAUSE = (2.0, 30.0)  # least and most seconds between two requests to a controller that does not answer
#: Variables of the batch step, which srun would apply to its own step.
_NOT_FOR_SRUN = frozenset({
    "SLURM_CPUS_PER_TASK", "SLURM_TRES_PER_TASK", "SLURM_NTASKS", "SLURM_NPROCS", "SLURM_NTASKS_PER_NODE",
    "SLURM_TASKS_PER_NODE", "SLURM_CPU_BIND", "SLURM_GPUS", "SLURM_NNODES", "SLURM_JOB_NUM_NODES", "SLURM_DISTRIBUTION",
    "MASTER_ADDR", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE",
})  # fmt: skip


class Job:
    """One start of one job (of one task of an array)."""

    def __init__(self, launch: Launch, requests: Requests):
        env = os.environ
        self.launch, self.run = launch, Path(launch.run_dir)
        self.task = env.get("SLURM_ARRAY_TASK_ID")
        self.id = env["SLURM_JOB_ID"] if self.task is None else f"{env['SLURM_ARRAY_JOB_ID']}_{self.task}"
        self.restart = int(env.get("SLURM_RESTART_COUNT") or 0)
        self.nodes = slurm.expand(env["SLURM_JOB_NODELIST"])
        self.log = main_log(self.run) if self.task is None or launch.tasks == 1 else task_log(self.run, self.task)
        self._first: int | None = None  # exit code of the task that failed first
        self._lost: failing.LostTask | None = None  # that task
        self._requests = requests
        self._last: Event | None = None  # that was recorded

    def work(self) -> int:
        """Run the processes, and tell whom the profile names if the run has ended; returns the exit code."""
        code = self._work()
        if self._last is not None and (said := tell_end(self.launch, self._last)):
            self._say(f"job {self.id}: {said}")
        return code

    def _work(self) -> int:
        usable = [n for n in self.launch.node_counts or [len(self.nodes)] if n <= len(self.nodes)]
        exports = self._exporting()
        if not usable and not exports:  # Slurm may give an export no more nodes than it kept
            self._tell("failed", reason=f"got {len(self.nodes)} nodes, and runs on {self.launch.node_counts}")
            return 2
        srun = slurm.tool("srun")
        if srun is None:
            self._tell("failed", reason="there is no srun: the profile's environment or setup lines hide it from PATH")
            return 2
        if lacks := container.missing(self.launch.profile):
            self._tell("failed", reason=lacks)
            return 2
        self._adopt()
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
        if code == 0 and self._exports_later and complete(self.run) and not trained(self.run):
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

    def _adopt(self) -> None:
        """Record this job, if whoever queued it did not hear of it because Slurm did not answer."""
        mine = self.id if self.launch.tasks == 1 else self.id.partition("_")[0]
        if mine not in self.launch.job_ids and not self.restart:
            self.launch.job_ids.append(mine)
            try:
                self.launch.write()
            except OSError as e:
                self._say(f"job {self.id}: could not be recorded ({e.strerror})")

    def _note_what_slurm_did(self) -> None:
        """Record a node failure of the previous start, which could not do so itself."""
        last = next((e for e in newest_first(self.run) if e.job == self.id), None)
        if self.restart and last is not None and last.event in (*_AT_WORK, "preempted", "stopped"):
            silent = "by Slurm: its nodes failed, or it was killed before it had a word"
            reason = silent if last.event in _AT_WORK else "by Slurm"
            self._tell("requeued", reason=reason, avoids=self._avoided)

    def _srun(self, command: Sequence[str]) -> int:
        with ReservedPort() as port:  # rank 0 runs on this node
            return self._processes(command, port.number)

    def _processes(self, command: Sequence[str], port: int) -> int:
        env = {k: v for k, v in os.environ.items() if k not in _NOT_FOR_SRUN}
        env |= {
            rank.RUN: str(self.run),
            rank.LOG: str(self.log),
            rank.START: str(self.restart + 1),
            "MASTER_PORT": str(port),
        }
        env |= hidden(self.launch.profile)
        env |= {EXPORTS_LATER: "1"} if self._exports_later else {}
        env |= {rank.BIND: GPU} if self.launch.profile.get("cpu_bind") == GPU else {}
        env["SLURM_EXPORT_ENV"] = "ALL"
        forget_blame(self.run / "logs")
        process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, start_new_session=True)
        self._requests.pass_to(process)
        reader = threading.Thread(target=self._listen, args=(process.stderr,), daemon=True)
        reader.start()
        code = process.wait()
        self._requests.pass_to(None)
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
                self._lost = failing.LostTask(match[1], int(re.split("[,-]", match[2])[0]), match[3])

    def _settle(self, code: int) -> int:
        """Have the job queued again if it is to go on, and record what became of it; returns the exit code."""
        if code == 0 and not self._finished():
            self._say(f"job {self.id}: srun gave up (code 0) before its processes had finished")
            code = EXIT_PREEMPTED
        blame = self._blame(code)
        verdict = judge_exit(self.launch, code, self.id, blame.nodes)
        if verdict.event == "finished":
            self._tell("finished")
            return 0
        # Slurm may be configured to requeue jobs that end with this code (RequeueExit).
        over = 1 if code == EXIT_PREEMPTED else code
        fate, refusal = self._ask(verdict)
        if fate == "cancelled":
            if self._cancelled():
                self._last = Event("cancelled", job=self.id)
            else:
                self._tell("cancelled", reason="scancel")
            return over
        by_slurm = fate == "queued"
        ended = by_slurm or (fate == "ending" and verdict.again)  # by Slurm, whatever the exit code
        left = ended or verdict.event == "preempted"
        reason = f"{blame.cause}: {verdict.reason}" if blame.cause == failing.HUNG else verdict.reason
        if ended and code != EXIT_PREEMPTED:
            reason = f"Slurm ended it before it had left (code {code})"
        event: What = "preempted" if left else verdict.event
        found: dict[str, Any] = {} if ended else {"blamed": blame.nodes, "cause": blame.cause}
        nodes = failing.failing_now(self.launch, Event(event, job=self.id, **found))
        self._tell(event, reason=reason, **found)
        self._say(f"job {self.id}: {event}: {reason}")
        if refusal:
            self._tell("stopped", reason=f"{refusal}; `stamo resume {self.run}` goes on")
            self._say(f"job {self.id}: {refusal}; `stamo resume {self.run}` goes on")
            return EXIT_PREEMPTED if left else code
        if not by_slurm and not verdict.again:
            return over
        avoids, said = failing.keep_off(self.launch, self.id, nodes, self._avoided)
        again = "by Slurm" if by_slurm else reason
        self._tell("requeued", reason="; ".join(filter(None, (again, said))), avoids=avoids)
        self._say(f"job {self.id}: {'Slurm has queued it again already' if by_slurm else 'queued again'}")
        if said:
            self._say(f"job {self.id}: {said}")
        return code

    def _blame(self, code: int) -> failing.Blame:
        """The nodes to blame for a start that ended with this code, of a training."""
        if code in (0, 2) or self.launch.command[:1] != ["train"]:
            return failing.Blame()
        ids = {self.id, os.environ["SLURM_JOB_ID"]}
        heads = [f"--- start {self.restart + 1} of job {id}" for id in ids]
        per_node, left = self.launch.processes_per_node, code == EXIT_PREEMPTED
        return failing.find_blame(self.run, self.nodes, per_node, heads, self._lost, left=left)

    @property
    def _avoided(self) -> list[str]:
        return avoided(since_submitted(self.run))

    def _finished(self) -> bool:
        """Whether code 0 means what it says: srun also returns it when it gives up processes that Slurm is killing."""
        if self.launch.command[:1] == ["train"]:
            return trained(self.run)
        try:
            return slurm.fate(self.id, self.restart) == ""
        except slurm.SlurmError:
            return True

    def _ask(self, verdict: Verdict) -> tuple[slurm.Fate, str]:
        """(what Slurm does with the job, which it is asked to queue again if `verdict` says so; "" or its refusal).

        A controller that does not answer is asked for as long as the job has its nodes.
        """
        pause, told = _PAUSE[0], False
        while True:
            try:
                return self._ask_once(verdict)
            except slurm.SlurmAwayError as e:
                if not verdict.again:
                    return ("cancelled" if self._cancelled() else ""), ""
                self._say(f"job {self.id}: is to be queued again, and asks in {pause:g} s again: {e}")
                if not told:
                    self._tell("preempted", reason=f"{verdict.reason}; Slurm does not answer, it is asked again")
                told = True
                time.sleep(pause)
                pause = min(2 * pause, _PAUSE[1])

    def _ask_once(self, verdict: Verdict) -> tuple[slurm.Fate, str]:
        fate = self._fate()
        if fate in ("queued", "cancelled") or not verdict.again:
            return fate, ""
        # A crash is not started again where nothing can be written: it would not be counted, and not do better.
        if not fate and verdict.event == "failed" and (why := unwritable(self.run)):
            return fate, why
        try:
            slurm.requeue(self.id)
        except slurm.SlurmAwayError:
            raise
        except slurm.SlurmError as e:
            now = self._fate()
            return (now, "") if now in ("queued", "cancelled") else (fate, f"could not be queued again: {e}")
        return fate, ""

    def _fate(self) -> slurm.Fate:
        """What Slurm will do with this job; where it cannot tell, a recorded cancel counts.

        Raises:
            SlurmAwayError: Slurm does not answer.
        """
        try:
            fate = slurm.fate(self.id, self.restart)
        except slurm.SlurmAwayError:
            raise
        except slurm.SlurmError as e:  # no scontrol
            self._say(f"job {self.id}: {e}")
            return "cancelled" if self._cancelled() else ""
        return "cancelled" if fate == "ending" and self._cancelled() else fate

    def _cancelled(self) -> bool:
        """Whether `stamo cancel` ended this start."""
        ids = (None, self.id, self.id.partition("_")[0])
        for event in newest_first(self.run):
            if event.event in ("submitted", "started", "exporting"):
                return False
            if event.event == "cancelled" and event.job in ids:
                return True
        return False

    def _tell(self, what: What, **about: Any) -> None:
        """Record an event, if that can be written: it never ends the job."""
        self._last = Event(what, job=self.id, restart=self.restart, step=newest_step(self.run), **about)
        try:
            record(self.run, self._last)
        except OSError as e:
            self._say(f"job {self.id}: {what} could not be recorded ({e.strerror})")

    def _say(self, text: str) -> None:
        with contextlib.suppress(OSError):  # the log lies on the run's disk
            print(text, flush=True)


def main(runs: list[str]) -> int:
    print_in_any_locale()
    requests = Requests()
    requests.listen()
    if len(runs) == 1:
        return Job(read(runs[0]), requests).work()
    job = Job(read(runs[int(os.environ["SLURM_ARRAY_TASK_ID"])]), requests)
    file = os.open(job.log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for out in (1, 2):  # the task's own run folder, which Slurm cannot set
        os.dup2(file, out)
    return job.work()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
