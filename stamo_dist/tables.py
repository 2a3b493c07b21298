"""Tables that are never cut: if one is wider than the terminal, each row is printed as a block."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

_UNLIMITED = 10_000


class Whole:
    """A table with every column and every cell whole, at any width."""

    def __init__(self, table: Table):
        self.table = table
        for column in table.columns:
            column.no_wrap = True
            column.width = _width([column.header, *column.cells])

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        return Measurement.get(console, options.update(max_width=_UNLIMITED), self.table)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.__rich_measure__(console, options).maximum <= options.max_width:
            yield self.table
        else:
            yield self._blocks()

    def _blocks(self) -> RenderableType:
        table = self.table
        titles = [Text.from_markup(str(table.title), style="bold")] if table.title else []
        blocks: list[RenderableType] = []
        cells = [list(column.cells) for column in table.columns]
        for row in range(table.row_count):
            block = Table.grid(padding=(0, 2))
            for column, of_column in zip(table.columns, cells, strict=True):
                if of_column[row] not in ("", None):
                    heading = column.header if isinstance(column.header, Text) else Text(str(column.header))
                    block.add_row(Text.assemble(heading, style="bold"), of_column[row])
            blocks += [Text(), block]
        return Group(*titles, *blocks, *([Text(str(table.caption))] if table.caption else []))


def _width(cells: Sequence[RenderableType]) -> int | None:
    """Of a column of plain cells of one line, which rich would measure three times; None: rich measures it."""
    texts = [Text.from_markup(cell) if isinstance(cell, str) else cell for cell in cells]
    plain = [text for text in texts if isinstance(text, Text) and "\n" not in text.plain]
    return max(text.cell_len for text in plain) if len(plain) == len(texts) else None


def show(console: Console, renderable: RenderableType) -> None:
    """Print it; into a file or a pipe as wide as it is, on a terminal within its width."""
    if not console.is_terminal:
        options = console.options.update(max_width=_UNLIMITED)
        console.width = max(console.width, Measurement.get(console, options, renderable).maximum)
    console.print(renderable, crop=False, soft_wrap=not console.is_terminal)
