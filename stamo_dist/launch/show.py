"""Tables of runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from stamo_dist.launch.look import age
from stamo_dist.launch.state import Word
from stamo_dist.launch.status import Run
from stamo_dist.tracking.progress import duration

_STYLE: dict[Word, str] = {
    "queued": "cyan", "starting": "cyan", "running": "green", "preempted": "yellow", "requeued": "yellow",
    "suspended": "yellow", "finished": "bold green", "failed": "bold red", "stopped": "yellow", "cancelled": "dim",
    "lost": "bold red", "unknown": "magenta",
}  # fmt: skip


def status_table(runs: Sequence[Run]) -> RenderableType:
    """One line a run; what there is to say about its state stands below the table."""
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
    """One line a run: what became of it, and where it lies."""
    if not runs:
        return Text("no runs; `stamo submit RECIPE` or `stamo train RECIPE` starts one")
    columns: list[tuple[str, Callable[[Run], str | Text]]] = [
        ("run", lambda r: r.name),
        ("state", _state),
        ("step", _step),
        ("loss", lambda r: f"{r.progress.loss:.4f}" if r.progress.loss is not None else ""),
        ("on", lambda r: r.launch.cluster if r.launch else "by hand"),
        ("last change", lambda r: f"{datetime.fromtimestamp(r.touched):%Y-%m-%d %H:%M}" if r.touched else ""),
        ("folder", lambda r: str(r.path)),
    ]
    return _table(runs, columns, wide="folder")


def sweep_table(runs: Sequence[Run]) -> RenderableType:
    """One line a run of a sweep, the lowest loss first, with the values in which the runs differ."""
    values = {run.path: dict(o.split("=", 1) for o in run.launch.overrides) if run.launch else {} for run in runs}
    fields = dict.fromkeys(field for own in values.values() for field in own if field not in ("run_dir", "name"))
    differ = [f for f in fields if len({own.get(f) for own in values.values()}) > 1]

    def swept(field: str) -> Callable[[Run], str | Text]:
        return lambda run: values[run.path].get(field, "")

    chosen: list[tuple[str, Callable[[Run], str | Text]]] = [(field, swept(field)) for field in differ]
    columns: list[tuple[str, Callable[[Run], str | Text]]] = [
        *chosen,
        ("state", _state),
        ("step", _step),
        ("loss", lambda r: f"{r.progress.loss:.4f}" if r.progress.loss is not None else ""),
        ("mean of the last 50", lambda r: f"{r.progress.mean_loss:.4f}" if r.progress.mean_loss is not None else ""),
        ("folder", lambda r: r.path.name),
    ]
    best = sorted(runs, key=lambda r: float("inf") if r.progress.mean_loss is None else r.progress.mean_loss)
    return Group(_table(best, columns, wide="folder"), _details(best))


def one_run(run: Run) -> RenderableType:
    """All that is known about one run."""
    p = run.progress
    rows: list[tuple[str, str | Text]] = [("state", _state(run) + Text(f"  {run.state.detail}"))]
    rows.append(("step", _step(run)))
    if p.loss is not None:
        others = {k: v for k, v in p.terms.items() if k in ("grad_norm", "lr", "data_wait", "mfu")}
        rows.append(("last loss", f"{p.loss:.4f}" + "".join(f"  {k} {v:.4g}" for k, v in others.items())))
    if p.rate is not None:
        rows.append(("speed", f"{p.rate:.4g} samples/s" + (f", {p.step_seconds:.3g} s a step" * bool(p.step_seconds))))
    if p.eta is not None and run.state.training and p.step < (p.steps or 0):
        rows.append(("ETA", duration(p.eta)))
    if p.checkpoint is not None:
        rows.append(("checkpoint", f"step {p.checkpoint}, {duration(age(p.saved) or 0)} ago"))
    if p.successes.last is not None:
        rows.append(("success", f"{p.successes.last}, of {p.successes.last.trials} trials"))
    if p.successes.best is not None:
        rows.append(("best", f"{p.successes.best}; its checkpoint is kept"))
    if run.nodes:
        rows.append(("nodes", run.nodes))
    if run.launch:
        again = f", {run.state.restarts} restarts" if run.state.restarts else ""
        rows.append(("job", f"{run.launch.job or 'none'} on {run.launch.cluster}{again}"))
    rows.append(("folder", str(run.path)))
    grid = Table.grid(padding=(0, 2))
    for name, value in rows:
        grid.add_row(Text(name, style="bold"), value)
    events = Table(title="since it was submitted", title_justify="left", title_style="bold", box=None, padding=(0, 2))
    for column in ("when", "what", "step", "on", ""):
        events.add_column(column)
    for e in run.history:
        when = f"{datetime.fromisoformat(e.time).astimezone():%m-%d %H:%M:%S}"
        where = f"{','.join(e.nodes)} × {e.world_size} ranks" if e.nodes and e.world_size else ",".join(e.nodes)
        events.add_row(when, e.event, "" if e.step is None else str(e.step), where, e.reason)
    since: list[RenderableType] = [Text(), events] if run.history else []
    return Group(Text(run.name, style="bold"), grid, *since)


def _state(run: Run) -> Text:
    return Text(run.state.title, style=_STYLE[run.state.word])


def _step(run: Run) -> str:
    p = run.progress
    return f"{p.step}/{p.steps}" if p.steps else ""


def _saved(run: Run) -> str:
    seconds = age(run.progress.saved)
    return "" if seconds is None else f"{duration(seconds)} ago"


def _success(run: Run) -> str:
    """The newest, and the best where that is another."""
    last, best = run.progress.successes.last, run.progress.successes.best
    if last is None:
        return ""
    return f"{last.success:.0f} %" + (f", best {best.success:.0f} % @{best.step}" if best and best != last else "")


def _details(runs: Sequence[Run]) -> Text:
    said = [run for run in runs if run.state.detail]
    lines = [Text.assemble((run.name, "bold"), f": {run.state.word}: {run.state.detail}") for run in said]
    return Text("\n").join(lines)


def _table(runs: Sequence[Run], columns: Sequence[tuple[str, Callable[[Run], str | Text]]], wide: str = "run") -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name, _ in columns:
        table.add_column(name, overflow="fold" if name == wide else "ellipsis", no_wrap=name != wide)
    for run in runs:
        table.add_row(*(value(run) for _, value in columns))
    return table
