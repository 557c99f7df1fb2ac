"""Turn rows into a report: tables for the terminal, Markdown and figures in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from sparsekd.bench import tables
from sparsekd.bench.gpu_report import draw_gpu, gpu_grids
from sparsekd.bench.results import Results
from sparsekd.errors import CheckpointError
from sparsekd.train import MetricsLog, Row


def read(path: Path) -> Results:
    """Read the rows of a file.

    Args:
        path: a JSON-lines file that `sparsekd bench` wrote.

    Returns:
        Its results.

    Raises:
        CheckpointError: the file has no rows, or is damaged.
    """
    rows = MetricsLog(path).rows()
    if not rows:
        raise CheckpointError(f"{path}: expected rows of `sparsekd bench`, found none")
    return Results(rows)


def grids(results: Results) -> list[tables.Grid]:
    """Build every table that the rows allow."""
    found = [
        tables.layer_grid(results, "conv"),
        tables.layer_grid(results, "linear"),
        tables.step_grid(results, "step"),
        tables.step_grid(results, "epoch"),
        tables.truth_grid(results),
        tables.density_grid(results),
        tables.waterfall_grid(results),
        tables.memory_grid(results),
        tables.roofline_grid(tables.roofline_rows(results)),
        *gpu_grids(results),
        tables.shortfall_grid(results),
    ]
    return [grid for grid in found if grid is not None]


def show(results: Results, console: Console) -> None:
    """Print the tables."""
    for grid in grids(results):
        console.print(grid.rich(), highlight=False)


def write(results: Results, folder: Path, rows: Path) -> list[Path]:
    """Write the tables as Markdown beside the figures.

    Args:
        results: the rows.
        folder: where README.md and the PNG files go.
        rows: the file that the rows came from, named in the text.

    Returns:
        The files written.
    """
    from sparsekd.bench.figures import draw  # matplotlib: not worth loading to print tables

    folder.mkdir(parents=True, exist_ok=True)
    files = [*draw(results, folder), *draw_gpu(results, folder)]
    pictures = "\n\n".join(f"![{path.stem.replace('_', ' ')}]({path.name})" for path in files)
    machine = "\n".join(f"- {name}: {value}" for name, value in results.machine.items())
    parts = [
        "# The arena\n",
        f"Written by `sparsekd bench` from `{rows.name}`; draw it again with `--draw`. All times "
        "are medians of turns that the arms took in one process, on the same masks and inputs, "
        "each arm after its results had been held against dense torch.\n",
        pictures + "\n" if files else "",
        *(grid.markdown() for grid in grids(results)),
        _roofs(results.rows("peaks")),
        f"### Machine\n\n{machine}\n",
    ]
    page = folder / "README.md"
    page.write_text("\n".join(part for part in parts if part))
    return [page, *files]


def _roofs(rows: Sequence[Row]) -> str:
    if not rows or "flops" not in rows[-1]:
        return ""
    top = rows[-1]
    return (
        f"### Roofs\n\nMeasured on {top['op']}: {top['flops'] / 1e9:.0f} GFLOP/s of independent "
        f"fused multiply-adds; reading {top['l2'] / 1e9:.0f} GB/s from L2, {top['l3'] / 1e9:.0f} "
        f"from L3, {top['memory'] / 1e9:.0f} from memory. `sparsekd/bench/roofline.py` says what a "
        "pass must move.\n"
    )
