"""The roofs of this machine as one more thing to measure."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from sparsekd.bench.race import Key
from sparsekd.diagnose.peaks import measure_peaks
from sparsekd.errors import BackendError
from sparsekd.ops import info
from sparsekd.train import Row


@dataclass(frozen=True)
class PeakSession:
    """Measure the roofs.

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
