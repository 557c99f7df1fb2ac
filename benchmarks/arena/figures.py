"""The figures of the arena beyond those of `sparsekd bench`."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from benchmarks.arena.tables import best_steps, fit, roofline_rows, waterfall_label
from benchmarks.arena.waterfall import PARTS
from sparsekd.bench.figures import LOSES
from sparsekd.bench.results import Results
from sparsekd.plots import COLORS, MARKERS, single_axes


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
    axes.axhspan(-10, 0, **LOSES)
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
        for competitor in ("sparsekd_optimized", "sparsekd"):
            rows = [
                r for r in results.rows("step", name=competitor, case=case) if r["ms"] is not None
            ]
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
    axes.axhspan(1, max(1.05, axes.get_ylim()[1]), **LOSES)
    axes.set(xlim=(0, None), ylim=(0, None))
    axes.legend(fontsize=8)
    return figure
