"""Instructions that compute from registers alone: arithmetic, comparisons, conversions."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from . import integers
from .operands import SHARED_WINDOW, Operands, Step
from .parse import members
from .values import FORMATS, INTEGERS, UNSIGNED, fma, rounded, tf32, to_integer

Builder = Callable[[Operands], Step]
BUILDERS: dict[str, Builder] = {}
# Modifiers that change nothing here: subnormals are kept, as sm_80 does without .ftz, and what is
# approximate on a GPU is rounded to nearest.
ROUNDINGS = {"rn", "approx", "full", "rna"}
NAN = np.uint32(0x7FFFFFFF).view(np.float32)  # that of all arithmetic in float32


def opcode(*names: str) -> Callable[[Builder], Builder]:
    def register(builder: Builder) -> Builder:
        BUILDERS.update(dict.fromkeys(names, builder))
        return builder

    return register


def function(o: Operands, compute: Callable[..., Array], types: list[str], to: str) -> Step:
    """Return the step that sets the first operand to a function of the others."""
    args = o.instruction.args
    reads = [o.read(text, type_) for text, type_ in zip(args[1:], types, strict=True)]
    write = o.write(args[0], to)
    if len(reads) == 2:  # by far the most frequent
        first, second = reads
        return lambda wave, mask: write(wave, mask, compute(first(wave), second(wave)))

    def step(wave, mask: Array) -> None:
        write(wave, mask, compute(*(read(wave) for read in reads)))

    return step


def only(o: Operands, *known: str) -> None:
    """Refuse modifiers, other than the type at the end, that would be ignored."""
    for modifier in o.instruction.modifiers[:-1]:
        if modifier not in known:
            raise o.unsupported(f"(.{modifier})")


def _extreme(choose: Callable, propagate: bool) -> Callable[[Array, Array], Array]:
    """Return minimum or maximum as GPUs know them: a NaN loses, and -0 is less than 0."""
    either = np.logical_or if choose is np.minimum else np.logical_and

    def compute(a: Array, b: Array) -> Array:
        if not propagate:
            a, b = np.where(np.isnan(a), b, a), np.where(np.isnan(b), a, b)
        zero = np.where(either(np.signbit(a), np.signbit(b)), a.dtype.type(-0.0), a.dtype.type(0.0))
        return np.where((a == 0) & (b == 0), zero, choose(a, b))

    return compute


def _with_one_nan(compute: Callable[..., Array], type_: str) -> Callable[..., Array]:
    """Return the function with the NaN of GPUs in float32, whatever the operands are.

    That of the host tells operands apart, as which one comes first. Halves have one when written.
    """
    if type_ != "f32":
        return compute

    def canonical(*operands: Array) -> Array:
        result = compute(*operands)
        wrong = np.isnan(result)
        return np.where(wrong, NAN, result) if wrong.any() else result

    return canonical


FLOAT_PAIRS = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}
INTEGER_PAIRS = {
    "add": np.add, "sub": np.subtract, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "div": integers.quotient, "rem": integers.remainder,
}  # fmt: skip


@opcode("add", "sub", "min", "max", "and", "or", "xor", "div", "rem")
def _pair(o: Operands) -> Step:
    op, type_ = o.instruction.op, o.instruction.type
    if type_ not in FORMATS:
        only(o)
        return function(o, INTEGER_PAIRS[op], [type_, type_], type_)
    if op in ("min", "max"):
        only(o, "NaN")
        choose = np.minimum if op == "min" else np.maximum
        return function(o, _extreme(choose, "NaN" in o.instruction.modifiers), [type_] * 2, type_)
    only(o, *ROUNDINGS)
    return function(o, _with_one_nan(FLOAT_PAIRS[op], type_), [type_, type_], type_)


@opcode("mul", "mad", "fma")
def _multiply(o: Operands) -> Step:
    op, type_, modifiers = o.instruction.op, o.instruction.type, o.instruction.modifiers
    if type_ in FORMATS:
        only(o, *ROUNDINGS)
        if op == "mul":
            return function(o, _with_one_nan(np.multiply, type_), [type_, type_], type_)
        if type_ == "f64":
            raise o.unsupported()
        fused = _with_one_nan(lambda a, b, c: fma(a, b, c, type_), type_)
        return function(o, fused, [type_] * 3, type_)
    only(o, "lo", "hi", "wide")
    to, product = type_, np.multiply
    if "wide" in modifiers:
        to = f"{type_[0]}{2 * int(type_[1:])}"
        dtype = INTEGERS[to]
        product = lambda a, b: a.astype(dtype) * b.astype(dtype)  # noqa: E731
    elif "hi" in modifiers:
        product = integers.high_product
    if op == "mul":
        return function(o, product, [type_, type_], to)
    return function(o, lambda a, b, c: product(a, b) + c, [type_, type_, to], to)


UNARY: dict[str, Callable[[Array], Array]] = {
    "neg": np.negative, "abs": np.abs, "sqrt": np.sqrt, "ex2": np.exp2, "lg2": np.log2,
    "sin": np.sin, "cos": np.cos, "tanh": np.tanh, "not": np.invert,
    "rcp": lambda x: 1 / x, "rsqrt": lambda x: 1 / np.sqrt(x),
    "popc": integers.popcount, "clz": integers.leading_zeros, "brev": integers.reversed_bits,
}  # fmt: skip


@opcode(*UNARY)
def _unary(o: Operands) -> Step:
    op, type_ = o.instruction.op, o.instruction.type
    only(o, *ROUNDINGS)
    to = "u32" if op in ("popc", "clz") else type_
    compute = UNARY[op]
    if type_ == "pred":
        compute = np.logical_not
    return function(o, compute, [type_], to)


@opcode("bfind")
def _bfind(o: Operands) -> Step:
    only(o)
    return function(o, integers.highest_bit, [o.instruction.type], "u32")


@opcode("shl", "shr")
def _shift(o: Operands) -> Step:
    type_ = o.instruction.type
    compute = integers.shift_left if o.instruction.op == "shl" else integers.shift_right
    return function(o, compute, [type_, "u32"], type_)


@opcode("shf")
def _funnel(o: Operands) -> Step:
    direction, mode = o.instruction.modifiers[:2]
    compute = integers.funnel(direction, mode)
    return function(o, compute, ["b32", "b32", "u32"], "b32")


@opcode("bfe", "bfi")
def _bit_field(o: Operands) -> Step:
    type_ = o.instruction.type
    if o.instruction.op == "bfe":
        return function(o, integers.extract, [type_, "u32", "u32"], type_)
    return function(o, integers.insert, [type_, type_, "u32", "u32"], type_)


@opcode("prmt")
def _permute(o: Operands) -> Step:
    only(o)
    return function(o, integers.permute_bytes, ["b32"] * 3, "b32")


@opcode("lop3")
def _logic(o: Operands) -> Step:
    only(o)
    table = o.integer(o.instruction.args.pop())
    return function(o, lambda a, b, c: integers.logic(a, b, c, table), ["b32"] * 3, "b32")


@opcode("selp")
def _select(o: Operands) -> Step:
    # Bits are moved and not numbers, which keeps every NaN as it is.
    bits = f"b{8 * np.dtype(_bits_of(o.instruction.type)).itemsize}"
    return function(o, lambda a, b, p: np.where(p, a, b), [bits, bits, "pred"], bits)


def _bits_of(type_: str) -> type:
    return FORMATS[type_].bits if type_ in FORMATS else INTEGERS[type_]


COMPARISONS: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal, "lo": np.less, "ls": np.less_equal,
    "hi": np.greater, "hs": np.greater_equal,
}  # fmt: skip
COMBINATIONS = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}


def _comparison(name: str, of_floats: bool) -> Callable[[Array, Array], Array] | None:
    if name in ("num", "nan"):
        return lambda a, b: (np.isnan(a) | np.isnan(b)) == (name == "nan")
    if name in COMPARISONS and not (of_floats and name == "ne"):
        return COMPARISONS[name]
    if of_floats and name == "ne":  # numpy's is true for NaN
        return lambda a, b: (a != b) & ~(np.isnan(a) | np.isnan(b))
    if name.endswith("u") and name[:-1] in COMPARISONS:
        plain = COMPARISONS[name[:-1]]
        return lambda a, b: plain(a, b) | np.isnan(a) | np.isnan(b)
    return None


@opcode("setp")
def _compare(o: Operands) -> Step:
    name, *combination = o.instruction.modifiers[:-1]
    type_, args = o.instruction.type, o.instruction.args
    compare = _comparison(name, type_ in FORMATS)
    targets = [o.write(text.strip(), "pred") for text in args[0].split("|")]
    first, second = o.read(args[1], type_), o.read(args[2], type_)
    of_pairs = type_.endswith("x2")
    if compare is None or len(combination) > 1 or (of_pairs and len(targets) != 2):
        raise o.unsupported()
    combine = COMBINATIONS[combination[0]] if combination else None
    other = o.read(args[3], "pred") if combination else None

    def step(wave, mask: Array) -> None:
        result = compare(first(wave), second(wave))
        # Of pairs a predicate each; else the second is the opposite.
        results = result.T if of_pairs else (result, ~result)
        for write, value in zip(targets, results, strict=False):
            write(wave, mask, combine(value, other(wave)) if combine else value)

    return step


@opcode("mov")
def _move(o: Operands) -> Step:
    target, source = o.instruction.args
    type_ = o.instruction.type
    if type_ == "pred":
        return function(o, lambda a: a, ["pred"], "pred")
    size = np.dtype(_bits_of(type_)).itemsize
    read = o.bits(source, size)
    if not target.startswith("{"):
        write = o.write(target, f"b{8 * size}")
        return lambda wave, mask: write(wave, mask, read(wave))
    parts = members(target)
    part = f"b{8 * size // len(parts)}"
    writes = [o.write(text, part) for text in parts]

    def unpack(wave, mask: Array) -> None:
        columns = np.ascontiguousarray(read(wave)).view(INTEGERS[part]).reshape(-1, len(parts))
        for i, write in enumerate(writes):
            write(wave, mask, np.ascontiguousarray(columns[:, i]))

    return unpack


WHOLE = ("rni", "rzi", "rmi", "rpi")


@opcode("cvt")
def _convert(o: Operands) -> Step:
    *modifiers, to, from_ = o.instruction.modifiers
    known = {"rn", "rna", "sat", *WHOLE}
    if not known.issuperset(modifiers) or ("rna" in modifiers) != (to == "tf32"):
        raise o.unsupported()
    if to == "tf32":
        return function(o, tf32, ["f32"], "b32")
    if to.endswith("x2") and from_ == "f32":  # the first operand becomes the upper half
        return function(o, lambda a, b: np.stack(np.broadcast_arrays(b, a), 1), ["f32", "f32"], to)
    mode = next((m for m in modifiers if m in WHOLE), None)
    if to in FORMATS:
        if "sat" in modifiers:
            raise o.unsupported()
        return function(o, _to_float(from_, to, mode), [from_], to)
    dtype = INTEGERS[to]
    if from_ in FORMATS:
        if mode is None:
            raise o.unsupported()
        return function(o, lambda x: to_integer(rounded(x, mode), dtype), [from_], to)
    if "sat" in modifiers:
        return function(o, lambda x: integers.clipped(x, dtype), [from_], to)
    return function(o, lambda x: x.astype(dtype), [from_], to)


def _to_float(from_: str, to: str, mode: str | None) -> Callable[[Array], Array]:
    if (
        from_ not in FORMATS
    ):  # float64 holds every 32-bit integer; wider ones round once, to float32
        wide = np.float64 if to != "f32" else np.float32
        return lambda x: x.astype(wide)
    if mode is not None:
        return lambda x: rounded(x, mode)
    return lambda x: x


@opcode("copysign")
def _copysign(o: Operands) -> Step:
    type_ = o.instruction.type
    return function(o, lambda a, b: np.copysign(b, a), [type_, type_], type_)


@opcode("cvta")
def _generic_address(o: Operands) -> Step:
    modifiers = o.instruction.modifiers
    shift = 0
    if "shared" in modifiers:
        shift = -SHARED_WINDOW if "to" in modifiers else SHARED_WINDOW
    elif "global" not in modifiers:
        raise o.unsupported()
    move = np.array([shift & (1 << 64) - 1], np.uint64)
    return function(o, lambda a: a + move, ["u64"], "u64")


@opcode("activemask")
def _activemask(o: Operands) -> Step:
    write = o.write(o.instruction.args[0], "b32")

    def step(wave, mask: Array) -> None:
        bits = integers.lane_bits(mask)
        write(wave, mask, np.repeat(bits, 32))

    return step


@opcode("membar", "fence", "prefetch", "prefetchu", "nanosleep")
def _nothing(o: Operands) -> Step:
    return lambda wave, mask: None


@opcode("createpolicy")
def _policy(o: Operands) -> Step:
    write = o.write(o.instruction.args[0], "b64")
    return lambda wave, mask: write(wave, mask, np.zeros(1, UNSIGNED[8]))
