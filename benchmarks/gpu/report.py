"""The tables and figures of what was raced on a GPU, made from rows."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure

from benchmarks.gpu.competitors import COMPETITORS, GpuCompetitor
from sparsekd.bench.results import Results
from sparsekd.bench.tables import Grid, percent
from sparsekd.plots import line_style, log_axis, single_axes, sparsity_axis, stretched
from sparsekd.train import Row

LEVELS = ("gpu layer", "gpu step")

_NOTE = (
    "Milliseconds and, in brackets, times faster than the fastest dense one of any precision, in "
    "turns with it."
)


def grids(results: Results) -> list[Grid | None]:
    """Build a table for each level and operation that there are rows of."""
    return [grid for level in LEVELS for grid in _grids(results, level)]


def _grids(results: Results, level: str) -> list[Grid]:
    grids = []
    for op in dict.fromkeys(row["op"] for row in results.rows(level)):
        rows = [row for row in results.rows(level) if row["op"] == op]
        sparsities = _sparsities(rows)
        header = ["case", "competitor", "dense", *map(percent, sparsities)]
        title = f"{results.machine.get('device', 'device')}: {level.partition(' ')[2]}, {op}"
        grid = Grid(title, header, note=_NOTE)
        for case in dict.fromkeys(row["case"] for row in rows):
            for one in competitors_of(rows):
                found = [results.find(level, case, op, one.name, s) for s in (None, *sparsities)]
                if any(row is not None and row["ms"] is not None for row in found):
                    grid.lines.append([case, one.label, *(_cell(results, row) for row in found)])
        if grid.lines:
            grids.append(grid)
    return grids


def _cell(results: Results, row: Row | None) -> str:
    if row is None or row["ms"] is None:
        return "-"
    speedup = results.speedup(row)
    return f"{row['ms']:.3g}" + ("" if speedup is None else f" ({speedup:.2f}x)")


def figures(results: Results) -> dict[str, Figure | None]:
    """Draw the speed-up of each sparse competitor over the fastest dense one, layers and steps."""
    return {
        "gpu_layer": _figure(
            results, "gpu layer", "layer", "convolutions of ResNet-18 and linear layers"
        ),
        "gpu_step": _figure(results, "gpu step", "step", "training steps"),
    }


def _figure(results: Results, level: str, op: str, what: str) -> Figure | None:
    rows = [row for row in results.rows(level) if row["op"] == op and row["ms"] is not None]
    sparse = [competitor for competitor in competitors_of(rows) if competitor.sparse]
    if not sparse:
        return None
    figure, axes = single_axes(
        f"{results.machine.get('device')}: {what}",
        "sparsity",
        "times faster than the fastest dense (geometric mean)",
    )
    for number, competitor in enumerate(sparse):
        points = [(stretched(s), mean) for s, mean in _means(results, rows, competitor)]
        axes.plot(*zip(*points, strict=True), label=competitor.label, **line_style(number))
    axes.axhline(1, color="#666666", linestyle="--")
    sparsity_axis(axes, _sparsities(rows), percent)
    log_axis(axes.yaxis, "{:g}x".format)
    axes.legend(fontsize=8)
    return figure


def competitors_of(rows: Sequence[Row]) -> list[GpuCompetitor]:
    """List the competitors that rows are of, in the order of their table.

    Example:
        >>> [competitor.label for competitor in competitors_of([{"arm": "dense_tf32"}])]
        ['dense, TF32']
    """
    present = {row["arm"] for row in rows}
    return [competitor for name, competitor in COMPETITORS.items() if name in present]


def _sparsities(rows: Sequence[Row]) -> list[float]:
    return sorted({row["sparsity"] for row in rows if row["sparsity"] is not None})


def _means(
    results: Results, rows: Sequence[Row], competitor: GpuCompetitor
) -> list[tuple[float, float]]:
    means = []
    mine = [row for row in rows if row["arm"] == competitor.name]
    for sparsity in _sparsities(mine):
        chosen = [row for row in mine if row["sparsity"] == sparsity]
        speedups = [s for s in map(results.speedup, chosen) if s is not None]
        if speedups:
            means.append((sparsity, statistics.geometric_mean(speedups)))
    return means
