"""The tables of the arena beyond those of `sparsekd bench`."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from benchmarks.arena.competitors import STEPS
from benchmarks.arena.passes import PASSES
from benchmarks.arena.peaks import Peaks
from benchmarks.arena.roofline import roof
from benchmarks.arena.waterfall import PARTS
from sparsekd.bench.cases import LayerCase
from sparsekd.bench.race import is_ours
from sparsekd.bench.results import Results
from sparsekd.bench.tables import Grid, cell, percent
from sparsekd.train import Row

OURS = tuple(filter(is_ours, STEPS))


def truth_grid(results: Results) -> Grid | None:
    """Tabulate how much of the operations saved became time saved."""
    lines = []
    for row, dense, label in best_steps(results):
        saved, gained = 1 - row["flops"] / dense["flops"], 1 - row["ms"] / dense["ms"]
        lines.append(
            [
                f"{row['case']}, {percent(row['sparsity'])}",
                label,
                f"{dense['flops'] / 1e9:.1f} / {row['flops'] / 1e9:.1f}",
                f"{dense['bytes'] / 1e9:.2f} / {row['bytes'] / 1e9:.2f}",
                f"{dense['ms']:.0f} / {row['ms']:.0f}",
                f"{saved:.1%}",
                f"{gained:.1%}",
                f"{gained / saved:.0%}" if saved else "-",
            ]
        )
    header = [
        "network",
        "competitor",
        "GFLOP",
        "GB",
        "ms",
        "FLOPs saved",
        "time saved",
        "became time",
    ]
    note = (
        "Dense / sparse, one training step. FLOPs are exact: two for every stored weight, position "
        "and pass, without the first layer's input gradient. Bytes are computed layer by layer, "
        "nothing staying in a cache: two maps and the nonzeros a pass, eight maps for BatchNorm, "
        "five for ReLU, five words a parameter for SGD."
    )
    return Grid("FLOPs against time", header, lines, note) if lines else None


def best_steps(results: Results) -> list[tuple[Row, Row, str]]:
    """Pair the fastest of ours in each step with dense in its better layout."""
    found = []
    for case in results.cases("step"):
        for sparsity in results.sparsities("step"):
            ours = [results.find("step", case, "step", name, sparsity) for name in OURS]
            timed = [row for row in ours if row and row["ms"] is not None]
            if not timed:
                continue
            row = min(timed, key=lambda row: row["ms"])
            dense = results.dense(row)
            if dense is not None:
                found.append((row, dense, STEPS[row["arm"]].label))
    return found


def roofline_rows(results: Results) -> list[Row]:
    """Compare every sparse pass with its roof.

    Args:
        results: with the rows of the levels "op" and "peaks".

    Returns:
        A row a (layer, pass, sparsity) in the faster of our layouts: `gflops`, `bound`,
        `roof_gflops`, `fraction`, `intensity` (FLOPs a byte of memory).
    """
    measured = [row for row in results.rows("peaks") if "flops" in row]
    if not measured:
        return []
    top = measured[-1]
    peaks = Peaks(top["flops"], top["l2"], top["l3"], top["memory"])
    found = []
    for case in results.cases("op"):
        for name in PASSES:
            for sparsity in results.sparsities("op"):
                ours = [
                    results.find("op", case, name, f"sparsekd_{layout}", sparsity)
                    for layout in ("channels_last", "contiguous")
                ]
                timed = [row for row in ours if row and row["ms"] is not None]
                if not timed:
                    continue
                row = min(timed, key=lambda row: row["ms"])
                limit = roof(
                    LayerCase(**row["layer"]),
                    name,
                    row["nnz"],
                    peaks,
                    l1=top["l1"],
                    last_level=top["last_level"],
                )
                found.append(
                    {
                        "case": case,
                        "op": name,
                        "sparsity": sparsity,
                        "gflops": row["flops"] / row["ms"] / 1e6,
                        "bound": limit.bound,
                        "roof_gflops": limit.flops / limit.seconds / 1e9,
                        "fraction": limit.seconds * 1e3 / row["ms"],
                        "intensity": limit.flops / limit.bytes,
                    }
                )
    return found


def roofline_grid(rows: Sequence[Row]) -> Grid | None:
    """Tabulate for each pass the useful GFLOP/s, the roof above it and the share of it reached."""
    if not rows:
        return None
    sparsities = sorted({row["sparsity"] for row in rows})
    grid = Grid(
        "Useful GFLOP/s of single passes, and the roof they stand against",
        ["layer, pass", *map(percent, sparsities)],
        note="GFLOP/s at the nonzeros, the binding roof and the share of it reached.",
    )
    table = {(row["case"], row["op"], row["sparsity"]): row for row in rows}
    for case, name in dict.fromkeys((row["case"], row["op"]) for row in rows):
        cells = []
        for sparsity in sparsities:
            row = table.get((case, name, sparsity))
            cells.append(
                f"{row['gflops']:.0f} {row['bound']} {row['fraction']:.0%}" if row else "-"
            )
        grid.lines.append([f"{case} {name}", *cells])
    return grid


def waterfall_grid(results: Results) -> Grid | None:
    """Tabulate where the time of a step goes."""
    rows = [row for row in results.rows("waterfall") if "parts" in row]
    if not rows:
        return None
    header = [part.removeprefix("conv ") for part in PARTS]
    grid = Grid(
        "Where a training step's time goes, ms",
        ["network: competitor", *header, "sum"],
        note="By torch's profiler, which sees nothing inside of the compiled blocks that "
        "optimize() makes: they are the rest.",
    )
    for row in rows:
        grid.lines.append(
            [waterfall_label(row)]
            + [f"{row['parts'][part]:.0f}" for part in PARTS]
            + [f"{row['ms']:.0f}"]
        )
    return grid


def waterfall_label(row: Row) -> str:
    """Return the label of a bar of the waterfall."""
    at = "" if row["sparsity"] is None else f", {percent(row['sparsity'])}"
    return f"{row['case']}: {STEPS[row['arm']].label}{at}"


def memory_grid(results: Results) -> Grid | None:
    """Tabulate the peak memory of a training step."""
    rows = [row for row in results.rows("memory") if "live_mib" in row]
    if not rows:
        return None
    grid = Grid(
        "Peak memory of a training step, MiB",
        ["network", "competitor", "live", "of dense", "held", "plans", "resident"],
        note="Held between steps are parameters, gradients, momentum and indices; plans are what "
        "the compiled module keeps beside them; live is both and the tensors of a step at their "
        "peak, against dense in its leaner layout. Resident is the peak of a process over three "
        "steps, with whatever holes the allocator left.",
    )
    for case in results.cases("memory"):
        group = [row for row in rows if row["case"] == case]
        dense = min((r["live_mib"] for r in group if r["sparsity"] is None), default=None)
        for row in group:
            at = "" if row["sparsity"] is None else f", {percent(row['sparsity'])}"
            share = row["live_mib"] / dense if dense else None
            grid.lines.append(
                [
                    case,
                    STEPS[row["arm"]].label + at,
                    f"{row['live_mib']:.0f}",
                    cell(share, ".2f"),
                    f"{row['held_mib']:.0f}",
                    f"{row['plans_mib']:.0f}",
                    f"{row['peak_mib']:.0f}",
                ]
            )
    return grid


def density_grid(results: Results) -> Grid | None:
    """Tabulate the line that a step's time follows against density, and its intercept."""
    grid = Grid(
        "Time of a step against density",
        [
            "network, competitor",
            "at density 0, ms",
            "per 10 % of density, ms",
            "R²",
            "intercept / dense",
            "slope / dense",
            "limit",
        ],
        note="Least squares from 80 % sparsity on; below, some layers run dense. The intercept is "
        "what a step costs without any multiplication in the sparse layers, and the limit how many "
        "times faster than dense that would be.",
    )
    for case in results.cases("step"):
        for name in OURS:
            line, dense = density_line(results, case, name)
            if line and dense:
                grid.lines.append(
                    [
                        f"{case}, {STEPS[name].label}",
                        f"{line.intercept * dense:.1f}",
                        f"{line.slope * dense / 10:.1f}",
                        f"{line.r2:.3f}",
                        f"{line.intercept:.2f}",
                        f"{line.slope:.2f}",
                        cell(1 / line.intercept if line.intercept > 0 else None, ".1f", "x"),
                    ]
                )
    return grid if grid.lines else None


class Line(NamedTuple):
    """A straight line fitted through times against density."""

    intercept: float
    slope: float
    r2: float


def density_points(results: Results, case: str, name: str) -> list[tuple[float, float]]:
    """List (density, time over that of the better dense layout) of a competitor's steps.

    Each time is held against dense as it was timed in turns with it.
    """
    speedups = [
        (1 - row["sparsity"], results.speedup(row))
        for row in results.rows("step", name=name, case=case)
    ]
    return sorted((density, 1 / speedup) for density, speedup in speedups if speedup)


def density_line(results: Results, case: str, name: str) -> tuple[Line | None, float | None]:
    """Fit the line of a competitor's steps over dense ones; return it and the dense time in ms."""
    rows = results.rows("step", name=name, case=case)
    dense = [ms for ms in map(results.dense_ms, rows) if ms is not None]
    line = fit(density_points(results, case, name))
    return line, statistics.median(dense) if dense else None


def fit(points: Sequence[tuple[float, float]]) -> Line | None:
    """Fit a line through (density, time) by least squares.

    Densities above a fifth do not count: there the dispatcher runs some layers dense, at a time
    that no longer depends on density.

    Returns:
        The line, None with fewer than three points.

    Example:
        >>> fit([(0.05, 1.5), (0.1, 2.0), (0.2, 3.0), (0.5, 4.0)]).intercept
        1.0
    """
    points = [point for point in points if point[0] <= 0.2 + 1e-9]
    if len(points) < 3:
        return None
    x, y = zip(*points, strict=True)
    slope, intercept = statistics.linear_regression(x, y)
    rest = sum((b - intercept - slope * a) ** 2 for a, b in points)
    total = sum((b - statistics.mean(y)) ** 2 for b in y)
    return Line(round(intercept, 9), slope, 1 - rest / total if total else 1.0)
