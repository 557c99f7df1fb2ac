"""The tables and figures of what was raced on a GPU, made from rows."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from functools import partial

from matplotlib.figure import Figure

from benchmarks.gpu.competitors import COMPETITORS, GpuCompetitor
from benchmarks.gpu.predicted import predicted_ms
from benchmarks.gpu_roofline import Gpu, sheet_of
from sparsekd.bench.cases import LayerCase
from sparsekd.bench.results import Results
from sparsekd.bench.tables import Grid, percent
from sparsekd.plots import line_style, log_axis, single_axes, sparsity_axis, stretched
from sparsekd.train import Row

LEVELS = ("gpu layer", "gpu step")

Cell = Callable[[Row], str | None]

_NOTE = (
    "Milliseconds and, in brackets, times faster than the fastest dense one of any precision, in "
    "turns with it."
)
_PREDICTED = (
    "Milliseconds that the data sheet of the {name} (SXM) allows, by `benchmarks/gpu_roofline.py`: "
    "csr by `gather` and `sample` of csrc/cuda, bcsr by `tile_product` and `tile_sample`, dense at "
    "the peak. **Computed, not measured**; in brackets the time measured over it."
)


def grids(results: Results) -> list[Grid | None]:
    """Build a table for each level and operation that there are rows of, then what was predicted.

    Predictions are for GPUs whose data sheet `benchmarks.gpu_roofline` has.
    """
    tables: list[Grid | None] = []
    for level in LEVELS:
        tables += _grids(results, level, level.partition(" ")[2], _NOTE, partial(_timed, results))
    sheet = sheet_of(results.machine.get("device", ""))
    if sheet is not None:
        note = _PREDICTED.format(name=sheet.name)
        tables += _grids(results, "gpu layer", "Predicted", note, partial(_predicted, sheet))
    return tables


def _grids(results: Results, level: str, what: str, note: str, cell: Cell) -> list[Grid]:
    grids = []
    for op in dict.fromkeys(row["op"] for row in results.rows(level)):
        rows = [row for row in results.rows(level) if row["op"] == op and cell(row) is not None]
        sparsities = _sparsities(rows)
        header = ["case", "competitor", "dense", *map(percent, sparsities)]
        title = f"{results.machine.get('device', 'device')}: {what}, {op}"
        grid = Grid(title, header, note=note)
        for case in dict.fromkeys(row["case"] for row in rows):
            mine = [row for row in rows if row["case"] == case]
            for one in competitors_of(mine):
                cells = {row["sparsity"]: cell(row) for row in mine if row["arm"] == one.name}
                texts = (cells.get(sparsity) or "-" for sparsity in (None, *sparsities))
                grid.lines.append([case, one.label, *texts])
        if grid.lines:
            grids.append(grid)
    return grids


def _timed(results: Results, row: Row) -> str | None:
    if row["ms"] is None:
        return None
    speedup = results.speedup(row)
    return f"{row['ms']:.3g}" + ("" if speedup is None else f" ({speedup:.2f}x)")


def _predicted(sheet: Gpu, row: Row) -> str | None:
    one = COMPETITORS.get(row["arm"])
    if one is None or "layer" not in row or "skipped" in row:
        return None
    ms = predicted_ms(one, LayerCase(**row["layer"]), row["op"], row["sparsity"] or 0.0, sheet)
    if ms is None:
        return None
    return f"{ms:.3g}" + ("" if row["ms"] is None else f" ({row['ms'] / ms:.2f}x)")


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
