"""The terminal of all commands: its width, and errors in one line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import NoReturn

import typer
from rich.console import Console


def console() -> Console:
    """Return a console for standard output."""
    # A log file has no width; rich would fold a table at 80 columns.
    return Console(width=None if sys.stdout.isatty() else 110)


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
