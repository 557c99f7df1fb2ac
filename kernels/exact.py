"""Computing again, exactly, what infinity or NaN has spoilt.

Kernels multiply zeros that are no terms of a result: those of padding, and those that fill up a
tile. Of finite numbers that adds nothing, but infinity or NaN times zero is NaN, and so is the sum.
A program that has such sums therefore goes through their terms once more, one by one, and leaves
out what is none. Other sums stay as they are. Where a run has diverged, terms soon come to NaN
again, which ends it. The rest is slow, but takes few registers, which all other runs would pay for.

Tests (tests/emulation): test_triton_infinity.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

LANES = tl.constexpr(128)  # results, or terms of one, that a program computes again at a time
_MAGNITUDE, _INFINITY = tl.constexpr(0x7FFFFFFF), tl.constexpr(0x7F800000)


@triton.jit
def has_nan(sums):
    """Return whether some sum in float32 is NaN; as integers, only NaN is above infinity."""
    return tl.max(sums.to(tl.int32, bitcast=True) & _MAGNITUDE) > _INFINITY


@triton.jit
def are_nan(sums, wanted):
    """Return whether all sums that are wanted are NaN, which no term changes any more."""
    return tl.min(tl.where(wanted, (sums != sums).to(tl.int32), 1)) == 1


@triton.jit
def results_of(turn, outputs, count, positions, BP: tl.constexpr):
    """Return the positions of a program's turn, which of them there are, and the output channel.

    Its results are those of `outputs` channels at BP positions, each turn LANES of one channel.
    """
    block = turn // outputs * LANES + tl.arange(0, LANES)
    p = tl.program_id(0) // count * BP + block
    return p, (block < BP) & (p < positions), turn % outputs


@triton.jit
def rewrite(at, sums, wanted):
    """Write results over those that are wanted, once all threads of the program have read them."""
    tl.debug_barrier()
    tl.store(at, sums.to(at.dtype.element_ty), mask=wanted)
