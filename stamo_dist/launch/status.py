"""The status of runs: reading their folders, one scheduler query for all, and tables."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stamo_dist.errors import RunError
from stamo_dist.launch import record, slurm, supervise
from stamo_dist.launch.ends import avoided
from stamo_dist.launch.logs import first_error
from stamo_dist.launch.record import Event, Launch, below, is_run, recipe_file, registered
from stamo_dist.launch.run_progress import Progress, age, read_progress
from stamo_dist.launch.slurm import SlurmJob
from stamo_dist.launch.state import State, Word, judge_state
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.recipe_history import changes_of
from stamo_dist.tables import Whole
from stamo_dist.tracking.progress import duration
from stamo_dist.words import counted

_ORDER = ("RUNNING", "COMPLETING", "CONFIGURING", "SUSPENDED", "PENDING")  # the state shown for an array, by its tasks
_STYLE: dict[Word, str] = {
    "queued": "cyan", "starting": "cyan", "running": "green", "preempted": "yellow", "requeued": "yellow",
    "suspended": "yellow", "finished": "bold green", "failed": "bold red", "stopped": "yellow", "cancelled": "dim",
    "lost": "bold red", "unknown": "magenta",
}  # fmt: skip
#: Of the last line of metrics: row → key → how it is said.
_LAST = {
    "waiting": {"data_wait": "{:.1%} for data", "comm_wait": "{:.1%} for other ranks' gradients"},
    "GPU": {"mfu": "MFU {:.1%}", "peak_gb": "{:.4g} GB in use at most", "reserved_gb": "{:.4g} GB reserved"},
}


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
        if not named:
            raise RunError(f"{name}: no run folder and no name of a run; `stamo runs` lists those there are")
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
    with ThreadPoolExecutor(16) as pool:  # a shared file system serves several requests at once
        read = list(pool.map(_read, folders))
        jobs, asked = _jobs_of(launch for launch, _, _ in read)
        runs = list(pool.map(lambda path, found: _run(path, *found, jobs=jobs, asked=asked), folders, read))
    pipelines = {run.launch.pipeline if run.launch else None for run in runs}
    return runs if len(pipelines) == 1 and None not in pipelines else sorted(runs, key=lambda run: -run.touched)


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
        watched = supervise.supervised(path)
    elif launch and launch.job:
        job, note = _of(jobs.get(launch.job, []))
    mine = [e for e in history if e.job in (None, job.id)] if job and launch and launch.tasks > 1 else history
    trains = launch is not None and launch.command[:1] == ["train"]
    state = judge_state(progress, mine, job, asked=asked, watched=watched, trains=trains)
    if state.word == "starting" and launch and launch.command[:1] != ["train"] and mine[-1].event == "started":
        state = replace(state, word="running")  # it writes no metrics
    if launch and launch.after and not state.live and not any(e.event in ("started", "cancelled") for e in history):
        state = State("stopped", record.hindrance(launch) or state.detail)
    if state.word == "failed" and (error := first_error(path)):
        state = replace(state, detail=f"{error} ({state.detail})" if state.detail else error)
    if state.word in ("failed", "stopped", "lost") and (full := _full(path)):
        state = replace(state, detail=f"{full} ({state.detail})" if state.detail else full)
    if state.live and (off := avoided(mine)):
        state = replace(state, detail=", ".join(filter(None, (state.detail, f"stays off {','.join(off)}"))))
    if note:
        state = replace(state, detail=", ".join(part for part in (note, state.detail) if part))
    return Run(path, launch, progress, history, job, state)


def _full(path: Path) -> str:
    """That the disk of the run folder is full, as its logs cannot say then."""
    try:
        free = os.statvfs(path).f_bavail
    except OSError:
        return ""
    return "" if free else f"the disk of {path} is full: make room, then `stamo resume {path}`"


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


def status_table(runs: Sequence[Run]) -> RenderableType:
    """One line per run; details on the states below the table."""
    if not runs:
        return Text("no runs; `stamo submit RECIPE` starts one, and `stamo runs` lists those that ended")
    columns: list[tuple[str, Callable[[Run], str | Text]]] = [
        ("run", lambda r: r.name),
        ("state", _state),
        ("step", _step),
        ("samples/s", lambda r: f"{r.progress.rate:.4g}" if r.progress.rate and r.state.training else ""),
        ("ETA", lambda r: duration(r.progress.eta) if r.progress.eta is not None and r.state.training else ""),
        ("loss", lambda r: f"{r.progress.loss:.4f}" if r.progress.loss is not None else ""),
        ("saved", _saved),
        *([("success", _success)] if any(r.progress.successes.last for r in runs) else []),
        ("nodes", lambda r: r.nodes),
        ("job", lambda r: (r.launch.job or "") if r.launch else ""),
    ]
    return Group(_table(runs, columns), _details(runs))


def runs_table(runs: Sequence[Run]) -> RenderableType:
    """One line per run: its state and folder."""
    if not runs:
        return Text("no runs; `stamo submit RECIPE` or `stamo train RECIPE` starts one")
    columns: list[tuple[str, Callable[[Run], str | Text]]] = [
        ("run", lambda r: r.name),
        ("state", _state),
        ("step", _step),
        ("loss", lambda r: f"{r.progress.loss:.4f}" if r.progress.loss is not None else ""),
        ("on", lambda r: r.launch.cluster if r.launch else "by hand"),
        ("last change", lambda r: f"{datetime.fromtimestamp(r.touched):%Y-%m-%d %H:%M}" if r.touched else ""),
        ("folder", lambda r: _from_here(r.path)),
    ]
    return _table(runs, columns)


def sweep_table(runs: Sequence[Run]) -> RenderableType:
    """One line per run of a sweep, lowest loss first, with the values in which they differ."""
    values = {run.path: dict(o.split("=", 1) for o in run.launch.overrides) if run.launch else {} for run in runs}
    fields = dict.fromkeys(field for own in values.values() for field in own if field not in ("run_dir", "name"))
    differ = [f for f in fields if len({own.get(f) for own in values.values()}) > 1]

    def swept(field: str) -> Callable[[Run], str | Text]:
        return lambda run: values[run.path].get(field, "")

    means = {run.path: mean for run in runs if (mean := run.progress.window.mean_loss) is not None}
    chosen: list[tuple[str, Callable[[Run], str | Text]]] = [(field, swept(field)) for field in differ]
    columns: list[tuple[str, Callable[[Run], str | Text]]] = [
        *chosen,
        ("state", _state),
        ("step", _step),
        ("loss", lambda r: f"{r.progress.loss:.4f}" if r.progress.loss is not None else ""),
        ("mean of the last 50", lambda r: f"{means[r.path]:.4f}" if r.path in means else ""),
        ("folder", lambda r: r.path.name),
    ]
    best = sorted(runs, key=lambda r: means.get(r.path, float("inf")))
    return Group(_table(best, columns), _details(best))


def one_run(run: Run) -> RenderableType:
    """All details of one run."""
    p = run.progress
    rows: list[tuple[str, str | Text]] = [("state", _state(run) + Text(f"  {run.state.detail}"))]
    rows.append(("step", _step(run)))
    if p.loss is not None:
        others = {k: v for k, v in p.terms.items() if k in ("grad_norm", "lr")}
        rows.append(("last loss", f"{p.loss:.4f}" + "".join(f"  {k} {v:.4g}" for k, v in others.items())))
    rows += [(name, said) for name, keys in _LAST.items() if (said := _values(p.terms, keys))]
    if alarm := p.window.alarm:
        rows.append(("ALARM", alarm))
    if p.rate is not None:
        rows.append(("speed", f"{p.rate:.4g} samples/s" + (f", {p.step_seconds:.3g} s a step" * bool(p.step_seconds))))
    if p.eta is not None and run.state.training and p.step < (p.steps or 0):
        rows.append(("ETA", duration(p.eta)))
    if p.checkpoint is not None:
        rows.append(("checkpoint", f"step {p.checkpoint}, {duration(age(p.saved) or 0)} ago"))
    if p.successes.last is not None:
        rows.append(("success", f"{p.successes.last}, of {counted(p.successes.last.trials, 'trial')}"))
    if p.successes.best is not None:
        rows.append(("best", f"{p.successes.best}; its checkpoint is kept"))
    if run.nodes:
        rows.append(("nodes", run.nodes))
    if run.launch:
        again = f", {run.state.restarts} restarts" if run.state.restarts else ""
        rows.append(("job", f"{run.launch.job or 'none'} on {run.launch.cluster}{again}"))
    if off := avoided(run.history):
        causes = {node: e.cause for e in run.history for node in e.blamed}
        rows.append(("stays off", "; ".join(f"{node}: {causes[node]}" if causes.get(node) else node for node in off)))
    for after, changed in changes_of(RunFolder(run.path)):
        said = "; ".join(f"{field}: {old} → {new}" for field, (old, new) in changed.items())
        rows.append((f"changed @ {after:,}", said))
    rows.append(("folder", str(run.path)))
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), value)
    events = Table(title="since it was submitted", title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for column in ("when", "what", "step", "on", ""):
        events.add_column(column)
    for e in run.history:
        when = f"{datetime.fromisoformat(e.time).astimezone():%m-%d %H:%M:%S}"
        where = ",".join(e.nodes or e.blamed) + (f" × {counted(e.world_size, 'rank')}" if e.world_size else "")
        events.add_row(when, e.event, "" if e.step is None else str(e.step), where, e.reason)
    since: list[RenderableType] = [Text(), Whole(events)] if run.history else []
    return Group(Text(run.name, style="bold"), grid, *since)


def _values(terms: Mapping[str, float], keys: Mapping[str, str]) -> str:
    return ", ".join(form.format(terms[key]) for key, form in keys.items() if key in terms)


def _state(run: Run) -> Text:
    return Text(run.state.title, style=_STYLE[run.state.word])


def _step(run: Run) -> str:
    p = run.progress
    return f"{p.step}/{p.steps}" if p.steps else ""


def _saved(run: Run) -> str:
    seconds = age(run.progress.saved)
    return "" if seconds is None else f"{duration(seconds)} ago"


def _success(run: Run) -> str:
    """The newest success rate, and the best if different."""
    last, best = run.progress.successes.last, run.progress.successes.best
    if last is None:
        return ""
    return f"{last.success:.0f} %" + (f", best {best.success:.0f} % @{best.step}" if best and best != last else "")


def _details(runs: Sequence[Run]) -> Text:
    said = [run for run in runs if run.state.detail]
    lines = [Text.assemble((run.name, "bold"), f": {run.state.word}: {run.state.detail}") for run in said]
    return Text("\n").join(lines)


def _table(runs: Sequence[Run], columns: Sequence[tuple[str, Callable[[Run], str | Text]]]) -> Whole:
    """Columns in which no run has anything are left out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    cells = {name: [_text(value(run)) for run in runs] for name, value in columns}
    cells = {name: of_runs for name, of_runs in cells.items() if any(of_runs)}
    for name in cells:
        table.add_column(name)
    for row in zip(*cells.values(), strict=True):
        table.add_row(*row)
    return Whole(table)


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell)


def _from_here(path: Path) -> str:
    """A folder as a person in this one would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
