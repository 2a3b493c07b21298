"""`stamo submit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.errors import StamoError

Overrides = Annotated[
    list[str], typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; may be repeated.")
]


def submit(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/tokenizer_sim.yaml.")],
    cluster: Annotated[
        str, typer.Option(metavar="PROFILE", help="A profile: a file, or the name of one in slurm/.")
    ] = "local",
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes, in place of the profile's.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a node, in place of the profile's.")] = None,
    time: Annotated[str | None, typer.Option(metavar="HH:MM:SS", help="Time limit, in place of the profile's.")] = None,
    set_: Overrides = [],  # noqa: B006 (typer reads the default)
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the batch script, and stop.")] = False,
) -> None:
    """Queue a recipe on a cluster; it is preempted, queued again and goes on by itself until it has finished.

    Code and recipe are copied into the run folder first: editing the checkout changes no queued run.

    Example: stamo submit recipes/tokenizer_sim_droid.yaml --cluster gpu --nodes 4 --dry-run
    """
    from stamo_dist.launch import submit as jobs

    order = jobs.plan(recipe, cluster, overrides=set_, nodes=nodes, gpus_per_node=gpus_per_node, time=time)
    if order.profile.backend == "local":
        raise StamoError(f"--cluster {cluster}: is the local machine")
    print(jobs.describe(order))
    for note in order.notes:
        print(f"  {note}")
    if dry_run:
        print(jobs.script(order))
        return
    launch = jobs.submit(order)
    print(f"job {launch.job}: `stamo status {launch.run_dir}` and `stamo logs {launch.run_dir}` show how it does")
