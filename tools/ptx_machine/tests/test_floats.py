"""Arithmetic, comparisons and conversions of floats, against Python's fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ptx_machine.testing import N, dtype_of, execute, integers

FLOATS = {"f16": (11, -14), "bf16": (8, -126), "f32": (24, -126)}  # digits, smallest exponent


def nearest(x: Fraction, type_: str) -> float:
    """Round to nearest even."""
    digits, smallest = FLOATS[type_]
    if x == 0:
        return 0.0
    exponent = x.numerator.bit_length() - x.denominator.bit_length()
    exponent -= abs(x) < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, smallest) - digits + 1)
    rounded = round(x / unit) * unit
    largest = (2 - Fraction(2) ** (1 - digits)) * Fraction(2) ** (1 - smallest)
    return math.copysign(math.inf, x) if abs(rounded) > largest else float(rounded)


def decoded(bits: np.ndarray, type_: str) -> np.ndarray:
    if type_ == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view({"f16": np.float16, "f32": np.float32, "f64": np.float64}[type_]).astype(float)


def floats(type_: str, seed: int) -> np.ndarray:
    """Return bits of finite numbers of all sizes, subnormal ones among them."""
    random = np.random.default_rng(seed)
    digits = FLOATS[type_][0]
    wide = type_ == "f32"
    bits = random.integers(0, 1 << (32 if wide else 16), N).astype(np.uint32 if wide else np.uint16)
    middle = random.random(N) < 0.7  # near one, where sums are inexact
    one = bits.dtype.type({"f16": 0x3C00, "bf16": 0x3F80, "f32": 0x3F800000}[type_])
    near = one + (bits & bits.dtype.type((1 << digits + 2) - 1)) - bits.dtype.type(1 << digits)
    bits = np.where(middle, near, bits)
    bits[random.permutation(N)[:16]] = [0, 1, 2, 3] * 4
    return np.where(np.isfinite(decoded(bits, type_)), bits, one)


@pytest.mark.parametrize("type_", FLOATS)
@pytest.mark.parametrize(
    "name, count, compute",
    [
        ("add", 2, lambda a, b: a + b),
        ("sub", 2, lambda a, b: a - b),
        ("mul", 2, lambda a, b: a * b),
        ("fma.rn", 3, lambda a, b, c: a * b + c),
    ],
)
def test_floats_round_once(type_: str, name: str, count: int, compute) -> None:
    inputs = [floats(type_, seed) for seed in range(count)]
    if count == 3:  # addends that leave a tie after the product, up to a little
        a, b, _ = (decoded(x, type_) for x in inputs)
        with np.errstate(all="ignore"):
            near = -(a * b)
        inputs[2][: N // 2] = _encode(near * (1 + 2.0 ** -np.arange(N)), type_)[: N // 2]
    text = f"{name}.{type_} %d, " + ", ".join(f"%a{i}" for i in range(count)) + ";"
    found = decoded(execute(text, inputs, inputs[0].dtype), type_)
    for got, *given in zip(found.tolist(), *(decoded(x, type_) for x in inputs), strict=True):
        exact = nearest(compute(*map(Fraction, given)), type_)
        assert got == exact, given


def _encode(x: np.ndarray, type_: str) -> np.ndarray:
    bits = [nearest(Fraction(v), type_) if math.isfinite(v) else 1.0 for v in x.tolist()]
    exact = np.clip(bits, -60000, 60000).astype(np.float32)
    if type_ == "bf16":
        return (exact.view(np.uint32) >> 16).astype(np.uint16)
    return exact.astype({"f16": np.float16, "f32": np.float32}[type_]).view(
        np.uint16 if type_ == "f16" else np.uint32
    )


def test_a_fused_multiply_add_in_float64_first_would_be_wrong() -> None:
    """The ties that rounding to float64 makes are really among the tested ones."""
    a = np.full(N, 1 + 2.0**-12, np.float32)
    b = np.full(N, 1 + 2.0**-12, np.float32)
    c = np.full(N, 2.0**-60, np.float32)
    found = execute("fma.rn.f32 %d, %a0, %a1, %a2;", [a, b, c], np.dtype("f4"))
    exact = nearest(Fraction(1 + 2.0**-12) ** 2 + Fraction(2.0**-60), "f32")
    twice = np.float32(np.float64(1 + 2.0**-12) ** 2 + 2.0**-60)
    assert found[0] == exact != twice


@pytest.mark.parametrize("type_", FLOATS)
@pytest.mark.parametrize("name, count", [("add", 2), ("sub", 2), ("mul", 2), ("fma.rn", 3)])
def test_arithmetic_has_one_nan(type_: str, name: str, count: int) -> None:
    """Else threads that add up the same numbers in other orders would seem to differ."""
    nans, infinity = {
        "f16": ([0x7E01, 0xFE00, 0x7E55, 0xFFFF], 0x7C00),
        "bf16": ([0x7FC1, 0xFFC0, 0x7FD5, 0xFFFF], 0x7F80),
        "f32": ([0x7FC00001, 0xFFC00000, 0x7FD55555, 0xFFFFFFFF], 0x7F800000),
    }[type_]
    dtype = np.dtype("u4" if type_ == "f32" else "u2")
    inputs = [np.resize(np.array(nans, dtype), N), *[np.full(N, infinity, dtype)] * (count - 1)]
    for order in (inputs, inputs[::-1]):
        text = f"{name}.{type_} %d, " + ", ".join(f"%a{i}" for i in range(count)) + ";"
        assert set(execute(text, order, dtype).tolist()) == {0x7FFFFFFF >> 8 * (4 - dtype.itemsize)}


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_halves_from_float32(type_: str) -> None:
    x = floats("f32", 5)
    x[:64] = _between(type_)
    found = execute(f"cvt.rn.{type_}.f32 %d, %a0;", [x], np.dtype("u2"))
    for got, given in zip(decoded(found, type_), decoded(x, "f32"), strict=True):
        assert got == nearest(Fraction(given), type_), given
    packed = execute(f"cvt.rn.{type_}x2.f32 %d, %a0, %a1;", [x, x[::-1]], np.dtype("u4"))
    assert np.array_equal(packed >> 16, found)
    assert np.array_equal(packed & 0xFFFF, found[::-1])


def _between(type_: str) -> np.ndarray:
    """Return the bits of float32 halfway between two halves, and next to it."""
    half = np.arange(21, 32, dtype=np.uint16) * 997
    step = half + np.uint16(1)
    middle = ((decoded(half, type_) + decoded(step, type_)) / 2).astype(np.float32)
    return np.resize(np.concatenate([middle, np.nextafter(middle, np.float32(9))]), 64).view("u4")


@pytest.mark.parametrize("type_", ["f16", "bf16"])
def test_float32_from_halves_is_exact(type_: str) -> None:
    x = floats(type_, 1)
    found = execute(f"cvt.f32.{type_} %d, %a0;", [x], np.dtype("f4"))
    assert np.array_equal(found, decoded(x, type_))


def test_tf32_ties_go_away_from_zero() -> None:
    x = np.resize(np.array([1 + 2.0**-11, -1 - 2.0**-11, 1 + 2.0**-12, 3.0], np.float32), N)
    found = execute("cvt.rna.tf32.f32 %d, %a0;", [x], np.dtype("f4"))
    assert found[:4].tolist() == [1 + 2.0**-10, -1 - 2.0**-10, 1.0, 3.0]


@pytest.mark.parametrize("to", ["s32", "u32", "s64", "u64", "s16", "u16"])
@pytest.mark.parametrize("mode", ["rzi", "rni", "rmi", "rpi"])
def test_integers_from_floats_saturate(to: str, mode: str) -> None:
    x = floats("f32", 3).view(np.float32).copy()
    x[:8] = [math.inf, -math.inf, math.nan, 0.5, 1.5, -0.5, 3e9, -3e9]
    found = execute(f"cvt.{mode}.{to}.f32 %d, %a0;", [x], dtype_of(to))
    rounding = {"rzi": math.trunc, "rni": round, "rmi": math.floor, "rpi": math.ceil}[mode]
    limits = np.iinfo(dtype_of(to))
    for got, given in zip(found.tolist(), x.tolist(), strict=True):
        if math.isnan(given):
            assert got == 0
        elif math.isinf(given):
            assert got == (limits.max if given > 0 else limits.min)
        else:
            assert got == max(limits.min, min(limits.max, rounding(given)))


@pytest.mark.parametrize(
    "to, from_",
    [("f32", t) for t in ("s32", "u32", "s64", "u64", "s16")] + [("f16", "s32"), ("f16", "u16")],
)
def test_floats_from_integers(from_: str, to: str) -> None:
    x = integers(from_, 3)
    size = {"f32": "u4", "f16": "u2"}[to]
    found = decoded(execute(f"cvt.rn.{to}.{from_} %d, %a0;", [x], np.dtype(size)), to)
    assert found.tolist() == [nearest(Fraction(v), to) for v in x.tolist()]


SPECIAL = np.array([math.nan, 0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, 2.0], np.float32)
LEFT, RIGHT = (np.resize(x, N) for x in (np.repeat(SPECIAL, 8), np.tile(SPECIAL, 8)))
COMPARED: dict[str, Callable[[float, float], bool]] = {
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b and a == a and b == b,
    "lt": lambda a, b: a < b, "le": lambda a, b: a <= b, "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b, "num": lambda a, b: a == a and b == b,
    "nan": lambda a, b: a != a or b != b, "equ": lambda a, b: a == b or a != a or b != b,
    "neu": lambda a, b: a != b, "ltu": lambda a, b: not a >= b, "leu": lambda a, b: not a > b,
    "gtu": lambda a, b: not a <= b, "geu": lambda a, b: not a < b,
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_of_floats(name: str) -> None:
    text = f"setp.{name}.f32 %p0, %a0, %a1; selp.b32 %d, 1, 0, %p0;"
    found = execute(text, [LEFT, RIGHT], np.dtype("u4"))
    assert found.tolist() == [
        int(COMPARED[name](float(a), float(b))) for a, b in zip(LEFT, RIGHT, strict=True)
    ]


@pytest.mark.parametrize("type_", ["f16", "bf16"])
@pytest.mark.parametrize("name", COMPARED)
def test_comparisons_of_pairs_of_halves(name: str, type_: str) -> None:
    """A predicate of each half, the lower one first; both combined with the same third one."""
    left, right = np.roll(LEFT, 5), np.roll(RIGHT, 11)  # of the upper halves
    pairs = [_halves(x, type_) | _halves(y, type_) << 16 for x, y in ((LEFT, left), (RIGHT, right))]
    text = f"""setp.lt.u32 %p3, %t, 100;
        setp.{name}.{type_}x2 %p0|%p1, %a0, %a1; setp.{name}.and.{type_}x2 %p2|_, %a0, %a1, !%p3;
        selp.b32 %d, 1, 0, %p0; @%p1 add.u32 %d, %d, 2; @%p2 add.u32 %d, %d, 4;"""
    found = execute(text, pairs, np.dtype("u4"))
    compare = COMPARED[name]
    for t, (got, *given) in enumerate(zip(found.tolist(), LEFT, RIGHT, left, right, strict=True)):
        first, second = compare(*given[:2]), compare(*given[2:])
        assert got == first + 2 * second + 4 * (first and t >= 100), given


def _halves(x: np.ndarray, type_: str) -> np.ndarray:
    bits = x.astype(np.float16).view("u2") if type_ == "f16" else x.view("u4") >> 16
    return bits.astype(np.uint32)


@pytest.mark.parametrize("name", ["min", "max", "min.NaN", "max.NaN"])
def test_extremes_of_floats(name: str) -> None:
    found = execute(f"{name}.f32 %d, %a0, %a1;", [LEFT, RIGHT], np.dtype("f4"))
    for got, a, b in zip(found, LEFT, RIGHT, strict=True):
        if math.isnan(a) or math.isnan(b):
            both = math.isnan(a) and math.isnan(b)
            expected = (
                np.float32(math.nan) if "NaN" in name or both else (b if math.isnan(a) else a)
            )
        else:
            order = sorted([a, b], key=lambda v: (v, -int(np.signbit(v))))
            expected = order[0] if name.startswith("min") else order[1]
        assert np.array_equal(got, expected, equal_nan=True)
        assert math.isnan(got) or np.signbit(got) == np.signbit(expected), (a, b)


@pytest.mark.parametrize("name, compute", [
    ("ex2.approx", np.exp2), ("lg2.approx", np.log2), ("sqrt.rn", np.sqrt),
    ("rcp.rn", lambda x: 1 / x), ("rsqrt.approx", lambda x: 1 / np.sqrt(x)), ("abs", np.abs),
    ("neg", np.negative), ("sin.approx", np.sin), ("tanh.approx", np.tanh),
])  # fmt: skip
def test_functions(name: str, compute: Callable[[Any], Any]) -> None:
    x = np.linspace(0.1, 9, N).astype(np.float32)
    found = execute(f"{name}.f32 %d, %a0;", [x], np.dtype("f4"))
    assert np.allclose(found, compute(x.astype(float)), rtol=3e-7)
