"""`stamo recipe …`: look at recipes without running them. Needs no torch."""

from __future__ import annotations

import itertools
import json
import re
from math import gcd
from pathlib import Path
from typing import Annotated

import typer

from stamo_dist.cli.options import RecipePath, field_names, settings
from stamo_dist.errors import StamoError

app = typer.Typer(no_args_is_help=True, help="Show, check and explain recipes.")

SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="FIELD=VALUE",
        help="Override a field; VALUE is YAML. May be given several times.",
        autocompletion=settings,
    ),
]


@app.command("list")
def list_() -> None:
    """List what can be given by name: recipes, pipelines and fragments, of recipes/ here and what comes with stamo.

    Example: stamo recipe list
    """
    from rich.console import Console
    from rich.table import Table

    from stamo_dist.recipe.find import names
    from stamo_dist.recipe.lines import shown
    from stamo_dist.shipped import RECIPES
    from stamo_dist.tables import Whole
    from stamo_dist.tables import show as show_table

    table = Table(box=None, pad_edge=False)
    for heading in ("name", "file", "what it is"):
        table.add_column(heading)
    for name, path in names().items():
        own = not path.resolve().is_relative_to(RECIPES)
        table.add_row(name, shown(path) if own else "comes with stamo", _about(path))
    show_table(Console(highlight=False), Whole(table))


def _about(path: Path) -> str:
    """The first sentence of its first comment."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    comment = " ".join(
        line.lstrip("# ")
        for line in itertools.takewhile(lambda line: line.startswith("#"), lines)
        if not line.startswith("# yaml-language-server")
    )
    return re.split(r"(?<=[.:;]) ", comment)[0].rstrip(".:;")


@app.command()
def show(
    recipe: RecipePath,
    overrides: SetOption = None,
    lr: Annotated[bool, typer.Option("--lr", help="Draw the learning rate over the steps instead.")] = False,
    picture: Annotated[Path | None, typer.Option("--png", metavar="FILE", help="With --lr: also as a picture.")] = None,
) -> None:
    """Print the resolved recipe with the file and line each value came from.

    The output is a recipe itself: every value written out, the origin as a comment. --lr shows what its run trained
    with so far, too.

    Example: stamo recipe show recipes/tokenizer_demo.yaml --set train.steps=500

    Example: stamo recipe show recipes/tokenizer_sim.yaml --lr --set optimizer.schedule=wsd
    """
    from rich.console import Console

    from stamo_dist.recipe.load import load
    from stamo_dist.recipe.render import render

    loaded = load(recipe, overrides or ())
    if lr or picture is not None:
        from stamo_dist.cli.rate import show_rate

        return show_rate(loaded.recipe, picture)
    console = Console(highlight=False, soft_wrap=True)
    for line in render(loaded):
        console.print(line)


@app.command()
def check(
    recipe: RecipePath,
    overrides: SetOption = None,
    world_size: Annotated[
        int | None, typer.Option("--world-size", metavar="N", min=1, help="Check the batching on N processes too.")
    ] = None,
    offline: Annotated[
        bool, typer.Option("--offline", help="Data and weights are not on this machine: look at the recipe alone.")
    ] = False,
) -> None:
    """List every problem of a recipe at once (exit code 2), or print OK and how the global batch is spread.

    Shards and weights are looked at as `stamo train` does before it starts: whether they are there, whole, and fit
    the recipe; what has to be encoded or installed first; whether an export is older than its run. It also says how
    many samples have an action and a world loss, which dimensions of actions never or seldom move, and what could be
    cached.

    Example: stamo recipe check recipes/tokenizer_sim_droid.yaml --offline --world-size 64
    """
    from rich.console import Console
    from rich.text import Text

    from stamo_dist.data.at_hand import is_remote
    from stamo_dist.launch.recipe_checks import Scope, refuse
    from stamo_dist.recipe.batching import batchings
    from stamo_dist.recipe.load import load_draft

    scope = Scope(world_size=world_size, asked="--world-size", offline=offline, advise=True)
    loaded, looked = refuse(load_draft(recipe, overrides or ()), scope)
    r = loaded.recipe
    first = r.data.first_shares()
    shares = ", ".join(f"{name} {share:.1%}" for name, share in first.items()) if first else ", ".join(r.data.used)
    console = Console(highlight=False, soft_wrap=True)
    console.print(
        Text.assemble(("OK", "bold green"), f"  {recipe}: {r.stage}, {r.strategy.name}, run folder {r.run_dir}")
    )
    console.print(f"    sources   {shares}")
    batch = str(r.train.batches) if len(r.train.batches.sizes) == 1 else f"({r.train.batches})"
    console.print(f"    schedule  {r.train.steps} steps × {batch} samples")
    console.print("    processes  per process = micro-batch × accumulation", style="dim")
    shared = r.train.virtual_workers or gcd(*r.train.batches.sizes)
    sizes = [world_size] if world_size else [2**k for k in range(11) if shared % 2**k == 0]
    for size in sizes:
        for b, since in zip(batchings(r.train, size), r.train.batches.starts, strict=True):
            when = f"  after step {since}" if since else ""
            console.print(f"    {b.world_size:9d}  {b.per_rank:11d} = {b.micro_batch:11d} × {b.accumulation}{when}")
    absent = [f"{field}: {what}: {fix}" for field, what, fix in looked.to_download]
    for line in [*r.strategy.advice(world_size or 1), *looked.notes, *absent, *looked.advice]:
        console.print(f"    {line}")
    remote = [path for source in r.data.used.values() for path in source.paths if is_remote(path)]
    if offline or remote:
        what = "data and weights (--offline)" if offline else ", ".join(remote)
        console.print(f"    not looked at: {what}", style="dim")


@app.command()
def diff(
    first: Annotated[str, typer.Argument(metavar="A", help="A recipe, a run folder or a checkpoint.")],
    second: Annotated[str, typer.Argument(metavar="B", help="Another.")],
) -> None:
    """List the fields in which two recipes differ, defaults included; exit code 1 if there are any.

    A run has the recipe of its last start, a checkpoint that of its time.

    Example: stamo recipe diff recipes/tokenizer_sim.yaml recipes/tokenizer_sim_droid.yaml
    """
    from stamo_dist.recipe.difference import differences
    from stamo_dist.run.recipe_history import resolved_at

    changes = differences(resolved_at(first), resolved_at(second))
    for change in changes:
        typer.echo(str(change))
    if changes:
        raise typer.Exit(1)
    typer.echo("no difference")


@app.command()
def schema(
    out: Annotated[Path | None, typer.Argument(metavar="FILE", help="Where to write it; printed when omitted.")] = None,
) -> None:
    """Write the JSON schema that gives editors completion and checks in recipe files.

    Editors with the YAML language server use it through a recipe's first line, "# yaml-language-server: $schema=FILE".

    Example: stamo recipe schema recipes/schema.json
    """
    from stamo_dist.recipe.explain import json_schema

    text = json.dumps(json_schema(), indent=2, ensure_ascii=False) + "\n"
    if out is None:
        typer.echo(text, nl=False)
        return
    try:
        out.write_text(text, encoding="utf-8")
    except OSError as e:
        raise StamoError(f"{out}: cannot be written: {e.strerror}") from e
    typer.echo(f"wrote {out}")


@app.command()
def explain(
    field: Annotated[
        str,
        typer.Argument(metavar="FIELD", help="Dotted name; the sections when omitted.", autocompletion=field_names),
    ] = "",
) -> None:
    """Explain a field or a section: type, default, meaning.

    Example: stamo recipe explain data.sources
    """
    from rich.console import Console

    from stamo_dist.recipe.explain import explain as explain_field

    Console(highlight=False).print(explain_field(field))
