"""The status of runs: reading their folders, and one scheduler query for all."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar

from stamo_dist.errors import RunError
from stamo_dist.launch import record, slurm, supervisor
from stamo_dist.launch.again import again
from stamo_dist.launch.ends import avoided
from stamo_dist.launch.logs import first_error, follows
from stamo_dist.launch.record import Event, Launch, below, is_run, recipe_file, registered
from stamo_dist.launch.run_progress import Progress, age, read_progress
from stamo_dist.launch.slurm import SlurmJob
from stamo_dist.launch.state import State, judge_state
from stamo_dist.run.history import last_objects
from stamo_dist.run.lease import last_start

_FIRST = 16  # runs by which it is judged how long files take
_ORDER = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "PENDING")  # the state shown for an array, by its tasks


T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Run:
    """One run or pipeline stage, with its status."""

    path: Path
    launch: Launch | None  # None if it was started by hand
    progress: Progress
    history: list[Event]  # events since the last submission
    job: SlurmJob | None
    state: State

    @property
    def name(self) -> str:
        return self.launch.name if self.launch else self.progress.name

    @property
    def nodes(self) -> str:
        """Its nodes, or the number of nodes it waits for."""
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
        """Timestamp of the last activity."""
        last = datetime.fromisoformat(self.history[-1].time).timestamp() if self.history else 0.0
        return max(last, self.progress.written or 0.0, self.progress.saved or 0.0)

    def facts(self) -> dict[str, Any]:
        """Plain values for programs; durations in seconds, None if unknown."""
        p = self.progress
        return {
            "name": self.name, "run_dir": str(self.path), "state": self.state.word, "detail": self.state.detail,
            "restarts": self.state.restarts, "step": p.step, "steps": p.steps, "samples_per_second": p.rate,
            "eta": p.eta, "loss": p.loss, "checkpoint": p.checkpoint, "checkpoint_age": age(p.saved),
            "nodes": self.nodes, "job": self.launch.job if self.launch else None,
            "cluster": self.launch.cluster if self.launch else None, "stays_off": avoided(self.history),
            **asdict(p.successes),
        }  # fmt: skip


class UnknownRunError(RunError):
    """Neither a folder nor the name of a run."""


def find(names: Sequence[str]) -> list[Path]:
    """The run folders named by the user: paths of runs, folders of runs, or names of registered runs.

    Raises:
        RunError: One is none of these, or an ambiguous name.
    """
    found: list[Path] = []
    for name in names:
        if Path(name).is_dir() and (here := below([Path(name)])):
            found += here
            continue
        named = [path for path in registered() if path.name == name or _named(path) == name]
        if len(named) > 1:
            paths = "\n  ".join(map(str, named))
            raise RunError(f"{name}: several runs are called so; give the folder of one:\n  {paths}")
        if not named and (end := last_start(Path(name)).end):
            raise RunError(f"{name}: no run yet, its start {end.word}: {end.reason}")
        if not named:
            raise UnknownRunError(f"{name}: no run folder and no name of a run; `stamo runs` lists those there are")
        found += named
    return list(dict.fromkeys(found))


def one(name: str) -> Path:
    """The run folder named by the user.

    Raises:
        RunError: There is none, or more than one.
    """
    found = find([name])
    if len(found) > 1:
        raise RunError(f"{name}: holds {len(found)} runs; give the folder of one, e.g. {found[0]}")
    return found[0]


def folder_of(given: Path) -> Path:
    """`given`, with the folder of a run in place of its name.

    Raises:
        UnknownRunError: It is neither a path nor the name of a run.
        RunError: Several runs have that name.
    """
    return given if len(given.parts) > 1 or given.exists() else one(str(given))


def everything() -> list[Run]:
    """The registered runs and those in the default folder, most recent activity first."""
    here = below([Path("runs")]) if Path("runs").is_dir() else []
    return sorted(collect(dict.fromkeys([*registered(), *here])), key=lambda run: -run.touched)


def recent(runs: Iterable[Run], hours: float = 24.0) -> list[Run]:
    """Active runs and those with recent activity."""
    return [run for run in runs if run.state.live or time.time() - run.touched < hours * 3600]


def collect(paths: Iterable[Path]) -> list[Run]:
    """The status of these runs, most recent activity first, but a pipeline's stages in their order."""
    folders = [path for path in paths if is_run(path)]
    read = _each(_read, folders)
    jobs, asked = _jobs_of(launch for launch, _, _ in read)
    runs = _each(lambda one: _run(one[0], *one[1], jobs=jobs, asked=asked), list(zip(folders, read, strict=True)))
    pipelines = {run.launch.pipeline if run.launch else None for run in runs}
    return runs if len(pipelines) == 1 and None not in pipelines else sorted(runs, key=lambda run: -run.touched)


def _each(function: Callable[[T], R], items: Sequence[T]) -> list[R]:
    """Call it for each item: in threads if the first ones waited for their files more than they computed.

    A shared file system serves several requests at once; where files are cached, threads only wait for each other.
    """
    wall, cpu = time.perf_counter(), time.thread_time()
    done = [function(item) for item in items[:_FIRST]]
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    if wall < 2 * cpu:
        return [*done, *map(function, items[_FIRST:])]
    with ThreadPoolExecutor(16) as pool:
        return [*done, *pool.map(function, items[_FIRST:])]


def _jobs_of(launches: Iterable[Launch | None]) -> tuple[dict[str, list[SlurmJob]], bool]:
    """(the jobs of all of them by the id or that of their array, from one call of squeue; whether Slurm answered)."""
    wanted = [launch.job for launch in launches if launch and launch.job and not _is_local(launch)]
    found: dict[str, list[SlurmJob]] = {}
    try:
        for job in slurm.jobs(wanted) if wanted else ():
            for id in dict.fromkeys((job.id, job.id.partition("_")[0])):
                found.setdefault(id, []).append(job)
    except slurm.SlurmError:
        return {}, False
    return found, True


def _read(path: Path) -> tuple[Launch | None, Progress, list[Event]]:
    try:
        launch = record.read(path)
    except RunError:
        launch = None
    recipe = recipe_file(launch.snapshot) if launch and launch.snapshot else None
    return launch, read_progress(path, recipe), record.since_submitted(path)


def _run(
    path: Path,
    launch: Launch | None,
    progress: Progress,
    history: list[Event],
    *,
    jobs: Mapping[str, list[SlurmJob]],
    asked: bool,
) -> Run:
    job, note, watched = None, "", None
    if launch and launch.job and _is_local(launch):
        watched = supervisor.supervised(path)
    elif launch and launch.job:
        job, note = _of(jobs.get(launch.job, []))
    mine = [e for e in history if e.job in (None, job.id)] if job and launch and launch.tasks > 1 else history
    trains = launch is not None and launch.command[:1] == ["train"]
    way = again(path, launch)
    state = judge_state(progress, mine, job, asked=asked, watched=watched, trains=trains, again=way)
    if state.word == "starting" and launch and launch.command[:1] != ["train"] and mine[-1].event == "started":
        state = replace(state, word="running")  # it writes no metrics
    if launch and launch.after and not state.live and not any(e.event in ("started", "cancelled") for e in history):
        state = State("stopped", record.hindrance(launch) or state.detail)
    if state.word == "finished" and mine and mine[-1].event == "failed":
        why = first_error(path) or mine[-1].reason
        state = replace(state, detail=f"before; its last start failed: {why}")
    if error := _error(path, launch, progress, state):
        state = replace(state, word="failed", detail=f"{error} ({state.detail})" if state.detail else error)
    if state.word in ("failed", "stopped", "lost") and (full := _full(path, way)):
        state = replace(state, detail=f"{full} ({state.detail})" if state.detail else full)
    if state.live and (off := avoided(mine)):
        state = replace(state, detail=", ".join(filter(None, (state.detail, f"stays off {','.join(off)}"))))
    if note:
        state = replace(state, detail=", ".join(part for part in (note, state.detail) if part))
    return Run(path, launch, progress, history, job, state)


def _error(path: Path, launch: Launch | None, progress: Progress, state: State) -> str:
    """The error with which the run failed, if its logs have it and the state does not."""
    if launch is not None:
        return first_error(path) if state.word == "failed" else ""
    known = progress.end is not None and not follows(progress.end.reason)
    if known or state.word not in ("failed", "lost"):
        return ""
    began = next(last_objects(path / "starts.jsonl"), {}).get("time", "")
    return first_error(path, since=str(began))


def _full(path: Path, again: str) -> str:
    """That the disk of the run folder is full, as its logs cannot say then."""
    try:
        free = os.statvfs(path).f_bavail
    except OSError:
        return ""
    return "" if free else f"the disk of {path} is full: make room, then {again}"


def _of(mine: Sequence[SlurmJob]) -> tuple[SlurmJob | None, str]:
    """The job of a launch; for an array the most significant task, and the number of ended ones."""
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
