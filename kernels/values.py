"""Values between row-major order and the order of a plan, and the second stage of samples.

Both kernels are gathers over blocks of BLOCK values, with BLOCK sums in registers where parts are
added. They touch no more than a weight's nonzeros, in a fixed order, and memory limits their speed.

Tests (tests/emulation): the products and samples of test_triton_ops.py go through them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import PLAIN

BLOCK = 512


@triton.jit
def take_values(values, slots, packed, size, BLOCK: tl.constexpr):
    """Write `packed[i] = values[slots[i]]`, and zero where a slot is -1."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots + i, mask=i < size, other=-1)
    tl.store(packed + i, tl.load(values + slot, mask=slot >= 0, other=0.0), mask=i < size)


@triton.jit(do_not_specialize=PLAIN)
def add_parts(
    partial, places, result, nnz, size, parts, PLACED: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the sum over parts, in their order, of what each has at the place of a value.

    Unless PLACED, the place of a value is its number.
    """
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = partial + i
    if PLACED:
        at = partial + tl.load(places + i, mask=i < nnz, other=0)
    acc = tl.zeros((BLOCK,), dtype=tl.float32)
    for _ in range(parts):
        acc += tl.load(at, mask=i < nnz, other=0.0)
        at += size
    tl.store(result + i, acc.to(result.dtype.element_ty), mask=i < nnz)
