"""Implicit GEMM over tiles of a weight: products (fprop, dgrad) and samples (wgrad).

Maps are channels_last: the channels of a pixel lie side by side. A product computes outputs of BN
channels at BP positions; its weight comes in *chunks*, each BN outputs times BK neighbouring input
channels seen at one offset (dy, dx). `lists` says which chunks belong to which outputs:

    lists   int32 [L + 1]  first chunk of each list
    outputs int32 [L, 2]   first output channel of a list, and how many there are, at most BN
    chunks  int32 [E, 6]   first input channel, how many (at most BK; 0 behind the lists), dy, dx,
                           the number of the first value, how many values on the next row starts
    weight        [nnz], or packed as [E, BN, BK], with zeros where a chunk is ragged

A weight of a single tap whose tiles have no zeros is read where it is. IN_PLACE says which side of
a chunk lies side by side in its rows: "k" where rows are outputs, "n" in an input gradient, where
they are inputs. That side is never ragged, and rows start at multiples of ROW. Values of several
taps alternate, so that vectors could not be read; such weights are packed, and IN_PLACE is "".

The input pixel of output (y, x) at offset (dy, dx) is (y * stride_y + dy, x * stride_x + dx); one
outside the map counts as zero, and makes NaN of an infinite weight: see exact.py. Lists and chunks
start at channels that are multiples of ALIGN. EVEN_N says that no list is ragged, EVEN_K that no
chunk is; their channels then need no mask.

A program of a product keeps BP x BN float32 sums in registers over all chunks of a list, and loads
BP x BK inputs and BN x BK weights a chunk for one `tl.dot`. A program of a sample keeps the BN x BK
sums of one chunk over its part of the positions. Where blocks are small, reads from L2 limit the
speed, as each input serves BN outputs only; with BN of 128 it is memory or the tensor cores, as
in dense convolutions (benchmarks/gpu_roofline.py). Sizes come from config.py.

Tests (tests/emulation): test_triton_ops.py compares with dense torch, test_triton_mutants.py plants
mistakes in these kernels, test_triton_compiled.py requires tensor cores and no spills.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import PLAIN
from .exact import LANES, are_nan, has_nan, results_of, rewrite

ROW = tl.constexpr(16)


@triton.jit
def _chunk(chunks, e, end, ALIGN: tl.constexpr):
    """Return the numbers of a chunk, zeros for one that lies behind the last of its list."""
    at, there = chunks + 6 * e, e < end
    channel = tl.multiple_of(tl.load(at, mask=there, other=0), ALIGN)
    size = tl.load(at + 1, mask=there, other=0)
    dy, dx = tl.load(at + 2, mask=there, other=0), tl.load(at + 3, mask=there, other=0)
    value = tl.multiple_of(tl.load(at + 4, mask=there, other=0), ROW)
    step = tl.multiple_of(tl.load(at + 5, mask=there, other=0), ROW)
    return channel, size, dy, dx, value, step


@triton.jit
def _places(
    p, live, high, wide, x_image, x_row, x_pixel, stride_y, stride_x, y_image, y_row, y_pixel,
    SPATIAL: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Return row and column of the input that positions start from, where it is, and the output."""
    in_y, in_x = p, p
    from_x, to_y = p.to(tl.int64) * x_pixel, p.to(tl.int64) * y_pixel
    if SPATIAL:
        # Without signs, divisions and bounds take fewer instructions.
        u, u_wide, u_high = p.to(tl.uint32), wide.to(tl.uint32), high.to(tl.uint32)
        line = u // u_wide
        image = line // u_high
        left, above = (u - line * u_wide).to(tl.int32), (line - image * u_high).to(tl.int32)
        in_y, in_x = above * stride_y, left * stride_x
        from_x = image.to(tl.int64) * x_image + in_y * x_row + in_x * x_pixel
        if not WHOLE:
            to_y = image.to(tl.int64) * y_image + above * y_row + left * y_pixel
        in_y = tl.where(live, in_y, -(1 << 30))  # far outside
    return in_y, in_x, from_x, to_y


@triton.jit
def _product_again(
    lists, outputs, chunks, slots, weight, bias, x, y,
    count, positions, high, wide,
    x_image, x_row, x_pixel, in_high, in_wide, stride_y, stride_x,
    y_image, y_row, y_pixel,
    SPATIAL: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr, IN_PLACE: tl.constexpr,
    FILLED: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the results of a program again that are NaN, without what is no term."""
    which = tl.program_id(0) % count
    begin, end = tl.load(lists + which), tl.load(lists + which + 1)
    first, size = tl.load(outputs + 2 * which), tl.load(outputs + 2 * which + 1)
    for turn in tl.range(0, size * tl.cdiv(BP, LANES), num_stages=1):
        p, live, n = results_of(turn, size, count, positions, BP)
        in_y, in_x, from_x, to_y = _places(
            p, live, high, wide, x_image, x_row, x_pixel, stride_y, stride_x,
            y_image, y_row, y_pixel, SPATIAL, WHOLE,
        )  # fmt: skip
        y_at = y + to_y + (first + n)
        written = tl.load(y_at, mask=live, other=0.0).to(tl.float32)
        if has_nan(written):
            wanted, acc = written != written, tl.zeros((LANES,), dtype=tl.float32)
            e = begin
            while e < end:
                channel, held, dy, dx, value, step = _chunk(chunks, e, end, 1)
                seen, offset = live, channel
                if SPATIAL:
                    row, pixel = in_y + dy, in_x + dx
                    seen = (row >= 0) & (row < in_high) & (pixel >= 0) & (pixel < in_wide)
                    offset += dy * x_row + dx * x_pixel
                at, apart = e * (BN * BK) + n * BK, 1
                if IN_PLACE == "k":
                    at = value + n * step
                elif IN_PLACE == "n":
                    at, apart = value + n, step
                for k in tl.range(0, held, num_stages=1):
                    is_term = True
                    if FILLED:
                        is_term = tl.load(slots + at + k) >= 0
                    if is_term:
                        a = tl.load(x + from_x + (offset + k), mask=seen, other=0.0)
                        b = tl.load(weight + at + k * apart).to(tl.float32)
                        acc += tl.where(seen, a.to(tl.float32) * b, 0.0)
                e = tl.where(are_nan(acc, wanted), end, e + 1)
            if BIAS:
                acc += tl.load(bias + first + n).to(tl.float32)
            rewrite(y_at, acc, wanted)


# Vectors go along channels, so that the last, smaller batch needs no variant of its own.
@triton.jit(do_not_specialize=(*PLAIN, "positions"))
def tile_product(
    lists, outputs, chunks, slots, weight, bias, x, y,
    count, positions, high, wide,
    x_image, x_row, x_pixel, in_high, in_wide, stride_y, stride_x,
    y_image, y_row, y_pixel,
    SPATIAL: tl.constexpr, PADDED: tl.constexpr, WHOLE: tl.constexpr, BIAS: tl.constexpr,
    EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr, IN_PLACE: tl.constexpr,
    FILLED: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute one block of positions for one list of chunks.

    WHOLE says that positions of the result lie one behind the other, `y_pixel` apart, as they
    always do unless SPATIAL. PADDED says that some input pixels may lie outside the map, FILLED
    that chunks have zeros where `slots` [E, BN, BK] is -1.
    """
    # Programs of all lists at the same positions run side by side and share the input in L2.
    program = tl.program_id(0)
    which = program % count
    begin, end = tl.load(lists + which), tl.load(lists + which + 1)
    first = tl.multiple_of(tl.load(outputs + 2 * which), ALIGN)
    p = (program // count) * BP + tl.arange(0, BP)
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    live = p < positions
    in_y, in_x, from_x, to_y = _places(
        p, live, high, wide, x_image, x_row, x_pixel, stride_y, stride_x, y_image, y_row, y_pixel,
        SPATIAL, WHOLE,
    )  # fmt: skip
    x_at, y_at = x + from_x, y + to_y
    kept, held = tl.full((BN,), True, tl.int1), tl.full((BK,), True, tl.int1)
    if not EVEN_N:
        kept = n < tl.load(outputs + 2 * which + 1)
    # A turn ahead: Triton has num_stages buffers where no address waits for a load of its own turn,
    # else two, and on sm_80 one.
    channel, size, dy, dx, value, step = _chunk(chunks, begin, end, ALIGN)
    acc = tl.zeros((BP, BN), dtype=tl.float32)
    for e in range(begin, end):
        seen, offset = live, channel
        if SPATIAL:
            row, pixel = (in_y + dy).to(tl.uint32), (in_x + dx).to(tl.uint32)
            # Negative numbers are large ones without their sign.
            seen = (row < in_high.to(tl.uint32)) & (pixel < in_wide.to(tl.uint32))
            offset = channel + dy * x_row + dx * x_pixel
        if not EVEN_K:
            held = k < size
        mask = seen[:, None] & held[None, :]
        a = tl.load(x_at[:, None] + (offset + k)[None, :], mask=mask, other=0.0)
        if IN_PLACE == "":
            b = tl.load(weight + e * (BN * BK) + n[None, :] * BK + k[:, None])
        elif IN_PLACE == "k":
            b_at = weight + value + n[None, :] * step + k[:, None]
            b = tl.load(b_at, mask=kept[None, :], other=0.0)
        else:
            b_at = weight + value + k[:, None] * step + n[None, :]
            b = tl.load(b_at, mask=held[:, None], other=0.0)
        channel, size, dy, dx, value, step = _chunk(chunks, e + 1, end, ALIGN)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    spoilt = (PADDED or FILLED) and has_nan(acc)
    mask = live[:, None] & kept[None, :]
    if BIAS:
        acc += tl.load(bias + first + n, mask=kept, other=0.0).to(tl.float32)[None, :]
    tl.store(y_at[:, None] + (first + n)[None, :], acc.to(y.dtype.element_ty), mask=mask)
    if spoilt:
        tl.debug_barrier()
        _product_again(
            lists, outputs, chunks, slots, weight, bias, x, y,
            count, positions, high, wide,
            x_image, x_row, x_pixel, in_high, in_wide, stride_y, stride_x,
            y_image, y_row, y_pixel,
            SPATIAL, WHOLE, BIAS, IN_PLACE, FILLED, BP, BN, BK,
        )  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def tile_sample(
    owners, outputs, chunks, grad, x, partial,
    entries, images, pixels, wide, images_each, blocks_each, image_parts,
    g_image, g_row, g_pixel, x_image, x_row, x_pixel, in_high, in_wide, stride_y, stride_x,
    SPATIAL: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr, ALIGN: tl.constexpr,
    PRECISION: tl.constexpr,
    PIXELS: tl.constexpr, IMAGES: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one chunk over one part of the positions, into `partial`.

    `owners` int32 [E] is the list of each chunk, `partial` float32 [parts, E, BN, BK]. A block of
    positions is PIXELS pixels of IMAGES images, so that the inner loop only steps to other images:
    where a pixel is and whether its input is inside the map is found out once.
    """
    e = tl.program_id(0)
    part = tl.program_id(1)
    which = tl.load(owners + e)
    first = tl.multiple_of(tl.load(outputs + 2 * which), ALIGN)
    channel = tl.multiple_of(tl.load(chunks + 6 * e), ALIGN)
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    lane = tl.arange(0, PIXELS * IMAGES)
    image = lane // PIXELS
    from_image = (part % image_parts) * images_each
    to_image = tl.minimum(from_image + images_each, images)
    from_block = (part // image_parts) * blocks_each
    blocks = tl.where(tl.load(chunks + 6 * e + 1) > 0, blocks_each, 0)
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    for block in range(from_block, from_block + blocks):
        pixel = block * PIXELS + lane % PIXELS
        held = pixel < pixels
        seen = held
        start = (from_image + image).to(tl.int64)
        g_at, x_at = grad + start * g_image + first, x + start * x_image + channel
        if SPATIAL:
            above, left = pixel // wide, pixel % wide
            in_y = above * stride_y + tl.load(chunks + 6 * e + 2)
            in_x = left * stride_x + tl.load(chunks + 6 * e + 3)
            seen = held & (in_y >= 0) & (in_y < in_high) & (in_x >= 0) & (in_x < in_wide)
            g_at += above * g_row + left * g_pixel
            x_at += in_y * x_row + in_x * x_pixel
        for i in range(from_image, to_image, IMAGES):
            here = i + image < to_image
            # Of the output gradient too, only what meets an input: it may be infinite.
            g_mask, x_mask = (seen & here)[None, :], (seen & here)[:, None]
            if not EVEN_N:
                g_mask = g_mask & (n < tl.load(outputs + 2 * which + 1))[:, None]
            if not EVEN_K:
                x_mask = x_mask & (k < tl.load(chunks + 6 * e + 1))[None, :]
            a = tl.load(g_at[None, :] + n[:, None], mask=g_mask, other=0.0)
            b = tl.load(x_at[:, None] + k[None, :], mask=x_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            g_at += IMAGES * g_image
            x_at += IMAGES * x_image
    at = partial + (part.to(tl.int64) * entries + e) * (BN * BK)
    tl.store(at + n[:, None] * BK + k[None, :], acc)
