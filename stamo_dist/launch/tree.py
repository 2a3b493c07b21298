"""Runs as a tree: each below the one that it began from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from stamo_dist.launch.status import Run
from stamo_dist.run.lineage import Parent, read

_EDGE = {"init": "init_from", "branch": "branch", "resume": "resume"}


def parent_of(run: Run) -> Parent | None:
    return read(run.path)


def runs_tree(runs: Sequence[Run]) -> RenderableType:
    """A line a run; a parent that is not among them is named by its place."""
    if not runs:
        return Text("no runs; `stamo submit RECIPE` or `stamo train RECIPE` starts one")
    by_path = {str(run.path.resolve()): run for run in runs}
    parents = {path: parent for path, run in by_path.items() if (parent := parent_of(run)) is not None}
    below: dict[str, list[str]] = {}
    for path, parent in parents.items():
        below.setdefault(parent.run, []).append(path)
    shown, lines = set[str](), list[Text]()

    def draw(path: str, first: str = "", rest: str = "") -> None:
        shown.add(path)
        lines.append(Text(first, style="dim").append_text(_line(path, by_path.get(path), parents.get(path))))
        children = [child for child in below.get(path, []) if child not in shown]
        for i, child in enumerate(children):
            last = i == len(children) - 1
            draw(child, f"{rest}{'└─' if last else '├─'} ", f"{rest}{'  ' if last else '│ '} ")

    tops = dict.fromkeys(parents[path].run if path in parents else path for path in by_path)
    for path in [path for path in tops if path not in parents]:
        draw(path)
    for path in by_path:  # of a circle
        if path not in shown:
            draw(path)
    return Group(*lines)


def _line(path: str, run: Run | None, parent: Parent | None) -> Text:
    if run is None:
        gone = Path(path).is_absolute() and not Path(path).is_dir()
        return Text(f"{path}{' (moved or removed)' if gone else ''}", style="dim")
    p, line = run.progress, Text(run.name, style="bold")
    if parent is not None:
        of = "" if parent.step is None else f" step {parent.step}"
        weights = f", {parent.weights}" if parent.weights else ""
        line.append(f"  {_EDGE[parent.kind]}{of}{weights}", style="cyan")
    line.append(f"  {run.state.word}", style="not bold")
    if p.step is not None:
        line.append(f"  step {p.step:,}" + (f" of {p.steps:,}" if p.steps else ""), style="not bold")
    if p.loss is not None:
        line.append(f"  loss {p.loss:.4f}", style="not bold")
    return line.append(f"  {run.path}", style="dim not bold")
