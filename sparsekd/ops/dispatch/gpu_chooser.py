"""The choice between the two backends for CUDA tensors, by measurement or by structure.

A product on operands of a kind never seen before runs on both; the faster one is used from then on,
in this process and, through a file, in every later one. Where nothing may be measured the structure
of the weight decides: tiles, and columns shared by groups of rows where there are tensor cores for
their dtype, go to Triton's kernels, the others to those of csrc/cuda.
"""

from __future__ import annotations

import hashlib
import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from triton.runtime.errors import TritonError

from sparsekd import cuda_library
from sparsekd.errors import BackendError, UnsupportedError
from sparsekd.ops.dispatch import cache_key
from sparsekd.ops.dispatch.backends import BACKENDS, Decision, module
from sparsekd.ops.dispatch.cache_key import Key
from sparsekd.ops.store import Store, path_of
from sparsekd.ops.triton import tuning as triton_tuning
from sparsekd.ops.triton.tuning import Clock

logger = logging.getLogger(__name__)

CHOICES = ("cuda", "triton")
LEAST_PRODUCTS = 1 << 26
"""Multiplications of the dense op below which a GPU takes microseconds either way."""
_MOST_KNOWN = 4096
_MEASURED = "measured, here or on similar work"
_CLOSE = 1.05  # less than medians vary by


@dataclass(frozen=True)
class Measured:
    """The faster backend of a product, and the milliseconds of each."""

    backend: str
    cuda_ms: float
    triton_ms: float

    @property
    def lead(self) -> float:
        """How many times longer the slower one takes."""
        return max(self.cuda_ms, self.triton_ms) / max(min(self.cuda_ms, self.triton_ms), 1e-6)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Measured:
        """Parse a line; raises ValueError, KeyError or TypeError if it is damaged."""
        if row["backend"] not in CHOICES:
            raise ValueError("backend")
        return cls(row["backend"], float(row["cuda_ms"]), float(row["triton_ms"]))


class Chooser:
    """The choice between the two backends, by measurement where that is possible.

    Args:
        store: what was measured before.
        clock_on: what times work on a device, None where it must not be timed.
    """

    def __init__(
        self, store: Store[Measured], clock_on: Callable[[torch.device], Clock | None]
    ) -> None:
        self.store = store
        self._clock_on = clock_on
        self._known: dict[Any, Decision] = {}
        self._lock = threading.RLock()

    def decide(self, op: str, args: tuple[Any, ...]) -> Decision:
        """Decide which backend runs a product on these operands.

        Args:
            op: its name.
            args: those of its schema.
        """
        x, other, _, col = args[:4]
        traits = module("triton").traits(op, args)
        size, nnz = math.prod(traits.conv.weight_shape), col.shape[0]
        step = cache_key.density_step(nnz / size) if nnz else None
        sizes = x.shape, x.stride(), other.shape, other.stride()
        facts = op, sizes, x.dtype, x.device, *traits[1:], step
        decision = self._known.get(facts)
        if decision is not None:
            return decision
        if len(self._known) >= _MOST_KNOWN:  # inputs of ever new shapes
            self._known.clear()
        name = "triton" if traits.structured else "cuda"
        by_structure = replace(BACKENDS[name].decide(op, args), reason="structure of the weight")
        if step is None or cache_key.products(op, args) < LEAST_PRODUCTS:
            return self._known.setdefault(facts, by_structure)
        with torch.cuda.device_of(x):
            clock = self._clock_on(x.device)
            if clock is None:
                return by_structure
            on = triton_tuning.name_of(x.device)
            key = cache_key.key(op, args, traits.runs, traits.arithmetic)
            key = key._replace(kind=f"{key.kind} on {on}")
            with self._lock:  # measurements must not disturb each other
                known = self.store.get(*key) or self._like(key)
                if known is None:
                    with traits.structure.temporary_plans():
                        known = self._measure(op, args, clock, name)
                    if known is not None:
                        known = self.store.add(*key, known)
                        logger.info("%s at density %.3g: %s", key.kind, nnz / size, known)
        if known is not None:
            times = {"cuda": known.cuda_ms, "triton": known.triton_ms}
            fastest = BACKENDS[known.backend].decide(op, args)
            decision = replace(
                fastest, reason="measured, here or on similar work", key=key, ms=times
            )
        return self._known.setdefault(facts, decision or by_structure)

    def _like(self, key: Key) -> Measured | None:
        """Return a clear result of nearly the same sizes and density, None if there is none."""
        near = [
            (distance, measured)
            for distance, density, measured in cache_key.nearby(key, self.store.of_kind(key.kind))
            if abs(density) <= cache_key.NEAR_DENSITY and measured.lead > cache_key.CLEAR
        ]
        return min(near, key=lambda found: found[0], default=(0.0, None))[1]

    def _measure(
        self, op: str, args: tuple[Any, ...], clock: Clock, otherwise: str
    ) -> Measured | None:
        """Time both, or return None where one does not run here, be it for want of memory.

        Where they are too close to tell apart the backend is `otherwise`.
        """
        calls = [partial(BACKENDS[name].function(op), *args) for name in CHOICES]
        try:
            cuda, triton = map(clock, calls)
        except (TritonError, BackendError, UnsupportedError, torch.OutOfMemoryError) as error:
            logger.warning("%s is not measured, its structure decides: %s", op, error)
            return None
        measured = Measured("cuda" if cuda < triton else "triton", cuda, triton)
        return measured if measured.lead > _CLOSE else replace(measured, backend=otherwise)


def chooser() -> Chooser:
    """Return a chooser that measures on GPUs and keeps what it finds in the user's cache folder."""
    library = hashlib.sha256(cuda_library.PATH.read_bytes()).hexdigest()
    path = path_of("gpu", {**triton_tuning.surroundings(), "library": library})
    return Chooser(Store(path, Measured.of), triton_tuning.clock_on)
