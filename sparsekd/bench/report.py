"""The report on a benchmark: tables for the terminal, Markdown and figures in a folder."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console

from sparsekd.bench.results import Results
from sparsekd.bench.suite import Suite
from sparsekd.bench.tables import Grid
from sparsekd.errors import CheckpointError
from sparsekd.train import MetricsLog


def read(path: Path) -> Results:
    """Read the rows of a JSON-lines file that a benchmark wrote.

    Raises:
        CheckpointError: the file has no rows, or is damaged.
    """
    rows = MetricsLog(path).rows()
    if not rows:
        raise CheckpointError(f"{path}: expected rows of `sparsekd bench`, found none")
    return Results(rows)


def grids(suite: Suite, results: Results) -> list[Grid]:
    """Make the tables that the rows allow."""
    return [grid for grid in suite.grids(results) if grid is not None]


def show(suite: Suite, results: Results, console: Console) -> None:
    """Print the tables."""
    for grid in grids(suite, results):
        console.print(grid.rich(), highlight=False)


def write(suite: Suite, results: Results, folder: Path, rows: Path) -> list[Path]:
    """Write the tables as Markdown beside the figures.

    Args:
        suite: whose report it is.
        results: the rows.
        folder: where README.md and the PNG files go.
        rows: the file that the rows came from, named in the text.

    Returns:
        The files written.
    """
    from sparsekd.plots import save  # matplotlib: not worth loading to print tables

    files = save(suite.figures(results), folder)
    pictures = "\n\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in files)
    machine = "\n".join(f"- {name}: {value}" for name, value in results.machine.items())
    parts = [
        f"# {suite.title}\n",
        f"Written by `{suite.command}` from `{rows.name}`; draw it again with `--draw`. All times "
        "are medians of turns that the competitors took in one process, on the same masks and "
        "inputs, after the results of each had been compared with dense torch's.\n",
        pictures + "\n" if files else "",
        *(grid.markdown() for grid in grids(suite, results)),
        suite.text(results),
        f"### Machine\n\n{machine}\n",
    ]
    page = folder / "README.md"
    page.write_text("\n".join(part for part in parts if part))
    return [page, *files]
