"""Products and samples at columns that lie anywhere, of their own or shared by groups of rows.

Maps are packed, `[channel][y][x][image]` with their padding. A pixel holds one channel of all
images, and a nonzero is one number, the offset in pixels from where the output starts to what it
reads. Neighbouring positions are neighbours in memory, whatever the columns are, and borders need
no test. A product writes into a packed map too: output (y, x) of a row reads from pixel `y * in_row
+ x * in_col` and goes to pixel `out_origin + y * out_row + x * out_col`. A sample finds what an
output reads in a table, `starts` int32 [outputs]; its VECTOR divides the number of images. PADDED
says that inputs, `in_high` x `in_wide` pixels, have padding: `top` rows, `left` columns and so on;
its zeros make NaN of infinite factors, see exact.py.

Rows that share their columns come in lists of at most BN, their columns in chunks of BK:

    lists   int32 [L + 1]   first chunk of each list
    outputs int32 [L, 2]    first row of a list, and how many there are
    owners  int32 [E]       list of each chunk
    offsets int32 [E, BK]   -1 behind the last column of a list, and in chunks behind the last list
    weight        [E, BN, BK], zeros there and behind the last row

Shared columns are multiplied as in gemm.py: BP x BN sums of a product, or BN x BK of a sample, stay
in registers, and only the loads differ, as every column is an address of its own. Single rows keep
BP sums over their nonzeros, their samples sums of BN nonzeros by one block of positions. Each of
their multiply-adds loads an input, so reads from L2 limit the speed, as in csrc/cuda/gather.cuh.

Tests (tests/emulation): test_triton_ops.py compares with dense torch, test_triton_mutants.py plants
mistakes in these kernels, test_triton_compiled.py compiles every instance in table.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .config import PLAIN
from .exact import LANES, are_nan, has_nan, results_of, rewrite


@triton.jit
def _pixels(p, lanes, wide, in_row, in_col, out_origin, out_row, out_col):
    """Return where positions read and where they write, in elements."""
    pixel, image = p // lanes, p % lanes
    above, left = pixel // wide, pixel % wide
    reads = (above * in_row + left * in_col).to(tl.int64) * lanes + image
    writes = (out_origin + above * out_row + left * out_col).to(tl.int64) * lanes + image
    return reads, writes


@triton.jit
def _is_inside(pixel, in_high, in_wide, top, bottom, left, right):
    """Return which pixels of a packed map are those of the map itself, not of its padding."""
    y, x = pixel // in_wide % in_high, pixel % in_wide
    return (y >= top) & (y < in_high - bottom) & (x >= left) & (x < in_wide - right)


@triton.jit
def _product_again(
    lists, outputs, offsets, weight, bias, x, y,
    count, positions, lanes, wide, in_row, in_col, out_origin, out_row, out_col,
    top, bottom, left, right, in_high, in_wide, out_plane,
    BIAS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the results of a program again that are NaN, without the padding."""
    which = tl.program_id(0) % count
    begin, end = tl.load(lists + which), tl.load(lists + which + 1)
    first, size = tl.load(outputs + 2 * which), tl.load(outputs + 2 * which + 1)
    for turn in tl.range(0, size * tl.cdiv(BP, LANES), num_stages=1):
        p, live, n = results_of(turn, size, count, positions, BP)
        reads, writes = _pixels(p, lanes, wide, in_row, in_col, out_origin, out_row, out_col)
        pixel = (reads // lanes).to(tl.int32)
        y_at = y + writes + (first + n).to(tl.int64) * out_plane
        written = tl.load(y_at, mask=live, other=0.0).to(tl.float32)
        if has_nan(written):
            wanted, acc = written != written, tl.zeros((LANES,), dtype=tl.float32)
            e = begin
            while e < end:
                for k in tl.range(0, BK, num_stages=1):
                    offset = tl.load(offsets + e * BK + k)
                    if offset >= 0:
                        seen = live & _is_inside(
                            pixel + offset, in_high, in_wide, top, bottom, left, right
                        )
                        a = tl.load(x + reads + offset.to(tl.int64) * lanes, mask=seen, other=0.0)
                        b = tl.load(weight + e * (BN * BK) + n * BK + k).to(tl.float32)
                        acc += tl.where(seen, a.to(tl.float32) * b, 0.0)
                e = tl.where(are_nan(acc, wanted), end, e + 1)
            if BIAS:
                acc += tl.load(bias + first + n).to(tl.float32)
            rewrite(y_at, acc, wanted)


@triton.jit(do_not_specialize=PLAIN)
def shared_product(
    lists, outputs, offsets, weight, bias, x, y,
    count, positions, lanes, wide, in_row, in_col, out_origin, out_row, out_col,
    top, bottom, left, right, in_high, in_wide, out_plane,
    BIAS: tl.constexpr, PADDED: tl.constexpr, PRECISION: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute one block of positions for one list of rows."""
    program = tl.program_id(0)
    which = program % count
    p = (program // count) * BP + tl.arange(0, BP)
    n, k = tl.arange(0, BN), tl.arange(0, BK)
    live = p < positions
    reads, writes = _pixels(p, lanes, wide, in_row, in_col, out_origin, out_row, out_col)
    x_at = x + reads
    begin, end = tl.load(lists + which), tl.load(lists + which + 1)
    # A turn ahead, as in gemm.py.
    offset = tl.load(offsets + begin * BK + k, mask=k < (end - begin) * BK, other=-1)
    acc = tl.zeros((BP, BN), dtype=tl.float32)
    for e in range(begin, end):
        mask = live[:, None] & (offset >= 0)[None, :]
        at = x_at[:, None] + (offset.to(tl.int64) * lanes)[None, :]
        a = tl.load(at, mask=mask, other=0.0)
        b = tl.load(weight + e * (BN * BK) + n[None, :] * BK + k[:, None])
        offset = tl.load(offsets + (e + 1) * BK + k, mask=k < (end - e - 1) * BK, other=-1)
        acc = tl.dot(a, b, acc, input_precision=PRECISION)
    spoilt = PADDED and has_nan(acc)
    row = tl.load(outputs + 2 * which) + n
    kept = n < tl.load(outputs + 2 * which + 1)
    if BIAS:
        acc += tl.load(bias + row, mask=kept, other=0.0).to(tl.float32)[None, :]
    at = y + writes[:, None] + (row.to(tl.int64) * out_plane)[None, :]
    tl.store(at, acc.to(y.dtype.element_ty), mask=live[:, None] & kept[None, :])
    if spoilt:
        tl.debug_barrier()
        _product_again(
            lists, outputs, offsets, weight, bias, x, y,
            count, positions, lanes, wide, in_row, in_col, out_origin, out_row, out_col,
            top, bottom, left, right, in_high, in_wide, out_plane,
            BIAS, BP, BN, BK,
        )  # fmt: skip


@triton.jit
def _sample_again(
    at, starts, grad, x, column, lanes, from_output, to_output, from_image, to_image,
    top, bottom, left, right, in_high, in_wide,
):  # fmt: skip
    """Compute one sum of a sample again if it is NaN, without the padding."""
    written = tl.load(at)
    if written != written:
        lane, images = tl.arange(0, LANES), to_image - from_image
        acc = tl.zeros((LANES,), dtype=tl.float32)
        j, last = from_output * images, to_output * images
        while j < last:
            there = j + lane < last
            output, image = (j + lane) // images, from_image + (j + lane) % images
            pixel = tl.load(starts + output, mask=there, other=0) + column
            term = there & _is_inside(pixel, in_high, in_wide, top, bottom, left, right)
            a = tl.load(grad + output.to(tl.int64) * lanes + image, mask=term, other=0.0)
            b = tl.load(x + pixel.to(tl.int64) * lanes + image, mask=term, other=0.0)
            acc += a.to(tl.float32) * b.to(tl.float32)
            j = tl.where(has_nan(acc), last, j + LANES)
        rewrite(at, tl.sum(acc), True)


@triton.jit(do_not_specialize=PLAIN)
def shared_sample(
    owners, outputs, offsets, starts, grad, x, partial,
    entries, count, lanes, images_each, blocks_each, image_parts,
    top, bottom, left, right, in_high, in_wide,
    PADDED: tl.constexpr, PRECISION: tl.constexpr,
    PIXELS: tl.constexpr, IMAGES: tl.constexpr, VECTOR: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of one chunk over one part of the positions, into `partial`.

    `grad` is packed without padding, `partial` is float32 [parts, E, BN, BK]. A block of positions
    is PIXELS outputs of IMAGES images.
    """
    e = tl.program_id(0)
    part = tl.program_id(1)
    which = tl.load(owners + e)
    n, k, lane = tl.arange(0, BN), tl.arange(0, BK), tl.arange(0, PIXELS * IMAGES)
    row = (tl.load(outputs + 2 * which) + n).to(tl.int64) * count * lanes
    kept = n < tl.load(outputs + 2 * which + 1)
    offset = tl.load(offsets + e * BK + k)
    shift = offset.to(tl.int64) * lanes
    from_image = tl.multiple_of((part % image_parts) * images_each, VECTOR)
    to_image = tl.multiple_of(tl.minimum(from_image + images_each, lanes), VECTOR)
    from_block = (part // image_parts) * blocks_each
    acc = tl.zeros((BN, BK), dtype=tl.float32)
    for block in range(from_block, from_block + blocks_each):
        output, image = block * PIXELS + lane // IMAGES, from_image + lane % IMAGES
        held = output < count
        pixel = tl.load(starts + output, mask=held, other=0)
        g_at = grad + output.to(tl.int64) * lanes + image
        x_at = x + pixel.to(tl.int64) * lanes + image
        for i in range(from_image, to_image, IMAGES):
            here = held & (i + lane % IMAGES < to_image)
            g_mask, x_mask = kept[:, None] & here[None, :], here[:, None] & (offset >= 0)[None, :]
            a = tl.load(g_at[None, :] + row[:, None], mask=g_mask, other=0.0)
            b = tl.load(x_at[:, None] + shift[None, :], mask=x_mask, other=0.0)
            acc = tl.dot(a, b, acc, input_precision=PRECISION)
            g_at += IMAGES
            x_at += IMAGES
    at = partial + (part.to(tl.int64) * entries + e) * (BN * BK)
    tl.store(at + n[:, None] * BK + k[None, :], acc)
    if PADDED and has_nan(acc):
        tl.debug_barrier()
        first = tl.load(outputs + 2 * which)
        to_output = tl.minimum((from_block + blocks_each) * PIXELS, count)
        for j in tl.range(0, tl.load(outputs + 2 * which + 1) * BK, num_stages=1):
            column = tl.load(offsets + e * BK + j % BK)
            if column >= 0:
                row_at = grad + (first + j // BK).to(tl.int64) * count * lanes
                _sample_again(
                    at + j, starts, row_at, x, column, lanes,
                    from_block * PIXELS, to_output, from_image, to_image,
                    top, bottom, left, right, in_high, in_wide,
                )  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def row_product(
    crow, offset, order, values, bias, x, y,
    positions, lanes, wide, in_row, in_col, out_origin, out_row, out_col,
    top, bottom, left, right, in_high, in_wide, out_plane,
    BIAS: tl.constexpr, PADDED: tl.constexpr, BP: tl.constexpr,
):  # fmt: skip
    """Compute one block of positions of one row, nonzero by nonzero; the longest rows first."""
    program = tl.program_id(0)
    blocks = tl.cdiv(positions, BP)
    row = tl.load(order + program // blocks)
    p = (program % blocks) * BP + tl.arange(0, BP)
    live = p < positions
    reads, writes = _pixels(p, lanes, wide, in_row, in_col, out_origin, out_row, out_col)
    x_at = x + reads
    begin, end = tl.load(crow + row), tl.load(crow + row + 1)
    # A turn ahead: an address then waits for no load of its own turn.
    shift = tl.load(offset + begin, mask=begin < end, other=0)
    value = tl.load(values + begin, mask=begin < end, other=0.0)
    acc = tl.zeros((BP,), dtype=tl.float32)
    for j in range(begin, end):
        of_x = tl.load(x_at + shift.to(tl.int64) * lanes, mask=live, other=0.0)
        factor, more = value.to(tl.float32), j + 1 < end
        shift = tl.load(offset + j + 1, mask=more, other=0)
        value = tl.load(values + j + 1, mask=more, other=0.0)
        acc += factor * of_x.to(tl.float32)
    if PADDED and has_nan(tl.where(live, acc, 0.0)):
        wanted, again = live & (acc != acc), tl.zeros((BP,), dtype=tl.float32)
        pixel = p // lanes
        first = pixel // wide * in_row + pixel % wide * in_col
        j = begin
        while j < end:
            column = tl.load(offset + j)
            seen = _is_inside(first + column, in_high, in_wide, top, bottom, left, right)
            of_x = tl.load(x_at + column.to(tl.int64) * lanes, mask=seen & live, other=0.0)
            term = tl.load(values + j).to(tl.float32) * of_x.to(tl.float32)
            again += tl.where(seen, term, 0.0)
            j = tl.where(are_nan(again, wanted), end, j + 1)
        acc = tl.where(wanted, again, acc)
    if BIAS:
        acc += tl.load(bias + row).to(tl.float32)
    at = y + row.to(tl.int64) * out_plane + writes
    tl.store(at, acc.to(y.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=PLAIN)
def row_sample(
    nonzero_row, offset, starts, grad, x, partial,
    nnz, count, lanes, images_each, blocks_each, image_parts,
    top, bottom, left, right, in_high, in_wide,
    PADDED: tl.constexpr,
    PIXELS: tl.constexpr, IMAGES: tl.constexpr, VECTOR: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of BN nonzeros over one part of the positions, as shared_sample does.

    `nonzero_row` and `offset` are those of each nonzero, `partial` is float32 [parts, nnz].
    """
    part = tl.program_id(1)
    nonzero, lane = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, PIXELS * IMAGES)
    kept = nonzero < nnz
    above = tl.load(nonzero_row + nonzero, mask=kept, other=0).to(tl.int64) * count * lanes
    shift = tl.load(offset + nonzero, mask=kept, other=0).to(tl.int64) * lanes
    from_image = tl.multiple_of((part % image_parts) * images_each, VECTOR)
    to_image = tl.multiple_of(tl.minimum(from_image + images_each, lanes), VECTOR)
    from_block = (part // image_parts) * blocks_each
    acc = tl.zeros((BN, PIXELS * IMAGES), dtype=tl.float32)
    for block in range(from_block, from_block + blocks_each):
        output, image = block * PIXELS + lane // IMAGES, from_image + lane % IMAGES
        held = output < count
        pixel = tl.load(starts + output, mask=held, other=0)
        g_at = grad + output.to(tl.int64) * lanes + image
        x_at = x + pixel.to(tl.int64) * lanes + image
        for i in range(from_image, to_image, IMAGES):
            here = kept[:, None] & (held & (i + lane % IMAGES < to_image))[None, :]
            a = tl.load(g_at[None, :] + above[:, None], mask=here, other=0.0).to(tl.float32)
            b = tl.load(x_at[None, :] + shift[:, None], mask=here, other=0.0).to(tl.float32)
            acc += a * b
            g_at += IMAGES
            x_at += IMAGES
    total, at = tl.sum(acc, axis=1), partial + part.to(tl.int64) * nnz
    tl.store(at + nonzero, total, mask=kept)
    if PADDED and has_nan(total):
        tl.debug_barrier()
        first = tl.program_id(0) * BN
        to_output = tl.minimum((from_block + blocks_each) * PIXELS, count)
        for j in tl.range(first, tl.minimum(first + BN, nnz), num_stages=1):
            row_at = grad + tl.load(nonzero_row + j).to(tl.int64) * count * lanes
            _sample_again(
                at + j, starts, row_at, x, tl.load(offset + j), lanes,
                from_block * PIXELS, to_output, from_image, to_image,
                top, bottom, left, right, in_high, in_wide,
            )  # fmt: skip
