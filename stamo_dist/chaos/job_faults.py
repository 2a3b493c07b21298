"""The kinds of faults of a Slurm job: those that its user can do to it, and those that take the cluster's operator."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from stamo_dist.chaos.faults import LEAVING, PAUSE, QUEUED, RANK, RANKS, SAVING, STARTING, TRAINING, Fault, Kind
from stamo_dist.errors import RunError
from stamo_dist.launch import slurm

JOB, SCRIPT, NODE, CONTROLLER, LINK, DISK = (
    "the job",
    "the batch script",
    "a node",
    "the controller",
    "a node's network",
    "the disk",
)
#: What an operator may offer.
OFFERS = ("rank-kill", "node-off", "controller-off", "link-off", "disk-full", "preempt")
_MISSED = 3  # exit code of an operator's program: there was nothing to hit


@dataclass(frozen=True)
class Act:
    """How a fault is done.

    Attributes:
        ends: Whether the start surely ends by it; otherwise the run may go on.
        offer: The operator's name of it; None: the job's user can do it.
        seconds: How long the operator keeps it up.
        signal: What scancel sends, to `part` of the job; without one the job is queued again by scontrol.
    """

    ends: bool = True
    offer: str | None = None
    seconds: float = 0
    signal: str = ""
    part: str = "--signal"


_ALL = (STARTING, TRAINING, SAVING, LEAVING)
#: whom, what → how, and in which phases.
ACTS: dict[tuple[str, str], tuple[Act, tuple[str, ...]]] = {
    (JOB, "scontrol requeue"): (Act(), (TRAINING, *_ALL)),
    (JOB, "preempted"): (Act(offer="preempt"), (TRAINING, *_ALL)),
    (RANKS, "SIGUSR1"): (Act(signal="USR1"), (STARTING, TRAINING, SAVING)),
    (RANKS, "SIGUSR2"): (Act(signal="USR2"), (TRAINING,)),
    (RANKS, "SIGTERM"): (Act(signal="TERM"), (STARTING, TRAINING, SAVING)),
    (RANKS, "SIGINT"): (Act(signal="INT"), (TRAINING,)),
    (RANKS, "SIGSEGV"): (Act(signal="11"), (TRAINING,)),  # scancel knows no name of it
    (RANKS, "SIGKILL"): (Act(signal="KILL"), _ALL),
    (RANKS, PAUSE): (Act(ends=False, signal="STOP"), (TRAINING,)),
    (SCRIPT, "SIGUSR1"): (Act(signal="USR1", part="--batch"), (STARTING, TRAINING)),
    (SCRIPT, "SIGTERM"): (Act(ends=False, signal="TERM", part="--batch"), (TRAINING,)),
    (f"{SCRIPT} and ranks", "SIGUSR1"): (Act(signal="USR1", part="--full"), (TRAINING,)),
    (RANK, "SIGKILL"): (Act(offer="rank-kill"), (TRAINING, TRAINING, SAVING, STARTING)),
    (NODE, "off 2 s"): (Act(offer="node-off", seconds=2), (TRAINING, SAVING)),
    (NODE, "off 15 s"): (Act(offer="node-off", seconds=15), (STARTING, TRAINING)),
    (CONTROLLER, "restarted"): (Act(ends=False, offer="controller-off"), (QUEUED, *_ALL)),
    (CONTROLLER, "off 5 s"): (
        Act(ends=False, offer="controller-off", seconds=5),
        (QUEUED, STARTING, TRAINING, LEAVING),
    ),
    (LINK, "off 2 s"): (Act(ends=False, offer="link-off", seconds=2), (STARTING, TRAINING, SAVING)),
    (LINK, "off 20 s"): (Act(ends=False, offer="link-off", seconds=20), (TRAINING,)),
    (DISK, "full 3 s"): (Act(ends=False, offer="disk-full", seconds=3), (TRAINING, SAVING, LEAVING)),
}


class Operator(Protocol):
    """Who has the cluster in hand."""

    @property
    def offers(self) -> Collection[str]:
        """Which of `OFFERS` it can do."""

    def act(self, name: str, node: str, seconds: float, run: Path) -> bool:
        """Do one of them, and return once it is over; False if there was nothing to hit.

        Args:
            name: One of `offers`.
            node: The node of the job that is meant, of those that mean one.
            seconds: How long it is to last.
            run: The run folder of the job.
        """


class Nobody:
    """No operator: offers nothing."""

    offers: Collection[str] = ()

    def act(self, name: str, node: str, seconds: float, run: Path) -> bool:
        return False


class Program:
    """An operator's program: `PROGRAM offers` prints what it can do, `PROGRAM NAME NODE SECONDS RUN_DIR` does it.

    Raises:
        RunError: It is none, or offers what is unknown.
    """

    def __init__(self, path: str):
        found = shutil.which(path)
        if found is None:
            raise RunError(f"--operator {path}: no such program; give the path of one that may be executed")
        self._path = found
        self.offers: Collection[str] = self._run("offers").stdout.split()
        if unknown := sorted({*self.offers} - {*OFFERS}):
            raise RunError(f"--operator {path}: offers {', '.join(unknown)}; known are {', '.join(OFFERS)}")

    def act(self, name: str, node: str, seconds: float, run: Path) -> bool:
        """Raises: RunError: The program failed."""
        return self._run(name, node, f"{seconds:g}", str(run)).returncode == 0

    def _run(self, *words: str) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [self._path, *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
        if done.returncode not in (0, _MISSED):
            raise RunError(
                f"--operator {' '.join([self._path, *words])}: code {done.returncode}: {done.stderr.strip()}"
            )
        return done


def kinds(operator: Operator) -> list[Kind]:
    """All that can be done with this operator."""
    return [
        (whom, what, moment)
        for (whom, what), (act, moments) in ACTS.items()
        if act.offer is None or act.offer in operator.offers
        for moment in moments
    ]


def strike(fault: Fault, job: slurm.SlurmJob, run: Path, operator: Operator) -> bool:
    """Inject the fault; False if Slurm refused or there was nothing to hit."""
    act, _ = ACTS[fault.whom, fault.what]
    if act.offer is not None:
        nodes = slurm.expand(job.nodes) or [""]
        return operator.act(act.offer, nodes[int(fault.pick * len(nodes))], act.seconds, run)
    if job.state != "RUNNING":
        return False
    try:
        if not act.signal:
            slurm.requeue(job.id)
        elif act.signal == "KILL":  # of the whole job it would be a cancel
            slurm.run("scancel", "--signal=KILL", f"{job.id}.0")
        elif act.part == "--signal":
            slurm.cancel(job.id, signal=act.signal)
        else:
            slurm.run("scancel", act.part, f"--signal={act.signal}", job.id)
        if act.signal == "STOP":
            time.sleep(1)
            slurm.cancel(job.id, signal="CONT")
    except slurm.SlurmError:
        return False
    return True
