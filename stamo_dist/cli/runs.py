"""`stamo status | runs | logs | cancel | resume`: looking after runs. Needs no torch, and of Slurm only squeue."""

from __future__ import annotations

import gc
import json
import time
from typing import TYPE_CHECKING, Annotated

import typer

from stamo_dist.run.registry import run_names

if TYPE_CHECKING:
    from rich.console import RenderableType

RunArgument = Annotated[
    str, typer.Argument(metavar="RUN", help="A run folder, or the name of a run.", autocompletion=run_names)
]
RunArguments = Annotated[
    list[str],
    typer.Argument(metavar="RUN", help="Run folders, folders of runs, or names of runs.", autocompletion=run_names),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print it for programs.")]


def status(
    runs: RunArguments = [],  # noqa: B006 (typer reads the default)
    watch: Annotated[
        bool, typer.Option("--watch", help="Keep it up to date until Ctrl-C, or until every RUN has ended.")
    ] = False,
    every: Annotated[float, typer.Option(metavar="SECONDS", min=0.5, help="How often with --watch.")] = 5.0,
    as_json: AsJson = False,
) -> None:
    """Show how runs do; all of yours of the last day when omitted, with all details for one.

    Example: stamo status runs/tokenizer_sim --watch
    """
    from stamo_dist.launch.status import Run, collect, everything, find, recent

    if not watch:
        gc.disable()  # it ends soon: looking for garbage takes an eighth of the time for hundreds of runs

    def look() -> list[Run]:
        return collect(find(runs)) if runs else recent(everything())

    if as_json:
        typer.echo(json.dumps([run.facts() for run in look()], indent=1))
        return
    from rich.console import Console
    from rich.live import Live

    from stamo_dist.launch.status_tables import one_run, status_table
    from stamo_dist.tables import show

    def table(found: list[Run]) -> RenderableType:
        return one_run(found[0]) if runs and len(found) == 1 else status_table(found)

    console, found = Console(highlight=False), look()
    if not watch:
        show(console, table(found))
        return
    with Live(table(found), console=console, auto_refresh=False) as live:
        try:
            while not runs or any(run.state.live for run in found):
                time.sleep(every)
                found = look()
                live.update(table(found), refresh=True)
        except KeyboardInterrupt:
            pass


def runs(
    folders: Annotated[
        list[str], typer.Argument(metavar="FOLDER", help="Folders of runs; all you submitted when omitted.")
    ] = [],  # noqa: B006 (typer reads the default)
    as_json: AsJson = False,
    tree: Annotated[bool, typer.Option("--tree", help="Each below the run that it began from.")] = False,
) -> None:
    """List runs, those that ended too: state, last loss, folder; for the folder of a sweep, the best values first.

    Example: stamo runs runs/ --tree
    """
    from dataclasses import asdict

    from rich.console import Console

    from stamo_dist.launch.record import SWEEP
    from stamo_dist.launch.status import collect, everything, find
    from stamo_dist.launch.status_tables import runs_table, sweep_table
    from stamo_dist.launch.tree import parent_of, runs_tree
    from stamo_dist.tables import show

    found = collect(find(folders)) if folders else everything()
    if as_json:
        parents = [parent_of(run) for run in found]
        facts = [{**run.facts(), "parent": p and asdict(p)} for run, p in zip(found, parents, strict=True)]
        typer.echo(json.dumps(facts, indent=1))
    elif tree:
        Console(highlight=False, soft_wrap=True).print(runs_tree(found))
    else:
        is_sweep = bool(found) and all(run.path.parent == found[0].path.parent for run in found)
        is_sweep &= bool(found) and found[0].path.parent.name == SWEEP
        show(Console(highlight=False), (sweep_table if is_sweep else runs_table)(found))


def logs(
    run: RunArgument,
    rank: Annotated[
        str | None, typer.Option(metavar="R|all", help="Of this rank; the job's and rank 0's if not.")
    ] = None,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the run has ended, over all its starts.")
    ] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="So many from the end; 0: all.")] = 100,
) -> None:
    """Print the logs of a run, of one rank, or of all with the rank and its node before each line.

    Example: stamo logs runs/tokenizer_sim --rank 3 --follow
    """
    from contextlib import suppress

    from stamo_dist.errors import RunError
    from stamo_dist.launch import logs as files
    from stamo_dist.launch.status import collect, one

    path = one(run)
    try:
        chosen = files.choose(path, rank)
    except RunError as e:
        if not follow or files.ranks(path) or files.by_hand(path):
            raise
        typer.echo(e, err=True)
        chosen = []

    def now() -> list[files.JobLog]:
        with suppress(RunError):
            return files.choose(path, rank)
        return []

    if rank is None and files.by_hand(path) and 0 not in files.ranks(path):
        typer.echo(files.in_terminal(path), err=True)
    for log in chosen:
        for line in log.last(lines):
            typer.echo(line)
    looked, over = 0.0, False

    def ended() -> bool:
        nonlocal looked, over
        if time.monotonic() > looked + 5:
            looked, over = time.monotonic(), not collect([path])[0].state.live
        return over

    try:
        for line in files.follow(chosen, ended, now) if follow else files.follow(chosen, lambda: True):
            typer.echo(line)
    except KeyboardInterrupt:
        pass


def cancel(
    run: Annotated[
        list[str], typer.Argument(metavar="RUN", help="Run folders, or names of runs.", autocompletion=run_names)
    ],
) -> None:
    """End runs: each saves, leaves and is not started again. `stamo resume` goes on later.

    Example: stamo cancel runs/tokenizer_sim
    """
    from stamo_dist.cli import steer
    from stamo_dist.errors import RunError, StamoError
    from stamo_dist.launch.status import find

    refused = list[str]()
    for path in find(run):
        try:
            typer.echo(steer.cancel(path))
        except StamoError as e:
            refused.append(str(e))
    if refused:
        raise RunError("\n".join(refused))


def resume(
    run: RunArgument,
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes, in place of those it had.")] = None,
    time: Annotated[
        str | None, typer.Option(metavar="HH:MM:SS", help="Time limit, in place of the one it had.")
    ] = None,
) -> None:
    """Submit a run that failed or was stopped again, with the code and recipe it had: it goes on where it stopped.

    Example: stamo resume runs/tokenizer_sim --time 12:00:00
    """
    from stamo_dist.cli import steer
    from stamo_dist.launch.status import one

    typer.echo(steer.resume(one(run), nodes=nodes, time=time))
