"""The summary of an experiment from its raw rows: a table and figures."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from sparsekd.dst import METHODS
from sparsekd.errors import CheckpointError
from sparsekd.train import MetricsLog, Row

LABELS = {name: method.label for name, method in METHODS.items()}
_ORDER = ["dense", *METHODS]
_RESULT = ("run", "method", "sparsity", "seed", "test_accuracy", "nnz", "numel", "flops_train")


def read_rows(folder: Path) -> list[Row]:
    """Read the rows of an experiment.

    Args:
        folder: of the experiment.

    Returns:
        Its rows.

    Raises:
        CheckpointError: there is no finished run, or the file is damaged.
    """
    path = folder / "metrics.jsonl"
    rows = MetricsLog(path).rows_with(_RESULT, kind="result")
    if not any(row.get("kind") == "result" for row in rows):
        raise CheckpointError(f"{path}: expected the rows of a finished run, found none")
    return rows


def table(rows: Sequence[Row]) -> Table:
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
    result = Table(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=_caption(rows),
        caption_justify="left",
    )
    result.add_column("method", no_wrap=True)
    for name in (
        "sparsity",
        "updates",
        "test\naccuracy",
        "nnz",
        "masked\nsparsity",
        "whole\nsparsity",
        "image\nMFLOPs",
        "run\nTFLOPs",
        "run\ns",
    ):
        result.add_column(name, justify="right", no_wrap=True)
    for name in ("step ms\nsparse", "step ms\ndense", "speed\nup"):
        result.add_column(name, justify="right", no_wrap=True)
    results = [row for row in rows if row["kind"] == "result"]
    timings = {r["run"]: r for r in rows if r["kind"] == "timing"}
    updates = Counter[str]()
    for row in rows:
        if row["kind"] == "epoch":
            updates[row["run"]] += row.get("updates", 0)
    cells = {(row["sparsity"], row["method"]) for row in results}
    previous = None
    for sparsity, method in sorted(cells, key=lambda c: (c[0], _ORDER.index(c[1]))):
        if previous not in (None, sparsity):
            result.add_section()
        previous = sparsity
        group = [r for r in results if (r["sparsity"], r["method"]) == (sparsity, method)]
        timing = next((timings[r["run"]] for r in group if r["run"] in timings), None)
        moved = [updates[row["run"]] for row in group if row["run"] in updates]
        result.add_row(*_line(group, timing, moved))
    return result


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
    accuracies = [row["test_accuracy"] for row in group]
    accuracy = f"{statistics.mean(accuracies):.2%}"
    if len(group) > 1:
        accuracy += f" ± {100 * statistics.stdev(accuracies):.2f}"
    return [
        LABELS.get(first["method"], "dense"),
        f"{first['sparsity']:.4g}",
        f"{statistics.mean(updates):.3g}" if moves and updates else "-",
        accuracy,
        f"{first['nnz']:,}",
        f"{1 - first['nnz'] / max(first['numel'], 1):.4g}",
        f"{first['sparsity_whole']:.4g}" if "sparsity_whole" in first else "-",
        f"{first['flops_train'] / 1e6:,.2f}",
        _mean(group, "flops_run", 1e12),
        _mean(group, "seconds", 1.0),
        *_times(timing),
    ]


def _mean(group: Sequence[Row], field: str, unit: float) -> str:
    if not all(field in row for row in group):
        return "-"  # rows of an earlier version
    mean = statistics.mean(row[field] for row in group) / unit
    return f"{mean:,.3g}" if mean < 100 else f"{mean:,.0f}"


def _times(timing: Row | None) -> list[str]:
    if timing is None:
        return ["-", "-", "-"]
    dense = min(timing["dense_contiguous_ms"], timing["dense_channels_last_ms"])
    if timing["sparse_ms"] is None:
        return ["-", f"{dense:.1f}", "-"]
    return [f"{timing['sparse_ms']:.1f}", f"{dense:.1f}", f"{dense / timing['sparse_ms']:.2f}x"]


def _caption(rows: Sequence[Row]) -> str:
    timing = next((row for row in rows if row["kind"] == "timing"), None)
    seeds = len({row["seed"] for row in rows if row["kind"] == "result"})
    spread = f"mean ± standard deviation of {seeds} seeds" if seeds > 1 else "1 seed"
    text = (
        f"Accuracy on the test split after the last epoch, {spread}. Sparsity as asked for,\n"
        "then that of the layers that the method masks, which nnz counts, and of all parameters.\n"
        "FLOPs: of training on an image at the end, and of the whole run with its teacher and the\n"
        "gradients that growth reads; methods that start from a dense run need that besides."
    )
    if timing is not None:
        text += (
            f"\nSteps of batch {timing['batch_size']} on {timing['threads']} threads, medians of "
            f"{timing['rounds']}, interleaved; dense in its better layout; KD includes its teacher."
        )
    return text
