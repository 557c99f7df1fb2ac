"""Integer and bit operations of PTX on arrays of lanes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array


def quotient(a: Array, b: Array) -> Array:
    """Divide and round to zero."""
    down = a // b
    if a.dtype.kind == "u":
        return down
    return down + ((down * b != a) & ((a < 0) != (b < 0)))


def remainder(a: Array, b: Array) -> Array:
    return a - quotient(a, b) * b


def high_product(a: Array, b: Array) -> Array:
    """Return the upper half of the product of twice as many bits."""
    bits = 8 * a.dtype.itemsize
    if bits < 64:
        wide = np.int64 if a.dtype.kind == "i" else np.uint64
        return (a.astype(wide) * b.astype(wide) >> wide(bits)).astype(a.dtype)
    x, y = a.view(np.uint64), b.view(np.uint64)
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    x0, x1, y0, y1 = x & low, x >> half, y & low, y >> half
    middle = x1 * y0 + (x0 * y0 >> half)
    other = x0 * y1 + (middle & low)
    high = x1 * y1 + (middle >> half) + (other >> half)
    if a.dtype.kind == "i":
        high = high - np.where(a < 0, y, 0) - np.where(b < 0, x, 0)
    return high.astype(np.uint64).view(a.dtype)


def bit_columns(x: Array) -> Array:
    """Return the bits of every element, the lowest first."""
    size = x.dtype.itemsize
    octets = np.ascontiguousarray(x).view(np.uint8).reshape(-1, size)
    return np.unpackbits(octets, axis=1, bitorder="little")


def popcount(x: Array) -> Array:
    return bit_columns(x).sum(axis=1, dtype=np.uint32)


def highest_bit(x: Array) -> Array:
    """Return the position of the highest bit that is not the sign, all ones where there is none."""
    if x.dtype.kind == "i":
        x = np.where(x < 0, ~x, x)
    columns = bit_columns(x)
    position = columns.shape[1] - 1 - np.argmax(columns[:, ::-1], axis=1)
    return np.where(columns.any(axis=1), position.astype(np.uint32), np.uint32(0xFFFFFFFF))


def leading_zeros(x: Array) -> Array:
    bits = np.uint32(8 * x.dtype.itemsize)
    return bits - np.uint32(1) - highest_bit(x.view(f"u{x.dtype.itemsize}"))


def reversed_bits(x: Array) -> Array:
    backwards = np.packbits(bit_columns(x)[:, ::-1], axis=1, bitorder="little")
    return np.ascontiguousarray(backwards).view(x.dtype).reshape(-1)


def shift_left(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    return np.where(by < bits, a << np.minimum(by, bits - 1).astype(a.dtype), a.dtype.type(0))


def shift_right(a: Array, by: Array) -> Array:
    bits = 8 * a.dtype.itemsize
    shifted = a >> np.minimum(by, bits - 1).astype(a.dtype)
    if a.dtype.kind == "i":
        return shifted
    return np.where(by < bits, shifted, a.dtype.type(0))


def funnel(direction: str, mode: str) -> Callable[[Array, Array, Array], Array]:
    """Return the shift of (upper, lower) as 64 bits, of which one half is the result."""

    def compute(lower: Array, upper: Array, by: Array) -> Array:
        by = (by & np.uint32(31) if mode == "wrap" else np.minimum(by, 32)).astype(np.uint64)
        both = upper.astype(np.uint64) << np.uint64(32) | lower
        if direction == "r":
            return (both >> by).astype(np.uint32)
        return (both << by >> np.uint64(32)).astype(np.uint32)

    return compute


def _ones(count: Array) -> Array:
    """Return as many ones, at most 64, from the lowest bit up."""
    count = count.astype(np.uint64)
    full = np.uint64(0xFFFFFFFFFFFFFFFF)
    return np.where(count == 0, np.uint64(0), full >> (np.uint64(64) - np.maximum(count, 1)))


def extract(a: Array, position: Array, length: Array) -> Array:
    """Return a field of bits; a signed one continues with its highest bit."""
    bits = 8 * a.dtype.itemsize
    position, length = position & np.uint32(255), np.minimum(length & np.uint32(255), bits)
    field = shift_right(a, position)
    inside = _ones(length).astype(f"u{a.dtype.itemsize}").view(a.dtype)
    if a.dtype.kind == "u":
        return field & inside
    top = shift_right(a, np.minimum(position + np.maximum(length, 1) - 1, bits - 1)) & 1
    continued = np.where((top != 0) & (length > 0), ~inside, a.dtype.type(0))
    return field & inside | continued


def insert(field: Array, into: Array, position: Array, length: Array) -> Array:
    bits = 8 * field.dtype.itemsize
    position, length = position & np.uint32(255), np.minimum(length & np.uint32(255), bits)
    mask = shift_left(_ones(length).astype(field.dtype), position)
    return shift_left(field, position) & mask | into & ~mask


def permute_bytes(a: Array, b: Array, selection: Array) -> Array:
    """Choose four of the eight bytes of (b, a); bit 3 of a choice repeats the byte's sign."""
    both = b.astype(np.uint64) << np.uint64(32) | a
    result = np.uint32(0)
    for i in range(4):
        choice = selection >> np.uint32(4 * i) & np.uint32(15)
        byte = (both >> ((choice & np.uint32(7)) * np.uint32(8)).astype(np.uint64)).astype(np.uint8)
        sign = np.where(byte.view(np.int8) < 0, np.uint8(255), np.uint8(0))
        chosen = np.where(choice & np.uint32(8), sign, byte).astype(np.uint32)
        result = result | chosen << np.uint32(8 * i)
    return result


def logic(a: Array, b: Array, c: Array, table: int) -> Array:
    """Look every bit up in a table of eight bits by those of a, b and c."""
    result = np.uint32(0)
    for entry in range(8):
        if table >> entry & 1:
            parts = (x if entry >> bit & 1 else ~x for x, bit in ((a, 2), (b, 1), (c, 0)))
            first, second, third = parts
            result = result | first & second & third
    return np.atleast_1d(result)


def clipped(x: Array, dtype: type) -> Array:
    """Convert; what does not fit becomes the nearest number that does."""
    own, to = np.iinfo(x.dtype), np.iinfo(dtype)
    return np.clip(x, max(to.min, own.min), min(to.max, own.max)).astype(dtype)


def lane_bits(mask: Array) -> Array:
    """Return for every warp a word of the lanes in the mask."""
    return np.packbits(mask.reshape(-1, 32), axis=1, bitorder="little").view(np.uint32).reshape(-1)
