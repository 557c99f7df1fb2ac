"""The choice between the backends for CUDA tensors, by measurement or by structure.

A product on operands of a kind never seen before runs on all that take it, torch's kernels with the
weight made dense among them; the fastest one is used from then on, in this process and, through a
file, in every later one. Where nothing may be measured the structure of the weight decides: what
torch's kernels for 2:4 weights take goes to them, tiles, and columns shared by groups of rows where
there are tensor cores for their dtype, to Triton's, the others to those of csrc/cuda.
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
from torch import Tensor
from triton.runtime.errors import TritonError

from sparsekd import cuda_library
from sparsekd.errors import BackendError, UnsupportedError
from sparsekd.ops.dispatch import cache_key
from sparsekd.ops.dispatch.backends import BACKENDS, BY_STRUCTURE, Decision, can_take, module
from sparsekd.ops.dispatch.cache_key import Key
from sparsekd.ops.store import Store, path_of
from sparsekd.ops.triton import tuning as triton_tuning
from sparsekd.ops.triton.tuning import Clock

logger = logging.getLogger(__name__)

SPARSE = ("cuda", "triton")
"""The backends of this project's kernels, which take every product."""
_2TO4, _DENSE = "semi_structured", "dense_cuda"  # torch's
_CHOICES = {*SPARSE, _2TO4, _DENSE}
LEAST_PRODUCTS = 1 << 26
"""Multiplications of the dense op below which a GPU takes microseconds either way."""
_MOST_KNOWN = 4096
_CLOSE = 1.05  # less than medians vary by
_OURS = TritonError, BackendError, UnsupportedError, torch.OutOfMemoryError
_TORCHS = RuntimeError  # by which torch passes on whatever its libraries refuse


@dataclass(frozen=True)
class Measured:
    """The fastest backend of a product, and the milliseconds of each that was measured."""

    backend: str
    ms: dict[str, float]

    @property
    def lead(self) -> float:
        """How many times longer the second fastest one takes; 1 of a single one."""
        times = sorted(self.ms.values())
        return times[min(1, len(times) - 1)] / max(times[0], 1e-6)

    @classmethod
    def of(cls, row: dict[str, Any]) -> Measured:
        """Parse a line; raises ValueError, KeyError or TypeError if it is damaged."""
        made = cls(row["backend"], {name: float(ms) for name, ms in dict(row["ms"]).items()})
        if made.backend not in made.ms or not made.ms.keys() <= _CHOICES:
            raise ValueError("backend")
        return made


class Chooser:
    """The choice between the backends, by measurement where that is possible.

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
        is_2to4 = can_take(_2TO4, op, args)
        reproducible = torch.are_deterministic_algorithms_enabled()
        facts = op, sizes, x.dtype, x.device, *traits[1:], is_2to4, reproducible, step
        decision = self._known.get(facts)
        if decision is not None:
            return decision
        if len(self._known) >= _MOST_KNOWN:  # inputs of ever new shapes
            self._known.clear()
        sparse = "triton" if traits.structured else "cuda"
        name = _2TO4 if is_2to4 else sparse
        by_structure = replace(BACKENDS[name].decide(op, args), reason=BY_STRUCTURE)
        if step is None or cache_key.products(op, args) < LEAST_PRODUCTS:
            return self._known.setdefault(facts, by_structure)
        with torch.cuda.device_of(x):
            clock = self._clock_on(x.device)
            if clock is None:
                return by_structure
            on = triton_tuning.name_of(x.device)
            words = {"2:4": is_2to4, "deterministic": reproducible}
            facts_of_time = traits.arithmetic, *(word for word, said in words.items() if said)
            key = cache_key.key(op, args, traits.runs, *facts_of_time)
            key = key._replace(kind=f"{key.kind} on {on}")
            with self._lock:  # measurements must not disturb each other
                known = self.store.get(*key) or self._like(key)
                if known is None:
                    with traits.structure.temporary_plans():
                        known = self._measure(op, args, clock, name)
                    if known is not None:
                        known = self.store.add(*key, known)
                        logger.info("%s at density %.3g: %s", key.kind, nnz / size, known)
        ours = replace(BACKENDS[sparse].decide(op, args), reason=BY_STRUCTURE)
        if known is None:  # those of torch need memory for copies, which our own do without
            return self._known.setdefault(facts, ours)
        fastest = BACKENDS[known.backend].decide(op, args)
        if known.backend not in SPARSE:
            fastest = replace(fastest, run=self._with_recourse(facts, fastest, ours))
        decision = replace(
            fastest, reason="measured, here or on similar work", key=key, ms=known.ms
        )
        return self._known.setdefault(facts, decision)

    def _with_recourse(self, facts: Any, first: Decision, then: Decision) -> Callable[..., Tensor]:
        """Return a function that runs a decision until memory is short, and from then on another.

        A first step, which measures, has memory that later ones have given to the optimizer.
        """

        def run(*args: Any) -> Tensor:
            try:
                return first.run(*args)
            except torch.OutOfMemoryError as error:
                logger.warning("%s runs on %s from now on: %s", facts[0], then.backend, error)
                self._known[facts] = then
            return then.run(*args)

        return run

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
        """Time the backends that take a product, but those of torch that refuse it here.

        Where `otherwise` is too close to the fastest to tell apart, it is the one. None says that
        one of our own does not run here.
        """
        # cuBLAS and cuDNN add up in any order, or raise where torch is told that they must not.
        torchs = (_2TO4,) if torch.are_deterministic_algorithms_enabled() else (_2TO4, _DENSE)
        times = {}
        for name in (*SPARSE, *(n for n in torchs if can_take(n, op, args))):
            refusals = _OURS if name in SPARSE else _TORCHS
            try:
                times[name] = clock(partial(BACKENDS[name].function(op), *args))
            except refusals as error:
                if name in SPARSE:
                    logger.warning("%s is not measured, its structure decides: %s", op, error)
                    return None
                logger.info("%s is not measured on %s: %s", op, name, error)
        fastest = min(times, key=lambda name: times[name])
        if times.get(otherwise, math.inf) <= _CLOSE * times[fastest]:
            fastest = otherwise
        return Measured(fastest, times)


def chooser() -> Chooser:
    """Return a chooser that measures on GPUs and keeps what it finds in the user's cache folder."""
    library = hashlib.sha256(cuda_library.PATH.read_bytes()).hexdigest()
    path = path_of("gpu", {**triton_tuning.surroundings(), "library": library})
    return Chooser(Store(path, Measured.of), triton_tuning.clock_on)
