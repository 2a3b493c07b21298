"""`stamo mix`: the mixture as a table."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from stamo_dist.data.shares import Share


def mixture_table(shares: Sequence[Share], console: Console | None = None) -> None:
    """Print requested and realised shares, epochs and repeats of each source, and the warnings below."""
    console = console or Console()
    table = Table(title="mixture")
    table.add_column("source")
    for column in ("frames", "requested", "realised", "samples", "epochs", "most repeats per epoch"):
        table.add_column(column, justify="right")
    for share in shares:
        table.add_row(
            share.source,
            f"{share.frames:,}",
            f"{share.requested:.2%}",
            f"{share.realised:.2%}",
            f"{share.samples:,}",
            f"{share.epochs:.2f}",
            str(share.repeats),
        )
    console.print(table)
    for share in shares:
        for warning in share.warnings:
            console.print(f"[yellow]{share.source}: {warning}", soft_wrap=True)
