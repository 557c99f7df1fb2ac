"""The terminal of all commands: its width, tables that fit it, and errors in one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, JustifyMethod, RenderResult
from rich.table import Table
from rich.text import Text


def console() -> Console:
    """Return a console for standard output."""
    # A log file has no width; rich would fold a table at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 110)


_GAP = 2
_NARROWEST = 8  # a name that is longer is broken into lines of at least this width


@dataclass(frozen=True)
class Columns:
    """A table that loses nothing on a narrow terminal.

    Columns that do not fit beside the first one, which names the lines, follow in a table below,
    with the names again. Nothing is cut: a name wider than the terminal goes on in the next line.

    Args:
        header: of the columns.
        rows: of cells.
        title: above the table.
        note: below it.
        left: columns aligned left; numbers are on the right.

    Example:
        >>> table = Columns(("layer", "ms"), [("layer1.0.conv1", "12.5")])
        >>> Console(width=30).print(table)
        layer             ms
        ────────────────────
        layer1.0.conv1  12.5
        <BLANKLINE>
    """

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    note: str = ""
    left: int = 1

    @property
    def row_count(self) -> int:
        """Number of lines below the header."""
        return len(self.rows)

    def groups(self, width: int) -> list[list[int]]:
        """Divide the columns behind the first into tables of at most this width."""
        names, *widths = self._widths(width)
        groups: list[list[int]] = []
        room = 0
        for number, wide in enumerate(widths, start=1):
            if not groups or wide + _GAP > room:
                groups.append([])
                room = width - names
            groups[-1].append(number)
            room -= wide + _GAP
        return groups or [[]]

    def _widths(self, width: int) -> list[int]:
        """Return the width of each column; titles break at spaces, and names where they must."""
        columns = [[name, *cells] for name, *cells in zip(self.header, *self.rows, strict=True)]
        whole = [max(map(len, cells)) for cells in columns]
        if sum(whole) + _GAP * (len(whole) - 1) <= width:
            return whole
        names, *others = (max(map(len, [*name.split(), *cells])) for name, *cells in columns)
        return [min(names, max(_NARROWEST, width - _GAP - max(others, default=0))), *others]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if self.title:
            yield Text(self.title, style="italic")
        widths = self._widths(options.max_width)
        for group in self.groups(options.max_width):
            table = Table(
                box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, _GAP - 1, 0, 0)
            )
            for number in (0, *group):
                name, wide = Text(self.header[number]), widths[number]
                side: JustifyMethod = "left" if number < self.left else "right"
                table.add_column(name, justify=side, overflow="fold", width=wide)
            for row in self.rows:
                table.add_row(*(Text(row[number]) for number in (0, *group)))
            yield table
            yield Text()
        if self.note:
            yield Text(self.note, style="dim")


@contextlib.contextmanager
def one_line_errors(*kinds: type[Exception]) -> Iterator[None]:
    """End the process with exit status 2 and one line on standard error if one of these occurs."""
    try:
        yield
    except kinds as error:
        fail(error, code=2)


def fail(error: Exception, code: int) -> NoReturn:
    """End the process with an exit status and one line on standard error."""
    typer.echo(f"error: {' '.join(str(error).split())}", err=True)
    raise typer.Exit(code)
