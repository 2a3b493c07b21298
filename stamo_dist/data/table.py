"""`stamo mix`: the mixture as a table and as a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from stamo_dist.data.mixture import Mixture
from stamo_dist.data.weights import Share
from stamo_dist.errors import DataError
from stamo_dist.tables import Whole, show


def mixture_table(shares: Sequence[Share], console: Console | None = None) -> None:
    """Print requested and realised shares, unique samples and epochs of each source, then warnings."""
    console = console or Console()
    table = Table(title="mixture")
    table.add_column("source")
    for column in ("frames", "requested", "realised", "samples", "unique", "epochs"):
        table.add_column(column, justify="right")
    for share in shares:
        table.add_row(
            share.source,
            f"{share.frames:,}",
            f"{share.requested:.2%}",
            f"{share.realised:.2%}",
            f"{share.samples:,}",
            f"{share.unique:,}",
            f"{share.epochs:.2f}",
        )
    show(console, Whole(table))
    for share in shares:
        for warning in share.warnings:
            console.print(f"[yellow]{share.source}: {warning}", soft_wrap=True)


def mixture_picture(mixture: Mixture, steps: int, out: Path, points: int = 200) -> Path:
    """Plot over the run: each source's share of the samples, and its number of passes.

    Raises:
        DataError: The image cannot be written.
    """
    from matplotlib.figure import Figure

    at = np.unique(np.linspace(0, steps, points + 1).round().astype(int))
    counts = np.array([mixture.schedule.counts(mixture.batches.before(step)) for step in at])
    shares = np.diff(counts, axis=0) / np.maximum(1, np.diff(counts, axis=0).sum(1, keepdims=True))
    figure = Figure(figsize=(10, 6), layout="constrained")
    above, below = figure.subplots(2, sharex=True)
    above.stackplot((at[1:] + at[:-1]) / 2, shares.T, labels=mixture.sources)
    above.set(ylabel="share of the samples", ylim=(0, 1))
    above.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
    for epochs in (counts / mixture.frames).T:
        below.plot(at, epochs)
    below.axhline(1, color="grey", linewidth=0.8, linestyle=":")
    below.set(xlabel="optimizer step", ylabel="epochs", ylim=(0, None), xlim=(0, steps))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=120)
    except OSError as e:
        raise DataError(f"{out}: cannot be written: {e.strerror or e}") from e
    return out
