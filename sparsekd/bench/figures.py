"""The figures of a benchmark, drawn from rows and from nothing else."""

from __future__ import annotations

from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from sparsekd.bench.race import Field
from sparsekd.bench.results import Results
from sparsekd.bench.tables import geomeans, layer_cases, percent
from sparsekd.plots import (
    COLORS,
    line_style,
    panel_grid,
    single_axes,
    sparsity_axis,
    stretched,
    top_legend,
)

LOSES: dict[str, Any] = {"color": "#d55e00", "alpha": 0.08, "linewidth": 0}
"""How the region where dense wins is shaded."""
_TIMES = FuncFormatter(lambda value, _: f"{value:g}x")
_LEVEL: dict[str, Any] = {"dense_compiled": "--", "dense_bf16": ":", "dense_optimized": "-."}
_ENGINES: dict[str, Any] = {
    "dense_contiguous": ":",
    "dense_channels_last": (0, (1, 3)),
    "dense_compiled": "--",
    "onnxruntime": "-.",
    "openvino": (0, (5, 1, 1, 1, 1, 1)),
}


def speedup_layers(results: Results, competitors: Field) -> Figure | None:
    """Plot speed-up against sparsity: a thin line a convolution, the geometric means bold."""
    cases, sparsities = layer_cases(results, "conv"), results.sparsities("layer")
    if not cases or not sparsities:
        return None
    figure, axes = single_axes(
        f"Forward + backward of {len(cases)} convolutions",
        "sparsity",
        "times faster than float32 dense, better layout",
    )
    thin = {"color": COLORS[0], "linewidth": 0.5, "alpha": 0.45}
    for case in cases:
        _plot_speedups(axes, results, "layer", case, "sparsekd", **thin)
    drawn = 0
    for name in geomeans(competitors):
        means = [(s, results.geomean(name, s, cases)) for s in sparsities]
        points = [(stretched(s), mean) for s, mean in means if mean is not None]
        if points:
            label = f"{competitors[name].label} (geometric mean)"
            axes.plot(*zip(*points, strict=True), label=label, linewidth=2.2, **line_style(drawn))
            drawn += 1
    bf16 = results.geomean("dense_bf16", None, cases)
    if bf16 is not None:
        axes.axhline(bf16, color="#666666", linestyle=":", label="dense, bfloat16 (geometric mean)")
    sparsity_axis(axes, sparsities, percent, fontsize=8)
    _mark_losses(axes)
    axes.legend(fontsize=8)
    return figure


def speedup_models(results: Results, competitors: Field, level: str = "step") -> Figure | None:
    """Plot the speed-up of whole steps, or of inference, against sparsity, a panel a network."""
    cases, sparsities = results.cases(level), results.sparsities(level)
    if not cases or not sparsities:
        return None
    over = "dense,\nbetter layout" if level == "step" else "the\nfastest dense engine"
    figure, panels = panel_grid(len(cases), "sparsity", f"times faster than {over}")
    sparse = [competitor for competitor in competitors.values() if competitor.sparse]
    shown: dict[str, Line2D] = {}
    for axes, case in zip(panels, cases, strict=True):
        for number, competitor in enumerate(sparse):
            line = _plot_speedups(axes, results, level, case, competitor.name, **line_style(number))
            if line is not None:
                shown.setdefault(competitor.label, line)
        for name, dashes in (_LEVEL if level == "step" else _ENGINES).items():
            speedup = results.speedup(results.find(level, case, level, name))
            if speedup is not None:
                line = axes.axhline(speedup, color="#666666", linestyle=dashes)
                shown.setdefault(competitors[name].label, line)
        axes.set_title(case, fontsize=10)
        sparsity_axis(axes, sparsities, percent, fontsize=8)
        _mark_losses(axes)
    top_legend(figure, list(shown.values()), list(shown))
    return figure


def _plot_speedups(
    axes: Axes, results: Results, level: str, case: str, name: str, **style: Any
) -> Line2D | None:
    rows = results.rows(level, name=name, case=case)
    speedups = [(stretched(r["sparsity"]), results.speedup(r)) for r in rows if r["ms"] is not None]
    points = sorted((x, y) for x, y in speedups if y is not None)
    if not points:
        return None
    return axes.plot(*zip(*points, strict=True), **style)[0]


def _mark_losses(axes: Axes) -> None:
    """Shade where dense wins, on an axis of factors."""
    axes.set_yscale("log", base=2)
    axes.yaxis.set_major_formatter(_TIMES)
    low, high = axes.get_ylim()
    axes.axhspan(min(low, 0.5), 1, **LOSES)
    axes.set_ylim(min(low, 0.5), high)
    axes.text(
        0.98, 0.02, "dense wins", transform=axes.transAxes, ha="right", fontsize=8, color="#d55e00"
    )
