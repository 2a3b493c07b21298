"""`stamo plan`. Torch is imported only inside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

_STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"]


def plan(
    recipe: Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, e.g. recipes/policy_openvla_state.yaml.")],
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Devices in all.")] = 8,
    every: Annotated[bool, typer.Option("--all", help="Every strategy, not the recipe's alone.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
    set_: Annotated[
        list[str], typer.Option("--set", metavar="A.B=C", help="Override one value of the recipe; may be repeated.")
    ] = [],  # noqa: B006 (typer reads the default)
) -> None:
    """What one device holds: parameters, gradients, optimizer, activations, and the peak of a step.

    Needs neither a GPU nor weights nor data: only shapes are computed.

    Example: stamo plan recipes/policy_openvla_state.yaml --gpus 8 --all
    """
    from dataclasses import asdict

    from rich.console import Console
    from rich.table import Table

    from stamo_dist.errors import RecipeError
    from stamo_dist.plan.memory import plan as predict
    from stamo_dist.recipe.load import load

    loaded = load(recipe, set_).recipe
    try:
        found = predict(loaded, gpus, _STRATEGIES if every else None)
    except ValueError as e:
        raise RecipeError([str(e)]) from None
    if as_json:
        typer.echo(json.dumps([{**asdict(memory), "peak": memory.peak} for memory in found], indent=1))
        return
    first = found[0]
    console = Console(highlight=False)
    devices = "1 device" if gpus == 1 else f"{gpus} devices"
    table = Table(
        title=f"{loaded.name} on {devices}: GB of each ({loaded.train.precision}, micro-batch {first.micro_batch})"
    )
    table.add_column("strategy")
    heads = ("weights", "grads", "AdamW", "frozen", "gather", "activ.", "peak")
    columns = ("parameters", "gradients", "optimizer", "frozen", "gathered", "activations", "peak")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for memory in found:
        numbers = [f"{getattr(memory, column) / 1e9:.2f}" for column in columns]
        table.add_row(memory.strategy, *numbers)
    console.print(table)
    console.print(f"{first.trained_numel / 1e6:,.1f} M parameters train, {first.frozen_numel / 1e6:,.1f} M are frozen")
    console.print("A GPU needs 1 GB more for its own, and some room for fragmentation.", style="dim")
    for note in first.notes:
        console.print(f"assumed  {note}", soft_wrap=True)
