"""The roofs of this machine as one more thing to measure."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from sparsekd.bench.race import Key
from sparsekd.errors import BackendError
from sparsekd.ops import info
from sparsekd.ops.peaks import measure_peaks
from sparsekd.train import Row

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_UNITS = {"K": 1 << 10, "M": 1 << 20}


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
        l1 = info()["cpp"]["l1d_bytes"]
        return [{**row, **asdict(peaks), "l1": l1, "last_level": last_level_bytes()}]


def last_level_bytes() -> int:
    """Return the size of the last-level cache as Linux tells it, 0 where it does not.

    Example:
        >>> last_level_bytes() >= 0
        True
    """
    sizes = [0]
    if os.path.isdir(_CACHES):
        for index in _CACHES.glob("index*/size"):
            text = index.read_text().strip()
            sizes.append(int(text[:-1]) * _UNITS[text[-1]] if text[-1:] in _UNITS else int(text))
    return max(sizes)
