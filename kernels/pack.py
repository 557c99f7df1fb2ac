"""Moving maps between strided tensors and the packed form, `[channel][y][x][image]` with padding.

Packed maps are a matrix of `slow` rows by `fast` columns whose rows follow what is contiguous in
the maps: rows are channels and columns positions if channels are, else rows are pixels of all
channels and columns are images. So a move is a transposition, and a program makes it for a block of
BS x BF elements: its load and its store each go along what is contiguous on their side, in vectors
where sizes and strides are multiples of 16, and the compiler has it change hands in shared memory.
Zeros of the padding are written with the rest. Memory limits the speed.

Tests (tests/emulation): test_triton_packing.py compares with torch's copies, test_triton_mutants.py
plants mistakes in this kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import PLAIN


@triton.jit(do_not_specialize=PLAIN)
def move_maps(
    maps, packed, slow, fast,
    images, high, wide, in_high, in_wide, top, left, m_image, m_channel, m_row, m_pixel,
    UNPACK: tl.constexpr, CHANNELS_INNER: tl.constexpr, BS: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """Write one block of `packed`, or of `maps` if UNPACK.

    Packed maps are `high` and `wide`. Within the padding they are `in_high` and `in_wide`, from row
    `top` and column `left` on. `m_image` to `m_pixel` are the strides of the maps.
    """
    program = tl.program_id(0)
    blocks = tl.cdiv(fast, BF)
    s = (program // blocks * BS + tl.arange(0, BS))[None, :]
    f = (program % blocks * BF + tl.arange(0, BF))[:, None]
    if CHANNELS_INNER:
        channel, image, place = s, f % images, f // images
    else:
        channel, image, place = s // (high * wide), f, s % (high * wide)
    y, x = place // wide - top, place % wide - left
    bounds = (s < slow) & (f < fast)
    inside = bounds & (y >= 0) & (y < in_high) & (x >= 0) & (x < in_wide)
    at = maps + image.to(tl.int64) * m_image + channel.to(tl.int64) * m_channel
    at += y.to(tl.int64) * m_row + x.to(tl.int64) * m_pixel
    packed_at = packed + s.to(tl.int64) * fast + f
    if UNPACK:
        tl.store(at, tl.load(packed_at, mask=bounds, other=0.0), mask=inside)
    else:
        tl.store(packed_at, tl.load(at, mask=inside, other=0.0), mask=bounds)
