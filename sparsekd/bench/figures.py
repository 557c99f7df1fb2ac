"""Draw the figures of the arena from rows, and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from sparsekd.bench.arms import LAYER_ARMS
from sparsekd.bench.results import Results, fit
from sparsekd.bench.steps import STEP_ARMS
from sparsekd.bench.tables import (
    LAYER_GEOMEANS,
    best_steps,
    layer_cases,
    percent,
    roofline_rows,
    waterfall_label,
)
from sparsekd.bench.waterfall import PARTS
from sparsekd.train.figures import COLORS, MARKERS, clean, single_axes, stretched

_TIMES = FuncFormatter(lambda value, _: f"{value:g}x")
_LOSES: dict[str, Any] = {"color": "#d55e00", "alpha": 0.08, "linewidth": 0}


def draw(results: Results, folder: Path) -> list[Path]:
    """Draw every figure the rows allow.

    Args:
        results: the rows.
        folder: where the PNG files go.

    Returns:
        The files written.

    Example:
        >>> draw(Results([]), Path("unused"))
        []
    """
    files = []
    for name, make in FIGURES.items():
        figure = make(results)
        if figure is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files.append(folder / f"{name}.png")
            figure.savefig(files[-1], dpi=150)
    return files


def speedup_layers(results: Results) -> Figure | None:
    """Plot speed-up against sparsity: a thin line a convolution, the geometric means bold."""
    cases, sparsities = layer_cases(results, "conv"), results.sparsities("layer")
    if not cases or not sparsities:
        return None
    figure, axes = single_axes(
        f"Forward + backward of {len(cases)} convolutions",
        "sparsity",
        "times faster than float32 dense, better layout",
    )
    for case in cases:
        _plot_speedups(
            axes, results, "layer", case, "sparsekd", color="#0072b2", linewidth=0.5, alpha=0.45
        )
    for number, arm in enumerate(LAYER_GEOMEANS):
        means = [(s, results.geomean(arm, s, cases)) for s in sparsities]
        points = [(stretched(s), mean) for s, mean in means if mean is not None]
        if points:
            label = f"{LAYER_ARMS[arm].label} (geometric mean)"
            style: dict[str, Any] = {
                "color": COLORS[number],
                "marker": MARKERS[number],
                "linewidth": 2.2,
            }
            axes.plot(*zip(*points, strict=True), label=label, **style)
    bf16 = results.geomean("dense_bf16", None, cases)
    if bf16 is not None:
        axes.axhline(bf16, color="#666666", linestyle=":", label="dense, bfloat16 (geometric mean)")
    _sparsity_axis(axes, sparsities)
    _mark_losses(axes)
    axes.legend(fontsize=8)
    return figure


def speedup_models(results: Results) -> Figure | None:
    """Plot the speed-up of whole steps against sparsity, a panel a network."""
    cases, sparsities = results.cases("step"), results.sparsities("step")
    if not cases or not sparsities:
        return None
    columns = min(3, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(4.0 * columns + 0.4, 3.4 * lines + 0.5), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    shown: dict[str, Line2D] = {}
    for axes, case in zip(grid.flat, cases, strict=False):
        for number, arm in enumerate(arm for arm in STEP_ARMS.values() if arm.sparse):
            style = {"color": COLORS[number], "marker": MARKERS[number]}
            line = _plot_speedups(axes, results, "step", case, arm.name, **style)
            if line is not None:
                shown.setdefault(arm.label, line)
        for name, dashes in (
            ("dense_compiled", "--"),
            ("dense_bf16", ":"),
            ("dense_optimized", "-."),
        ):
            speedup = results.speedup(results.find("step", case, "step", name))
            if speedup is not None:
                line = axes.axhline(speedup, color="#666666", linestyle=dashes)
                shown.setdefault(STEP_ARMS[name].label, line)
        axes.set_title(case, fontsize=10)
        clean(axes)
        _sparsity_axis(axes, sparsities)
        _mark_losses(axes)
    for axes in list(grid.flat)[len(cases) :]:
        axes.set_axis_off()
    grid[0, 0].set_ylabel("times faster than dense, better layout")
    figure.legend(
        list(shown.values()), list(shown), loc="outside upper center", ncols=3, frameon=False
    )
    return figure


def roofline(results: Results) -> Figure | None:
    """Plot useful GFLOP/s against FLOPs a byte of memory, under the measured roofs."""
    rows = roofline_rows(results)
    if not rows:
        return None
    top = next(row for row in reversed(results.rows("peaks")) if "flops" in row)
    figure, axes = single_axes(
        f"Single passes under the roofs of {top['op']}, {results.machine['isa']}",
        "useful FLOPs a byte moved to or from memory",
        "useful GFLOP/s",
    )
    bounds = list(dict.fromkeys(row["bound"] for row in rows))
    for name, marker in zip(("fprop", "dgrad", "wgrad"), MARKERS, strict=False):
        for number, bound in enumerate(bounds):
            group = [row for row in rows if (row["op"], row["bound"]) == (name, bound)]
            if group:
                axes.scatter(
                    [row["intensity"] for row in group],
                    [row["gflops"] for row in group],
                    s=14,
                    marker=marker,
                    color=COLORS[number],
                    alpha=0.7,
                    linewidths=0,
                    label=f"{name}, bound by {bound}",
                )
    low = min(row["intensity"] for row in rows) / 1.5
    high = max(row["intensity"] for row in rows) * 1.5
    roofs = (("memory", "DRAM read"), ("l3", "L3 read"), ("l2", "L2 read"))
    for (field, label), dashes in zip(roofs, ("-", "--", ":"), strict=True):
        bandwidth = top[field] / 1e9
        ends = [low, min(high, top["flops"] / 1e9 / bandwidth)]
        text = f"{label} {bandwidth:.0f} GB/s"
        if ends[1] > low:
            axes.plot(ends, [x * bandwidth for x in ends], dashes, color="#444444", label=text)
    peak = top["flops"] / 1e9
    axes.axhline(peak, color="#000000", linewidth=1.2, label=f"FMA peak {peak:.0f} GFLOP/s")
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    figure.set_size_inches(8.4, 5.4)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    return figure


def waterfall(results: Results) -> Figure | None:
    """Stack the parts of a training step, dense and sparse."""
    rows = [row for row in results.rows("waterfall") if "parts" in row]
    if not rows:
        return None
    figure, axes = single_axes("Where a training step's time goes", "ms", "")
    figure.set_size_inches(8.4, 1.6 + 0.42 * len(rows))
    axes.set_axisbelow(True)
    left = [0.0] * len(rows)
    colors = [*COLORS, "#999999", "#bbbbbb"]
    for part, color in zip(PARTS, colors, strict=True):
        widths = [row["parts"][part] for row in rows]
        axes.barh(range(len(rows)), widths, left=left, label=part, color=color, height=0.7)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.set_yticks(range(len(rows)), [waterfall_label(row) for row in rows], fontsize=8)
    axes.invert_yaxis()
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return figure


def flops_and_time(results: Results) -> Figure | None:
    """Plot the share of time saved against the share of FLOPs saved, a line a network."""
    pairs = best_steps(results)
    if not pairs:
        return None
    figure, axes = single_axes(
        "FLOPs saved and time saved, whole training steps", "share of FLOPs saved", "of time saved"
    )
    for number, case in enumerate(results.cases("step")):
        group = [(row, dense) for row, dense, _ in pairs if row["case"] == case]
        if group:
            axes.plot(
                [1 - row["flops"] / dense["flops"] for row, dense in group],
                [1 - row["ms"] / dense["ms"] for row, dense in group],
                color=COLORS[number % len(COLORS)],
                marker=MARKERS[number % len(MARKERS)],
                label=case,
            )
    axes.plot([0, 1], [0, 1], color="#666666", linestyle="--", label="all of it")
    axes.axhspan(-10, 0, **_LOSES)
    axes.set(xlim=(0, 1), ylim=(min(-0.05, axes.get_ylim()[0]), 1))
    axes.legend(fontsize=8)
    return figure


def time_and_density(results: Results) -> Figure | None:
    """Plot a step's time over dense's against density, with the line fitted through it."""
    figure, axes = single_axes(
        "A step's time against density", "density of the sparse layers", "time, dense = 1"
    )
    drawn = 0
    for number, case in enumerate(results.cases("step")):
        for arm in ("sparsekd_optimized", "sparsekd"):
            rows = [r for r in results.rows("step", arm=arm, case=case) if r["ms"] is not None]
            dense = results.dense_ms(rows[0]) if rows else None
            points = [(1 - row["sparsity"], row["ms"] / (dense or 1)) for row in rows]
            line = fit(points)
            if line is None or dense is None:
                continue
            style: dict[str, Any] = {"color": COLORS[number % len(COLORS)]}
            label = f"{case}: {line.intercept:.3f} + {line.slope:.2f} density, R² {line.r2:.3f}"
            axes.plot(*zip(*points, strict=True), MARKERS[number % len(MARKERS)], **style)
            ends = [0.0, min(0.2, max(density for density, _ in points))]
            axes.plot(ends, [line.intercept + line.slope * x for x in ends], label=label, **style)
            drawn += 1
            break
    if not drawn:
        return None
    axes.axhspan(1, max(1.05, axes.get_ylim()[1]), **_LOSES)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=8)
    return figure


FIGURES: dict[str, Callable[[Results], Figure | None]] = {
    "speedup_layers": speedup_layers,
    "speedup_models": speedup_models,
    "roofline": roofline,
    "waterfall": waterfall,
    "flops_and_time": flops_and_time,
    "time_and_density": time_and_density,
}


def _plot_speedups(
    axes: Axes, results: Results, level: str, case: str, arm: str, **style: Any
) -> Line2D | None:
    rows = results.rows(level, arm=arm, case=case)
    speedups = [(stretched(r["sparsity"]), results.speedup(r)) for r in rows if r["ms"] is not None]
    points = sorted((x, y) for x, y in speedups if y is not None)
    if not points:
        return None
    return axes.plot(*zip(*points, strict=True), **style)[0]


def _sparsity_axis(axes: Axes, sparsities: Sequence[float]) -> None:
    axes.xaxis.set_major_locator(FixedLocator([stretched(s) for s in sparsities]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xticklabels([percent(s) for s in sparsities], fontsize=8)


def _mark_losses(axes: Axes) -> None:
    """Shade where dense wins, on an axis of factors."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(_TIMES)
    low, high = axes.get_ylim()
    axes.axhspan(min(low, 0.5), 1, **_LOSES)
    axes.set_ylim(min(low, 0.5), high)
    axes.text(
        0.98, 0.02, "dense wins", transform=axes.transAxes, ha="right", fontsize=8, color="#d55e00"
    )
