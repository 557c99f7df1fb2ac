"""The figures of the arena beyond those of `sparsekd bench`."""

from __future__ import annotations

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from benchmarks.arena.tables import (
    best_steps,
    density_line,
    density_points,
    roofline_rows,
    waterfall_label,
)
from benchmarks.arena.waterfall import PARTS
from sparsekd.bench.figures import LOSES
from sparsekd.bench.results import Results
from sparsekd.bench.tables import percent
from sparsekd.plots import (
    COLORS,
    MARKERS,
    Label,
    label_points,
    line_style,
    log_axis,
    panel_grid,
    single_axes,
)

_FITTED = 0.205  # the densities that the line is fitted to, and a little room
_PERCENT = FuncFormatter(lambda value, _: percent(value))
_LINES = {"sparsekd_optimized": "optimize()", "sparsekd": "plain"}


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
    log_axis(axes.xaxis, "{:g}".format)
    log_axis(axes.yaxis, "{:g}".format)
    axes.set_xlim(low, high)
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
        label = "blocks of optimize(), rest" if part == "rest" else part
        axes.barh(range(len(rows)), widths, left=left, label=label, color=color, height=0.7)
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
        "FLOPs saved and time saved, whole training steps",
        "FLOPs saved",
        "time saved",
    )
    highest: dict[float, tuple[float, float]] = {}
    for number, case in enumerate(results.cases("step")):
        group = [(row, dense) for row, dense, _ in pairs if row["case"] == case]
        points = [
            (1 - row["flops"] / dense["flops"], 1 - row["ms"] / dense["ms"]) for row, dense in group
        ]
        if not points:
            continue
        axes.plot(*zip(*points, strict=True), label=case, **line_style(number))
        for (row, _), point in zip(group, points, strict=True):
            top = highest.setdefault(row["sparsity"], point)
            highest[row["sparsity"]] = max(top, point, key=lambda place: place[1])
    axes.plot([0, 1], [0, 1], color="#666666", linestyle="--", label="time saved = FLOPs saved")
    low = min(-0.05, axes.get_ylim()[0])  # before the shading, which moves it
    axes.axhspan(low, 0, **LOSES)
    axes.set(xlim=(0, 1), ylim=(low, 1))
    axes.xaxis.set_major_formatter(_PERCENT)
    axes.yaxis.set_major_formatter(_PERCENT)
    axes.legend(fontsize=8)
    # networks of one sparsity lie above each other
    label_points(axes, [Label(percent(s), *point, "#000000") for s, point in highest.items()])
    return figure


def time_and_density(results: Results) -> Figure | None:
    """Plot a step's time over dense's against density with the fitted lines, a panel a network."""
    cases = [
        case
        for case in results.cases("step")
        if any(density_line(results, case, name)[0] for name in _LINES)
    ]
    if not cases:
        return None
    figure, panels = panel_grid(len(cases), "density of the sparse layers", "time, dense = 1")
    for axes, case in zip(panels, cases, strict=True):
        axes.set_title(case, fontsize=10)
        for number, name in enumerate(_LINES):
            _plot_line(axes, results, case, name, COLORS[number], MARKERS[number])
        bf16 = results.speedup(results.find("step", case, "step", "dense_bf16"))
        if bf16 is not None:
            axes.axhline(1 / bf16, color="#666666", linestyle=":", label="dense, bfloat16")
        top = max(1.05, axes.get_ylim()[1])
        axes.axhspan(1, top, **LOSES)
        axes.set(xlim=(0, _FITTED * 1.05), ylim=(0, top))
        axes.legend(fontsize=7, loc="lower right", framealpha=0.8)
    return figure


def _plot_line(axes: Axes, results: Results, case: str, name: str, color: str, marker: str) -> None:
    line, _ = density_line(results, case, name)
    if line is None:
        return
    points = [one for one in density_points(results, case, name) if one[0] <= _FITTED]
    axes.plot(*zip(*points, strict=True), linestyle="", marker=marker, color=color)
    label = f"{_LINES[name]}: {line.intercept:.3f} + {line.slope:.2f} d"
    ends = [0.0, _FITTED]
    axes.plot(ends, [line.intercept + line.slope * x for x in ends], color=color, label=label)
