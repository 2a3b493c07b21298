"""A progress bar for bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from data_tools.stores.store import Advance


@contextmanager
def bytes_bar(name: str, total: int, quiet: bool) -> Iterator[Advance]:
    """A progress bar for `total` bytes; yields a function to call with the bytes moved."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    moved = (TextColumn(name), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    left = (TextColumn("ETA"), TimeRemainingColumn())
    with Progress(*moved, *left, console=Console(file=sys.stderr), disable=quiet) as bar:
        line = bar.add_task(name, total=total)
        yield lambda moved: bar.update(line, advance=moved)
