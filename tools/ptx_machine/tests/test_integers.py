"""Integer and bit operations, against Python's integers; and what the machine refuses."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from ptx_machine import Unsupported
from ptx_machine.testing import N, dtype_of, execute, integers


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


@pytest.mark.parametrize("text", [
    "frobnicate.b32 %d, %a0;", "add.sat.s32 %d, %a0, %a0;", "cvt.rz.f16.f32 %d, %a0;",
    "fma.rn.f64 %d, %a0, %a0, %a0;", "prmt.b32.f4e %d, %a0, %a0, %a0;", "add.s32 %d, %a0, %nobody;",
])  # fmt: skip
def test_what_is_not_known_is_refused_by_name(text: str) -> None:
    with pytest.raises(Unsupported, match=text.split()[0]):
        execute(text, [np.zeros(N, np.uint32)], np.dtype("u4"))
