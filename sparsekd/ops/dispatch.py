"""The automatic CPU backend: sparse kernels or a dense weight, by measurement, op by op.

An op on operands of a kind never seen before runs both ways, a few times in turn; the faster one is
used from then on, in this process and, through the file of `choices`, in every later one. Three
rules need no clock. A small op always runs sparse: it takes microseconds either way, too few to
tell apart. So does a weight without nonzeros. A large weight without zeros always runs dense: there
is nothing to skip.
"""

from __future__ import annotations

import logging
import math
import threading
from functools import cache, partial
from typing import Any

import torch

from sparsekd.ops import cpp, dense, kinds
from sparsekd.ops.checks import geometry
from sparsekd.ops.choices import Choice, Choices, default_path
from sparsekd.ops.race import race

logger = logging.getLogger(__name__)

LEAST_PRODUCTS = 1 << 22
"""Multiplications of the dense op below which it always runs sparse."""

OPS = ("conv2d", "conv2d_dgrad", "conv2d_wgrad", "linear", "linear_dgrad", "linear_wgrad")

_BACKENDS = {"cpp": cpp, "dense": dense}
_lock = threading.RLock()


@cache
def choices() -> Choices:
    """Return the choices of this machine."""
    return Choices(default_path())


def choose(op: str, args: tuple[Any, ...]) -> Choice:
    """Return the choice for an op on operands like these, measured now if it never was.

    Args:
        op: one of `OPS`.
        args: those of its schema.
    """
    size, nnz = math.prod(geometry(op, args)[0]), args[3].shape[0]
    if nnz == 0 or kinds.products(op, args) < LEAST_PRODUCTS:
        return Choice("cpp")
    if nnz == size:
        return Choice("dense")
    kind, step = describe(op, args), kinds.density_step(nnz / size)
    with _lock:  # measurements must not disturb each other
        known = choices().get(kind, step)
        if known is not None:
            return known
        follows = choices().follows(kind, step)
        if follows is not None:
            return choices().add(kind, step, Choice(follows))
        times = race(
            {name: partial(getattr(module, op), *args) for name, module in _BACKENDS.items()}
        )
        winner = min(times, key=times.__getitem__)
        choice = choices().add(kind, step, Choice(winner, times["cpp"], times["dense"]))
    logger.info(
        "%s at density %.3g: sparse %.3f ms, dense %.3f ms; it runs %s from now on",
        kind, nnz / size, times["cpp"], times["dense"],
        "sparse" if choice.backend == "cpp" else "dense",
    )  # fmt: skip
    if choice.backend == "dense":
        cpp.forget(args[2], args[3])  # the plans that the race has made
    return choice


def describe(op: str, args: tuple[Any, ...]) -> str:
    """Return all that the time of an op depends on but the density, in words."""
    return kinds.describe(op, args, tile_size(op, args), f"threads={torch.get_num_threads()}")


def tile_size(op: str, args: tuple[Any, ...]) -> tuple[int, int]:
    """Return of how many output times input channels the tiles of the weight are; (1, 1) if none.

    The kernels find them in the indices and load an input once for all rows of a tile, so the time
    of an op depends on them.
    """
    weight_shape, *conv = geometry(op, args)
    return cpp.tile_size(args[2], args[3], weight_shape, conv[3] if conv else 1)
