"""`stamo submit`."""

from __future__ import annotations

import gc
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.cli.options import Branch, Overrides, recipe_names
from stamo_dist.command_options import with_options
from stamo_dist.errors import StamoError


@dataclass(frozen=True)
class SubmitOptions:
    """Queue a recipe on a cluster; it is preempted, queued again and goes on by itself until it has finished.

    Code and recipe are copied into the run folder first: editing the checkout changes no queued run. A pipeline is
    queued stage after stage; what is done already is skipped.

    Example: stamo submit recipes/tokenizer_sim_droid.yaml --cluster gpu --nodes 4 --dry-run

    Example: stamo submit recipes/tokenizer_demo.yaml --cluster local --sweep optimizer.lr=1e-3,2e-3

    Example: stamo submit recipes/pipelines/demo.yaml --cluster local
    """

    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="RECIPE",
            help="A recipe or pipeline: a file, or a name of `stamo recipe list`.",
            autocompletion=recipe_names,
        ),
    ]
    cluster: Annotated[
        str | None,
        typer.Option(metavar="PROFILE", help="A profile: a file, or the name of one in slurm/; local without Slurm."),
    ] = None
    nodes: Annotated[int | None, typer.Option(min=1, help="Nodes, in place of the profile's.")] = None
    gpus_per_node: Annotated[int | None, typer.Option(min=1, help="GPUs of a node, in place of the profile's.")] = None
    time: Annotated[str | None, typer.Option(metavar="HH:MM:SS", help="Time limit, in place of the profile's.")] = None
    set_: Overrides = field(default_factory=list)
    sweep: Annotated[
        list[str],
        typer.Option(metavar="A.B=X,Y", help="One run for each value; may be repeated, for all combinations."),
    ] = field(default_factory=list)
    branch: Branch = None
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check, print the batch script, and stop.")] = False


@with_options(SubmitOptions)
def submit(context: typer.Context, asked: SubmitOptions) -> None:
    gc.disable()  # as in `stamo_dist.cli`
    from stamo_dist.launch import chain, checks, pipeline
    from stamo_dist.launch import submit as jobs
    from stamo_dist.launch.trained import without_trained

    gc.freeze()
    gc.enable()

    recipe, cluster = asked.recipe, asked.cluster or jobs.default_cluster()
    overrides = asked.set_
    if asked.branch is not None:
        from stamo_dist.checkpoint.branch import branch

        if pipeline.is_pipeline(recipe) or asked.sweep:
            raise StamoError("--branch: is of one run, not of a pipeline or sweep")
        overrides = branch(recipe, overrides, asked.branch)
    resources = jobs.Resources(asked.nodes, asked.gpus_per_node, asked.time)
    steps: list[chain.Step] = []
    if pipeline.is_pipeline(recipe):
        if asked.sweep:
            raise StamoError(f"--sweep: {recipe} is a pipeline; sweep over one of its recipes")
        whole, works = pipeline.load_pipeline(recipe, asked.set_, context.find_root().command)
        pipeline.check_needs(works)
        steps = chain.look_at(works)
        for step in steps:
            if step.state != "todo":
                print(f"{whole.name}.{step.work.name}: {step.words}")
        orders, where = chain.stage_orders(whole, steps, cluster, resources.changes()), whole.run_dir
    elif asked.sweep:
        orders, where = chain.sweep_orders(recipe, cluster, asked.sweep, asked.set_, resources)
    else:
        orders = [jobs.plan(recipe, cluster, overrides=overrides, resources=resources)]
        where = orders[0].launch.run_dir
    if not steps:  # those of a pipeline are left out by their own look
        orders, trained = without_trained(orders)
        print(*(f"{words}\n" for words in trained), sep="", end="")
    for order in orders:
        print(jobs.describe(order))
        for note in order.notes:
            print(f"  {note}")
        if asked.dry_run:
            print(jobs.script(order))
    if asked.dry_run:
        print("".join(f"{note}\n" for note in checks.unasked(order.profile for order in orders)), end="")
    if asked.dry_run or not orders:
        return
    launches = chain.send(whole, recipe, steps, orders) if steps else jobs.submit_all(orders)
    ids = dict.fromkeys(str(launch.job) for launch in launches)
    where, one = map(shlex.quote, (str(where), launches[0].run_dir))
    print(f"job {', '.join(ids)}: `stamo status {where}` and `stamo logs {one}` show how it does")
