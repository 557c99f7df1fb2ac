"""The backend "auto" of the CPU: sparse kernels or a dense weight, by measurement, op by op.

An op on operands with a new cache key runs both ways, a few times in turn; the faster one is used
from then on, in this process and, through the file of `choices`, in every later one. If only sizes
or the density are new, measurements close by decide, and the two are timed when that pays (see
`watch`). Three rules need no clock. A small op always runs sparse: it takes microseconds either
way, too few to tell apart. So does a weight without nonzeros. A large weight without zeros always
runs dense: there is nothing to skip.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sparsekd.ops.checks import geometry
from sparsekd.ops.cpu import cpp
from sparsekd.ops.dispatch import cache_key
from sparsekd.ops.dispatch.backends import BACKENDS, Decision
from sparsekd.ops.dispatch.cache_key import Key
from sparsekd.ops.dispatch.choices import CHOICES, Choice, Choices, default_path
from sparsekd.ops.dispatch.watch import Watch
from sparsekd.ops.single import Single
from sparsekd.timing import interleave, spread

logger = logging.getLogger(__name__)

LEAST_PRODUCTS = 1 << 22
"""Multiplications of the dense op below which it always runs sparse."""

_SPARSE_BELOW = 0.25
"""Density up to which the sparse kernels run where timings cannot tell."""
_MOST_WATCHES = 4096


class Dispatcher:
    """The choice between the two backends, by measurement.

    Args:
        choices: what was measured before.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self._watches: dict[Key, Watch] = {}
        self._lock = threading.RLock()  # measurements must not disturb each other

    def decide(self, op: str, args: tuple[Any, ...]) -> Decision:
        """Decide which backend runs a product, by a measurement now if there is none yet.

        Args:
            op: one of `PRODUCTS`.
            args: those of its schema.
        """
        nnz, products = args[3].shape[0], cache_key.products(op, args)
        if nnz == 0 or products < LEAST_PRODUCTS:
            rule = "the weight has no nonzeros" if nnz == 0 else "few multiplications"
            return replace(BACKENDS["cpp"].decide(op, args), reason=rule)
        if nnz == math.prod(geometry(op, args)[0]):
            return replace(BACKENDS["dense"].decide(op, args), reason="the weight has no zeros")
        key = key_of(op, args)
        with self._lock:
            watch = self._watches.get(key)
            if watch is None:
                watch = self._watch(key, op, args, products)
                if len(self._watches) >= _MOST_WATCHES:  # operands of ever new kinds
                    self._watches.pop(next(iter(self._watches)))
                self._watches[key] = watch
        choice, timed = watch.choice, _Timed(self, watch, op, products, args)
        return Decision(choice.backend, timed, None, choice.reason, key, choice.times)

    def _watch(self, key: Key, op: str, args: tuple[Any, ...], products: int) -> Watch:
        known = self.choices.get(*key) or self.choices.estimate(key, products)
        if known is not None:
            return Watch(known)
        made, timing_ms = self._time(op, args, products)
        if made.measured:
            made = self.choices.add(*key, made)
            _log(key, made)
        _forget_plans(made, args)
        return Watch(made, timing_ms)

    def measure(self, watch: Watch, op: str, args: tuple[Any, ...]) -> None:
        """Measure watched work again, since that is due."""
        with self._lock:
            if not watch.due:  # another thread has done it
                return
            key, before = key_of(op, args), watch.choice
            made, timing_ms = self._time(op, args, cache_key.products(op, args), before)
            if not watch.takes(made):
                made = before
            elif made.measured:
                made = self.choices.add(*key, made, again=True)
            watch.measured(made, timing_ms)
            _forget_plans(made, args)
            if watch.choice.backend != before.backend:
                _log(key, watch.choice)

    def _time(
        self, op: str, args: tuple[Any, ...], products: int, before: Choice | None = None
    ) -> tuple[Choice, float]:
        """Time both backends; return the choice and the milliseconds that the timing took.

        Where they are too close to tell apart, the choice is that of `before`, or by density.
        """
        density = args[3].shape[0] / math.prod(geometry(op, args)[0])
        backend = "cpp" if density <= _SPARSE_BELOW else "dense"
        backend = backend if before is None else before.backend
        calls = {name: partial(BACKENDS[name].function(op), *args) for name in CHOICES}
        start = time.perf_counter()
        try:
            times = interleave(calls)
        except (MemoryError, RuntimeError) as error:  # a dense weight may be too large
            logger.warning("%s is not measured and runs sparse: %s", op, error)
            return Choice("cpp"), (time.perf_counter() - start) * 1e3
        timing_ms = (time.perf_counter() - start) * 1e3
        cpp_ms, dense_ms = (max(min(times[name]), 1e-6) for name in ("cpp", "dense"))
        made = Choice(
            backend, cpp_ms, dense_ms, max(map(spread, times.values())), products, time.time()
        )
        if made.decided:
            made = replace(made, backend="cpp" if cpp_ms < dense_ms else "dense")
        return made, timing_ms


class _Timed:
    """A product on operands that are equal but for their numbers, timed as it runs."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        watch: Watch,
        op: str,
        products: int,
        args: tuple[Any, ...],
    ) -> None:
        self._dispatcher, self._watch, self._op, self._products = dispatcher, watch, op, products
        self._functions = {name: BACKENDS[name].prepared(op, args) for name in CHOICES}

    def __call__(self, *args: Any) -> Tensor:
        watch = self._watch
        if watch.due:
            self._dispatcher.measure(watch, self._op, args)
        run = self._functions[watch.choice.backend]
        start = time.perf_counter()
        result = run(*args)
        watch.ran((time.perf_counter() - start) * 1e3, self._products)
        return result


def _forget_plans(choice: Choice, args: tuple[Any, ...]) -> None:
    """Drop the plans that the slower backend has made in a measurement."""
    if choice.backend == "dense":
        cpp.forget(args[2], args[3])


def _log(key: Key, choice: Choice) -> None:
    if choice.measured:
        logger.info(
            "%s at density %.3g: sparse %.3f ms, dense %.3f ms, spread %.0f %%; it runs %s%s",
            key.kind, cache_key.DENSITY_STEP ** key.step[0],
            choice.cpp_ms, choice.dense_ms, 100 * choice.spread,
            "sparse" if choice.backend == "cpp" else "dense",
            " from now on" if choice.decided else " until that can be told apart",
        )  # fmt: skip


@Single
def dispatcher() -> Dispatcher:
    """Return the dispatcher of this process."""
    return Dispatcher(Choices(default_path()))


def decide(op: str, args: tuple[Any, ...]) -> Decision:
    """Decide which backend runs a product on these operands, see `Dispatcher.decide`."""
    return dispatcher().decide(op, args)


def info() -> dict[str, Any]:
    """Return the file of choices, how many are known and how many are not decided."""
    return dispatcher().choices.info()


def key_of(op: str, args: tuple[Any, ...]) -> Key:
    """Return the cache key of an op on these operands.

    Args:
        op: one of `PRODUCTS`.
        args: those of its schema.
    """
    return cache_key.key(op, args, tile_size(op, args), f"threads={torch.get_num_threads()}")


def tile_size(op: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """Return the size of a weight's tiles, output by input channels; (1, 1) if it has none.

    The kernels find them in the indices and load an input once for all rows of a tile, so the time
    of an op depends on them.
    """
    weight_shape, *conv = geometry(op, args)
    return cpp.tile_size(args[2], args[3], weight_shape, conv[3] if conv else 1)
