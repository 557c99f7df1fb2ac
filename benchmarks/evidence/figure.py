"""The figure of a study, drawn from its rows and from nothing else."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.evidence import summary
from benchmarks.evidence.studies import Study
from sparsekd.plots import clean, line_style, top_legend
from sparsekd.recipes.report import LABELS
from sparsekd.train import Row


def differences(study: Study, rows: Sequence[Row]) -> Figure | None:
    """Plot the paired differences, a line a pair and a colour a sparsity: mean and every seed.

    Args:
        study: whose pairs are drawn, those that have rows.
        rows: of the study.

    Returns:
        The figure, None without a pair.
    """
    groups: dict[tuple[str, str], list[tuple[float, summary.BySeed]]] = {}
    for first, second, sparsity, by_seed in summary.paired(study, rows):
        groups.setdefault((first, second), []).append((sparsity, by_seed))
    if not groups:
        return None
    figure = Figure(figsize=(8.0, 1.2 + 0.45 * len(groups)), layout="constrained")
    axes = figure.subplots()
    clean(axes)
    axes.axvline(0, color="#666666", linewidth=1)
    sparsities = sorted({sparsity for group in groups.values() for sparsity, _ in group})
    for line, group in enumerate(groups.values()):
        for sparsity, by_seed in group:
            number = sparsities.index(sparsity)
            style = {**line_style(number), "linestyle": "none"}
            height = line + 0.22 * (number - (len(sparsities) - 1) / 2)
            found = list(by_seed.values())
            axes.plot(found, [height] * len(found), alpha=0.4, markersize=4, **style)
            axes.plot([statistics.mean(found)], [height], markersize=8, **style)
    named = [_named(*pair, len(study.columns) > 1) for pair in groups]
    axes.set_yticks(range(len(groups)), named)
    axes.invert_yaxis()
    axes.set_xlabel("difference of test accuracy, points; large: mean over seeds")
    handles = [
        Line2D([], [], **{**line_style(n), "linestyle": "none"}) for n in range(len(sparsities))
    ]
    top_legend(figure, handles, [f"{100 * sparsity:.4g} % sparse" for sparsity in sparsities])
    return figure


def _named(first: str, second: str, columns: bool) -> str:
    """Return the words for a pair, with the column where there are several."""
    (a, m), (b, n) = summary.column(first), summary.column(second)
    if not columns:
        return f"{LABELS[m]} less {LABELS[n]}"
    if a == b:
        return f"{a}: {LABELS[m]} less {LABELS[n]}"
    return f"{a}: {LABELS[m]} less {b}: {LABELS[n]}"
