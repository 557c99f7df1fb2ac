"""`make gpu-check` goes on after a failure, ends what hangs and says how everything ended."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch
from rich.console import Console

from benchmarks.gpu.suite import suite

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_it_survives_failures_and_sums_up(gpu_check: ModuleType, tmp_path: Path) -> None:
    sleeper = "import subprocess, sys; subprocess.run(['sleep', '60'])"
    todo = [
        gpu_check.Step("good", python("import os; print(os.environ['ASKED'])"), 30, {"ASKED": "1"}),
        gpu_check.Step("bad", python("raise SystemExit('no such kernel')"), 30),
        gpu_check.Step("hangs", python(sleeper), 0.5),
        gpu_check.Step("missing", ["no-such-program"], 30),
        gpu_check.Step("absent", [], 30, skipped="not installed"),
        gpu_check.Step("after", python("print('still here')"), 30),
    ]
    start = time.monotonic()
    outcomes = gpu_check.run(todo, tmp_path, Console(file=io.StringIO()))
    assert time.monotonic() - start < 30
    ends = {outcome.name: outcome.outcome for outcome in outcomes}
    assert ends == {
        "good": "passed",
        "bad": "failed",
        "hangs": "timed out",
        "missing": "failed",
        "absent": "skipped",
        "after": "passed",
    }
    assert (tmp_path / "good.log").read_text() == "1\n"
    assert outcomes[1].last == "no such kernel"
    assert [o["outcome"] for o in json.loads((tmp_path / "summary.json").read_text())] == list(
        ends.values()
    )
    assert gpu_check.summary(outcomes).row_count == len(todo)


def test_it_takes_less_than_twelve_minutes_whatever_hangs(gpu_check: ModuleType) -> None:
    assert sum(step.seconds for step in gpu_check.steps(Path("x"))) < 12 * 60


def test_what_is_worth_most_comes_first(gpu_check: ModuleType) -> None:
    names = [step.name for step in gpu_check.steps(Path("x"))]
    assert names == [
        *("build", "info", "tests", "steps", "layers", "memcheck", "racecheck", "report")
    ]


def test_benchmarks_stop_by_themselves_before_they_are_ended(gpu_check: ModuleType) -> None:
    levels = []
    for step in gpu_check.steps(Path("x")):
        if "--seconds" in step.command:
            option = dict(itertools.pairwise(step.command))
            assert float(option["--seconds"]) < step.seconds - 30, step.name
            levels += option["--level"].split(",")
    assert levels == list(suite().levels)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so_and_fails(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "torch sees no CUDA device" in done.stdout
    assert not list(tmp_path.iterdir())
