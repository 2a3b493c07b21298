"""Arguments and options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def recipe_names(incomplete: str) -> list[str]:
    """The names that begin so, for a shell's completion."""
    from stamo_dist.recipe.find import names

    return [name for name in names() if name.startswith(incomplete)]


def field_names(incomplete: str) -> list[str]:
    """The dotted names of recipe fields that begin so, for a shell's completion."""
    from stamo_dist.recipe.fields import PLACEHOLDER, all_fields
    from stamo_dist.recipe.lines import dotted

    found = (dotted(field.key) for field in all_fields() if PLACEHOLDER not in field.key)
    return [name for name in found if name.startswith(incomplete)]


def settings(incomplete: str) -> list[str]:
    """The beginnings of values for --set, as in `train.steps=`."""
    return [f"{name}=" for name in field_names(incomplete)]


RecipePath = Annotated[
    Path,  # readable=False: no access(2) by every rank of a run before the recipe is read
    typer.Argument(
        metavar="RECIPE",
        readable=False,
        help="A recipe: a file, or a name of `stamo recipe list`, e.g. tokenizer_demo.",
        autocompletion=recipe_names,
    ),
]
Overrides = Annotated[
    list[str],
    typer.Option(
        "--set",
        metavar="A.B=C",
        help="Override one value of the recipe; may be repeated.",
        autocompletion=settings,
    ),
]
Processes = Annotated[int, typer.Option("--nproc", min=1, help="Processes to start on this machine.")]
Branch = Annotated[
    int | None,
    typer.Option(
        "--branch",
        metavar="STEP",
        min=1,
        help="Train only wsd's decay, from that checkpoint of the recipe's run, in the run folder RUN-STEP.",
    ),
]
