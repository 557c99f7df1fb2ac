"""Sinks have every row once, also after an interruption."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import pytest

from sparsekd.errors import UnavailableError
from sparsekd.recipes import Experiment, RunFolder, get, load_data, override
from sparsekd.train import Interrupted, MetricsLog
from sparsekd.train.sinks import Csv, TensorBoard, make_sinks


class Memory:
    def __init__(self):
        self.rows = []

    def begin(self, rows):
        self.rows = list(rows)

    def add(self, row):
        self.rows.append(row)


@pytest.fixture(scope="module")
def recipe():
    chosen = get("demo").with_epochs(3)
    small = ("seeds=1", "model.name=resnet20", "skip=", "data.train_images=128")
    for change in ("methods=rigl", "sparsities=0.9", "dynamics.every=1", *small):
        chosen = override(chosen, change)
    return chosen


@pytest.mark.parametrize("looks", [0, 3])
def test_rows_arrive_once_over_interruptions(recipe, tmp_path, stop_at, looks):
    dataset, table = load_data(recipe.data, None), tmp_path / "epochs.csv"
    with pytest.raises(Interrupted), RunFolder(tmp_path, recipe, sinks=[Csv(table)]) as folder:
        Experiment(recipe, dataset, folder, stop=stop_at(looks)).run()
    if looks:  # as a kill would leave it between the saved state and the row
        log = MetricsLog(tmp_path / "metrics.jsonl")
        log.keep(lambda row: row["epoch"] != max(row["epoch"] for row in log.rows()))
    memory = Memory()
    with RunFolder(tmp_path, recipe, sinks=[Csv(table), memory]) as folder:
        Experiment(recipe, dataset, folder).run()
        assert memory.rows == folder.log.rows()
    with open(table, newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["run"], int(line["epoch"])) for line in lines] == [
        ("seed0/rigl-0.9", epoch) for epoch in (1, 2, 3)
    ]
    losses = [row["train_loss"] for row in memory.rows if row["kind"] == "epoch"]
    assert [float(line["train_loss"]) for line in lines] == losses


def test_tensorboard_has_a_curve_a_run(tmp_path):
    pytest.importorskip("tensorboard", reason="writes and reads its event files")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = {"kind": "epoch", "run": "seed0/lt-0.9", "train_loss": 1.0, "updates": 0}
    rows = [run | {"epoch": epoch, "train_loss": 1 / epoch} for epoch in (1, 2, 3)]
    result = {"kind": "result", "run": "seed0/lt-0.9", "epochs": 3, "test_accuracy": 0.5}
    for _ in range(2):  # the second begins again, from the rows that are there
        sink = TensorBoard(tmp_path / "tensorboard")
        sink.begin(rows[:2])
        sink.add(rows[2])
        sink.add(result)
    events = EventAccumulator(str(tmp_path / "tensorboard/seed0/lt-0.9")).Reload()
    points = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert points == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert [(e.step, e.value) for e in events.Scalars("test_accuracy")] == [(3, 0.5)]


def test_unknown_and_missing_sinks_are_named(monkeypatch, tmp_path):
    with pytest.raises(ValueError, match="--log: expected names among csv, tensorboard, got 'x'"):
        make_sinks("csv,x", tmp_path)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(UnavailableError, match=r"pip install 'sparsekd\[tensorboard\]'"):
        make_sinks("tensorboard", Path("runs"))
