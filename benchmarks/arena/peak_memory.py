"""Peak memory of a training step, by process: its tensors, and `VmHWM`.

Every competitor gets a process of its own, which runs this module with what to train as a JSON
object, trains a few steps and prints what they took as another.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import sparsekd as skd
from benchmarks.arena.competitors import STEPS
from sparsekd.bench.cases import ModelCase
from sparsekd.bench.race import Key, pairs
from sparsekd.bench.steps import StepCompetitor, step_problem
from sparsekd.errors import UnsupportedError
from sparsekd.train import Row, step_memory

_ROOT = Path(__file__).resolve().parents[2]
_STEPS = 3
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class PeakMemory:
    """The peak memory of training steps.

    Args:
        case: the network.
        sparsities: that sparse competitors are measured at.
        competitors: dense ones run once.
    """

    case: ModelCase
    sparsities: tuple[float, ...]
    competitors: Mapping[str, StepCompetitor]

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("memory", self.case.title, "step")

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return pairs(self.competitors, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them, one process after the other."""
        rows = []
        for name, sparsity in self.keys():
            row: Row = {"arm": name, "sparsity": sparsity, "batch": self.case.batch, "ms": None}
            reason = self.competitors[name].missing(self.case)
            if not _STATUS.exists():
                reason = "needs /proc, as on Linux"
            rows.append(row | ({"skipped": reason} if reason else self._ask(name, sparsity)))
        return rows

    def _ask(self, competitor: str, sparsity: float | None) -> Row:
        request = {
            "case": asdict(self.case),
            "competitor": competitor,
            "sparsity": sparsity or self.sparsities[0],
            "threads": torch.get_num_threads(),
        }
        call = [sys.executable, "-m", "benchmarks.arena.peak_memory", json.dumps(request)]
        answer = subprocess.run(call, cwd=_ROOT, capture_output=True, text=True, check=False)
        if answer.returncode:
            return {"failed": answer.stderr.strip().rpartition("\n")[2]}
        return json.loads(answer.stdout)


def peak(case: ModelCase, competitor: StepCompetitor, sparsity: float) -> Row:
    """Train a few steps in this process and return its peak memory.

    Args:
        case: the network.
        competitor: what trains it.
        sparsity: of the model.

    Returns:
        `peak_mib` and `before_mib` (resident memory of the process at its peak, and when the model
        and the batch were there; holes between tensors count, so it varies from run to run),
        `held_mib` (storages of parameters, buffers, gradients and momentum after a step),
        `plans_mib` (what the compiled module keeps beside them for the structures it knows) and
        `live_mib` (both, and the most that tensors made during a step took at any moment).

    Raises:
        UnsupportedError: the system has no /proc.
    """
    given = step_problem(case, sparsity)
    run = competitor.build(given)
    del given
    before = _resident("VmRSS")
    for _ in range(_STEPS):
        run.call()
    peak = _resident("VmHWM")
    kept = step_memory.held(run.model) / 2**20
    plans = skd.ops.info()["cpp"].get("cached_bytes", 0) / 2**20
    return {
        "peak_mib": round(peak, 1),
        "before_mib": round(before, 1),
        "held_mib": round(kept, 1),
        "plans_mib": round(plans, 1),
        "live_mib": round(plans + step_memory.peak(run.model, run.call) / 2**20, 1),
    }


def _resident(field: str) -> float:
    if not _STATUS.exists():
        raise UnsupportedError("peak memory: expected /proc, as on Linux")
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def main() -> None:
    """Answer a request of `PeakMemory`."""
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    skd.keep_memory_warm()
    case = ModelCase(**request["case"])
    print(json.dumps(peak(case, STEPS[request["competitor"]], request["sparsity"])))


if __name__ == "__main__":
    main()
