"""`stamo plan`. Torch is imported only inside."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from stamo_dist.cli.options import Overrides, RecipePath

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from stamo_dist.plan.memory import Memory
    from stamo_dist.recipe.schema import Recipe

_DTYPES = ("float32", "bfloat16", "float16")
_STRATEGIES = ["ddp", "zero1", "zero2", "zero3", "fsdp", "hsdp"]


def plan(
    recipe: RecipePath,
    gpus: Annotated[int, typer.Option("--gpus", metavar="N", min=1, help="Devices in all.")] = 8,
    every: Annotated[bool, typer.Option("--all", help="Every strategy, not the recipe's alone.")] = False,
    serve: Annotated[
        str | None,
        typer.Option(
            metavar="|".join(_DTYPES), help="Weights alone of the policy while it is served, exported in that --dtype."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, in bytes.")] = False,
    set_: Overrides = [],  # noqa: B006 (typer reads the default)
) -> None:
    """What one device holds: parameters, gradients, optimizer, activations, and the peak of a step; or a served policy.

    And how long a step should take in bf16 on some GPUs: a prediction, none is measured (gpu.md of the docs).

    Needs neither a GPU nor weights nor data: only shapes are computed.

    Example: stamo plan recipes/policy_openvla_state.yaml --gpus 8 --all
    """
    from stamo_dist.errors import RecipeError, StamoError
    from stamo_dist.recipe.load import load

    loaded = load(recipe, set_).recipe  # before the slow imports
    if serve is not None and serve not in _DTYPES:
        raise StamoError(f"--serve: {serve} is unknown; give {', '.join(_DTYPES)}")

    from rich.console import Console

    from stamo_dist.plan.memory import plan as predict
    from stamo_dist.plan.roofline import expect
    from stamo_dist.tables import Whole, show

    if serve is not None:
        _show_serving(loaded, serve, as_json=as_json)
        return
    try:
        found = predict(loaded, gpus, _STRATEGIES if every else None)
        expected = expect(loaded, gpus)
    except ValueError as e:
        raise RecipeError([str(e)]) from None
    if as_json:
        own = {"expected": [step.to_dict() for step in expected]}
        rows = [asdict(m) | {"peak": m.peak} | (own if m.strategy == loaded.strategy.name else {}) for m in found]
        typer.echo(json.dumps(rows, indent=1))
        return
    first, devices = found[0], "1 device" if gpus == 1 else f"{gpus} devices"
    console = Console(highlight=False)
    title = f"{loaded.name} on {devices}: GB of each ({loaded.train.precision}, micro-batch {first.micro_batch})"
    show(console, Whole(_memory_table(title, found)))
    console.print(f"{first.trained_numel / 1e6:,.1f} M parameters train, {first.frozen_numel / 1e6:,.1f} M are frozen")
    console.print("A GPU needs 1 GB more for its own, and some room for fragmentation.", style="dim")
    for step in expected:
        of = f"{step.samples} samples on " if len(loaded.train.batches.sizes) > 1 else ""
        console.print(f"expected  {of}{step.line}", soft_wrap=True)
    for note in first.notes:
        console.print(f"assumed  {note}", soft_wrap=True)
    for advice in loaded.strategy.advice(gpus):
        console.print(f"advised  {advice}", soft_wrap=True)


def _memory_table(title: str, found: Sequence[Memory]) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("strategy")
    heads = ("weights", "grads", "AdamW", "frozen", "gather", "activ.", "peak")
    columns = ("parameters", "gradients", "optimizer", "frozen", "gathered", "activations", "peak")
    for head in heads:
        table.add_column(head, justify="right", no_wrap=True)
    for memory in found:
        numbers = [f"{getattr(memory, column) / 1e9:.2f}" for column in columns]
        table.add_row(memory.strategy, *numbers)
    return table


def _show_serving(recipe: Recipe, name: str, *, as_json: bool) -> None:
    import torch
    from rich.console import Console
    from rich.table import Table

    from stamo_dist.plan.serving import serving
    from stamo_dist.tables import Whole, show

    parts, notes = serving(recipe, getattr(torch, name))
    if as_json:
        typer.echo(json.dumps([asdict(part) for part in parts], indent=1))
        return
    console = Console(highlight=False)
    table = Table(title=f"{recipe.name} served, exported in {name}: weights in GB")
    table.add_column("part")
    for head in ("M parameters", "on the device", "not read"):
        table.add_column(head, justify="right", no_wrap=True)
    for part in parts:
        size = f"{part.size / 1e9:.2f}"
        table.add_row(part.name, f"{part.numel / 1e6:,.1f}", *((size, "") if part.held else ("", size)))
    held, left = (f"{sum(part.size for part in parts if part.held is on) / 1e9:.2f}" for on in (True, False))
    table.add_section()
    table.add_row("in all", "", held, left)
    show(console, Whole(table))
    console.print("Weights alone: a request's activations come on top, and 1 GB of a GPU's own.", style="dim")
    for note in notes:
        console.print(f"assumed  {note}", soft_wrap=True)
