"""Runs and how they do, in one look: their folders, and one question to the scheduler for all of them."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from stamo_dist.errors import RunError
from stamo_dist.launch import record, slurm, supervise
from stamo_dist.launch.failure import first_error
from stamo_dist.launch.known import below, is_run, known
from stamo_dist.launch.look import Progress, age, look
from stamo_dist.launch.record import Event, Launch
from stamo_dist.launch.slurm import Job
from stamo_dist.launch.snapshot import recipe_file
from stamo_dist.launch.state import State, judge

_ORDER = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "PENDING")  # of an array's tasks: what it is said to do


@dataclass(frozen=True)
class Run:
    """One run, or one stage of a pipeline, and how it does."""

    path: Path
    launch: Launch | None  # None where it was started by hand
    progress: Progress
    history: list[Event]  # since it was submitted last
    job: Job | None
    state: State

    @property
    def name(self) -> str:
        return self.launch.name if self.launch else self.progress.name

    @property
    def nodes(self) -> str:
        """Where it runs, or how much it waits for."""
        if not self.state.live:
            return ""
        if self.job is not None and self.job.nodes:
            return self.job.nodes
        if self.state.word in ("queued", "requeued") and self.launch:
            return f"{self.launch.nodes} × {self.launch.processes_per_node}"
        started = next((e for e in reversed(self.history) if e.event == "started"), None)
        if started is not None and started.nodes:
            return ",".join(started.nodes)
        return self.progress.owner.node if self.progress.owner else ""

    @property
    def touched(self) -> float:
        """When something last happened (time stamp)."""
        last = datetime.fromisoformat(self.history[-1].time).timestamp() if self.history else 0.0
        return max(last, self.progress.written or 0.0, self.progress.saved or 0.0)

    def facts(self) -> dict[str, Any]:
        """For programs: plain values; seconds, and None for what is not known."""
        p = self.progress
        return {
            "name": self.name, "run_dir": str(self.path), "state": self.state.word, "detail": self.state.detail,
            "restarts": self.state.restarts, "step": p.step, "steps": p.steps, "samples_per_second": p.rate,
            "eta": p.eta, "loss": p.loss, "checkpoint": p.checkpoint, "checkpoint_age": age(p.saved),
            "nodes": self.nodes, "job": self.launch.job if self.launch else None,
            "cluster": self.launch.cluster if self.launch else None, **asdict(p.successes),
        }  # fmt: skip


def find(names: Sequence[str]) -> list[Path]:
    """The run folders that a person means: paths of runs, folders of runs, or names of remembered runs.

    Raises:
        RunError: One is none of these, or a name that several runs have.
    """
    found: list[Path] = []
    for name in names:
        if Path(name).is_dir() and (here := below([Path(name)])):
            found += here
            continue
        named = [path for path in known() if path.name == name or _named(path) == name]
        if len(named) > 1:
            paths = "\n  ".join(map(str, named))
            raise RunError(f"{name}: several runs are called so; give the folder of one:\n  {paths}")
        if not named:
            raise RunError(f"{name}: no run folder and no name of a run; `stamo runs` lists those there are")
        found += named
    return list(dict.fromkeys(found))


def one(name: str) -> Path:
    """The run folder that a person means.

    Raises:
        RunError: It is none, or not one alone.
    """
    found = find([name])
    if len(found) > 1:
        raise RunError(f"{name}: holds {len(found)} runs; give the folder of one, e.g. {found[0]}")
    return found[0]


def everything() -> list[Run]:
    """The remembered runs, and those in the folder where recipes put them; what happened last comes first."""
    here = below([Path("runs")]) if Path("runs").is_dir() else []
    return sorted(collect(dict.fromkeys([*known(), *here])), key=lambda run: -run.touched)


def collect(paths: Iterable[Path]) -> list[Run]:
    """How these runs do; what happened last comes first, but a pipeline's stages come in their order."""
    folders = [path for path in paths if is_run(path)]
    with ThreadPoolExecutor(8) as pool:  # a shared file system answers several questions at once
        read = list(pool.map(_read, folders))
    wanted = [launch.job for launch, _, _ in read if launch and launch.job and not _is_local(launch)]
    jobs: list[Job] = []
    asked = True
    if wanted:
        try:
            jobs = slurm.jobs(wanted)
        except slurm.SlurmError:
            asked = False
    runs = [_run(path, *found, jobs, asked) for path, found in zip(folders, read, strict=True)]
    pipelines = {run.launch.pipeline if run.launch else None for run in runs}
    return runs if len(pipelines) == 1 and None not in pipelines else sorted(runs, key=lambda run: -run.touched)


def _read(path: Path) -> tuple[Launch | None, Progress, list[Event]]:
    try:
        launch = record.read(path)
    except RunError:
        launch = None
    recipe = recipe_file(launch.snapshot) if launch and launch.snapshot else None
    return launch, look(path, recipe), record.since_submitted(record.events(path))


def _run(
    path: Path, launch: Launch | None, progress: Progress, history: list[Event], jobs: list[Job], asked: bool
) -> Run:
    job, note, watched = None, "", None
    if launch and launch.job and _is_local(launch):
        watched = supervise.supervised(path)
    elif launch and launch.job:
        job, note = _of(launch.job, jobs)
    mine = [e for e in history if e.job in (None, job.id)] if job and launch and launch.tasks > 1 else history
    state = judge(progress, mine, job, asked=asked, watched=watched)
    if state.word == "starting" and launch and launch.command[:1] != ["train"] and mine[-1].event == "started":
        state = replace(state, word="running")  # it writes no metrics
    if launch and launch.after and not state.live and not any(e.event in ("started", "cancelled") for e in history):
        state = State("stopped", record.hindrance(launch) or state.detail)
    if state.word == "failed" and (error := first_error(path)):
        state = replace(state, detail=f"{error} ({state.detail})" if state.detail else error)
    if note:
        state = replace(state, detail=", ".join(part for part in (note, state.detail) if part))
    return Run(path, launch, progress, history, job, state)


def _of(job: str, jobs: Sequence[Job]) -> tuple[Job | None, str]:
    """The job with this id; of an array the task that says most, and how many have ended."""
    mine = [j for j in jobs if j.id == job or j.id.partition("_")[0] == job]
    if len(mine) < 2:
        return (mine[0] if mine else None), ""
    failed = [j for j in mine if not j.active and j.state != "COMPLETED"]
    live = sorted((j for j in mine if j.state in _ORDER), key=lambda j: _ORDER.index(j.state))
    done = sum(j.state == "COMPLETED" for j in mine)
    note = f"{done} of {len(mine)} tasks done" + (f", {len(failed)} failed" if failed else "")
    return (live or failed or mine)[0], note


def _is_local(launch: Launch) -> bool:
    return bool(launch.job and launch.job.startswith("local-"))


def _named(path: Path) -> str:
    try:
        return record.read(path).name
    except RunError:
        return ""


def recent(runs: Iterable[Run], hours: float = 24.0) -> list[Run]:
    """Those that are to go on, and those to which something happened lately."""
    return [run for run in runs if run.state.live or time.time() - run.touched < hours * 3600]
