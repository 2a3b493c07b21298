"""`stamo report`; the command line adds `report` to its own app."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders; several are put side by side.")],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Where to write; RUN/report.html, or report.html for several runs."),
    ] = None,
) -> None:
    """Write one self-contained HTML page about runs: recipe, mixture, curves, evaluations, pictures.

    Example: stamo report runs/tokenizer_demo
    """
    from stamo_dist.report.page import write_report

    typer.echo(f"wrote {write_report(runs, out)}")
