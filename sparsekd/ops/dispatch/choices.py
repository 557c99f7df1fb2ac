"""Measured choices between sparse kernels and a dense weight, and estimates from them.

The name of the file that keeps them stands for everything that timings depend on besides the key:
processor, instruction sets, torch, and the compiled kernels themselves.
"""

from __future__ import annotations

import hashlib
import math
import os
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

import sparsekd._C as _C
from sparsekd.ops.cpu.processor import cpu_name
from sparsekd.ops.dispatch import cache_key
from sparsekd.ops.dispatch.cache_key import Key
from sparsekd.ops.store import Store, path_of

CHOICES = ("cpp", "dense")
_FORMAT = 2


@dataclass(frozen=True)
class Choice:
    """The backend that runs an op, and why.

    Args:
        backend: "cpp" or "dense".
        cpp_ms: what the sparse kernels took; None where a rule decides.
        dense_ms: likewise on the dense weight.
        spread: how far the times of one backend lay apart, as a share of the fastest.
        products: multiplications of the dense op that was timed.
        when: it was timed, in seconds since 1970; 0 where the times are estimates.
    """

    backend: str
    cpp_ms: float | None = None
    dense_ms: float | None = None
    spread: float = 0.0
    products: int = 0
    when: float = 0.0

    @property
    def ms(self) -> float | None:
        """Time of what runs."""
        return self.times.get(self.backend)

    @property
    def times(self) -> dict[str, float]:
        """Milliseconds by backend, as far as they are known."""
        found = {"cpp": self.cpp_ms, "dense": self.dense_ms}
        return {name: ms for name, ms in found.items() if ms is not None}

    @property
    def reason(self) -> str:
        """Where the choice comes from, in words."""
        if not self.times:
            return "the dense weight cannot run here"
        if not self.measured:
            return "estimated from measurements of similar work"
        return "measured" if self.decided else "too close to tell apart"

    @property
    def measured(self) -> bool:
        """Whether the times are of this very kind of work."""
        return self.when > 0

    @property
    def decided(self) -> bool:
        """Whether it was measured, and the gain is larger than what timings varied by."""
        return self.measured and self.lead > 1 + self.spread

    @property
    def lead(self) -> float:
        """How many times longer the slower one takes; 1 where nothing is known."""
        if not self.cpp_ms or not self.dense_ms:
            return 1.0
        return max(self.cpp_ms, self.dense_ms) / min(self.cpp_ms, self.dense_ms)

    @property
    def vague(self) -> bool:
        """Whether another measurement may well tell another backend."""
        return not (self.decided if self.measured else self.lead > cache_key.CLEAR)

    @property
    def clear(self) -> bool:
        """Whether it was measured, and by far more than timings vary."""
        return self.decided and self.lead > cache_key.CLEAR

    @classmethod
    def of(cls, row: dict[str, Any]) -> Choice:
        """Parse a line; raises ValueError, KeyError or TypeError if it is damaged."""
        if row["backend"] not in CHOICES:
            raise ValueError("backend")
        times = [float(row[name]) for name in ("cpp_ms", "dense_ms", "spread", "when")]
        if not all(math.isfinite(time) and time >= 0 for time in times) or min(times[:2]) == 0:
            raise ValueError("times")
        products = row["products"]
        if type(products) is not int or products < 1:
            raise ValueError("products")
        cpp_ms, dense_ms, spread, when = times
        return cls(row["backend"], cpp_ms, dense_ms, spread, products, when)


class Choices(Store[Choice]):
    """A map from cache keys, in steps of density and sizes, to choices.

    Args:
        path: of the file; None to keep them in memory only.
    """

    def __init__(self, path: Path | None) -> None:
        super().__init__(path, Choice.of)

    def info(self) -> dict[str, Any]:
        """Return the path of the file, the number of choices and how many are not decided."""
        undecided = sum(not choice.decided for choice in self.all())
        return {**super().info(), "undecided": undecided}

    def estimate(self, key: Key, products: int) -> Choice | None:
        """Estimate a choice from measurements of similar work; None if they are not enough.

        A sparse op takes time by its nonzeros, a dense one does not, and both by their sizes. So
        work of a similar density and size tells the times; a clear result tells who wins at the
        densities beyond, too.

        Args:
            key: of the work.
            products: multiplications of the dense op.
        """
        near: list[tuple[float, Choice]] = []
        implied: list[tuple[float, Choice]] = []
        for distance, density, choice in cache_key.nearby(key, self.of_kind(key.kind)):
            if not choice.measured:
                continue
            found = distance, _scaled(choice, products, density)
            if abs(density) <= cache_key.NEAR_DENSITY:
                near.append(found)
            elif choice.clear and (density < 0 if choice.backend == "cpp" else density > 0):
                implied.append(found)
        if not near and len({choice.backend for _, choice in implied}) > 1:
            return None  # they contradict each other
        return min(near or implied, key=lambda found: found[0], default=(0.0, None))[1]


def _scaled(choice: Choice, products: int, density: int) -> Choice:
    """Return an estimate from a choice at another size, and so many steps of density away."""
    if choice.cpp_ms is None or choice.dense_ms is None:
        return choice
    size = products / choice.products
    cpp_ms, dense_ms = (
        choice.cpp_ms * size * cache_key.DENSITY_STEP**density,
        choice.dense_ms * size,
    )
    scaled = replace(choice, cpp_ms=cpp_ms, dense_ms=dense_ms, products=products, when=0.0)
    if scaled.lead <= 1 + choice.spread:
        return scaled
    return replace(scaled, backend="cpp" if cpp_ms < dense_ms else "dense")


@cache
def surroundings() -> dict[str, Any]:
    """Describe what timings depend on besides the op and its operands."""
    compiled = _C.info()
    return {
        "format": _FORMAT,
        "processor": cpu_name(),
        "isa": compiled["isa"],
        "caches": [compiled["l1d_bytes"], compiled["l2_bytes"]],
        "cores": os.cpu_count(),
        "torch": torch.__version__,
        "onednn_isa": os.environ.get("ONEDNN_MAX_CPU_ISA", ""),
        "kernels": hashlib.sha256(Path(_C.__file__).read_bytes()).hexdigest(),
    }


def default_path() -> Path | None:
    """Return the file of the dispatcher's choices, None if SPARSEKD_CACHE is "off"."""
    return path_of("dispatch", surroundings())
