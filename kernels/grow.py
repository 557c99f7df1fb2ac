"""Growth: keys that order positions by their scores, of gradients that come in rectangles.

A key is an int64, larger for better scores and, of equal scores, for lower positions, so all keys
differ and the k largest of them are one set. A dense gradient is never stored: what is kept of
earlier rectangles is their k best keys.

Both kernels are elementwise, over blocks of BLOCK scores or nonzeros: one reads scores and writes
keys, the other overwrites keys of nonzeros. Memory limits their speed; torch's top-k does the rest.

Tests (tests/emulation): test_growth.py compares the chosen positions with a full sort.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import PLAIN

BLOCK = 512
TAKEN = -(1 << 63)  # less than the key of any position
NAN = 0x7FFFFFFF << 32  # keys of NaN are at least this, all others less


@triton.jit(do_not_specialize=PLAIN)
def score_keys(
    scores, keys, size, row, col, cols, width, MAGNITUDE: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Write the key of every score of a rectangle, `cols` wide, of a weight `width` wide."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    score = tl.load(scores + i, mask=i < size, other=0.0).to(tl.float32)
    if MAGNITUDE:
        score = tl.abs(score)
    score = tl.where(score == 0, 0.0, score)  # -0 and 0 are equal
    bits = score.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rank = tl.where(score == score, rank, 0x7FFFFFFF).to(tl.int64)
    position = (row + i // cols).to(tl.int64) * width + col + i % cols
    tl.store(keys + i, (rank << 32) | (0xFFFFFFFF - position), mask=i < size)


@triton.jit(do_not_specialize=PLAIN)
def exclude_taken(
    taken_row, taken_col, keys, nnz, row, rows, col, cols, TAKEN: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Overwrite the keys of positions that the structure has with TAKEN."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here_row = tl.load(taken_row + i, mask=i < nnz, other=0) - row
    here_col = tl.load(taken_col + i, mask=i < nnz, other=0) - col
    inside = (here_row >= 0) & (here_row < rows) & (here_col >= 0) & (here_col < cols)
    at = keys + here_row.to(tl.int64) * cols + here_col
    tl.store(at, tl.full((BLOCK,), TAKEN, tl.int64), mask=inside & (i < nnz))
