"""The time of one pass, sparse, dense and in bfloat16, and the sparsity where sparse gets faster.

The cost of a sparse pass is linear in its nonzeros, with a small intercept for reading and writing
the maps. Times at a few densities give the line; break-even is where it meets the dense time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsekd._torch import onednn_computes
from sparsekd.layouts import Tiling
from sparsekd.ops.checks import geometry
from sparsekd.ops.dispatch.backends import module
from sparsekd.ops.memory_format import rows_cols
from sparsekd.timing import fastest, interleave

_DENSITIES = (0.05, 0.5)
_TILE = 16
_TURNS, _MOST_MS = 5, 1000.0


@dataclass(frozen=True)
class PassTimes:
    """The time of a pass in milliseconds; the times of several passes can be added.

    Args:
        backend: what runs it: "cpp", "dense" or "reference".
        ms: as it runs.
        dense_ms: with a dense weight on torch's kernels.
        sparse_ms: on the sparse kernels; None without them.
        intercept_ms: of the line that sparse times at several densities lie on.
        full_ms: where that line is at full density.
        reason: why that backend runs it, a rule or a measurement.
        bf16_ms: with a dense weight on torch's kernels, all in bfloat16; None where the processor
            has no instructions for it, which makes it slower than float32, or no float32 is
            computed.
    """

    backend: str
    ms: float
    dense_ms: float
    sparse_ms: float | None
    intercept_ms: float
    full_ms: float
    reason: str = ""
    bf16_ms: float | None = None

    @classmethod
    def zero(cls) -> PassTimes:
        """Return zero times, to start a sum from."""
        return cls("", 0.0, 0.0, 0.0, 0.0, 0.0, bf16_ms=0.0)

    def __add__(self, other: PassTimes) -> PassTimes:
        return PassTimes(
            other.backend,
            self.ms + other.ms,
            self.dense_ms + other.dense_ms,
            _sum(self.sparse_ms, other.sparse_ms),
            self.intercept_ms + other.intercept_ms,
            self.full_ms + other.full_ms,
            other.reason,
            _sum(self.bf16_ms, other.bf16_ms),
        )

    def sparse_ms_at(self, density: float) -> float:
        """Return what sparse takes at another density, by its line."""
        return self.intercept_ms + (self.full_ms - self.intercept_ms) * density

    @property
    def break_even(self) -> float | None:
        """Sparsity from which on sparse is faster: 0 if it always is, None if it never is."""
        if self.sparse_ms is None or self.intercept_ms >= self.dense_ms:
            return None
        if self.full_ms <= self.dense_ms:
            return 0.0
        return 1 - (self.dense_ms - self.intercept_ms) / (self.full_ms - self.intercept_ms)


def time_pass(op: str, args: tuple[Any, ...], backend: str) -> PassTimes:
    """Time an op on these operands both ways, and sparse at other densities too.

    Args:
        op: its name.
        args: those of its schema.
        backend: which one runs it.
    """
    if backend not in ("cpp", "dense"):
        calls = {backend: _call(backend, op, args)}
        ms = fastest(interleave(calls, _enough, device=args[0].device))[backend]
        return PassTimes(backend, ms, ms, None, ms, ms)
    shape = tuple(geometry(op, args)[0])
    size, nnz = math.prod(shape), args[3].shape[0]
    ways: dict[Any, Callable[[], Tensor]] = {
        name: _call(name, op, args) for name in ("cpp", "dense")
    }
    probes = [_with_density(op, args, shape, density) for density in _DENSITIES]
    if args[0].dtype == torch.float32 and onednn_computes(torch.bfloat16):
        ways["bf16"] = _call("dense", op, tuple(map(_in_bf16, args)))
    ways |= {probe[3].shape[0]: _call("cpp", op, probe) for probe in probes}
    times = fastest(interleave(ways, _enough))
    for probe in probes:
        module("cpp").forget(probe[2], probe[3])
    points = {nnz: times["cpp"], **{n: ms for n, ms in times.items() if isinstance(n, int)}}
    intercept, full = _line(points, size)
    return PassTimes(
        backend,
        times[backend],
        times["dense"],
        times["cpp"],
        intercept,
        full,
        bf16_ms=times.get("bf16"),
    )


def _call(name: str, op: str, args: tuple[Any, ...]) -> Callable[[], Tensor]:
    return partial(getattr(module(name), op), *args)


def _in_bf16(arg: Any) -> Any:
    return arg.bfloat16() if isinstance(arg, Tensor) and arg.is_floating_point() else arg


def _sum(one: float | None, other: float | None) -> float | None:
    """Return the sum, None if a part is unknown."""
    return None if one is None or other is None else one + other


def _enough(times: list[list[float]]) -> bool:
    turns, spent = len(times[0]), sum(map(sum, times))
    return turns >= _TURNS or spent > _MOST_MS


def _with_density(
    op: str, args: tuple[Any, ...], shape: tuple[int, ...], density: float
) -> tuple[Any, ...]:
    """Return the operands with a random structure of another density, in tiles of the same size."""
    high, wide = module("auto").tile_size(op, args)  # of a weight without zeros one, too large
    crow, col = _random_structure(shape, (min(high, _TILE), min(wide, _TILE)), density)
    second = args[1] if op.endswith("wgrad") else args[1].new_ones(col.shape[0])
    return args[0], second, crow, col, *args[4:]


@lru_cache(maxsize=len(_DENSITIES))
def _random_structure(
    shape: tuple[int, ...], tile: tuple[int, int], density: float
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tiling = Tiling(torch.Size(shape), *tile)
    mask = tiling.expand(torch.rand(tiling.grid, generator=generator) < density)
    mask = mask.reshape(rows_cols(shape))
    crow = torch.zeros(shape[0] + 1, dtype=torch.int32)
    crow[1:] = mask.sum(1).cumsum(0)
    return crow, mask.nonzero()[:, 1].to(torch.int32)


def _line(points: dict[int, float], size: int) -> tuple[float, float]:
    """Fit a line to times over nonzeros; return its value at 0 and at `size`."""
    if len(points) < 2:
        return (ms := next(iter(points.values()))), ms
    nnz, ms = np.array(sorted(points.items())).T
    slope, intercept = np.polyfit(nnz, ms, 1, w=1 / np.maximum(ms, 1e-6))
    intercept, slope = max(float(intercept), 0.0), max(float(slope), 0.0)
    return intercept, intercept + slope * size
