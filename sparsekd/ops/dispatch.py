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
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import sparsekd._C as _C
from sparsekd.ops import cpp, dense
from sparsekd.ops.checks import conv2d_shape
from sparsekd.ops.choices import Choice, Choices, default_path
from sparsekd.ops.layout import memory_format_of
from sparsekd.ops.race import race

logger = logging.getLogger(__name__)

LEAST_PRODUCTS = 1 << 22
"""Multiplications of the dense op below which it always runs sparse."""

_BACKENDS = {"cpp": cpp, "dense": dense}
_MOST_FACTS = 1 << 16

_chosen: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
_lock = threading.RLock()


@cache
def choices() -> Choices:
    """Return the choices of this machine."""
    return Choices(default_path())


def _run(op: str, *args: Any) -> Tensor:
    facts = _facts(op, args)
    chosen = _chosen.get(facts)
    if chosen is not None:
        return chosen(*args)
    with _lock:  # measurements must not disturb each other
        choice, result = choose(op, args)
        if len(_chosen) >= _MOST_FACTS:  # inputs of ever new shapes
            _chosen.clear()
        _chosen[facts] = getattr(_BACKENDS[choice.backend], op)
    return _chosen[facts](*args) if result is None else result


conv2d = partial(_run, "conv2d")
conv2d_dgrad = partial(_run, "conv2d_dgrad")
conv2d_wgrad = partial(_run, "conv2d_wgrad")
linear = partial(_run, "linear")
linear_dgrad = partial(_run, "linear_dgrad")
linear_wgrad = partial(_run, "linear_wgrad")


def choose(op: str, args: tuple[Any, ...]) -> tuple[Choice, Tensor | None]:
    """Return the choice for an op on these operands and, if it was measured just now, the result.

    Args:
        op: its name.
        args: those of its schema.
    """
    weight_shape, nnz = _geometry(op, args)[0], args[3].shape[0]
    if nnz == 0 or products(op, args) < LEAST_PRODUCTS:
        return Choice("cpp"), None
    if nnz == math.prod(weight_shape):
        return Choice("dense"), None
    kind = describe(op, args)
    step = density_step(nnz / math.prod(weight_shape))
    known = choices().get(kind, step)
    if known is not None:
        return known, None
    follows = choices().follows(kind, step)
    if follows is not None:
        return choices().add(kind, step, Choice(follows)), None
    times, results = race(
        {name: partial(getattr(module, op), *args) for name, module in _BACKENDS.items()}
    )
    winner = min(times, key=times.__getitem__)
    choice = choices().add(kind, step, Choice(winner, times["cpp"], times["dense"]))
    logger.info(
        "%s at density %.3g: sparse %.3f ms, dense %.3f ms; it runs %s from now on",
        kind, nnz / math.prod(weight_shape), times["cpp"], times["dense"],
        "sparse" if choice.backend == "cpp" else "dense",
    )  # fmt: skip
    if choice.backend == "dense":
        _C.release(args[2].numpy(), args[3].numpy())  # forget the plans that the race made
    return choice, results[choice.backend]


def density_step(density: float) -> int:
    """Return a number that densities within 5 % of each other share."""
    return round(math.log(density) / math.log(1.05))


def products(op: str, args: tuple[Any, ...]) -> int:
    """Return how many multiplications an op on these operands takes with a dense weight."""
    weight_shape, *conv = _geometry(op, args)
    if not conv:
        return args[0].numel() // max(args[0].shape[-1], 1) * math.prod(weight_shape)
    n, _, high, wide = conv2d_shape(_input_shape(op, args), weight_shape, *conv)
    return n * high * wide * math.prod(weight_shape)


def describe(op: str, args: tuple[Any, ...]) -> str:
    """Return all that the time of an op depends on but the density, in words.

    The rows of a linear layer's input count within 5 %: their number may change with every batch.
    """
    weight_shape, *conv = _geometry(op, args)
    first, second = args[:2]
    words = [op, str(first.dtype).removeprefix("torch."), f"threads={torch.get_num_threads()}"]
    words.append(f"weight={_times(weight_shape)}")
    if not conv:
        rows = first.numel() // max(first.shape[-1], 1)
        return " ".join([*words, f"rows=1.05^{density_step(rows)}"])
    words.append(f"input={_times(_input_shape(op, args))}")
    names = ("stride", "padding", "dilation")
    words += [f"{name}={_times(sizes)}" for name, sizes in zip(names, conv, strict=False)]
    words += [f"groups={conv[3]}", _layout(first)]
    return " ".join([*words, _layout(second)] if op == "conv2d_wgrad" else words)


def _facts(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return what identifies the kind of call, fast to make and finer than what `describe` says."""
    first, second, _, col, *rest = args
    return (
        op, torch.get_num_threads(), first.dtype, first.shape, first.stride(), second.shape,
        second.stride(), col.shape,
        *[tuple(a) if isinstance(a, list) else a for a in rest if not isinstance(a, Tensor)],
    )  # fmt: skip


def _geometry(op: str, args: tuple[Any, ...]) -> list[Any]:
    """Return weight_shape and, for a convolution, stride, padding, dilation and groups."""
    with_one_more = op in ("conv2d", "linear", "conv2d_dgrad")  # a bias, or the shape of the input
    return list(args[5:] if with_one_more else args[4:])


def _input_shape(op: str, args: tuple[Any, ...]) -> Sequence[int]:
    if op == "conv2d_dgrad":
        return args[4]
    return args[1 if op == "conv2d_wgrad" else 0].shape


def _layout(maps: Tensor) -> str:
    if memory_format_of(maps) == torch.channels_last:
        return "channels_last"
    return "contiguous" if maps.is_contiguous() else "strided"


def _times(sizes: Sequence[int]) -> str:
    return "x".join(map(str, sizes))
