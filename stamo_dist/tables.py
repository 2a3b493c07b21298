"""Tables that are never cut: if one is wider than the terminal, each row is printed as a block."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.segment import Segment
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


class Columns:
    """Cells of one line below their headings, two blanks apart; looks like `Whole`, and is quick for hundreds of rows.

    `columns`: heading → cells, each in one style, as many as there are rows.
    """

    def __init__(self, columns: Mapping[str, Sequence[Text]]):
        self._columns = columns
        self._widths = [max(cell_len(name), *(c.cell_len for c in cells)) for name, cells in columns.items()]

    def __rich_measure__(self, console: Console, options: ConsoleOptions) -> Measurement:
        width = sum(self._widths) + 2 * max(0, len(self._widths) - 1)
        return Measurement(width, width)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.__rich_measure__(console, options).maximum > options.max_width:
            table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
            for name in self._columns:
                table.add_column(name)
            for row in zip(*self._columns.values(), strict=True):
                table.add_row(*row)
            yield Whole(table)
            return
        yield from self._line(console, [Text(name, style="table.header") for name in self._columns])
        for row in zip(*self._columns.values(), strict=True):
            yield from self._line(console, row)

    def _line(self, console: Console, cells: Sequence[Text]) -> Iterator[Segment]:
        blank = 0
        for cell, width in zip(cells, self._widths, strict=True):
            if cell.plain:
                yield Segment(" " * blank)
                yield Segment(cell.plain, console.get_style(cell.style))
                blank = 0
            blank += width - cell.cell_len + 2
        yield Segment.line()


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
