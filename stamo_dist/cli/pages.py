"""`stamo mix | report`: what goes into a training as a picture, what came of it as a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.cli.options import Overrides, RecipePath
from stamo_dist.errors import RecipeError
from stamo_dist.run.registry import run_names


def mix(
    recipe: RecipePath,
    set_: Overrides = [],  # noqa: B006
    out: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Where to draw it; RUN_DIR/mixture.png when omitted.")
    ] = None,
) -> None:
    """Show what the mixture really is: requested and realised shares, unique samples, epochs; as a table and a picture.

    Of a policy's recipe also how many samples have an action loss, and how many a world loss, and which sources give no
    actions; it fails (exit code 2) where none does.

    Example: stamo mix recipes/tokenizer_demo.yaml --set data.sources.libero.weight=3
    """
    from stamo_dist.recipe.load import load

    loaded = load(recipe, set_).recipe  # before the slow imports

    from stamo_dist.data.instructions import episode_tables
    from stamo_dist.data.mixture import Mixture
    from stamo_dist.data.supervised import Supervision
    from stamo_dist.data.table import mixture_picture, mixture_table
    from stamo_dist.data.weights import report

    mixture = Mixture(loaded.data, seed=loaded.seed, global_batch=loaded.train.global_batch)
    steps = loaded.train.steps
    mixture_table(report(mixture, steps))
    problems: list[str] = []
    if loaded.stage == "policy":
        supervision = Supervision(loaded, episode_tables(mixture))
        print("\n".join(supervision.lines))
        problems = supervision.problems
    print(f"picture: {mixture_picture(mixture, steps, out or Path(loaded.run_dir) / 'mixture.png')}")
    if problems:
        raise RecipeError(problems)


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(
            metavar="RUN", help="Run folders, or names of runs, shown side by side.", autocompletion=run_names
        ),
    ],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Where to write; RUN/report.html of the first run when omitted.")
    ] = None,
) -> None:
    """Write one self-contained HTML page: recipe, mixture, curves, evaluations, pictures.

    Example: stamo report demo/runs/tokenizer
    """
    from stamo_dist.launch.status import folder_of
    from stamo_dist.run.folder import open_run

    runs = [folder_of(run) for run in runs]
    for run in runs:
        open_run(run)  # before the slow imports

    from stamo_dist.report import write_report

    print(f"report: {write_report(runs, out or runs[0] / 'report.html')}")
