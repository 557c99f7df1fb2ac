"""Check and measure the GPU kernels on a machine with a GPU: `make gpu-check`.

Builds, runs the tests that need a device, times training steps and layers against dense torch, and
runs some of the tests under compute-sanitizer if that is installed: in the order of their worth.
Needs no network, takes less than twelve minutes, goes on after a failure and ends with a summary;
logs, rows, tables, figures and what was chosen by measurement are in runs/gpu-check/<name of the
device>. Called again, it measures what is missing there. Exits with 1 if a step failed, with 2 if
there is no GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parents[1]
SANITIZER = "compute-sanitizer"


@dataclass(frozen=True)
class Step:
    """A command.

    Args:
        name: in the summary, and of its log.
        command: what runs, in the project's root.
        seconds: after which it is ended.
        environment: variables it gets besides the present ones.
        skipped: why it does not run, None if it does.
    """

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)
    skipped: str | None = None


@dataclass(frozen=True)
class Outcome:
    """How a step ended: "passed", "failed", "timed out" or "skipped", and its last line."""

    name: str
    outcome: str
    seconds: float
    last: str


def steps(folder: Path) -> list[Step]:
    """List what is done, in order.

    Args:
        folder: of logs and results.
    """
    python, path = sys.executable, os.environ.get("PATH", "")
    # cmake and ninja of the environment, which need not be the active one
    build = {"SPARSEKD_CUDA": "on", "PATH": f"{Path(python).parent}{os.pathsep}{path}"}
    tests, untuned = [python, "-m", "pytest", "-v", "tests/gpu"], {"SPARSEKD_TUNE": "off"}
    bench = [python, "-m", "benchmarks.gpu", "--rows", f"{folder}/rows.jsonl"]
    bench += ["--out", str(folder)]
    choices = {"SPARSEKD_CACHE": f"{folder}/choices"}
    return [
        Step("build", [python, "setup.py", "build_ext", "--inplace"], 110, build),
        Step("info", [python, "-m", "sparsekd", "info"], 20),
        # Most of their time Triton compiles, on the CPU. Tests of tuning turn it on.
        Step("tests", [*tests, "-n", "4"], 150, untuned),
        # A race that has begun has the rest of the limit to end in.
        Step("steps", [*bench, "--level", "step", "--seconds", "160"], 230, choices),
        Step("layers", [*bench, "--level", "layer,small", "--seconds", "55"], 90, choices),
        # A tensor to an allocation: past its end is then past what a kernel may touch. That CUDA
        # refuses what torch or Triton only try is no error.
        _sanitized(
            "memcheck",
            tests,
            {**untuned, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
            "--report-api-errors",
            "no",
        ),
        _sanitized("racecheck", tests, untuned),
        # On what there is by then, should time have run out.
        Step("report", [*bench, "--draw"], 20),
    ]


def _sanitized(tool: str, tests: Sequence[str], environment: dict[str, str], *options: str) -> Step:
    found = shutil.which(SANITIZER)
    command = [SANITIZER, "--tool", tool, *options, "--error-exitcode", "1", *tests]
    return Step(
        tool, [*command, "-k", "equal_bits"], 45, environment,
        skipped=None if found else f"{SANITIZER} is not installed",
    )  # fmt: skip


def run(todo: Iterable[Step], folder: Path, console: Console) -> list[Outcome]:
    """Run steps one after the other, whatever becomes of them, and write the summary.

    Args:
        todo: the steps.
        folder: where a log a step and summary.json go.
        console: shows each step as it ends.

    Returns:
        How they ended.
    """
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = []
    for step in todo:
        with console.status(f"{step.name}: {' '.join(step.command)}"):
            outcomes.append(_run(step, folder))
        console.print(f"{step.name}: {outcomes[-1].outcome}, {outcomes[-1].seconds:.0f} s")
        text = json.dumps([asdict(outcome) for outcome in outcomes], indent=2)
        (folder / "summary.json").write_text(text + "\n")
    return outcomes


def _run(step: Step, folder: Path) -> Outcome:
    if step.skipped is not None:
        return Outcome(step.name, "skipped", 0.0, step.skipped)
    start, path = time.monotonic(), folder / f"{step.name}.log"
    with path.open("w") as log:
        try:
            process = subprocess.Popen(
                step.command,
                cwd=ROOT,
                env={**os.environ, **step.environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        except OSError as error:
            return Outcome(step.name, "failed", 0.0, str(error))
        try:
            outcome = "failed" if process.wait(step.seconds) else "passed"
        except subprocess.TimeoutExpired:
            outcome = "timed out"
        finally:
            _end(process)
    lines = [line for line in path.read_text(errors="replace").splitlines() if line.strip()]
    return Outcome(step.name, outcome, time.monotonic() - start, lines[-1] if lines else "")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process with all that it has started."""
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        return
    process.wait()


def summary(outcomes: Sequence[Outcome]) -> Table:
    """Build the closing table."""
    table = Table("step", "outcome", "seconds", "last line")
    for outcome in outcomes:
        table.add_row(outcome.name, outcome.outcome, f"{outcome.seconds:.0f}", outcome.last[:100])
    return table


def device() -> str | None:
    """Return the name of the GPU, None without one."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def main() -> int:
    """Run everything and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu-check")
    out = parser.parse_args().out
    console, name = Console(), device()
    if name is None:
        console.print("gpu-check: torch sees no CUDA device; nothing was checked", style="red")
        return 2
    folder = out / re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    outcomes = run(steps(folder), folder, console)
    console.print(summary(outcomes))
    console.print(f"logs, rows, tables and figures: {folder}", highlight=False, soft_wrap=True)
    return int(any(outcome.outcome in ("failed", "timed out") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
