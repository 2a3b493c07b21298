"""A job to submit, its batch script, and the call of sbatch."""

from __future__ import annotations

import os
import re
import shlex
import uuid
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit import SlurmExecutor

from stamo_dist.errors import RunError
from stamo_dist.launch import checks, container, slurm
from stamo_dist.launch.profile import ClusterProfile
from stamo_dist.launch.record import Launch, folder, main_log, snapshot_command, task_log
from stamo_dist.launch.shell import before_the_run
from stamo_dist.recipe.load import Loaded


@dataclass(frozen=True)
class JobOrder:
    """One job to submit."""

    launch: Launch
    profile: ClusterProfile
    loaded: Loaded | None = None  # the recipe for the snapshot
    members: list[JobOrder] = field(default_factory=list)  # runs of a sweep submitted as one job array, self first
    after: list[str] = field(default_factory=list)  # jobs that must have finished
    notes: list[str] = field(default_factory=list)  # notes for the user
    avoids: list[str] = field(default_factory=list)  # nodes on which earlier starts failed

    @property
    def tasks(self) -> int:
        """Number of array tasks; 0 if it is not an array."""
        return len(self.members) or (self.launch.tasks if self.launch.tasks > 1 else 0)

    @property
    def least(self) -> int:
        """Minimum number of nodes."""
        return min(self.launch.node_counts or [self.launch.nodes])

    @property
    def cpus(self) -> int:
        """CPUs of a node."""
        return self.profile.cpus_per_gpu * self.launch.processes_per_node


class Sbatch(SlurmExecutor):
    """submitit's batch script and sbatch call, with our own command instead of a pickled function.

    submitit's own job handles signals on rank 0 only, ignores SIGTERM, and requests a requeue that Slurm may have made
    already; so the job runs `stamo_dist.launch.job` instead.
    """

    def __init__(self, order: JobOrder):
        self.order = order
        super().__init__(folder(order.launch.run_dir) / "sbatch")
        p, launch, given = order.profile, order.launch, order.profile.model_dump(mode="json")
        exports = container.exports(given)
        counts = launch.node_counts or [launch.nodes]
        more: dict[str, Any] = {"signal": f"USR1@{p.signal_delay}", "open-mode": "append"}
        more["output"] = _pattern(_log(order))
        if p.notify is not None and p.notify.mail:
            kinds = {"end": "END", "failure": "FAIL"}
            more |= {"mail-user": p.notify.mail, "mail-type": ",".join(kinds[on] for on in p.notify.on)}
        more |= {"requeue": True, "chdir": os.getcwd(), **({"exclusive": True} if p.exclusive else {})}
        more |= {**({"segment": p.segment} if p.segment else {}), **p.sbatch, **p.gpu_options(max(counts))}
        if min(counts) < max(counts):
            more["nodes"] = f"{min(counts)}-{max(counts)}"
        if order.tasks:
            more["array"] = f"0-{order.tasks - 1}"
        if order.after:
            more |= {"dependency": f"afterok:{':'.join(order.after)}", "kill-on-invalid-dep": "yes"}
        # One task per node with the CPUs of all processes: a range of nodes cannot be combined with tasks per node.
        self.update_parameters(
            job_name=launch.name,
            partition=p.partition,
            account=p.account,
            qos=p.qos,
            time=p.time,
            nodes=max(counts),
            cpus_per_task=order.cpus,
            mem=p.memory,
            constraint=p.constraint,
            exclude=",".join(filter(None, (p.exclude, *order.avoids))) or None,
            wckey=None,
            stderr_to_stdout=True,
            use_srun=False,
            setup=[*(f"export {k}={shlex.quote(v)}" for k, v in exports.items()), *before_the_run(given)],
            additional_parameters=more,
        )

    @classmethod
    def affinity(cls) -> int:
        return 1  # allows showing a script without Slurm

    def text(self) -> str:
        return self._make_submission_file_text(self._command, "")

    def test(self) -> None:
        """Let Slurm validate the script without queueing it.

        Raises:
            SlurmError: Slurm would refuse it.
        """
        self._sbatch("--test-only", stdin=self.text())

    def send(self) -> str:
        """The id of the queued job."""
        self.folder.mkdir(parents=True, exist_ok=True)
        _log(self.order).parent.mkdir(parents=True, exist_ok=True)
        file = self.folder / f".{os.getpid()}.sh"
        file.write_text(self.text())
        token = f"stamo-{uuid.uuid4().hex}"
        mark = [] if "comment" in self.order.profile.sbatch else [f"--comment={token}"]
        try:
            job = str(self._get_job_id_from_submission_command(self._sbatch(*mark, str(file))))
        except slurm.SlurmAwayError:  # it may have been queued all the same
            found = slurm.commented(token) if mark else None
            if found is None:
                raise
            job = found
        file.rename(self.folder / f"{job}.sh")
        return job

    def _sbatch(self, *words: str, stdin: str | None = None) -> str:
        try:
            return slurm.run("sbatch", *words, stdin=stdin)
        except slurm.SlurmError as e:
            raise type(e)(checks.hinted(str(e), self.order.profile)) from None

    @property
    def _command(self) -> str:
        launch = self.order.launch
        code = snapshot_command(launch.snapshot or no_snapshot(launch), "stamo_dist.launch.job", [])
        return f"exec {shlex.join([*code, *(m.launch.run_dir for m in self.order.members or [self.order])])}"


def no_snapshot(launch: Launch) -> str:
    """Where the snapshot will be."""
    return f"{folder(launch.run_dir)}/snapshots/TIME"


def _log(order: JobOrder) -> Path:
    """The batch script's output file; arrays have one per task (TASK), used until the task's run opens its own log."""
    run = Path(order.launch.run_dir)
    return task_log(run.parent if order.members else run, "TASK") if order.tasks else main_log(run)


def _pattern(log: Path) -> str:
    """A log's path as sbatch wants it.

    Raises:
        RunError: There is no way to write it.
    """
    if found := re.search(r"[\\\n\r]", str(log)):
        raise RunError(f"run_dir: {log.parent.parent} has {found[0]!r}, which Slurm takes out of a path; rename it")
    return str(log).replace("%", "%%").replace("task_TASK", "task_%a")
