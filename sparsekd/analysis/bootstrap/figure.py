"""The figure of deep bootstrap, drawn from the rows of the study and from nothing else."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from statistics import mean, stdev
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sparsekd.analysis.bootstrap.measure import gaps, stopping_time
from sparsekd.plots import clean, deviations, line_style, log_axis, sparsity_axis, stretched
from sparsekd.train import Row

LABELS: Mapping[str, str] = {
    "dense": "dense",
    "static": "Static",
    "rigl": "RigL",
    "lt": "LT",
    "kd": "KD ticket",
}
Key = tuple[str, float]


def summaries(rows: Sequence[Row], delta: float = 0.01) -> dict[Key, list[Row]]:
    """Compare the worlds of every method and sparsity, seed by seed.

    Args:
        rows: of a `BootstrapStudy`, of kind "probe".
        delta: training soft-error at which a sample counts as fitted.

    Returns:
        (method, sparsity) -> a row a seed: stopping time "time", soft-errors "real" and "ideal"
        there with their difference "gap", the same at the end ("gap_end"), and the hard errors.
    """
    runs: dict[tuple[str, float, int], dict[str, list[Row]]] = {}
    for row in rows:
        if row["kind"] == "probe":
            worlds = runs.setdefault((row["method"], row["sparsity"], row["seed"]), {})
            worlds.setdefault(row["world"], []).append(row)
    found: dict[Key, list[Row]] = {}
    for (method, sparsity, seed), worlds in sorted(runs.items()):
        if len(worlds) < 2:
            continue
        real, ideal = worlds["real"], worlds["ideal"]
        time, gap = stopping_time(real, delta), gaps(real, ideal)
        there = {row["step"]: row for row in ideal}
        here = {row["step"]: row for row in real}
        last = max(gap)
        row = {"seed": seed, "time": time, "gap": gap[time], "gap_end": gap[last]}
        row |= {"real": here[time]["test_soft"], "ideal": there[time]["test_soft"]}
        row |= {"fitted": real[-1]["train_soft"] < delta, "train_end": real[-1]["train_soft"]}
        row |= {"real_end": here[last]["test_soft"], "ideal_end": there[last]["test_soft"]}
        row |= {"real_error": here[last]["test_error"], "ideal_error": there[last]["test_error"]}
        found.setdefault((method, sparsity), []).append(row)
    return found


def figures(rows: Sequence[Row], delta: float = 0.01) -> dict[str, Figure]:
    """Draw soft-errors in both worlds over the steps, and gap and ideal error over density.

    Args:
        rows: of a `BootstrapStudy`.
        delta: as in `summaries`.

    Returns:
        The figure by the name of its file; none without a pair of worlds.
    """
    found = summaries(rows, delta)
    if not found:
        return {}
    probes = [row for row in rows if row["kind"] == "probe"]
    sparsities = sorted({sparsity for method, sparsity in found if method != "dense"})
    figure = Figure(figsize=(11, 8), layout="constrained")
    grid = figure.subplots(2, 2)
    for axes in grid.flat:
        clean(axes)
    static: list[Key] = [("dense", 0.0), *(("static", sparsity) for sparsity in sparsities)]
    _curves(grid[0, 0], probes, static, lambda key: f"{key[1]:g}" if key[1] else "dense")
    grid[0, 0].set_title("Static masks by sparsity")
    if sparsities:
        sparsest: list[Key] = [(m, 0.0 if m == "dense" else sparsities[-1]) for m in LABELS]
        _curves(grid[0, 1], probes, sparsest, lambda key: LABELS[key[0]])
        grid[0, 1].set_title(f"Methods at sparsity {sparsities[-1]:g}")
    _over_density(grid[1, 0], found, "gap", "gap at T(n)")
    _over_density(grid[1, 1], found, "ideal", "soft-error of the ideal world at T(n)")
    population, seeds = probes[0]["population"], len({row["seed"] for row in probes})
    figure.suptitle(f"{population}: solid real world, dotted ideal world, {seeds} seeds")
    return {"deep-bootstrap": figure}


def _curves(
    axes: Axes, probes: Sequence[Row], keys: Sequence[Key], label: Callable[[Key], str]
) -> None:
    for number, key in enumerate(keys):
        for world, linestyle in (("real", "-"), ("ideal", ":")):
            points: dict[int, list[float]] = {}
            for row in probes:
                if (row["method"], row["sparsity"]) == key and row["world"] == world:
                    points.setdefault(row["step"], []).append(row["test_soft"])
            style: dict[str, Any] = {"color": line_style(number)["color"], "linestyle": linestyle}
            name = label(key) if world == "real" and points else None
            steps = sorted(points)
            axes.plot(steps, [mean(points[s]) for s in steps], label=name, **style)
    axes.set(xlabel="step", ylabel="soft-error on fresh samples")
    log_axis(axes.yaxis, "{:g}".format)
    axes.legend(fontsize=8)


def _over_density(axes: Axes, found: Mapping[Key, list[Row]], field: str, title: str) -> None:
    sparsities = sorted({sparsity for method, sparsity in found if method != "dense"})
    for number, (method, label) in enumerate(LABELS.items()):
        places = sorted(sparsity for name, sparsity in found if name == method)
        values = [[row[field] for row in found[method, sparsity]] for sparsity in places]
        if method == "dense":
            for value in values:
                axes.axhline(mean(value), color="#666666", linestyle="--", label=label)
        elif places:
            axes.errorbar(
                [stretched(s) for s in places],
                [mean(v) for v in values],
                deviations(values),
                label=label,
                capsize=2,
                **line_style(number),
            )
    sparsity_axis(axes, sparsities, "{:.4g}".format)
    axes.set(title=title, xlabel="sparsity", ylabel="soft-error")
    axes.axhline(0, color="#bbbbbb", linewidth=0.8, zorder=0)
    axes.legend(fontsize=8)


def table(rows: Sequence[Row], delta: float = 0.01) -> list[list[str]]:
    """Return the comparison as a table, its head first: mean and deviation over the seeds."""
    lines = [["method, sparsity", "T(n)", "real", "ideal", "gap", "gap at the end", "train"]]
    found = summaries(rows, delta)
    for method, sparsity in sorted(found, key=lambda key: (key[1], list(LABELS).index(key[0]))):
        group = found[method, sparsity]
        time = f"{mean(row['time'] for row in group):.0f}"
        time += "" if all(row["fitted"] for row in group) else " (not fitted)"
        cells = [_spread([r[f] for r in group]) for f in ("real", "ideal", "gap", "gap_end")]
        train = f"{mean(row['train_end'] for row in group):.4f}"
        lines.append([f"{LABELS[method]} {sparsity:g}", time, *cells, train])
    return lines


def _spread(numbers: Sequence[float]) -> str:
    text = f"{mean(numbers):.4f}"
    return text + (f" ± {stdev(numbers):.4f}" if len(numbers) > 1 else "")
