"""Instructions that move numbers between registers and memory: ld, st, atom, red, cp.async."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from .arithmetic import opcode
from .operands import SHARED_WINDOW, Operands, Read, Step
from .parse import BYTES, members
from .values import FORMATS, INTEGERS, SIGNED, UNSIGNED

SPACES = ("global", "shared", "param", "local", "const")
ORDERED = {"volatile", "relaxed", "acquire", "release"}
Scatter = Callable[..., None]


def _space(o: Operands) -> str:
    return next((m for m in o.instruction.modifiers if m in SPACES), "generic")


def _memory(wave, space: str, addresses: Array, o: Operands):
    """Return the memory that is meant, and the addresses in it."""
    if space == "generic":
        of_shared = addresses >= SHARED_WINDOW
        if of_shared.any() and not of_shared.all():
            raise o.unsupported("(generic addresses of two memories)")
        space = "shared" if of_shared.any() else "global"
        addresses = addresses & (SHARED_WINDOW - 1)
    if space == "global":
        return wave.memory, addresses
    if space == "shared":
        return wave.shared, addresses
    raise o.unsupported(f"({space} memory)")


def scatter(o: Operands, text: str, type_: str) -> Scatter:
    """Return a function that sets a register of chosen lanes."""
    if text == "_":
        return lambda wave, lanes, values: None
    if text not in o.kernel.registers:
        raise o.unsupported(f"(no register {text})")
    size = o.kernel.registers[text]
    signed = type_[0] == "s"
    own = SIGNED[BYTES[type_]] if signed else UNSIGNED[BYTES[type_]]
    wide = SIGNED[size] if signed else UNSIGNED[size]

    def set_(wave, lanes: Array, values: Array) -> None:
        wave.registers[text][lanes] = values.view(own).astype(wide).view(UNSIGNED[size])

    return set_


def _lanes_of(wave, read: Read, lanes: Array) -> Array:
    values = read(wave)
    return values[lanes] if len(values) > 1 else np.broadcast_to(values, len(lanes))


@opcode("ld")
def _load(o: Operands) -> Step:
    type_, space = o.instruction.type, _space(o)
    targets = members(o.instruction.args[0])
    if space == "param":
        return _parameter(o, targets, type_)
    if ORDERED & set(o.instruction.modifiers):
        raise o.unsupported()
    address = o.address(o.instruction.args[1])
    sets = [scatter(o, text, type_) for text in targets]
    size = BYTES[type_]

    def step(wave, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        memory, addresses = _memory(wave, space, _lanes_of(wave, address, lanes), o)
        values = memory.load(wave, lanes, addresses, size, len(sets))
        for i, set_ in enumerate(sets):
            set_(wave, lanes, np.ascontiguousarray(values[:, i]))

    return step


def _parameter(o: Operands, targets: list[str], type_: str) -> Step:
    name, _, offset = o.instruction.args[1].strip("[] ").partition("+")
    start = next((p.offset for p in o.kernel.parameters if p.name == name.strip()), None)
    if start is None:
        raise o.unsupported("(no such parameter)")
    start += int(offset or 0, 0) if offset else 0
    size = BYTES[type_]
    dtype = FORMATS[type_].bits if type_ in FORMATS else INTEGERS[type_]
    plain = type_ if type_ in INTEGERS else f"b{8 * size}"
    writes = [o.write(text, plain) for text in targets]

    def step(wave, mask: Array) -> None:
        data = wave.parameters[start : start + size * len(writes)]
        for value, write in zip(np.frombuffer(data, dtype), writes, strict=True):
            write(wave, mask, np.array([value]))

    return step


@opcode("st")
def _store(o: Operands) -> Step:
    if ORDERED & set(o.instruction.modifiers):
        raise o.unsupported()
    size, space = BYTES[o.instruction.type], _space(o)
    address = o.address(o.instruction.args[0])
    reads = [o.bits(text, size) for text in members(o.instruction.args[1])]

    def step(wave, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        memory, addresses = _memory(wave, space, _lanes_of(wave, address, lanes), o)
        values = np.stack([_lanes_of(wave, read, lanes) for read in reads], axis=1)
        memory.store(wave, lanes, addresses, values)

    return step


UPDATES: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum, "exch": lambda old, new: new,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "inc": lambda old, most: np.where(old >= most, old.dtype.type(0), old + 1),
    "dec": lambda old, most: np.where((old == 0) | (old > most), most, old - 1),
}  # fmt: skip


@opcode("atom", "red")
def _atomic(o: Operands) -> Step:
    instruction, space = o.instruction, _space(o)
    type_, size = instruction.type, BYTES[instruction.type]
    args = list(instruction.args)
    set_ = scatter(o, args.pop(0), f"b{8 * size}") if instruction.op == "atom" else None
    address = o.address(args[0])
    operands = [o.bits(text, size) for text in args[1:]]
    kind = next((m for m in instruction.modifiers if m in (*UPDATES, "cas")), None)
    if kind is None or "v2" in instruction.modifiers or "v4" in instruction.modifiers:
        raise o.unsupported()
    update = _update(kind, type_)

    def step(wave, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        memory, addresses = _memory(wave, space, _lanes_of(wave, address, lanes), o)
        given = [_lanes_of(wave, read, lanes) for read in operands]
        before = memory.exchange(
            wave, lanes, addresses, size, lambda old, i: update(old, *(g[i] for g in given))
        )
        if set_ is not None:
            set_(wave, lanes, before)

    return step


def _update(kind: str, type_: str) -> Callable[..., Array]:
    """Return the update of bits by bits."""
    if kind == "cas":
        return lambda old, expected, new: np.where(old == expected, new, old)
    compute = UPDATES[kind]
    if type_ in FORMATS:
        form = FORMATS[type_]
        return lambda old, x: form.encode(compute(form.decode(old), form.decode(x)))
    dtype, bits = INTEGERS[type_], UNSIGNED[BYTES[type_]]
    return lambda old, x: compute(old.view(dtype), x.view(dtype)).view(bits)


@opcode("cp")
def _copy(o: Operands) -> Step:
    modifiers, args = o.instruction.modifiers, o.instruction.args
    if modifiers[:1] != ["async"] or "bulk" in modifiers or "mbarrier" in modifiers:
        raise o.unsupported()
    if modifiers[1] == "commit_group":
        return _commit
    if modifiers[1] in ("wait_group", "wait_all"):
        but = o.integer(args[0]) if args else None
        return lambda wave, mask: wave.shared.land(wave, mask, but)
    to, from_ = o.address(args[0], 4), o.address(args[1])
    total = o.integer(args[2])
    given = o.bits(args[3], 4) if len(args) > 3 else None

    def step(wave, mask: Array) -> None:
        lanes = np.flatnonzero(mask)
        targets, sources = _lanes_of(wave, to, lanes), _lanes_of(wave, from_, lanes)
        data = np.zeros((len(lanes), total // 4), np.uint32)
        sizes = np.full(len(lanes), total) if given is None else _lanes_of(wave, given, lanes)
        for size in np.unique(sizes):
            if size % 4 or size > total:
                raise o.unsupported(f"(copies {size} bytes)")
            if size:
                here = sizes == size
                part = (lanes[here], sources[here], 4, int(size) // 4)
                data[here, : size // 4] = wave.memory.load(wave, *part)
        wave.shared.take_off(wave, lanes, targets, data)

    return step


def _commit(wave, mask: Array) -> None:
    wave.shared.group[mask] += 1
