"""The figure of gradient flow, drawn from the rows of the study and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsekd.plots import clean, line_style, log_axis, low_legend
from sparsekd.train import Row

LABELS: Mapping[str, str] = {
    "pruned": "Pruned",
    "lt": "LT",
    "scratch": "Scratch",
    "scratch+": "Scratch, sparse init",
    "set": "SET",
    "rigl": "RigL",
    "rigl+": "RigL, sparse init",
}


def figures(rows: Sequence[Row]) -> dict[str, Figure]:
    """Draw one figure for every network and sparsity.

    Args:
        rows: of a `GradientFlowStudy`.

    Returns:
        Figures by the name of their file.
    """
    drawn = {}
    panels: Sequence[Callable[[Axes, Sequence[Row]], None]]
    panels = (_norms, _updates, _disagreement, _map, _paths, _spectra)
    for (network, sparsity), here in _places(rows).items():
        figure = Figure(figsize=(13.5, 7.4), layout="constrained")
        figure.suptitle(f"{network}, every layer {sparsity:.4g} sparse")
        for axes, panel in zip(figure.subplots(2, 3).flat, panels, strict=True):
            clean(axes)
            panel(axes, here)
            axes.title.set_fontsize(10)
        drawn[f"{network}-{sparsity:g}"] = figure
    return drawn


def table(rows: Sequence[Row]) -> list[list[str]]:
    """Return the results as a table, its head first: mean and deviation over the seeds."""
    head = ["network, sparsity, method", "test accuracy", "gradient norm, last quarter"]
    head += ["disagreement", "with pruned", "ensemble"]
    lines = [head]
    for (network, sparsity), here in _places(rows).items():
        for method, label in LABELS.items():
            mine = [r for r in here if r.get("method") == method]
            results = [r["test_accuracy"] for r in mine if r["kind"] == "result"]
            if not results:
                continue
            close = [r["disagreement"] for r in mine if r["kind"] == "to_pruned"]
            group = [r for r in mine if r["kind"] == "group"][-1:]
            cells = [_spread(results, 100, 2), _spread(_late_norms(mine), 1, 3)]
            between = group[0]["disagreement"] if group else None
            cells += ["-" if between is None else f"{100 * between:.2f}", _spread(close, 100, 2)]
            cells += [f"{100 * group[0]['ensemble_accuracy']:.2f}" if group else "-"]
            lines.append([f"{network} {sparsity:g} {label}", *cells])
    return lines


def _places(rows: Sequence[Row]) -> dict[tuple[str, float], list[Row]]:
    """Group rows by place; of comparisons over different numbers of seeds, keep the last."""
    places: dict[tuple[str, float], list[Row]] = {}
    for row in rows:
        if "network" in row:
            places.setdefault((row["network"], row["sparsity"]), []).append(row)
    for place, here in places.items():
        compared = [row["run"] for row in here if row["kind"] == "group"]
        old = set(compared) - set(compared[-1:])
        places[place] = [row for row in here if row["run"] not in old]
    return dict(sorted(places.items()))


def _late_norms(rows: Sequence[Row]) -> list[float]:
    """Return each run's mean gradient norm over the last quarter of its measurements."""
    runs: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "probe":
            runs.setdefault(row["run"], []).append(row["norm"])
    return [mean(norms[-(len(norms) // 4 or 1) :]) for norms in runs.values()]


def _spread(numbers: Sequence[float], scale: float, digits: int) -> str:
    if not numbers:
        return "-"
    text = f"{scale * mean(numbers):.{digits}f}"
    return text + (f" ± {scale * stdev(numbers):.{digits}f}" if len(numbers) > 1 else "")


def _style(method: str) -> dict[str, Any]:
    style = line_style(list(LABELS).index(method))
    return {"color": style["color"], "label": LABELS[method]}


def _norms(axes: Axes, rows: Sequence[Row]) -> None:
    for method in LABELS:
        points: dict[int, list[float]] = {}
        for row in rows:
            if row["kind"] == "probe" and row["method"] == method:
                points.setdefault(row["step"], []).append(row["norm"])
        if points:
            steps = sorted(points)
            axes.plot(steps, [mean(points[s]) for s in steps], linewidth=1.3, **_style(method))
    axes.set(title="Gradient norm while training", xlabel="step", ylabel="norm")
    log_axis(axes.yaxis, "{:g}".format)
    low_legend(axes, 4, fontsize=7)


def _updates(axes: Axes, rows: Sequence[Row]) -> None:
    for method in ("set", "rigl", "rigl+"):
        moved = [r for r in rows if r["kind"] == "update" and r["method"] == method]
        style = {**_style(method), "s": 9, "alpha": 0.6}
        ratio = [r["after"]["norm"] / max(r["before"]["norm"], 1e-12) for r in moved]
        axes.scatter([r["step"] for r in moved], ratio, **style)
    axes.axhline(1.0, color="#666666", linewidth=0.8)
    axes.set(title="Gradient norm after an update, over that before", xlabel="step")
    log_axis(axes.yaxis, "{:g}".format)
    axes.legend(fontsize=7)


def _disagreement(axes: Axes, rows: Sequence[Row]) -> None:
    groups = {r["method"]: r["disagreement"] for r in rows if r["kind"] == "group"}
    close: dict[str, list[float]] = {}
    for row in rows:
        if row["kind"] == "to_pruned":
            close.setdefault(row["method"], []).append(row["disagreement"])
    methods = [method for method in LABELS if method in groups]
    places = np.arange(len(methods))
    within = [100 * (groups[m] or 0) for m in methods]
    to_pruned = [100 * mean(close[m]) if m in close else 0.0 for m in methods]
    axes.bar(places - 0.2, within, 0.4, label="between seeds", color="#56b4e9")
    axes.bar(places + 0.2, to_pruned, 0.4, label="with the pruned solution", color="#0072b2")
    axes.set_xticks(places, [LABELS[m] for m in methods], rotation=30, ha="right", fontsize=8)
    axes.set(title="Test images that two networks classify differently", ylabel="%")
    axes.margins(y=0.2)
    axes.legend(fontsize=7, ncols=2)


def _map(axes: Axes, rows: Sequence[Row]) -> None:
    found = [r for r in rows if r["kind"] == "map"]
    seen = set()
    for row in found:
        end, method = row["when"] == "end", row["method"]
        marker = "*" if method == "pruned" else "o" if end else "x"
        label = f"{LABELS[method]}, {row['when']}"
        axes.scatter(
            row["x"],
            row["y"],
            s=110 if marker == "*" else 28,
            marker=marker,
            color=_style(method)["color"],
            label=None if label in seen else label,
        )
        seen.add(label)
        starts = [r for r in found if r["when"] == "start" and r["method"] == method]
        own = [r for r in starts if r["seed"] == row["seed"]] or starts
        if end and own:
            line: dict[str, Any] = {"color": "#bbbbbb", "linewidth": 0.6, "zorder": 0}
            axes.plot([own[0]["x"], row["x"]], [own[0]["y"], row["y"]], **line)
    axes.set(title="Weights in the plane (scaled distances)")
    axes.set_aspect("equal", adjustable="datalim")
    low_legend(axes, 3, fontsize=7)


def _paths(axes: Axes, rows: Sequence[Row]) -> None:
    for row in rows:
        if row["kind"] == "path":
            style = {**_style(row["method"]), "linestyle": "-" if row["from"] == "end" else ":"}
            style["label"] = f"{style['label']}, {row['from']}"
            axes.plot(row["alphas"], row["losses"], **style)
    axes.set(title="Line from a run to the pruned solution", xlabel="alpha")
    axes.set_ylabel("training loss")
    axes.legend(fontsize=7)


def _spectra(axes: Axes, rows: Sequence[Row]) -> None:
    """Plot spectra smoothed by Gaussians, over the sign-preserving logarithm of the eigenvalue."""
    grid = np.linspace(-3, 3.5, 600)
    for row in rows:
        if row["kind"] != "spectrum":
            continue
        values, weights = np.array(row["eigenvalues"]), np.array(row["weights"])
        places = np.sign(values) * np.log10(1 + 100 * np.abs(values))
        density = (weights * np.exp(-(((grid[:, None] - places) / 0.08) ** 2) / 2)).sum(1)
        linestyle = "-" if row["when"] == "end" else ":"
        style = {**_style(row["method"]), "linestyle": linestyle}
        style["label"] = f"{style['label']}, {row['when']}: largest {values.max():.3g}"
        axes.plot(grid, np.maximum(density, 1e-7), **style)
    log_axis(axes.yaxis, "{:g}".format, (1.0,))
    axes.set(title="Spectrum of the Hessian", ylim=(1e-6, None))
    axes.set(xlabel="eigenvalue, as sign · log10(1 + 100 |eigenvalue|)", ylabel="density")
    low_legend(axes, 2, fontsize=7)
