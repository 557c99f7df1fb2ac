"""The roofs of a machine: what it can do at best, measured by the compiled module."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from sparsekd.bench.race import Key
from sparsekd.errors import BackendError
from sparsekd.ops import info
from sparsekd.ops.dispatch.backends import BACKENDS, load
from sparsekd.train import Row

_L3_PART = 2 << 20  # per thread: past any L2, and inside any L3
_MEMORY_PART = 128 << 20  # per thread: past any L3


@dataclass(frozen=True)
class Peaks:
    """Roofs of a machine, for the current instruction set and number of threads.

    Args:
        flops: float32 operations per second of independent fused multiply-adds.
        l2: bytes per second read from the threads' own L2 caches.
        l3: bytes per second read from what lies behind them.
        memory: bytes per second read from memory.
    """

    flops: float
    l2: float
    l3: float
    memory: float


def measure_peaks(seconds: float = 0.3) -> Peaks:
    """Measure the roofs of this machine for the current instruction set and number of threads.

    Args:
        seconds: spent on each of the four.

    Returns:
        The roofs, each the best of three runs.

    Raises:
        BackendError: the compiled module is missing.

    Source: Williams et al., Roofline (2009), section 4.
    """
    cpp, reason = load("cpp")
    if cpp is None:
        raise BackendError(
            f"peaks are measured by the compiled module ({reason}): {BACKENDS['cpp'].how_to_get}"
        )
    threads = torch.get_num_threads()
    each = seconds / 3

    def read(size: int) -> float:
        return max(cpp.read_bandwidth(size, threads, each) for _ in range(3))

    return Peaks(
        flops=max(cpp.peak_flops(threads, each) for _ in range(3)),
        l2=read(info()["cpp"]["l2_bytes"] // 2),
        l3=read(_L3_PART),
        memory=read(_MEMORY_PART),
    )


@dataclass(frozen=True)
class PeakSession:
    """The roofs as one more thing to measure.

    Args:
        seconds: spent on each.
    """

    seconds: float = 0.3

    @property
    def name(self) -> tuple[str, str, str]:
        """Level, case and operation."""
        return ("peaks", "machine", f"{torch.get_num_threads()} threads")

    def keys(self) -> list[Key]:
        """List the rows it gives."""
        return [("peaks", None)]

    def measure(self) -> list[Row]:
        """Measure them."""
        row: Row = {"arm": "peaks", "sparsity": None, "ms": None}
        try:
            peaks = measure_peaks(self.seconds)
        except BackendError as error:
            return [{**row, "skipped": str(error)}]
        compiled = info()["cpp"]
        caches = {"l1": compiled["l1d_bytes"], "last_level": compiled["l3_bytes"]}
        return [{**row, **asdict(peaks), **caches}]
