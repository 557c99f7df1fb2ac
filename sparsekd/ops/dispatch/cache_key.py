"""Cache keys of measurements: operands on which an op takes about equally long share one.

This is the one place that defines what a choice depends on: the kernels, `explain`, `info` and the
files of measurements all use `key`.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import weakref
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from sparsekd._torch import version_of
from sparsekd.ops.checks import conv2d_shape, geometry
from sparsekd.ops.memory_format import memory_format_of

_compiled_key: Any = None
with contextlib.suppress(ModuleNotFoundError):  # not built: all runs on the reference backend
    import sparsekd._C as compiled_module

    _compiled_key = compiled_module.call_key

DENSITY_STEP = 1.05
NEAR_DENSITY, NEAR_SIZES = 8, 6  # steps: half as many nonzeros again, eight times the size
CLEAR = 1.5  # times as fast as the other backend: by far more than timings vary

Entry = TypeVar("Entry")


class Key(NamedTuple):
    """The cache key of a measurement.

    Args:
        kind: all that must be equal, in words.
        step: what may be close: the density in steps of 5 %, then sizes in steps of the square root
            of two, of rows, or of images and the two sides of their maps.
    """

    kind: str
    step: tuple[int, ...]


def density_step(density: float) -> int:
    """Round a density to steps of 5 %."""
    return round(math.log(density) / math.log(DENSITY_STEP))


def size_step(size: int) -> int:
    """Round a size to steps of the square root of two."""
    return round(2 * math.log2(max(size, 1)))


def nearby(
    key: Key, entries: Iterable[tuple[tuple[int, ...], Entry]]
) -> Iterator[tuple[float, int, Entry]]:
    """Yield measurements at similar sizes: how far off, steps of density above, the entry.

    Args:
        key: of the work at hand.
        entries: of its kind, with their steps.
    """
    for step, entry in entries:
        density, *sizes = (a - b for a, b in zip(key.step, step, strict=True))
        apart = sum(map(abs, sizes))
        if apart <= NEAR_SIZES:
            yield apart + abs(density) / 2, density, entry


def products(op: str, args: tuple[Any, ...]) -> int:
    """Count the multiplications of an op on these operands with a dense weight."""
    weight_shape, *conv = geometry(op, args)
    if not conv:
        return args[0].numel() // max(args[0].shape[-1], 1) * math.prod(weight_shape)
    n, _, high, wide = conv2d_shape(_input_shape(op, args), weight_shape, *conv)
    return n * high * wide * math.prod(weight_shape)


def key(op: str, args: tuple[Any, ...], tile: tuple[int, int], *facts: str) -> Key:
    """Return the cache key of an op on these operands.

    Sizes that change from batch to batch count roughly: the rows of a linear layer's input, the
    images of a convolution's and the sides of its maps.

    Args:
        op: its name.
        args: those of its schema; the weight must have a nonzero.
        tile: output times input channels of the tiles that the weight consists of.
        facts: what else its time depends on.
    """
    weight_shape, *conv = geometry(op, args)
    first, second = args[:2]
    words = [op, str(first.dtype).removeprefix("torch."), *facts, f"weight={_times(weight_shape)}"]
    if tile != (1, 1):
        words.append(f"tiles={_times(tile)}")
    if conv:
        batch, _, *sides = _input_shape(op, args)
        sizes = [batch, *sides]
        names = ("stride", "padding", "dilation")
        words += [f"{name}={_times(size)}" for name, size in zip(names, conv, strict=False)]
        words += [f"groups={conv[3]}", _layout(first)]
        words += [_layout(second)] if op == "conv2d_wgrad" else []
    else:
        sizes = [first.numel() // max(first.shape[-1], 1)]
    density = density_step(args[3].shape[0] / math.prod(weight_shape))
    return Key(" ".join(words), (density, *map(size_step, sizes)))


def call_key(backend: str | None, threads: int, args: tuple[Any, ...]) -> Hashable:
    """Return what calls have in common that run the same way, all but the numbers in the operands.

    The compiled module reads plain CPU tensors of a structure that it knows, in a microsecond.

    Args:
        backend: that was asked for.
        threads: of torch.
        args: those of a product's schema.
    """
    compiled = None if _compiled_key is None else _compiled_key(backend, threads, args)
    return compiled or (backend, threads, serial(args[2], args[3]), sizes_of(args))


def sizes_of(args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the exact sizes and types of operands, everything but the numbers in them."""
    first, second, crow, col, *rest = args
    return (
        first.shape, first.stride(), first.dtype, first.is_cpu or first.device,
        second.shape, second.stride(), second.dtype, second.is_cpu or second.device,
        crow.shape, crow.dtype, col.shape, col.dtype,
        *[tuple(a) if isinstance(a, list) else (a.shape, a.dtype, a.device)
          if isinstance(a, Tensor) else a for a in rest],
    )  # fmt: skip


_serials: dict[tuple[int, int], tuple[int, int]] = {}  # addresses to version and number
_count = itertools.count()


def serial(crow: Tensor, col: Tensor) -> int:
    """Return a number that identifies index tensors while they live and are not written to.

    To find their tiles every index must be looked at, too much for every call; the number stands
    for them at the price of two addresses. It is given up with the tensor, whose memory may come to
    hold another structure.
    """
    where = crow.data_ptr(), col.data_ptr()
    try:
        version = version_of(col)
    except RuntimeError:  # an inference tensor does not count what is written into it
        version = -1
    known = _serials.get(where)
    if known is not None and known[0] == version:
        return known[1]
    if known is None:
        weakref.finalize(col, _serials.pop, where, None).atexit = False
    number = next(_count)
    _serials[where] = version, number
    return number


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
