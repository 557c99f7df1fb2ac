"""Rows of results: one JSON object a line, appended as they are measured."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from sparsekd.errors import CheckpointError
from sparsekd.train import distributed
from sparsekd.train.checkpoint import write_atomic

Row = dict[str, Any]


class MetricsLog:
    """A JSON-lines file of rows that survives a crash in the middle of a write.

    Args:
        path: the file; created with the first row.

    Example:
        >>> import tempfile
        >>> log = MetricsLog(Path(tempfile.mkdtemp()) / "metrics.jsonl")
        >>> log.append({"kind": "epoch", "loss": 0.5})
        >>> log.rows()
        [{'kind': 'epoch', 'loss': 0.5}]
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)

    def append(self, row: Row) -> None:
        """Append one row and flush it to disk; in a distributed run only rank 0 writes.

        Args:
            row: JSON-serialisable.
        """
        if distributed.rank() > 0:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab") as file:
            file.write(_encode(row))
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[Row]:
        """Read all complete rows; a last line cut short by a crash is ignored.

        Returns:
            The rows in order.

        Raises:
            CheckpointError: a line before the last is not a JSON object.
        """
        if not self.path.exists():
            return []
        *lines, _cut_short = self.path.read_bytes().split(b"\n")
        rows = []
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
            except ValueError as error:
                raise CheckpointError(
                    f"{self.path}: line {number} is not JSON: {error}; remove this line and repeat "
                    "the command"
                ) from error
            if not isinstance(row, dict):
                raise CheckpointError(
                    f"{self.path}: line {number} is not a JSON object; remove this line and repeat "
                    "the command"
                )
            rows.append(row)
        return rows

    def rows_with(self, fields: Iterable[str], kind: str | None = None) -> list[Row]:
        """Read all complete rows, of which those of a kind must have some fields.

        Args:
            fields: their names.
            kind: of the rows that must have them; None for all rows.

        Returns:
            All rows in order.

        Raises:
            CheckpointError: a line is not a JSON object, or a row lacks one of the fields.
        """
        rows, fields = self.rows(), tuple(fields)
        for number, row in enumerate(rows, start=1):
            missing = [name for name in fields if name not in row]
            if missing and kind in (None, row.get("kind")):
                raise CheckpointError(
                    f"{self.path}: line {number} lacks {', '.join(missing)}; is it a file of "
                    "this command? Remove the line, or name another file"
                )
        return rows

    def keep(self, condition: Callable[[Row], bool]) -> None:
        """Rewrite the file, atomically, with the rows that meet a condition.

        Args:
            condition: row -> whether it stays.
        """
        if self.path.exists():
            write_atomic(self.path, b"".join(_encode(r) for r in self.rows() if condition(r)))


def _encode(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"
