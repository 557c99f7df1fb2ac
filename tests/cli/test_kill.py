"""kill -9 at random moments: nothing that has finished is lost, and the files end up the same."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

import sparsekd
from sparsekd.train import MetricsLog, load_state

_TRAIN = [
    *(sys.executable, "-m", "sparsekd", "train", "demo", "--method", "kd,rigl,sup-rigl"),
    *("--sparsity", "0.9", "--epochs", "3", "--threads", "1", "--backend", "cpp"),
    *("--seeds", "1", "--set", "model.name=resnet20", "--set", "skip="),
    *("--set", "data.train_images=96", "--set", "training.batch_size=32"),
    *("--set", "dynamics.every=2", "--set", "sup.cycle_fraction=0.34"),
]
_ENV = {**os.environ, "PYTHONPATH": str(Path(sparsekd.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
_RUNS = ["dense", "kd-0.9", "rigl-0.9", "sup-rigl-0.9"]
_LIMIT = 300  # seconds: no run takes this long on the slowest machine


@contextmanager
def training(out: Path):
    """Train in a process that is gone afterwards, whatever happens here."""
    with open(out.with_suffix(".log"), "ab") as log:
        command = [*_TRAIN, "--out", str(out)]
        process = subprocess.Popen(command, env=_ENV, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.kill()
            process.wait(_LIMIT)


def finished(out: Path) -> set[str]:
    """Return the runs that count as done, and check that their files can be read."""
    rows = MetricsLog(out / "metrics.jsonl").rows()
    runs = {row["run"] for row in rows if row["kind"] == "result"}
    for run in runs:
        assert load_state(out / run / "final.safetensors")
    return runs


def wait_for(process, out: Path, file: str) -> float:
    """Wait until a process has written a file; return the time."""
    deadline = time.monotonic() + _LIMIT
    while not (out / file).exists():
        assert process.poll() is None, out.with_suffix(".log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return time.monotonic()


def complete(process, out: Path) -> None:
    assert process.wait(_LIMIT) == 0, out.with_suffix(".log").read_text()


def outcome(out: Path):
    rows = [
        {name: value for name, value in row.items() if "second" not in name}
        for row in MetricsLog(out / "metrics.jsonl").rows()
        if row["kind"] != "timing"
    ]
    files = {run: (out / f"seed0/{run}/final.safetensors").read_bytes() for run in _RUNS}
    return rows, files


def lives_for(process, seconds: float) -> bool:
    """Return whether a process is still running after this time."""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return True
    return False


@pytest.mark.parametrize(
    "kills", [pytest.param(5, marks=pytest.mark.slow), pytest.param(50, marks=pytest.mark.thorough)]
)
def test_killed_runs_end_as_one_that_was_not(tmp_path, kills):
    whole = tmp_path / "whole"
    begun = time.monotonic()
    with training(whole) as process:
        # Starting Python takes longer than the runs: kills fall where there is something to lose.
        start = wait_for(process, whole, "config.json") - begun
        span = wait_for(process, whole, f"seed0/{_RUNS[-1]}/final.safetensors") - begun - start
        complete(process, whole)
    expected, random = outcome(whole), Random(kills)
    killed = experiments = 0
    while killed < kills:
        out, done = tmp_path / str(experiments), set()
        experiments += 1
        over = False
        while killed < kills and not over:
            with training(out) as process:
                over = not lives_for(process, random.uniform(0.8 * start, start + span / 2))
                if over:
                    complete(process, out)
            if not over:
                killed += 1
                now = finished(out)
                assert now >= done
                done = now
        if not over:
            with training(out) as process:
                complete(process, out)
        rows, files = outcome(out)
        assert rows == expected[0]
        assert [run for run in _RUNS if files[run] != expected[1][run]] == []
        assert not list(out.rglob("*.tmp"))
