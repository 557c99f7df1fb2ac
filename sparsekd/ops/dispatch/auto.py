"""The automatic CPU backend: sparse kernels or a dense weight, by measurement, op by op.

An op on operands of a kind never seen before runs both ways, a few times in turn; the faster one is
used from then on, in this process and, through the file of `choices`, in every later one. Where
only sizes or the density are new, what was measured close by tells which one runs, and the race is
held once it is paid for (see `watch`). Three rules need no clock. A small op always runs sparse: it
takes microseconds either way, too few to tell apart. So does a weight without nonzeros. A large
weight without zeros always runs dense: there is nothing to skip.
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
from sparsekd.ops.cpu import cpp, dense
from sparsekd.ops.dispatch import cache_key
from sparsekd.ops.dispatch.cache_key import Key
from sparsekd.ops.dispatch.choices import Choice, Choices, default_path
from sparsekd.ops.dispatch.single import Single
from sparsekd.ops.dispatch.watch import Watch
from sparsekd.timing import interleave, spread

logger = logging.getLogger(__name__)

LEAST_PRODUCTS = 1 << 22
"""Multiplications of the dense op below which it always runs sparse."""

OPS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "linear", "linear_dgrad", "linear_wgrad")

_BACKENDS = {"cpp": cpp, "dense": dense}
_SPARSE_BELOW = 0.25
"""Density up to which the sparse kernels run where timings cannot tell."""
_MOST_WATCHES = 4096


class Dispatcher:
    """Choose between the two backends.

    Args:
        choices: what was measured before.
    """

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self._watches: dict[Key, Watch] = {}
        self._lock = threading.RLock()  # measurements must not disturb each other

    def choose(self, op: str, args: tuple[Any, ...]) -> Choice:
        """Return the choice for an op, measured now if nothing like it ever was."""
        chosen = self._look_up(op, args)
        return chosen.choice if isinstance(chosen, Watch) else chosen

    def runner(self, op: str, args: tuple[Any, ...]) -> Any:
        """Return what runs an op: a backend, or a `Runner` where it is chosen by measurement."""
        chosen = self._look_up(op, args)
        if isinstance(chosen, Choice):
            return _BACKENDS[chosen.backend]
        return Runner(self, chosen, op, args)

    def _look_up(self, op: str, args: tuple[Any, ...]) -> Choice | Watch:
        nnz, products = args[3].shape[0], cache_key.products(op, args)
        if nnz == 0 or products < LEAST_PRODUCTS:
            return Choice("cpp")
        if nnz == math.prod(geometry(op, args)[0]):
            return Choice("dense")
        key = key_of(op, args)
        with self._lock:
            watch = self._watches.get(key)
            if watch is None:
                watch = self._watch(key, op, args, products)
                if len(self._watches) >= _MOST_WATCHES:  # operands of ever new kinds
                    self._watches.pop(next(iter(self._watches)))
                self._watches[key] = watch
        return watch

    def _watch(self, key: Key, op: str, args: tuple[Any, ...], products: int) -> Watch:
        known = self.choices.get(*key) or self.choices.estimate(key, products)
        if known is not None:
            return Watch(known)
        made, race_ms = self._race(op, args, products)
        if made.measured:
            made = self.choices.add(*key, made)
            _log(key, made)
        _forget_plans(made, args)
        return Watch(made, race_ms)

    def measure(self, watch: Watch, op: str, args: tuple[Any, ...]) -> None:
        """Measure work that is watched, now that this is due."""
        with self._lock:
            if not watch.due:  # another thread has done it
                return
            key, before = key_of(op, args), watch.choice
            made, race_ms = self._race(op, args, cache_key.products(op, args), before)
            if not watch.takes(made):
                made = before
            elif made.measured:
                made = self.choices.add(*key, made, again=True)
            watch.measured(made, race_ms)
            _forget_plans(made, args)
            if watch.choice.backend != before.backend:
                _log(key, watch.choice)

    def _race(
        self, op: str, args: tuple[Any, ...], products: int, before: Choice | None = None
    ) -> tuple[Choice, float]:
        """Time both backends; return the choice and the milliseconds that it took.

        Where they are too close to tell apart, the choice is that of `before`, or by density.
        """
        density = args[3].shape[0] / math.prod(geometry(op, args)[0])
        backend = "cpp" if density <= _SPARSE_BELOW else "dense"
        backend = backend if before is None else before.backend
        calls = {name: partial(getattr(module, op), *args) for name, module in _BACKENDS.items()}
        start = time.perf_counter()
        try:
            times = interleave(calls)
        except (MemoryError, RuntimeError) as error:  # a dense weight may be too large
            logger.warning("%s is not measured and runs sparse: %s", op, error)
            return Choice("cpp"), (time.perf_counter() - start) * 1e3
        race_ms = (time.perf_counter() - start) * 1e3
        cpp_ms, dense_ms = (max(min(times[name]), 1e-6) for name in ("cpp", "dense"))
        made = Choice(
            backend, cpp_ms, dense_ms, max(map(spread, times.values())), products, time.time()
        )
        if made.decided:
            made = replace(made, backend="cpp" if cpp_ms < dense_ms else "dense")
        return made, race_ms


class Runner:
    """A backend for one op on operands that are equal but for their numbers, timed as it runs.

    Its function has the name of the op, as those of the other backends.
    """

    def __init__(
        self, dispatcher: Dispatcher, watch: Watch, op: str, args: tuple[Any, ...]
    ) -> None:
        self._dispatcher, self._watch, self._op = dispatcher, watch, op
        self._products = cache_key.products(op, args)
        setattr(self, op, self._run)

    def _run(self, *args: Any) -> Tensor:
        watch = self._watch
        if watch.due:
            self._dispatcher.measure(watch, self._op, args)
        run = getattr(_BACKENDS[watch.choice.backend], self._op)
        start = time.perf_counter()
        result = run(*args)
        watch.ran((time.perf_counter() - start) * 1e3, self._products)
        return result


def _forget_plans(choice: Choice, args: tuple[Any, ...]) -> None:
    """Drop the plans that a race has made where they are not used."""
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
    """Return what chooses in this process."""
    return Dispatcher(Choices(default_path()))


def choices() -> Choices:
    """Return the choices of this machine."""
    return dispatcher().choices


def choose(op: str, args: tuple[Any, ...]) -> Choice:
    """Return the choice for an op on operands like these, measured now if nothing like it ever was.

    Args:
        op: one of `OPS`.
        args: those of its schema.
    """
    return dispatcher().choose(op, args)


def runner(op: str, args: tuple[Any, ...]) -> Any:
    """Return what runs an op on operands like these: its function there has the name of the op.

    Args:
        op: one of `OPS`.
        args: those of its schema.
    """
    return dispatcher().runner(op, args)


def backend_of(op: str, args: tuple[Any, ...]) -> Any:
    """Return the module whose kernels run an op on operands like these.

    Args:
        op: one of `OPS`.
        args: those of its schema.
    """
    return _BACKENDS[choose(op, args).backend]


def key_of(op: str, args: tuple[Any, ...]) -> Key:
    """Return what the choice for an op on operands like these is looked up by.

    Args:
        op: one of `OPS`.
        args: those of its schema.
    """
    return cache_key.key(op, args, tile_size(op, args), f"threads={torch.get_num_threads()}")


def tile_size(op: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """Return of how many output times input channels the tiles of the weight are; (1, 1) if none.

    The kernels find them in the indices and load an input once for all rows of a tile, so the time
    of an op depends on them.
    """
    weight_shape, *conv = geometry(op, args)
    return cpp.tile_size(args[2], args[3], weight_shape, conv[3] if conv else 1)
