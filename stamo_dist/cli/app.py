"""The `stamo` command, assembled from the groups of commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from data_tools.cli import app as data_app
from data_tools.simulators.catalogue import InstalledBenchmarks
from stamo_dist.cli.about import COMPLETE, completion, env
from stamo_dist.cli.chaos import chaos
from stamo_dist.cli.doctor import doctor, probe
from stamo_dist.cli.export import export
from stamo_dist.cli.help import Grouped, WholeSummaries, show_version
from stamo_dist.cli.pages import mix, report
from stamo_dist.cli.plan import plan
from stamo_dist.cli.project import demo, init
from stamo_dist.cli.recipe import app as recipe_app
from stamo_dist.cli.runs import cancel, logs, resume, runs, status
from stamo_dist.cli.serve import serve
from stamo_dist.cli.submit import submit
from stamo_dist.cli.sync import sync
from stamo_dist.cli.train import encode, train
from stamo_dist.errors import StamoError
from stamo_dist.evaluate.commands import EvalTools
from stamo_dist.evaluate.commands import app as eval_app
from stamo_dist.evaluate.rollout_check import check_rollout
from stamo_dist.launch.further import FURTHER, Further
from stamo_dist.shipped import page

if TYPE_CHECKING:
    from stamo_dist.recipe.schema import Recipe

app = typer.Typer(
    help="Pretrain robot state tokenizers and policies: mix data through recipes, train, resume, measure.",
    epilog=f"How to: {page('index.md')}",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
    cls=Grouped,
)
app.add_typer(data_app, name="data", cls=WholeSummaries)


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show versions and commit, and exit."),
    ] = False,
) -> None:
    pass


@eval_app.callback()
def _bring_tools(context: typer.Context) -> None:
    from stamo_dist.launch.local import launch_local
    from stamo_dist.launch.status import folder_of

    context.obj = EvalTools(launch_local, InstalledBenchmarks(), folder_of)


def _rollout(recipe: Recipe) -> list[str]:
    check_rollout(recipe, InstalledBenchmarks())
    return []


def _advice(recipe: Recipe) -> list[str]:
    from stamo_dist.data.advice import advice

    return advice(recipe)


FURTHER += [Further(_rollout, ("evaluate", "data")), Further(_advice, ("stage", "data", "policy", "train"))]
app.add_typer(eval_app, name="eval", cls=WholeSummaries)
app.add_typer(recipe_app, name="recipe", cls=WholeSummaries)
COMMANDS: tuple[Callable[..., None], ...] = (
    *(init, demo, env, completion),
    *(submit, status, runs, logs, cancel, resume, doctor, chaos),
    *(plan, export, sync, train, encode, serve, mix, report),
)
for _command in COMMANDS:
    app.command()(_command)
app.command("doctor-probe", hidden=True)(probe)


def main() -> None:
    """Console entry: errors a user can act on are printed without a traceback, exit code 2."""
    if COMPLETE in os.environ:
        from typer.completion import completion_init

        completion_init()
    try:
        app(prog_name="stamo")
    except StamoError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
