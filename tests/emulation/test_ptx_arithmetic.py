"""Every arithmetic instruction of the PTX machine against Python's integers and fractions."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from ptx_machine import Module, Unsupported

N = 256
DTYPES = {"b": "u", "u": "u", "s": "i", "f": "f"}


def dtype_of(type_: str) -> np.dtype:
    return np.dtype(f"{DTYPES[type_[0]]}{int(type_[1:]) // 8}")


def execute(body: str, inputs: list[np.ndarray], out: np.dtype) -> np.ndarray:
    """Run instructions on %a0, %a1, ... of every thread and return %d."""
    result = np.zeros(N, out)
    arrays = [np.ascontiguousarray(x) for x in inputs]
    loads, registers, parameters = "", "", [".param .u64 out"]
    for i, x in enumerate(arrays):
        size = x.dtype.itemsize
        parameters.append(f".param .u64 in{i}")
        registers += f".reg .b{max(8 * size, 16)} %a{i};\n"
        loads += f"""ld.param.u64 %at, [in{i}];
            mad.wide.u32 %at, %t, {size}, %at;
            ld.global.b{8 * size} %a{i}, [%at];\n"""
    text = f""".version 8.0\n.target sm_80
        .visible .entry test({", ".join(parameters)}) {{
            .reg .pred %p<4>; .reg .b32 %t; .reg .b64 %at; .reg .b{8 * out.itemsize} %d;
            {registers} mov.u32 %t, %tid.x;
            {loads} {body}
            ld.param.u64 %at, [out];
            mad.wide.u32 %at, %t, {out.itemsize}, %at;
            st.global.b{8 * out.itemsize} [%at], %d;
            ret;
        }}"""
    kernel = Module(text)["test"]
    buffers = [(x.ctypes.data, x.nbytes) for x in (result, *arrays)]
    kernel.launch((1,), (N,), kernel.arguments(*(b[0] for b in buffers)), buffers)
    return result


def integers(type_: str, seed: int) -> np.ndarray:
    """Return random numbers of all sizes, and the extremes."""
    dtype = dtype_of(type_)
    random = np.random.default_rng(seed)
    bits = 8 * dtype.itemsize
    x = random.integers(0, 1 << bits, N, np.uint64, endpoint=False) if bits < 64 else (
        random.integers(0, (1 << 64) - 1, N, np.uint64, endpoint=True)
    )  # fmt: skip
    x >>= random.integers(0, bits, N).astype(np.uint64)
    x[random.permutation(N)[:40]] = [0, 1, 2, 3, (1 << bits) - 1] * 8
    x[random.permutation(N)[:20]] = [1 << (bits - 1), (1 << (bits - 1)) - 1] * 10
    return x.astype(f"u{dtype.itemsize}").view(dtype)


def wrapped(number: int, type_: str) -> int:
    bits = int(type_[1:])
    number &= (1 << bits) - 1
    return number - (1 << bits) if type_[0] == "s" and number >> (bits - 1) else number


def truncated(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


def bits_of(x: int, width: int) -> int:
    return x & (1 << width) - 1


def found_bit(x: int, signed: bool) -> int:
    x = ~x if signed and x < 0 else x
    return x.bit_length() - 1 if x else 0xFFFFFFFF


def extracted(a: int, position: int, length: int, type_: str) -> int:
    """Follow the definition in the PTX manual, bit by bit."""
    width = int(type_[1:])
    position, length = position & 255, length & 255
    raw = bits_of(a, width)
    signed = type_[0] == "s" and length > 0
    sign = raw >> min(position + length - 1, width - 1) & 1 if signed else 0
    result = 0
    for i in range(width):
        inside = i < length and position + i < width
        result |= (raw >> (position + i) & 1 if inside else sign) << i
    return result


def _upper(lower: int, upper: int, by: int) -> int:
    return (upper << 32 | lower) << by >> 32


def inserted(a: int, b: int, position: int, length: int) -> int:
    position, length = position & 255, length & 255
    for i in range(length):
        if position + i < 32:
            b = b & ~(1 << position + i) | (a >> i & 1) << position + i
    return b


def permuted(a: int, b: int, choice: int) -> int:
    octets = (b << 32 | a).to_bytes(8, "little")
    result = 0
    for i in range(4):
        nibble = choice >> 4 * i & 15
        byte = octets[nibble & 7]
        result |= (255 * (byte >> 7) if nibble & 8 else byte) << 8 * i
    return result


def looked_up(a: int, b: int, c: int, table: int) -> int:
    result = 0
    for i in range(32):
        index = (a >> i & 1) << 2 | (b >> i & 1) << 1 | c >> i & 1
        result |= (table >> index & 1) << i
    return result


Case = tuple[str, str, str, Callable[..., int]]  # instruction, types in, type out, what it is


def integer_cases() -> list[Case]:
    cases: list[Case] = []
    for t in ("s32", "u32", "s64", "u64", "u16", "s16"):
        width = int(t[1:])
        cases += [
            (f"add.{t}", f"{t} {t}", t, lambda a, b: a + b),
            (f"sub.{t}", f"{t} {t}", t, lambda a, b: a - b),
            (f"mul.lo.{t}", f"{t} {t}", t, lambda a, b: a * b),
            (f"mul.hi.{t}", f"{t} {t}", t, lambda a, b, w=width: a * b >> w),
            (f"mad.lo.{t}", f"{t} {t} {t}", t, lambda a, b, c: a * b + c),
            (f"min.{t}", f"{t} {t}", t, min),
            (f"max.{t}", f"{t} {t}", t, max),
            (f"div.{t}", f"{t} {t}", t, lambda a, b: truncated(a, b) if b else None),
            (f"rem.{t}", f"{t} {t}", t, lambda a, b: a - truncated(a, b) * b if b else None),
            (f"shr.{t}", f"{t} u32", t, lambda a, n: a >> min(n, 64)),
            (f"shl.b{width}", f"{t} u32", t, lambda a, n: a << min(n, 64)),
            (f"and.b{width}", f"{t} {t}", t, lambda a, b: a & b),
            (f"or.b{width}", f"{t} {t}", t, lambda a, b: a | b),
            (f"xor.b{width}", f"{t} {t}", t, lambda a, b: a ^ b),
            (f"not.b{width}", t, t, lambda a: ~a),
        ]
        if width < 64:
            wide = f"{t[0]}{2 * width}"
            cases += [
                (f"mul.wide.{t}", f"{t} {t}", wide, lambda a, b: a * b),
                (f"mad.wide.{t}", f"{t} {t} {wide}", wide, lambda a, b, c: a * b + c),
            ]
        if width > 16:
            signed = t[0] == "s"
            cases += [
                (f"bfind.{t}", t, "u32", lambda a, s=signed: found_bit(a, s)),
                (f"bfe.{t}", f"{t} u32 u32", t, lambda a, p, n, t=t: extracted(a, p, n, t)),
                (f"clz.b{width}", t, "u32", lambda a, w=width: w - bits_of(a, w).bit_length()),
                (f"popc.b{width}", t, "u32", lambda a, w=width: bits_of(a, w).bit_count()),
                (f"brev.b{width}", t, t, lambda a, w=width: int(f"{bits_of(a, w):0{w}b}"[::-1], 2)),
            ]
        if t[0] == "s":
            cases += [(f"abs.{t}", t, t, abs), (f"neg.{t}", t, t, lambda a: -a)]
    for table in (0x80, 0xCA, 0x96, 0xE8, 0x01):
        cases.append(
            (f"lop3.b32 %d, %a0, %a1, %a2, {table}", "u32 u32 u32", "u32",
             lambda a, b, c, table=table: looked_up(a, b, c, table))
        )  # fmt: skip
    cases += [
        ("bfi.b32", "u32 u32 u32 u32", "u32", inserted),
        ("prmt.b32", "u32 u32 u32", "u32", permuted),
        ("shf.l.wrap.b32", "u32 u32 u32", "u32", lambda a, b, n: _upper(a, b, n & 31)),
        ("shf.r.wrap.b32", "u32 u32 u32", "u32", lambda a, b, n: (b << 32 | a) >> (n & 31)),
        ("shf.l.clamp.b32", "u32 u32 u32", "u32", lambda a, b, n: _upper(a, b, min(n, 32))),
        ("shf.r.clamp.b32", "u32 u32 u32", "u32", lambda a, b, n: (b << 32 | a) >> min(n, 32)),
        ("cvt.s64.s32", "s32", "s64", lambda a: a),
        ("cvt.u64.u32", "u32", "u64", lambda a: a),
        ("cvt.s32.s64", "s64", "s32", lambda a: a),
        ("cvt.u16.u32", "u32", "u16", lambda a: a),
        ("cvt.s32.s16", "s16", "s32", lambda a: a),
        ("cvt.s32.s8", "s32", "s32", lambda a: wrapped(a, "s8")),
        ("cvt.sat.u16.s32", "s32", "u16", lambda a: max(0, min(a, 65535))),
        ("cvt.sat.s16.u32", "u32", "s16", lambda a: min(a, 32767)),
        ("selp.b32 %d, %a0, %a1, %p0", "u32 u32", "u32", lambda a, b: a if a < b else b),
        ("mov.b32 {%a0, %a1}, %a2; mov.b32 %d, {%a1, %a0}", "u16 u16 u32", "u32",
         lambda a, b, c: (c & 0xFFFF) << 16 | c >> 16),
        ("mov.b64 %d, {%a0, %a1}", "u32 u32", "u64", lambda a, b: b << 32 | a),
    ]  # fmt: skip
    return cases


@pytest.mark.parametrize("case", integer_cases(), ids=lambda c: c[0])
def test_integers(case: Case) -> None:
    text, types, to, compute = case
    inputs = [integers(type_, seed) for seed, type_ in enumerate(types.split())]
    if text.startswith(("sh", "bf")):  # amounts around the width, and far beyond
        for i, type_ in list(enumerate(types.split()))[1:]:
            if type_ == "u32" and not (text.startswith("shf") and i < 2):
                inputs[i] %= 80
    if text.startswith(("div", "rem")) and to[0] == "s":  # the one quotient that does not fit
        inputs[0][inputs[1] == -1] //= 2
    if " " not in text:
        text += " %d, " + ", ".join(f"%a{i}" for i in range(len(inputs)))
    if "%p0" in text:
        text = f"setp.lt.u32 %p0, %a0, %a1; {text}"
    found = execute(text + ";", inputs, dtype_of(to))
    for got, *given in zip(found.tolist(), *(x.tolist() for x in inputs), strict=True):
        exact = compute(*given)
        assert exact is None or got == wrapped(exact, to), given


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


@pytest.mark.parametrize("name, type_, compute", [
    ("lt", "s32", lambda a, b: a < b), ("lt", "u32", lambda a, b: a < b),
    ("ge", "s64", lambda a, b: a >= b), ("hi", "u64", lambda a, b: a > b),
    ("ls", "u32", lambda a, b: a <= b), ("eq", "s16", lambda a, b: a == b),
])  # fmt: skip
def test_comparisons_of_integers(name: str, type_: str, compute) -> None:
    a, b = integers(type_, 1), integers(type_, 2)
    b[::3] = a[::3]
    text = f"""setp.{name}.{type_} %p0|%p1, %a0, %a1; setp.{name}.and.{type_} %p2, %a0, %a1, !%p0;
        selp.b32 %t, 1, 0, %p0; @%p1 add.u32 %t, %t, 2; @%p2 add.u32 %t, %t, 4;
        mov.b32 %d, %t; mov.u32 %t, %tid.x;"""
    found = execute(text, [a, b], np.dtype("u4"))
    assert found.tolist() == [
        1 if compute(x, y) else 2 for x, y in zip(a.tolist(), b.tolist(), strict=True)
    ]


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


@pytest.mark.parametrize("text", [
    "frobnicate.b32 %d, %a0;", "add.sat.s32 %d, %a0, %a0;", "cvt.rz.f16.f32 %d, %a0;",
    "fma.rn.f64 %d, %a0, %a0, %a0;", "prmt.b32.f4e %d, %a0, %a0, %a0;", "add.s32 %d, %a0, %nobody;",
])  # fmt: skip
def test_what_is_not_known_is_refused_by_name(text: str) -> None:
    with pytest.raises(Unsupported, match=text.split()[0]):
        execute(text, [np.zeros(N, np.uint32)], np.dtype("u4"))
