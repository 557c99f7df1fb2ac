"""Where rows of results go besides metrics.jsonl: CSV, TensorBoard, or a service of your own."""

from __future__ import annotations

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from sparsekd.train.metrics import Row
from sparsekd.train.optional import need

EPOCH_COLUMNS = (
    "run",
    "epoch",
    "lr",
    "train_loss",
    "train_accuracy",
    "val_loss",
    "val_accuracy",
    "images_per_second",
    "seconds",
    "flops",
    "updates",
)


class Sink(Protocol):
    """A receiver of rows. It gets every row once, whatever interrupted the runs.

    metrics.jsonl is what counts: a sink starts from its rows and may forget what it had before.

    Example:
        >>> class Print:
        ...     def begin(self, rows):
        ...         print(len(rows), "rows so far")
        ...
        ...     def add(self, row):
        ...         print(row["kind"], row["run"])
        >>> Print().begin([])
        0 rows so far
    """

    def begin(self, rows: Sequence[Row]) -> None:
        """Receive the rows that are there when a command starts."""

    def add(self, row: Row) -> None:
        """Receive a new row."""


class Csv:
    """A table of all epochs, a line each, for spreadsheets and data frames.

    Args:
        path: of the file.

    Example:
        >>> import tempfile
        >>> sink = Csv(Path(tempfile.mkdtemp()) / "epochs.csv")
        >>> sink.begin([{"kind": "epoch", "run": "seed0/dense", "epoch": 1, "train_loss": 0.5}])
        >>> sink.path.read_text().splitlines()[1]
        'seed0/dense,1,,0.5,,,,,,,'
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin(self, rows: Sequence[Row]) -> None:
        with open(self.path, "w", newline="") as file:
            writer = _writer(file)
            writer.writeheader()
            writer.writerows(row for row in rows if row["kind"] == "epoch")

    def add(self, row: Row) -> None:
        if row["kind"] == "epoch":
            with open(self.path, "a", newline="") as file:
                _writer(file).writerow(row)


def _writer(file: Any) -> csv.DictWriter[str]:
    return csv.DictWriter(file, EPOCH_COLUMNS, extrasaction="ignore")


class TensorBoard:
    """Curves for TensorBoard, a folder of events for each run.

    Args:
        folder: of the events; what is in it is replaced.

    Raises:
        UnavailableError: TensorBoard is not installed.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        need("tensorboard", "tensorboard")
        self._new = need("torch.utils.tensorboard", "tensorboard").SummaryWriter
        self._writers: dict[str, Any] = {}

    def begin(self, rows: Sequence[Row]) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        for row in rows:
            self.add(row)

    def add(self, row: Row) -> None:
        run, step = row["run"], row.get("epoch", row.get("epochs"))
        if row["kind"] not in ("epoch", "result"):
            return
        if run not in self._writers:
            self._writers[run] = self._new(str(self.folder / run))
        wanted = EPOCH_COLUMNS[2:] if row["kind"] == "epoch" else ("test_accuracy", "test_loss")
        for name in wanted:
            if name in row:
                self._writers[run].add_scalar(name, row[name], step)
        self._writers[run].flush()
        if row["kind"] == "result":  # the run is over; a sweep has more runs than files may be open
            self._writers.pop(run).close()


SINKS = ("csv", "tensorboard")
"""Names that `make_sinks` knows."""


def make_sinks(names: str, folder: Path) -> list[Sink]:
    """Build sinks by name, in the folder of an experiment.

    Args:
        names: of `SINKS`, separated by commas.
        folder: of the experiment.

    Raises:
        ValueError: a name is not known.
        UnavailableError: a package is missing.

    Example:
        >>> [type(sink).__name__ for sink in make_sinks("csv", Path("runs/demo"))]
        ['Csv']
    """
    sinks: list[Sink] = []
    for name in filter(None, (word.strip() for word in names.split(","))):
        if name == "csv":
            sinks.append(Csv(folder / "epochs.csv"))
        elif name == "tensorboard":
            sinks.append(TensorBoard(folder / "tensorboard"))
        else:
            raise ValueError(f"--log: expected names among {', '.join(SINKS)}, got {name!r}")
    return sinks
