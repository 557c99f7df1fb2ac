"""Evaluation of rows: which of them count, the dense time, the speed-up of a competitor."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from sparsekd.bench.cases import BASELINES
from sparsekd.bench.runner import identity
from sparsekd.errors import CheckpointError
from sparsekd.train import MetricsLog, Row

_FIELDS = ("level", "case", "op", "arm", "sparsity", "ms", "machine")


class Results:
    """The rows of one machine and build, the newest of each kind.

    Args:
        rows: of any machines and builds; those of the machine of the last row count.

    Example:
        >>> machine = {"id": "a"}
        >>> common = {"level": "layer", "case": "c", "op": "layer", "session": "1"}
        >>> rows = [
        ...     {**common, "arm": "dense_contiguous", "sparsity": None, "ms": 8.0},
        ...     {**common, "arm": "sparsekd", "sparsity": 0.9, "ms": 2.0},
        ... ]
        >>> results = Results([{**row, "machine": machine} for row in rows])
        >>> results.speedup(results.find("layer", "c", "layer", "sparsekd", 0.9))
        4.0
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.machine: dict[str, Any] = rows[-1]["machine"] if rows else {}
        self._newest: dict[tuple[str, str, str, str, float | None], Row] = {}
        self._dense: dict[tuple[str, str, str, str], Row] = {}
        for row in rows:
            if row["machine"]["id"] != self.machine["id"]:
                continue
            self._newest.pop(identity(row), None)
            self._newest[identity(row)] = row
            baseline = row.get("baseline", row["arm"] in BASELINES)
            if baseline and row["ms"] is not None:
                best = self._dense.get(_place(row), row)
                self._dense[_place(row)] = min(best, row, key=lambda one: one["ms"])

    @classmethod
    def read(cls, path: Path) -> Results:
        """Read the rows of a JSON-lines file that a benchmark wrote.

        Raises:
            CheckpointError: the file has no rows, or is damaged.
        """
        rows = MetricsLog(path).rows_with(_FIELDS)
        if not rows:
            raise CheckpointError(f"{path}: expected rows of `sparsekd bench`, found none")
        return cls(rows)

    def rows(self, level: str, *, name: str | None = None, case: str | None = None) -> list[Row]:
        """List the rows of a level, in the order of measurement."""
        return [
            row
            for row in self._newest.values()
            if row["level"] == level
            and (name is None or row["arm"] == name)
            and (case is None or row["case"] == case)
        ]

    def cases(self, level: str) -> list[str]:
        """List the cases of a level, in the order of measurement."""
        return list(dict.fromkeys(row["case"] for row in self.rows(level)))

    def sparsities(self, level: str) -> list[float]:
        """List the sparsities of a level, ascending."""
        found = {row["sparsity"] for row in self.rows(level)}
        return sorted(sparsity for sparsity in found if sparsity is not None)

    def find(
        self, level: str, case: str, op: str, name: str, sparsity: float | None = None
    ) -> Row | None:
        """Return the newest row of these, None if there is none."""
        return self._newest.get((level, case, op, name, sparsity))

    def dense(self, row: Row) -> Row | None:
        """Return the row of the better dense layout, measured in turns with this row."""
        return self._dense.get(_place(row))

    def dense_ms(self, row: Row) -> float | None:
        """Return the time of that row."""
        dense = self.dense(row)
        return dense["ms"] if dense else None

    def speedup(self, row: Row | None) -> float | None:
        """Return how many times faster than the better dense layout a row is."""
        dense = self.dense_ms(row) if row else None
        return dense / row["ms"] if row and row["ms"] and dense else None

    def geomean(self, name: str, sparsity: float | None, cases: Iterable[str]) -> float | None:
        """Return the geometric mean of the speed-ups over layers, None unless all have one."""
        rows = [self.find("layer", case, "layer", name, sparsity) for case in cases]
        speedups = [speedup for speedup in map(self.speedup, rows) if speedup is not None]
        complete = speedups and len(speedups) == len(rows)
        return statistics.geometric_mean(speedups) if complete else None

    def shortfalls(self) -> list[tuple[str, Row]]:
        """List the rows without a time, each with what happened: refused, failed or skipped."""
        outcomes = ("refused", "failed", "skipped")
        return [(o, row) for row in self._newest.values() for o in outcomes if o in row]


def _place(row: Row) -> tuple[str, str, str, str]:
    return row["session"], row["level"], row["case"], row["op"]
