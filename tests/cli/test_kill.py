"""kill -9 at random moments: nothing that has finished is lost, and the files end up the same."""

from __future__ import annotations

import multiprocessing
import os
import sys
import time
from pathlib import Path
from random import Random

import pytest

import sparsekd.cli
from sparsekd.train import MetricsLog, load_state

_TRAIN = [
    *("sparsekd", "train", "demo", "--method", "kd,rigl,sup-rigl", "--sparsity", "0.9"),
    *("--epochs", "3", "--threads", "1", "--backend", "cpp", "--set", "data.train_images=96"),
    *("--set", "training.batch_size=32", "--set", "dynamics.every=2"),
    *("--set", "sup.cycle_fraction=0.34"),
]
_RUNS = ["dense", "kd-0.9", "rigl-0.9", "sup-rigl-0.9"]
# A process of this server is ready at once: what it imports takes longer than a run.
_PROCESSES = multiprocessing.get_context("forkserver") if os.name == "posix" else None


@pytest.fixture
def start(monkeypatch):
    assert _PROCESSES is not None
    _PROCESSES.set_forkserver_preload(["sparsekd.cli"])

    def start(out: Path):
        monkeypatch.setattr(sys, "argv", [*_TRAIN, "--out", str(out)])  # which the process takes
        process = _PROCESSES.Process(target=sparsekd.cli.main)
        process.start()
        return process

    return start


def finished(out: Path) -> set[str]:
    """Return the runs that count as done, and check that their files can be read."""
    rows = MetricsLog(out / "metrics.jsonl").rows()
    runs = {row["run"] for row in rows if row["kind"] == "result"}
    for run in runs:
        assert load_state(out / run / "final.safetensors")
    return runs


def wait_for(process, file: Path) -> float:
    """Wait until a process has written a file; return the time."""
    while not file.exists():
        assert process.exitcode is None
        time.sleep(0.01)
    return time.monotonic()


def outcome(out: Path):
    rows = [
        {name: value for name, value in row.items() if "second" not in name}
        for row in MetricsLog(out / "metrics.jsonl").rows()
        if row["kind"] != "timing"
    ]
    files = {run: (out / f"seed0/{run}/final.safetensors").read_bytes() for run in _RUNS}
    return rows, files


@pytest.mark.skipif(os.name != "posix", reason="forks processes")
@pytest.mark.thorough
@pytest.mark.parametrize("kills", [5, 50])
def test_killed_runs_end_as_one_that_was_not(start, tmp_path, kills):
    whole = tmp_path / "whole"
    process = start(whole)
    begun = wait_for(process, whole / "config.json")  # the server is up, and the run begins
    span = wait_for(process, whole / f"seed0/{_RUNS[-1]}/final.safetensors") - begun
    process.join()
    assert process.exitcode == 0
    expected, random = outcome(whole), Random(kills)
    killed = experiments = 0
    while killed < kills:
        out, done = tmp_path / str(experiments), set()
        experiments += 1
        while killed < kills:
            process = start(out)
            process.join(random.uniform(0, span / 2))
            if process.exitcode is not None:
                break
            process.kill()
            process.join(60)
            assert process.exitcode is not None
            killed += 1
            now = finished(out)
            assert now >= done
            done = now
        if process.exitcode != 0:
            process = start(out)
            process.join()
            assert process.exitcode == 0
        rows, files = outcome(out)
        assert rows == expected[0]
        assert [run for run in _RUNS if files[run] != expected[1][run]] == []
        assert not list(out.rglob("*.tmp"))
