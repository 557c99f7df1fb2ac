"""The table and the figure of what was raced on a GPU, made from rows."""

from __future__ import annotations

import statistics
from pathlib import Path

from sparsekd.bench.gpu import LEVELS, GpuArm, arms_of
from sparsekd.bench.results import Results
from sparsekd.bench.tables import Grid, percent
from sparsekd.train import Row

_NOTE = (
    "Milliseconds and, in brackets, times faster than the fastest dense arm of any precision, in "
    "turns with it."
)


def gpu_grids(results: Results) -> list[Grid]:
    """Build a table for each level and operation that there are rows of."""
    return [grid for level in LEVELS for grid in _grids(results, level)]


def _grids(results: Results, level: str) -> list[Grid]:
    grids = []
    for op in dict.fromkeys(row["op"] for row in results.rows(level)):
        rows = [row for row in results.rows(level) if row["op"] == op]
        sparsities = sorted({row["sparsity"] for row in rows if row["sparsity"] is not None})
        header = ["case", "arm", "dense", *map(percent, sparsities)]
        title = f"{results.machine.get('device', 'device')}: {level.partition(' ')[2]}, {op}"
        grid = Grid(title, header, note=_NOTE)
        for case in dict.fromkeys(row["case"] for row in rows):
            for arm in arms_of(rows):
                found = [results.find(level, case, op, arm.name, s) for s in (None, *sparsities)]
                if any(row is not None and row["ms"] is not None for row in found):
                    grid.lines.append([case, arm.label, *(_cell(results, row) for row in found)])
        if grid.lines:
            grids.append(grid)
    return grids


def _cell(results: Results, row: Row | None) -> str:
    if row is None or row["ms"] is None:
        return "-"
    speedup = results.speedup(row)
    return f"{row['ms']:.3g}" + ("" if speedup is None else f" ({speedup:.2f}x)")


def draw_gpu(results: Results, folder: Path) -> list[Path]:
    """Draw the speed-up of each sparse arm over the fastest dense one, layers and steps.

    Returns:
        The files written.
    """
    from sparsekd.train.figures import COLORS, MARKERS, clean, single_axes, stretched

    files = []
    for level, op in ((LEVELS[0], "layer"), (LEVELS[1], "step")):
        rows = [row for row in results.rows(level) if row["op"] == op and row["ms"] is not None]
        arms = [arm for arm in arms_of(rows) if arm.sparse]
        if not arms:
            continue
        what = "convolutions of ResNet-18 and linear layers" if op == "layer" else "training steps"
        figure, axes = single_axes(
            f"{results.machine.get('device')}: {what}",
            "sparsity",
            "times faster than the fastest dense arm (geometric mean)",
        )
        for number, arm in enumerate(arms):
            points = [(stretched(s), mean) for s, mean in _means(results, rows, arm)]
            axes.plot(
                *zip(*points, strict=True),
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                label=arm.label,
            )
        axes.axhline(1, color="#666666", linestyle="--")
        ticks = sorted({row["sparsity"] for row in rows if row["sparsity"] is not None})
        axes.set_xticks([stretched(s) for s in ticks], [percent(s) for s in ticks])
        axes.set(yscale="log")
        axes.legend(fontsize=8)
        clean(axes)
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"gpu_{op}.png")
        figure.savefig(files[-1], dpi=150)
    return files


def _means(results: Results, rows: list[Row], arm: GpuArm) -> list[tuple[float, float]]:
    means = []
    for sparsity in sorted({row["sparsity"] for row in rows if row["arm"] == arm.name}):
        chosen = [row for row in rows if (row["arm"], row["sparsity"]) == (arm.name, sparsity)]
        speedups = [s for s in map(results.speedup, chosen) if s is not None]
        if speedups:
            means.append((sparsity, statistics.geometric_mean(speedups)))
    return means
