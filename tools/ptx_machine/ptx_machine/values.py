"""Numbers as GPUs represent and round them, in numpy: 16-bit floats, TF32, fused multiply-add."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy import ndarray as Array

UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
INTEGERS: dict[str, type] = {}
for _size in UNSIGNED:
    INTEGERS |= {f"{kind}{8 * _size}": UNSIGNED[_size] for kind in "bu"}
    INTEGERS[f"s{8 * _size}"] = SIGNED[_size]


class Format(NamedTuple):
    """A float format: the integer type of its bits, and conversion to and from numpy floats."""

    bits: type
    decode: Callable[[Array], Array]
    encode: Callable[[Array], Array]


def bfloat16(x: Array) -> Array:
    """Round float32 or float64 to the bits of bfloat16, to nearest even."""
    bits = to_odd_float32(x).view(np.uint32) if x.dtype == np.float64 else x.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded.astype(np.uint16))


def from_bfloat16(bits: Array) -> Array:
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def float16(x: Array) -> Array:
    bits = x.astype(np.float16).view(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), bits)


def from_float16(bits: Array) -> Array:
    return bits.view(np.float16).astype(np.float32)


def tf32(x: Array) -> Array:
    """Round float32 to the bits of TF32, to nearest, ties away from zero."""
    bits = x.view(np.uint32)
    rounded = (bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)
    return np.where(np.isfinite(x), rounded, bits)


def pairs(bits: Array) -> Array:
    """View 32-bit words as two halves each, the lower one first."""
    return np.ascontiguousarray(bits).view(np.uint16).reshape(-1, 2)


def words(halves: Array) -> Array:
    return np.ascontiguousarray(halves).view(np.uint32).reshape(-1)


FORMATS = {
    "f16": Format(np.uint16, from_float16, float16),
    "bf16": Format(np.uint16, from_bfloat16, bfloat16),
    "f16x2": Format(np.uint32, lambda b: from_float16(pairs(b)), lambda x: words(float16(x))),
    "bf16x2": Format(np.uint32, lambda b: from_bfloat16(pairs(b)), lambda x: words(bfloat16(x))),
    "f32": Format(
        np.uint32,
        lambda bits: bits.view(np.float32),
        lambda x: x.astype(np.float32, copy=False).view(np.uint32),
    ),
    "f64": Format(
        np.uint64,
        lambda bits: bits.view(np.float64),
        lambda x: x.astype(np.float64, copy=False).view(np.uint64),
    ),
}


def to_odd(product: Array, addend: Array) -> Array:
    """Add in float64 and round to odd, so that rounding once more to fewer bits is right."""
    total = product + addend
    part = total - product
    rest = (product - (total - part)) + (addend - part)
    bits = total.view(np.int64)
    step = np.where((rest > 0) == (total > 0), 1, -1)
    inexact = (rest != 0) & np.isfinite(total) & np.isfinite(rest) & (bits & 1 == 0)
    return np.where(inexact, bits + step, bits).view(np.float64)


def to_odd_float32(x: Array) -> Array:
    """Round float64 to float32, to odd where it is not exact."""
    near = x.astype(np.float32)
    bits = near.view(np.uint32)
    inexact = (near.astype(np.float64) != x) & np.isfinite(near) & (bits & np.uint32(1) == 0)
    above = np.abs(near.astype(np.float64)) > np.abs(x)
    step = np.where(above, bits - np.uint32(1), bits + np.uint32(1))
    return np.where(inexact, step, bits).view(np.float32)


def fma(a: Array, b: Array, c: Array, type_: str) -> Array:
    """Return a * b + c, rounded once to nearest even."""
    product, addend = a.astype(np.float64) * b, c.astype(np.float64)
    if type_ != "f32":
        return to_odd(product, addend)
    total = np.atleast_1d(product + addend)
    # Rounding to float64 first only matters where that leaves a tie, or something subnormal.
    risky = (total.view(np.uint64) & np.uint64(0x1FFFFFFF)) == np.uint64(0x10000000)
    risky |= np.abs(total) < 2.0**-125
    if risky.any():
        total = np.where(risky, to_odd(product, addend), total)
    return total.astype(np.float32)


def rounded(x: Array, mode: str) -> Array:
    """Round to whole numbers: rni to nearest even, rzi to zero, rmi down, rpi up."""
    return {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}[mode](x)


def to_integer(x: Array, dtype: type) -> Array:
    """Convert whole floats; what does not fit becomes the nearest number that does, NaN zero."""
    info = np.iinfo(dtype)
    x = np.nan_to_num(x.astype(np.float64), nan=0.0, posinf=np.inf, neginf=-np.inf)
    low, high = x <= float(info.min), x >= float(info.max)
    inside = np.where(low | high, 0.0, x).astype(dtype)
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(dtype)
