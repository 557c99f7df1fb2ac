"""The figures of generalized tickets, drawn from the rows of the study and from nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, stdev

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from sparsekd.analysis.bases.basis import BASES
from sparsekd.plots import clean, deviations, line_style, log_axis
from sparsekd.train import Row

_TITLES = {"lt": "LT: the initialisation's coefficients", "reinit": "Reinit: those of another"}


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Draw accuracy against numbers stored, a panel a start, one figure for every network.

    Args:
        rows: of a `BasisStudy`.

    Returns:
        Figures by the name of their file.
    """
    drawn = {}
    results = [row for row in rows if row["kind"] == "result"]
    for network in sorted({row["network"] for row in results}):
        figure = Figure(figsize=(10.5, 4.6), layout="constrained")
        panels = figure.subplots(1, 2, sharey=True)
        here = [row for row in results if row["network"] == network]
        for axes, (start, title) in zip(panels, _TITLES.items(), strict=True):
            clean(axes)
            _accuracy(axes, [r for r in here if r["basis"] == "dense" or r["start"] == start])
            axes.set_title(title, fontsize=10)
        seeds = len({row["seed"] for row in here})
        figure.suptitle(f"{network}: tickets in six bases, {seeds} seeds")
        panels[0].set_ylabel("test accuracy")
        handles, names = panels[0].get_legend_handles_labels()
        figure.legend(handles, names, loc="outside lower center", ncols=len(names), frameon=False)
        drawn[network] = figure
    return drawn


def _accuracy(axes: Axes, rows: Sequence[Row]) -> None:
    for number, (basis, kind) in enumerate(BASES.items()):
        points: dict[float, list[Row]] = {}
        for row in rows:
            if row["basis"] == basis:
                points.setdefault(row["density"], []).append(row)
        groups = [points[density] for density in sorted(points)]
        accuracies = [[row["test_accuracy"] for row in group] for group in groups]
        axes.errorbar(
            [mean(row["stored"] / row["weights"] for row in group) for group in groups],
            [mean(a) for a in accuracies],
            deviations(accuracies),
            label=kind.label,
            capsize=2,
            **line_style(number),
        )
    dense = [row["test_accuracy"] for row in rows if row["basis"] == "dense"]
    if dense:
        axes.axhline(mean(dense), color="#666666", linestyle="--", linewidth=1.1, label="dense")
    percent = FuncFormatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set_xlabel("numbers stored, share of the weights (basis included)")
    log_axis(axes.xaxis, percent)
    axes.yaxis.set_major_formatter(percent)


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the results as a table, its head first: mean and deviation over the seeds."""
    lines = [["network, density, basis", "kept", "stored", "LT", "Reinit", "step, ms", "converted"]]
    results = [row for row in rows if row["kind"] == "result"]
    times = {(r["network"], r["density"]): r["ms"] for r in rows if r["kind"] == "timing"}
    for network in sorted({row["network"] for row in results}):
        here = [row for row in results if row["network"] == network]
        dense = [row["test_accuracy"] for row in here if row["basis"] == "dense"]
        step = next((ms["dense"] for (n, _), ms in times.items() if n == network), None)
        took = "-" if step is None else f"{step:.2f}"
        lines.append([f"{network} dense", "-", "-", _percent(dense), "-", took, "-"])
        for density in sorted({r["density"] for r in here if "density" in r}, reverse=True):
            for basis, kind in BASES.items():
                mine = [r for r in here if (r["basis"], r.get("density")) == (basis, density)]
                if not mine:
                    continue
                ms = times.get((network, density), {})
                forms = (f"{basis}, as parametrized", f"{basis}, converted")
                steps = [f"{ms[form]:.2f}" if form in ms else "-" for form in forms]
                lt, re = (
                    _percent([r["test_accuracy"] for r in mine if r["start"] == start])
                    for start in ("lt", "reinit")
                )
                kept, stored = f"{mine[0]['kept']:,}", f"{mine[0]['stored']:,}"
                name = f"{network} {density:g} {kind.label}"
                lines.append([name, kept, stored, lt, re, *steps])
    return lines


def _percent(numbers: Sequence[float]) -> str:
    if not numbers:
        return "-"
    text = f"{100 * mean(numbers):.2f}"
    return text + (f" ± {100 * stdev(numbers):.2f}" if len(numbers) > 1 else "")
