"""`stamo doctor`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.cli.options import Overrides


def doctor(
    recipe: Annotated[
        Path | None, typer.Argument(metavar="RECIPE", help="Also look at what this recipe needs: data, weights, W&B.")
    ] = None,
    cluster: Annotated[
        str, typer.Option(metavar="PROFILE", help="Look at this cluster, and run a job of two minutes on it.")
    ] = "local",
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes of that job, in place of the profile's.")] = None,
    set_: Overrides = [],  # noqa: B006 (typer reads the default)
    no_job: Annotated[bool, typer.Option("--no-job", help="Only look from here: no processes, no job.")] = False,
    wait: Annotated[float, typer.Option(metavar="SECONDS", min=1, help="How long the job may be queued.")] = 600.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings for programs.")] = False,
) -> None:
    """Look for what is wrong with the environment before a job is burnt; each finding comes with what to do.

    Versions, what the recipe needs, Slurm's settings; then on the nodes GPUs, the network between ranks, disks, clocks.
    Exit code 1 where something is an error.

    Example: stamo doctor recipes/tokenizer_sim.yaml --cluster gpu --nodes 2
    """
    from rich.console import Console

    from stamo_dist.launch.doctor.diagnose import diagnose
    from stamo_dist.launch.doctor.verdict import failed, show

    console = Console(highlight=False, stderr=as_json)
    with console.status("looking …") as status:
        found = list(diagnose(recipe, set_, cluster, nodes, job=not no_job, patience=wait, say=status.update))
    if as_json:
        typer.echo(json.dumps([asdict(f) for f in found], indent=1, ensure_ascii=False))
    else:
        show(found, console)
    raise typer.Exit(int(failed(found)))


def probe(
    out: Annotated[Path, typer.Argument(help="Folder for the reports.")],
    path: Annotated[list[str], typer.Option(help="Folder whose disk is measured.")] = [],  # noqa: B006
    wandb: Annotated[str, typer.Option(help="Host to reach.")] = "",
) -> None:
    """One rank of the doctor's job; `stamo doctor` starts it."""
    from stamo_dist.launch.doctor.probe import main

    code = main(out, path, wandb)
    os._exit(code)  # gloo's threads may abort the interpreter during shutdown
