"""The summary of an experiment from its raw rows: tables, bars and figures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from sparsekd.dst import METHODS
from sparsekd.errors import CheckpointError
from sparsekd.recipes.savings import Saving, by_cell, dense_ms, savings
from sparsekd.terminal import Columns
from sparsekd.train import MetricsLog, Row

LABELS = {name: method.label for name, method in METHODS.items()}
_RESULT = ("run", "method", "sparsity", "seed", "test_accuracy", "nnz", "numel", "flops_train")
_BAR = 20


def read_rows(folder: Path) -> list[Row]:
    """Read the rows of an experiment.

    Args:
        folder: of the experiment, or of the parts of one that several processes shared.

    Returns:
        Its rows.

    Raises:
        CheckpointError: there is no finished run, or the file is damaged.
    """
    path = folder / "metrics.jsonl"
    paths = [path] if path.exists() else [path, *sorted(folder.glob("*/metrics.jsonl"))]
    rows = [row for part in paths for row in MetricsLog(part).rows_with(_RESULT, kind="result")]
    if not any(row.get("kind") == "result" for row in rows):
        raise CheckpointError(f"{path}: expected the rows of a finished run, found none")
    return rows


def table(rows: Sequence[Row]) -> Columns:
    """Build the table of an experiment: a line a method and sparsity.

    Accuracy is of the last epoch on the test split, mean and standard deviation over seeds. A step
    is forward, loss (with the teacher where there is one), backward and update of a batch; the
    dense time is that of the better layout.

    Args:
        rows: raw rows.

    Returns:
        The table.

    Example:
        >>> table([]).row_count
        0
    """
    header = (
        "method", "sparsity", "updates", "test accuracy", "nnz", "masked sparsity",
        "whole sparsity", "image MFLOPs", "run TFLOPs", "run s", "step ms sparse",
        "step ms dense", "speed up",
    )  # fmt: skip
    timings = {r["run"]: r for r in rows if r["kind"] == "timing"}
    updates = Counter[str]()
    for row in rows:
        if row["kind"] == "epoch":
            updates[row["run"]] += row.get("updates", 0)
    lines, sparsities = [], []
    for sparsity, _, group in by_cell(rows):
        timing = next((timings[r["run"]] for r in group if r["run"] in timings), None)
        moved = [updates[row["run"]] for row in group if row["run"] in updates]
        lines.append(_line(group, timing, moved))
        sparsities.append(sparsity)
    return Columns(header, lines, note=_caption(rows), sections=_changes(sparsities))


def savings_table(rows: Sequence[Row]) -> Columns:
    """Build the table of what sparse training saves, a line a method and sparsity.

    Args:
        rows: raw rows.

    Returns:
        The table.

    Example:
        >>> savings_table([]).row_count
        0
    """
    header = (
        "method", "sparsity", "test accuracy", "FLOPs saved", "time saved", "times faster",
        "weight memory saved", "step memory saved", "total FLOPs", "total time",
    )  # fmt: skip
    lines, sparsities = [], []
    for _, method, group in by_cell(rows):
        if method == "dense":
            accuracy = _accuracy([row["test_accuracy"] for row in group])
            lines.append(["dense", "0 %", accuracy, *["-"] * 5, "1.00", "1.00"])
            sparsities.append(0.0)
    found = savings(rows)
    for saving in found:
        lines.append(
            [
                LABELS[saving.method],
                _percent(saving.sparsity),
                _accuracy(saving.accuracies),
                *map(_percent, (saving.flops, saving.time)),
                _number(saving.speedup, "x"),
                *map(_percent, (saving.held, saving.peak)),
                *map(_number, (saving.total_flops, saving.total_time)),
            ]
        )
        sparsities.append(saving.sparsity)
    return Columns(header, lines, note=_explained(rows, found), sections=_changes(sparsities))


def _changes(values: Sequence[float]) -> set[int]:
    """Return where a value differs from the one before."""
    return {n for n in range(1, len(values)) if values[n] != values[n - 1]}


def bars(rows: Sequence[Row]) -> Columns:
    """Draw FLOPs and time of a training step as bars, for a terminal.

    Args:
        rows: raw rows.

    Returns:
        Two lines a method and sparsity.

    Example:
        >>> bars([]).row_count
        0
    """
    lines = []
    for saving in savings(rows):
        name = f"{LABELS[saving.method]}, {_percent(saving.sparsity)}"
        for what, saved in (("FLOPs", saving.flops), ("time", saving.time)):
            if saved is not None:
                halves = round(2 * _BAR * min(1 - saved, 1.0))
                bar = "━" * (halves // 2) + "╸" * (halves % 2)
                lines.append([name, what, bar, _percent(1 - saved)])
    header = ("method", "", "share of dense", "")
    return Columns(header, lines, title="A training step; dense is 100 %", left=3)


def figures(rows: Sequence[Row], folder: Path, formats: Sequence[str] = ("png",)) -> list[Path]:
    """Draw the figures of an experiment into its folder.

    Args:
        rows: raw rows.
        folder: of the experiment.
        formats: of the files, as `sparsekd.plots.save` takes them.

    Returns:
        The files written.
    """
    from sparsekd.recipes.figures import draw  # matplotlib: not worth loading for `sparsekd info`

    present = {row.get("method") for row in rows}
    labels = {name: label for name, label in LABELS.items() if name in present}
    needs_dense = {name for name in labels if METHODS[name].needs_dense}
    return draw(rows, folder / "figures", labels, needs_dense, formats)


def _line(group: Sequence[Row], timing: Row | None, updates: Sequence[int]) -> list[str]:
    first = group[0]
    method = METHODS.get(first["method"])
    moves = method is not None and method.updater is not None
    return [
        LABELS.get(first["method"], "dense"),
        f"{first['sparsity']:.4g}",
        f"{statistics.mean(updates):.3g}" if moves and updates else "-",
        _accuracy([row["test_accuracy"] for row in group]),
        f"{first['nnz']:,}",
        f"{1 - first['nnz'] / max(first['numel'], 1):.4g}",
        f"{first['sparsity_whole']:.4g}" if "sparsity_whole" in first else "-",
        f"{first['flops_train'] / 1e6:,.2f}",
        _mean(group, "flops_run", 1e12),
        _mean(group, "seconds", 1.0),
        *_times(timing),
    ]


def _accuracy(accuracies: Sequence[float]) -> str:
    mean = f"{statistics.mean(accuracies):.2%}"
    if len(accuracies) == 1:
        return mean
    return f"{mean} ± {100 * statistics.stdev(accuracies):.2f}"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.3g} %"


def _number(value: float | None, unit: str = "") -> str:
    return "-" if value is None else f"{value:.2f}{unit}"


def _mean(group: Sequence[Row], field: str, unit: float) -> str:
    if not all(field in row for row in group):
        return "-"  # rows of an earlier version
    mean = statistics.mean(row[field] for row in group) / unit
    return f"{mean:,.3g}" if mean < 100 else f"{mean:,.0f}"


def _times(timing: Row | None) -> list[str]:
    if timing is None:
        return ["-", "-", "-"]
    dense = dense_ms(timing)
    if timing["sparse_ms"] is None:
        return ["-", f"{dense:.1f}", "-"]
    return [f"{timing['sparse_ms']:.1f}", f"{dense:.1f}", f"{dense / timing['sparse_ms']:.2f}x"]


def _explained(rows: Sequence[Row], found: Sequence[Saving]) -> str:
    """Say what the columns of the savings are, and what they add up to."""
    timing = next((row for row in rows if row["kind"] == "timing"), None)
    first = [LABELS[m] for m in _methods(found) if METHODS[m].needs_dense]
    lines = [
        f"Test accuracy: {_seeds(rows)}. Saved: of a training step of the dense network.",
        "Weight memory: weights, indices, gradients, momentum; step memory: these and the maps.",
    ]
    if timing is not None:
        lines.append(
            f"Time: steps of batch {timing['batch_size']} on {timing['threads']} threads, in turns "
            "with dense in its better layout;"
        )
        lines.append("a teacher takes part on both sides.")
    lines.append("Total: all that a method runs, its teacher included; the dense run is 1.")
    if first:
        verb = "need" if len(first) > 1 else "needs"
        lines.append(f"It includes the dense run that {_listed(first)} {verb}.")
    totals = {m: [s.total_time for s in found if s.method == m] for m in _methods(found)}
    known = {m: [t for t in times if t is not None] for m, times in totals.items()}
    if any(known.values()):
        cheaper = [LABELS[m] for m, times in known.items() if times and max(times) < 1]
        lines.append(f"Less time in total than a dense run: {_listed(cheaper) or 'none'}.")
    slower = [s for s in found if s.time is not None and s.time <= 0]
    if slower:
        names = [f"{LABELS[s.method]} at {_percent(s.sparsity)}" for s in slower]
        lines.append(f"Steps no faster than dense: {_listed(names)}.")
    return "\n".join(lines)


def _methods(found: Sequence[Saving]) -> list[str]:
    return list(dict.fromkeys(saving.method for saving in found))


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def _seeds(rows: Sequence[Row]) -> str:
    seeds = len({row["seed"] for row in rows if row["kind"] == "result"})
    return f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "1 seed"


def _caption(rows: Sequence[Row]) -> str:
    timing = next((row for row in rows if row["kind"] == "timing"), None)
    text = (
        f"Accuracy on the test split after the last epoch, {_seeds(rows)}. Sparsity as asked for, "
        "then that of the layers that the method masks, which nnz counts, and of all parameters. "
        "FLOPs: of training on an image at the end, and of the whole run with its teacher and the "
        "gradients that growth reads; methods that start from a dense run need that besides."
    )
    if timing is not None:
        text += (
            f" Steps of batch {timing['batch_size']} on {timing['threads']} threads, medians of "
            f"{timing['rounds']}, interleaved; dense in its better layout; KD includes its teacher."
        )
    return text
