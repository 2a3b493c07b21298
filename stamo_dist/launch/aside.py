"""Commands of `stamo` that run beside a training without disturbing it, as separate processes or Slurm jobs."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from stamo_dist.errors import RunError, StamoError
from stamo_dist.launch import slurm
from stamo_dist.launch.profile import LOCAL, ClusterProfile, load_profile
from stamo_dist.launch.record import Launch, main_log, read, since_submitted
from stamo_dist.run.lease import Owner

_NICE = 10
_ASK = 60.0  # seconds between queries to Slurm
_ENDS = ("finished", "failed", "stopped", "cancelled")
_ROOT = Path(__file__).resolve().parents[2]  # folder of the package, which may be a snapshot's
#: Environment variables that make a process a rank of the training, or a part of its job.
_RANK = frozenset({
    "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT",
    "STAMO_LAUNCHED", "CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES",
})  # fmt: skip
Ticket = dict[str, Any]


class Processes:
    """Each command is a low-priority process on this machine in its own session."""

    stays = False

    def __init__(self) -> None:
        self._mine: list[subprocess.Popen[bytes]] = []

    def start(self, arguments: Sequence[str], folder: Path) -> Ticket:
        """Run `stamo ARGUMENTS`, printing into FOLDER/log.txt."""
        log, nice = folder / "log.txt", shutil.which("nice")
        command = [*([nice, "-n", str(_NICE)] if nice else []), sys.executable, "-m", "stamo_dist.cli", *arguments]
        env = environment(gpus=True)
        with log.open("wb") as out:
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )
        self._mine.append(process)
        return {"process": asdict(Owner.of(process.pid)), "log": str(log)}

    def alive(self, ticket: Ticket) -> bool:
        """Whether it runs; a process on another machine, where the training ran before, counts as dead."""
        for process in self._mine:
            process.poll()  # an ended child is a zombie until it is polled
        owner = Owner(**ticket["process"])
        return owner.local and owner.alive

    def stop(self, ticket: Ticket) -> None:
        if self.alive(ticket):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(ticket["process"]["pid"], signal.SIGTERM)


class Jobs:
    """Each command is a Slurm job on one node, with one process and at most one GPU.

    Args:
        run: The training run.
        cluster: The profile; the one the run was submitted with if None.

    Raises:
        StamoError: There is no Slurm here, no such profile, or the run was not submitted to Slurm.
    """

    stays = True

    def __init__(self, run: Path, cluster: str | None):
        self._run, self._cluster = run, cluster
        self._asked: dict[str, tuple[float, bool]] = {}
        if not slurm.available():
            raise RunError("evaluate.rollout.where: slurm, but this machine cannot submit to Slurm; set process")
        profile_of(run, cluster)

    def start(self, arguments: Sequence[str], folder: Path) -> Ticket:
        """Queue `stamo ARGUMENTS`, or find its earlier job; `folder` is its run folder."""
        asked = [str(self._run), self._cluster or "", str(folder), *arguments]
        # In a separate process: the Slurm variables of the training's job must not reach the new one.
        command, env = [sys.executable, "-m", __name__, *asked], environment(gpus=False)
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        if done.returncode:
            lines = (done.stderr or done.stdout).strip().splitlines()
            raise RunError(lines[-1] if lines else "could not be submitted")
        ticket: Ticket = json.loads(done.stdout.splitlines()[-1])
        return ticket

    def alive(self, ticket: Ticket) -> bool:
        job, last = ticket["job"], since_submitted(ticket["folder"])[-1:]
        if last and last[0].event in _ENDS:
            return False
        when, was = self._asked.get(job, (0.0, True))
        if not when or time.monotonic() > when + _ASK:
            with contextlib.suppress(slurm.SlurmError):  # Slurm does not answer: ask again later
                was = any(j.active for j in slurm.jobs([job]))
            self._asked[job] = (time.monotonic(), was)
        return was

    def stop(self, ticket: Ticket) -> None:
        with contextlib.suppress(slurm.SlurmError):
            slurm.cancel(ticket["job"])


def launcher(run: Path, where: str, cluster: str | None) -> Processes | Jobs:
    """The launcher named by `evaluate.rollout.where`.

    Raises:
        StamoError: Jobs cannot be submitted here.
    """
    return Jobs(run, cluster) if where == "slurm" else Processes()


def environment(*, gpus: bool) -> dict[str, str]:
    """This process's variables without those that make it a rank of a training; `gpus`: keep the visible GPUs."""
    env = {k: v for k, v in os.environ.items() if k not in _RANK and (k == "SLURM_CONF" or not k.startswith("SLURM"))}
    if gpus:
        env |= {k: os.environ[k] for k in ("CUDA_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES") if k in os.environ}
    env["PYTHONPATH"] = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return env


def profile_of(run: Path, cluster: str | None) -> tuple[str, ClusterProfile, Launch | None]:
    """(profile name, profile for one process on one node, launch of the training) for jobs beside a run.

    Raises:
        StamoError: The profile is unknown.
    """
    try:
        training = read(run)
    except RunError:
        training = None
    if cluster is not None:
        name, profile = load_profile(cluster)
    elif training is not None and training.cluster != LOCAL and training.profile:
        name, profile = training.cluster, ClusterProfile.model_validate(training.profile)
    else:
        raise RunError("evaluate.rollout.cluster: is missing, and the training was not submitted to Slurm; name one")
    if profile.backend != "slurm":
        raise RunError(f"evaluate.rollout.cluster: {name} is no Slurm cluster; set evaluate.rollout.where: process")
    one: Mapping[str, Any] = {
        "nodes": 1, "min_nodes": None, "max_nodes": None, "segment": None, "exclusive": False,
        "processes_per_node": None,
    }  # fmt: skip
    more = {"gpus_per_node": min(1, profile.gpus_per_node), "notify": None}
    given = {**profile.model_dump(mode="json"), **one, **more}
    return name, ClusterProfile.model_validate(given), training


def launch_of(run: Path, cluster: str | None, folder: Path, arguments: Sequence[str]) -> tuple[Launch, ClusterProfile]:
    """The launch record and profile; the code is that of the training's snapshot, if it has one."""
    name, profile, training = profile_of(run, cluster)
    recipe, snapshot = (training.recipe, training.snapshot) if training else ("", None)
    whose, where = f"{run.name} {folder.name}", str(folder.absolute())
    launch = Launch(whose, where, recipe, kind="beside", command=list(arguments), snapshot=snapshot)
    given = profile.model_dump(mode="json")
    launch = replace(launch, cluster=name, profile=given, node_counts=[1], max_restarts=profile.max_restarts)
    return launch, profile


def main(run: str, cluster: str, folder: str, *arguments: str) -> None:
    from stamo_dist.launch.sbatch import JobOrder
    from stamo_dist.launch.submit import active, submit

    job = active(folder)
    if job is None:
        launch, profile = launch_of(Path(run), cluster or None, Path(folder), arguments)
        job = submit(JobOrder(launch, profile)).job
    print(json.dumps({"job": job, "folder": folder, "log": str(main_log(folder))}))


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except StamoError as e:
        sys.exit(str(e))
