"""The figures of an experiment, drawn from its rows and from nothing else."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, FuncFormatter, MaxNLocator

from sparsekd.plots import (
    Label,
    clean,
    deviations,
    label_points,
    line_style,
    log_axis,
    panel_grid,
    save,
    single_axes,
    sparsity_axis,
    stretched,
    top_legend,
)
from sparsekd.recipes.savings import savings
from sparsekd.train.metrics import Row

_PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.4g} %")
_FLOPS = EngFormatter()  # 2 T
_DENSE: dict[str, Any] = {"color": "#666666", "linestyle": "--", "linewidth": 1.2}


def draw(
    rows: Sequence[Row],
    folder: Path,
    labels: Mapping[str, str],
    needs_dense: Container[str] = (),
    formats: Sequence[str] = ("png",),
) -> list[Path]:
    """Draw every figure the rows allow: savings, accuracy, its price, loss, density per layer.

    Args:
        rows: of an experiment, of kind "epoch" and "result".
        folder: where the files go.
        labels: method -> name in the legend, in the order of the legend.
        needs_dense: methods whose price includes the dense run of the same seed.
        formats: of the files, as `sparsekd.plots.save` takes them.

    Returns:
        The files written.

    Example:
        >>> import tempfile
        >>> row = {"kind": "result", "run": "lt", "seed": 0, "method": "lt", "sparsity": 0.9}
        >>> row |= {"test_accuracy": 0.8}
        >>> files = draw([row | {"density": {"conv": 0.1}}], Path(tempfile.mkdtemp()), {"lt": "LT"})
    """
    results = [row for row in rows if row["kind"] == "result"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    figures = {
        "savings": savings_figure(rows, labels),
        "accuracy_vs_sparsity": accuracy_figure(results, labels),
        "accuracy_vs_flops": price_figure(results, labels, needs_dense, "flops_run"),
        "accuracy_vs_time": price_figure(results, labels, needs_dense, "seconds"),
        "loss_curves": loss_figure(results, epochs, labels),
        "density_per_layer": density_figure(results, labels),
    }
    return save(figures, folder, formats)


def accuracy_figure(results: Sequence[Row], labels: Mapping[str, str]) -> Figure | None:
    """Plot test accuracy against sparsity, a line a method, mean and spread over seeds.

    Args:
        results: rows of kind "result".
        labels: method -> name in the legend.

    Returns:
        The figure, None without a ticket.
    """
    tickets = [row for row in results if row["method"] != "dense"]
    if not tickets:
        return None
    figure, axes = single_axes(
        "Accuracy after the last epoch", "sparsity of the masked layers", "test accuracy"
    )
    seeds = _draw_accuracy(axes, results, labels)
    if seeds > 1:
        axes.set_xlabel(
            f"sparsity of the masked layers (mean and standard deviation, {seeds} seeds)"
        )
    _legend(axes, len(_methods(tickets, labels)))
    return figure


def savings_figure(rows: Sequence[Row], labels: Mapping[str, str]) -> Figure | None:
    """Plot FLOPs and time saved against sparsity, with the accuracy beside them.

    Args:
        rows: raw rows.
        labels: method -> name in the legend.

    Returns:
        The figure, None where no step was timed.
    """
    found = [saving for saving in savings(rows) if saving.method in labels]
    if all(saving.time is None for saving in found):
        return None
    figure, (saved, accuracy) = panel_grid(2, "sparsity of the masked layers", "saved")
    figure.set_size_inches(10.4, 4.6)
    results = [row for row in rows if row["kind"] == "result"]
    kinds: dict[str, tuple[str, Literal["-", "--"]]]
    kinds = {"flops": ("FLOPs of a training step", "--"), "time": ("time of a training step", "-")}
    for number, method in enumerate(_methods(results, labels)):
        style = line_style(number)
        points = [saving for saving in found if saving.method == method]
        for kind, (_, line) in kinds.items():
            pairs = [(stretched(p.sparsity), getattr(p, kind)) for p in points]
            pairs = [pair for pair in pairs if pair[1] is not None]
            fill = style["color"] if kind == "time" else "white"
            saved.plot(*zip(*pairs, strict=True), **style | {"linestyle": line, "mfc": fill})
    saved.set_title("Saved of dense training", fontsize=11)
    saved.set_ylim(min(0.0, saved.get_ylim()[0]), 1.0)
    saved.yaxis.set_major_formatter(_PERCENT)
    sparsity_axis(saved, sorted({s.sparsity for s in found}), _percent)
    saved.legend(
        handles=[
            Line2D([], [], color="#444444", marker="o", linestyle=line, label=text, mfc=fill)
            for (text, line), fill in zip(kinds.values(), ("white", "#444444"), strict=True)
        ],
        loc="lower right",
    )
    seeds = _draw_accuracy(accuracy, results, labels)
    spread = f", mean and standard deviation of {seeds} seeds" if seeds > 1 else ""
    accuracy.set_title(f"Test accuracy{spread}", fontsize=11)
    sparsity_axis(accuracy, sorted({s.sparsity for s in found}), _percent)
    handles, names = accuracy.get_legend_handles_labels()
    top_legend(figure, handles, names)
    return figure


def _percent(sparsity: float) -> str:
    return f"{100 * sparsity:.4g} %"


def _methods(results: Sequence[Row], labels: Mapping[str, str]) -> list[str]:
    present = {row["method"] for row in results}
    return [method for method in labels if method in present]


def _draw_accuracy(axes: Axes, results: Sequence[Row], labels: Mapping[str, str]) -> int:
    """Draw accuracy against sparsity with its spread; return the number of seeds."""
    tickets = [row for row in results if row["method"] != "dense"]
    sparsities = sorted({row["sparsity"] for row in tickets})
    methods = _methods(tickets, labels)
    # Methods stand a little beside each other, so that equal accuracies do not hide one.
    width = 0.008 * (stretched(sparsities[-1]) - stretched(sparsities[0]))
    seeds = 1
    for number, method in enumerate(methods):
        groups = _group([r for r in tickets if r["method"] == method], "sparsity")
        seeds = max(seeds, *(len(group) for group in groups.values()))
        accuracies = [[row["test_accuracy"] for row in groups[s]] for s in sorted(groups)]
        axes.errorbar(
            [stretched(s) + width * (number - (len(methods) - 1) / 2) for s in sorted(groups)],
            [statistics.mean(a) for a in accuracies],
            deviations(accuracies),
            label=labels[method],
            capsize=3,
            **line_style(number),
        )
    dense = [row["test_accuracy"] for row in results if row["method"] == "dense"]
    if dense:
        axes.axhline(statistics.mean(dense), label="dense", **_DENSE)
    rotation = 45 if len(sparsities) > 7 else 0
    sparsity_axis(axes, sparsities, "{:.4g}".format, rotation=rotation)
    axes.yaxis.set_major_formatter(_PERCENT)
    return seeds


def price_figure(
    results: Sequence[Row], labels: Mapping[str, str], needs_dense: Container[str], price: str
) -> Figure | None:
    """Plot test accuracy against what training took, a line a method through its sparsities.

    Args:
        results: rows of kind "result".
        labels: method -> name in the legend.
        needs_dense: methods whose price includes the dense run of the same seed.
        price: "flops_run" or "seconds".

    Returns:
        The figure, None without a ticket or where a row lacks the price.
    """
    tickets = [row for row in results if row["method"] in labels]
    if not tickets or not all(price in row for row in results):
        return None
    dense = {row["seed"]: row for row in results if row["method"] == "dense"}
    name = {"flops_run": "training FLOPs", "seconds": "training time in seconds"}[price]
    figure, axes = single_axes(
        "Accuracy and what it took; numbers are sparsities", name, "test accuracy"
    )
    present = [method for method in labels if any(row["method"] == method for row in tickets)]
    places: list[Label] = []
    for number, method in enumerate(present):
        points = _group([row for row in tickets if row["method"] == method], "sparsity")
        first = {s: dense[s][price] for s in dense} if method in needs_dense else {}
        costs = {s: [r[price] + first.get(r["seed"], 0) for r in g] for s, g in points.items()}
        accuracies = {s: [row["test_accuracy"] for row in g] for s, g in points.items()}
        axes.errorbar(
            [statistics.mean(costs[s]) for s in sorted(points)],
            [statistics.mean(accuracies[s]) for s in sorted(points)],
            deviations([a for _, a in sorted(accuracies.items())]),
            label=labels[method] + (" + dense run" if method in needs_dense else ""),
            capsize=3,
            **line_style(number),
        )
        for sparsity in points:
            x, y = statistics.mean(costs[sparsity]), statistics.mean(accuracies[sparsity])
            places.append(Label(f"{sparsity:.4g}", x, y, line_style(number)["color"]))
    if dense:
        axes.errorbar(
            statistics.mean(row[price] for row in dense.values()),
            statistics.mean(row["test_accuracy"] for row in dense.values()),
            label="dense",
            color="#666666",
            marker="*",
            markersize=10,
            linestyle="none",
        )
    log_axis(axes.xaxis, _FLOPS if price == "flops_run" else "{:g}".format)
    axes.yaxis.set_major_formatter(_PERCENT)
    _legend(axes, len(present))
    axes.margins(x=0.1)  # room for the labels of the outermost points
    label_points(axes, places)
    return figure


def _legend(axes: Axes, entries: int) -> None:
    """Put a long legend beside the panel."""
    if entries <= 6:
        axes.legend()
        return
    figure = axes.figure
    assert isinstance(figure, Figure)
    figure.set_size_inches(9.2, 5.2)
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=9)


def loss_figure(
    results: Sequence[Row], epochs: Sequence[Row], labels: Mapping[str, str]
) -> Figure | None:
    """Plot training accuracy and loss against epochs, a panel a sparsity, first seed.

    Distillation minimises another loss than cross entropy does, so their curves differ in scale.

    Args:
        results: rows of kind "result".
        epochs: rows of kind "epoch".
        labels: method -> name in the legend.

    Returns:
        The figure, None without an epoch.
    """
    curves = _group(epochs, "run")
    first = [row for row in results if row["seed"] == 0 and row["run"] in curves]
    if not first:
        return None
    sparsities = sorted({row["sparsity"] for row in first if row["method"] != "dense"}) or [0.0]
    shown = sparsities if len(sparsities) <= 4 else [sparsities[0], *sparsities[-3:]]
    figure = Figure(figsize=(3.6 * len(shown) + 0.6, 5.6), layout="constrained")
    grid = figure.subplots(2, len(shown), sharex=True, sharey="row", squeeze=False)
    for column, sparsity in enumerate(shown):
        for row in first:
            if row["method"] != "dense" and row["sparsity"] != sparsity:
                continue
            points = curves[row["run"]]
            x = [point["epoch"] for point in points]
            style = _style(row["method"], labels)
            grid[0, column].plot(x, [p["train_loss"] for p in points], **style)
            grid[1, column].plot(x, [p["train_accuracy"] for p in points], **style)
        grid[0, column].set_title(f"sparsity {sparsity:.4g}", fontsize=10)
        grid[1, column].set_xlabel("epoch")
        grid[1, column].yaxis.set_major_formatter(_PERCENT)
        grid[1, column].xaxis.set_major_locator(MaxNLocator(integer=True))
        for axes in grid[:, column]:
            clean(axes)
    grid[0, 0].set_ylabel("training loss (own objective)")
    log_axis(grid[0, 0].yaxis, "{:g}".format)
    grid[1, 0].set_ylabel("training accuracy")
    handles, names = grid[0, 0].get_legend_handles_labels()
    top_legend(figure, handles, names)
    return figure


def density_figure(
    results: Sequence[Row], labels: Mapping[str, str] | None = None
) -> Figure | None:
    """Plot the density of every layer, a line a sparsity, for the first ticket of each.

    Args:
        results: rows of kind "result".
        labels: method -> name in the title; by default the method itself.

    Returns:
        The figure, None without a ticket.
    """
    groups = _group([row for row in results if row["method"] != "dense"], "sparsity")
    if not groups:
        return None
    shown = sorted(groups) if len(groups) <= 6 else sorted(groups)[-6:]
    layers = list(groups[shown[0]][0]["density"])
    methods = {sparsity: groups[sparsity][0]["method"] for sparsity in shown}
    names = {sparsity: (labels or {}).get(method, method) for sparsity, method in methods.items()}
    single = len(set(names.values())) == 1
    title = "Density per layer at the end" + (f", {names[shown[0]]}" if single else "")
    figure, axes = single_axes(title, "", "density")
    figure.set_size_inches(max(6.4, 0.26 * len(layers) + 1.5), 4.4)
    for number, sparsity in enumerate(shown):
        density = groups[sparsity][0]["density"]
        axes.plot(
            range(len(layers)),
            [density[layer] or float("nan") for layer in layers],
            label=f"sparsity {sparsity:.4g}" + ("" if single else f", {names[sparsity]}"),
            markersize=4,
            **line_style(number),
        )
    log_axis(axes.yaxis, "{:g}".format)
    axes.set_xticks(range(len(layers)), layers, rotation=90, fontsize=7)
    axes.legend()
    return figure


def _style(method: str, labels: Mapping[str, str]) -> dict[str, Any]:
    if method == "dense":
        return {"label": "dense", **_DENSE}
    style = line_style(list(labels).index(method))
    return {"label": labels[method], "color": style["color"], "linestyle": style["linestyle"]}


def _group(rows: Sequence[Row], key: str) -> dict[Any, list[Row]]:
    groups: dict[Any, list[Row]] = defaultdict(list)
    for row in rows:
        groups[row[key]].append(row)
    return dict(groups)
