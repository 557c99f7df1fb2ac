"""What the sparse runs of an experiment save against its dense network, and what they cost."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparsekd.dst import METHODS
from sparsekd.train import Row

ORDER = ("dense", *METHODS)
"""Methods, as tables list them."""


@dataclass(frozen=True)
class Saving:
    """A method at a sparsity, beside the dense network.

    What was not measured, or has no dense run to be compared with, is None.

    Args:
        method: name in `sparsekd.dst.METHODS`.
        sparsity: of the masked layers.
        accuracies: on the test split, one a seed.
        flops: share of the FLOPs of a training step saved, with the last topology.
        time: share of the time of a training step saved.
        held: share saved of the memory of weights, indices, gradients and momentum.
        peak: share saved of that and everything else that a step keeps.
        total_flops: of all that the method runs, over those of the dense run: with its teacher,
            and with the dense run if it starts from one.
        total_time: likewise, of training.
    """

    method: str
    sparsity: float
    accuracies: tuple[float, ...]
    flops: float | None
    time: float | None
    held: float | None
    peak: float | None
    total_flops: float | None
    total_time: float | None

    @property
    def speedup(self) -> float | None:
        """How many times faster a step is than dense."""
        return None if self.time is None else 1 / (1 - self.time)


def by_cell(rows: Sequence[Row]) -> Iterator[tuple[float, str, list[Row]]]:
    """Iterate over sparsities and methods in the order of tables, each with a row a seed.

    Args:
        rows: raw rows.
    """
    results = [row for row in rows if row["kind"] == "result"]
    cells = {(row["sparsity"], row["method"]) for row in results}
    for sparsity, method in sorted(cells, key=lambda cell: (cell[0], ORDER.index(cell[1]))):
        group = [r for r in results if (r["sparsity"], r["method"]) == (sparsity, method)]
        yield sparsity, method, group


def savings(rows: Sequence[Row]) -> list[Saving]:
    """Compare every sparse method and sparsity of an experiment with dense training.

    Args:
        rows: raw rows.

    Returns:
        One entry a method and sparsity, in the order of tables.

    Example:
        >>> savings([])
        []
    """
    timings = {row["run"]: row for row in rows if row["kind"] == "timing"}
    dense = {r["seed"]: r for _, method, group in by_cell(rows) if method == "dense" for r in group}
    found = []
    for sparsity, method, group in by_cell(rows):
        if method == "dense":
            continue
        timing = next((timings[r["run"]] for r in group if r["run"] in timings), None)
        found.append(
            Saving(
                method,
                sparsity,
                tuple(row["test_accuracy"] for row in group),
                flops=_flops(group[0], dense),
                time=_time(timing),
                held=_memory(timing, "held"),
                peak=_memory(timing, "peak"),
                total_flops=_total(group, dense, "flops_run"),
                total_time=_total(group, dense, "seconds"),
            )
        )
    return found


def dense_ms(timing: Row) -> float:
    """Return the time of a dense step, in its better layout."""
    return min(timing["dense_contiguous_ms"], timing["dense_channels_last_ms"])


def _flops(row: Row, dense: dict[int, Row]) -> float | None:
    # A narrow dense network is compared with the whole one, which its row does not know.
    whole = next((r["flops_train"] for r in dense.values() if "flops_train" in r), None)
    whole = whole or row.get("flops_train_dense")
    return 1 - row["flops_train"] / whole if whole and "flops_train" in row else None


def _time(timing: Row | None) -> float | None:
    if timing is None or timing["sparse_ms"] is None:
        return None
    return 1 - timing["sparse_ms"] / dense_ms(timing)


def _memory(timing: Row | None, kind: str) -> float | None:
    measured = (timing or {}).get(kind) or {}
    return 1 - measured["sparse"] / measured["dense"] if "sparse" in measured else None


def _total(group: Sequence[Row], dense: dict[int, Row], price: str) -> float | None:
    """Return the price of a method over that of the dense run, on the seeds that have both."""
    pairs = [(row, dense[row["seed"]]) for row in group if row["seed"] in dense]
    if not pairs or not all(price in row and row[price] for pair in pairs for row in pair):
        return None
    first = METHODS[group[0]["method"]].needs_dense
    cost = statistics.mean(row[price] + (whole[price] if first else 0) for row, whole in pairs)
    return cost / statistics.mean(whole[price] for _, whole in pairs)
