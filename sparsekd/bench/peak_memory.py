"""Peak memory of a training step, each arm in a process of its own: `VmHWM` from /proc.

Run as a module (`python -m sparsekd.bench.peak_memory CASE ARM SPARSITY BATCH THREADS`) it trains
a few steps and prints what it took, as one JSON object.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

import sparsekd as skd
from sparsekd.bench.cases import MODELS, ModelCase
from sparsekd.bench.race import Key, pairs
from sparsekd.bench.steps import STEP_ARMS, StepArm, contest
from sparsekd.errors import UnsupportedError
from sparsekd.train import Row

_STEPS = 3
_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class PeakMemory:
    """Measure the peak memory of training steps.

    Args:
        case: the network, one of `MODELS`.
        sparsities: that sparse arms are measured at.
        arms: dense ones run once.
    """

    case: ModelCase
    sparsities: tuple[float, ...]
    arms: Mapping[str, StepArm]

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("memory", self.case.title, "step")

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return pairs(self.arms, self.sparsities)

    def measure(self) -> list[Row]:
        """Measure them, one process after the other."""
        rows = []
        for name, sparsity in self.keys():
            row: Row = {"arm": name, "sparsity": sparsity, "batch": self.case.batch, "ms": None}
            reason = self.arms[name].missing()
            if not _STATUS.exists():
                reason = "needs /proc, as on Linux"
            rows.append(row | ({"skipped": reason} if reason else self._ask(name, sparsity)))
        return rows

    def _ask(self, arm: str, sparsity: float | None) -> Row:
        options = (self.case.name, arm, sparsity or self.sparsities[0], self.case.batch)
        call = [sys.executable, "-m", "sparsekd.bench.peak_memory", *map(str, options)]
        answer = subprocess.run(
            [*call, str(torch.get_num_threads())], capture_output=True, text=True
        )
        if answer.returncode:
            return {"failed": answer.stderr.strip().rpartition("\n")[2]}
        return json.loads(answer.stdout)


def peak(case: ModelCase, arm: StepArm, sparsity: float) -> Row:
    """Train a few steps in this process and return its peak memory.

    Args:
        case: the network.
        arm: what trains it.
        sparsity: of the model.

    Returns:
        `peak_mib`, `before_mib` (of the process when the model and the batch were there),
        `held_mib` (storages of parameters, buffers, gradients and momentum after a step) and
        `plans_mib` (what the compiled module keeps beside them for the structures it knows).

    Raises:
        UnsupportedError: the system has no /proc.
    """
    given = contest(case, sparsity)
    run = arm.build(given)
    del given
    before = _resident("VmRSS")
    for _ in range(_STEPS):
        run.call()
    plans = skd.ops.info()["cpp"].get("cached_bytes", 0)
    return {
        "peak_mib": round(_resident("VmHWM"), 1),
        "before_mib": round(before, 1),
        "held_mib": round(_held(run.model) / 2**20, 1),
        "plans_mib": round(plans / 2**20, 1),
    }


def _held(model: torch.nn.Module) -> int:
    """Count the bytes of what lives as long as training, with momentum as large as gradients."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    tensors = [*parameters, *model.buffers(), *gradients]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + sum(4 * gradient.numel() for gradient in gradients)


def _resident(field: str) -> float:
    if not _STATUS.exists():
        raise UnsupportedError("peak memory: expected /proc, as on Linux")
    lines = dict(line.split(":", 1) for line in _STATUS.read_text().splitlines())
    return int(lines[field].split()[0]) / 1024


def main() -> None:
    """Answer a request of `PeakMemory`."""
    name, arm, sparsity, batch, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    skd.keep_memory_warm()
    case = ModelCase(name, MODELS[name].input_shape, int(batch))
    print(json.dumps(peak(case, STEP_ARMS[arm], float(sparsity))))


if __name__ == "__main__":
    main()
