"""What is shown of the status of runs: tables of many, and all of one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import MappingProxyType

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stamo_dist.launch.ends import avoided
from stamo_dist.launch.run_progress import age
from stamo_dist.launch.state import Word
from stamo_dist.launch.status import Run
from stamo_dist.run.folder import RunFolder
from stamo_dist.run.recipe_history import changes_of
from stamo_dist.tables import Columns, Whole
from stamo_dist.words import counted, duration

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


def status_table(runs: Sequence[Run]) -> RenderableType:
    """One line per run; details on the states below the table."""
    if not runs:
        return Text("no runs; `stamo submit RECIPE` starts one, and `stamo runs` lists those that ended")
    tails = _tails(runs)
    columns: list[tuple[str, Callable[[Run], str | Text]]] = [
        ("run", lambda r: r.name),
        ("folder", lambda r: tails.get(r.path, "")),
        ("state", _state),
        ("step", _step),
        ("samples/s now", lambda r: f"{r.progress.rate:.4g}" if r.progress.rate and r.state.training else ""),
        ("ETA", lambda r: duration(r.progress.eta) if r.progress.eta is not None and r.state.training else ""),
        ("loss", lambda r: f"{r.progress.loss:.4f}" if r.progress.loss is not None else ""),
        ("saved", _saved),
        *([("success", _success)] if any(r.progress.successes.last for r in runs) else []),
        ("nodes", lambda r: r.nodes),
        ("job", lambda r: (r.launch.job or "") if r.launch else ""),
    ]
    return Group(_table(runs, columns), _details(runs, tails))


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
        when = "now" if run.state.training else "at the end"  # the report's is of the whole run
        step = f", {p.step_seconds:.3g} s a step" * bool(p.step_seconds)
        rows.append(("speed", f"{p.rate:.4g} samples/s {when}{step}"))
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


def _details(runs: Sequence[Run], tails: Mapping[Path, str] = MappingProxyType({})) -> Text:
    said = [(run, f" ({tails[run.path]})" if run.path in tails else "") for run in runs if run.state.detail]
    lines = [Text.assemble((run.name, "bold"), f"{where}: {run.state.word}: {run.state.detail}") for run, where in said]
    return Text("\n").join(lines)


def _tails(runs: Sequence[Run]) -> dict[Path, str]:
    """Of runs that share their name: as much of the end of each one's folder as tells them apart."""
    by_name: dict[str, list[Path]] = {}
    for run in runs:
        by_name.setdefault(run.name, []).append(run.path)
    tails: dict[Path, str] = {}
    for paths in by_name.values():
        count = 1
        while len({path.parts[-count:] for path in paths}) < len(set(paths)):
            count += 1
        if len(paths) > 1:
            tails |= {path: str(Path(*path.parts[-count:])) for path in paths}
    return tails


def _table(runs: Sequence[Run], columns: Sequence[tuple[str, Callable[[Run], str | Text]]]) -> Columns:
    """Columns in which no run has anything are left out."""
    cells = {name: [_text(value(run)) for run in runs] for name, value in columns}
    return Columns({name: of_runs for name, of_runs in cells.items() if any(of_runs)})


def _text(cell: str | Text) -> Text:
    return cell if isinstance(cell, Text) else Text(cell.replace("\n", " "))


def _from_here(path: Path) -> str:
    """A folder as a person in this one would type it."""
    here = Path.cwd()
    return str(path.relative_to(here)) if path.is_relative_to(here) else str(path)
