"""What a pass of a layer could reach at best: operations, bytes moved, and the roof they hit.

Three roofs stand over every pass:

- compute: the measured rate of independent fused multiply-adds;
- memory: every activation and gradient is read or written once, values and int32 column indices
  once, at the bandwidth measured for a working set of that size (the last-level cache's if the
  whole pass fits half of it, else main memory's);
- L2: a core's L1 holds a block of input channels of one output tile. Either the window is read from
  L2 once and partial sums of every output channel go to L2 and back between two blocks, or each
  nonzero reads its operand from L2; the cheaper of the two counts. The weight gradient keeps its
  sums in registers and reads the output gradient again for every block instead.

They are bounds of this way of computing, not of any conceivable one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from benchmarks.arena.peaks import Peaks
from sparsekd.bench.cases import LayerCase

_WORD = 4  # bytes of a float32 and of an int32 index
_LANES = 16  # images that one packed pixel holds
_TILE = 8  # pixels of an output row that a tile keeps in registers
_STRIP = 32  # positions over which the weight gradient keeps a sum in registers


@dataclass(frozen=True)
class Roof:
    """What bounds a pass.

    Args:
        flops: operations at the nonzeros.
        bytes: that must move between memory and the core's caches.
        l2_bytes: that must move between L2 and L1.
        bound: "compute", "L2", "L3" or "DRAM", whichever takes longest.
        seconds: that it takes at least.
    """

    flops: int
    bytes: int
    l2_bytes: int
    bound: str
    seconds: float


def moved_bytes(case: LayerCase, name: str, nnz: int) -> int:
    """Count the bytes that a pass must move: two maps once, values and column indices once.

    Pixels that a stride skips need not be read, but their gradient is written.

    Example:
        >>> moved_bytes(LayerCase("linear", 4, 2, batch=3), "fprop", nnz=5)
        112
    """
    reached = 1.0 if name == "dgrad" else min(1.0, case.kernel / case.stride) ** 2
    maps = math.prod(case.input_shape) * reached + math.prod(case.output_shape)
    return round(_WORD * (maps + 2 * nnz))


def l2_bytes(case: LayerCase, name: str, nnz: int, l1: int) -> int:
    """Count the bytes between L2 and L1 of one pass, by the model above.

    Args:
        case: the layer.
        name: "fprop", "dgrad" or "wgrad".
        nnz: weights in use.
        l1: bytes of a core's L1 data cache.

    Returns:
        Bytes over all positions of the batch.

    Example:
        >>> case = LayerCase("conv", 64, 64, size=32, kernel=3)
        >>> l2_bytes(case, "fprop", 100, 32768) < l2_bytes(case, "fprop", 10_000, 32768)
        True
    """
    pixel = _WORD * _LANES
    length = _STRIP if name == "wgrad" else _TILE
    if name == "dgrad":  # a tile covers `length` pixels of the output gradient's resolution
        reach = math.ceil(case.kernel / case.stride)
        window = case.outs * reach * (length + reach - 1) * pixel
        results = case.channels * min(case.stride, case.kernel) ** 2 * length * pixel
    else:
        reach = min((length - 1) * case.stride + case.kernel, length * case.kernel)
        window = case.channels * case.kernel * reach * pixel
        results = case.outs * length * pixel
    blocks = math.ceil(window / (l1 / 2))
    again = results * (blocks if name == "wgrad" else 2 * blocks - 1)
    operands = nnz * length * pixel
    # A weight gradient adds each sum to memory at the end of a strip.
    flushed = 2 * nnz * pixel if name == "wgrad" else 0
    tile = min(window + again, operands + results) + flushed
    return round(tile * case.positions / (length * _LANES))


def roof(case: LayerCase, name: str, nnz: int, peaks: Peaks, *, l1: int, last_level: int) -> Roof:
    """Find what bounds a pass and the least time it takes.

    Args:
        case: the layer.
        name: "fprop", "dgrad" or "wgrad".
        nnz: weights in use.
        peaks: of the machine, as measured.
        l1: bytes of a core's L1 data cache.
        last_level: bytes of the last-level cache.

    Returns:
        The roof.

    Source: Williams et al., Roofline (2009).

    Example:
        >>> peaks = Peaks(flops=1e11, l2=1e11, l3=5e10, memory=2e10)
        >>> case = LayerCase("conv", 256, 64, size=32)
        >>> roof(case, "fprop", 160, peaks, l1=32768, last_level=1 << 24).bound
        'DRAM'
    """
    flops, moved = case.flops(nnz), moved_bytes(case, name, nnz)
    near = l2_bytes(case, name, nnz, l1)
    inside = moved <= last_level / 2
    behind, bandwidth = ("L3", peaks.l3) if inside else ("DRAM", peaks.memory)
    seconds = {"compute": flops / peaks.flops, "L2": near / peaks.l2, behind: moved / bandwidth}
    bound = max(seconds, key=seconds.__getitem__)
    return Roof(flops, moved, near, bound, seconds[bound])
