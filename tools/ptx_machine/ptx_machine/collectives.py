"""Instructions that lanes of a warp execute together, shuffles and votes; and control flow."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from . import integers
from .errors import AbsentLane, Trap
from .operands import Operands
from .tensors import load_matrices, multiply_matrices
from .wave import LANES, Control, Wave

Perform = Callable[[Wave, Array], None]
CONTROLS: dict[str, Callable[[Operands], Control]] = {}


def control(*names: str):
    def register(builder):
        CONTROLS.update(dict.fromkeys(names, builder))
        return builder

    return register


class Collective:
    """A collective, which waits for the lanes that its mask names and then acts on them all.

    Args:
        o: the instruction.
        members: the operand that names them; None is the whole warp.
        perform: what is done, on a mask of lanes.
    """

    def __init__(self, o: Operands, members: str | None, perform: Perform) -> None:
        read = o.bits(members or "0xffffffff", 4)
        self.members = lambda wave: np.broadcast_to(read(wave), wave.size)
        self.perform = perform
        self.predicate = _predicate(o)

    def __call__(self, wave: Wave, mask: Array, pc: int) -> None:
        coming = mask if self.predicate is None else mask & self.predicate(wave)
        if coming is not mask and (mask & ~coming).any():
            wave.go(pc + 1, mask & ~coming)
        if coming.any():
            complete = wave.gather(pc, coming, self.members(wave))
            if complete.any():
                self.perform(wave, complete)
                wave.go(pc + 1, complete)


def _predicate(o: Operands):
    name = o.instruction.predicate
    if name is None:
        return None
    return o.read(("!" if o.instruction.negated else "") + name, "pred")


@control("bra")
def _branch(o: Operands) -> Control:
    label = o.instruction.args[0]
    if label not in o.kernel.labels:
        raise o.unsupported("(no such label)")
    target, predicate = o.kernel.labels[label], _predicate(o)

    def step(wave: Wave, mask: Array, pc: int) -> None:
        if predicate is None:
            wave.go(target, mask)
            return
        taken = mask & predicate(wave)
        rest = mask & ~taken
        if taken.any():
            wave.go(target, taken)
        if rest.any():
            wave.go(pc + 1, rest)

    return step


def _of_some(o: Operands, act: Callable[[Wave, Array, int], None]) -> Control:
    """Return an effect on the lanes of the predicate alone; the others continue."""
    predicate = _predicate(o)
    if predicate is None:
        return act

    def step(wave: Wave, mask: Array, pc: int) -> None:
        doing = mask & predicate(wave)
        rest = mask & ~doing
        if rest.any():
            wave.go(pc + 1, rest)
        if doing.any():
            act(wave, doing, pc)

    return step


@control("ret", "exit")
def _leave(o: Operands) -> Control:
    return _of_some(o, lambda wave, mask, pc: wave.leave(mask))


@control("trap")
def _trap(o: Operands) -> Control:
    def fail(wave: Wave, mask: Array, pc: int) -> None:
        raise Trap("the kernel traps")

    return _of_some(o, fail)


@control("bar", "barrier")
def _barrier(o: Operands) -> Control:
    if "warp" in o.instruction.modifiers:
        return Collective(o, o.instruction.args[0], lambda wave, mask: wave.pass_warp(mask))
    if "sync" not in o.instruction.modifiers or o.instruction.args != ["0"]:
        raise o.unsupported()
    return _of_some(o, lambda wave, mask, pc: wave.wait(pc, mask))


@control("shfl")
def _shuffle(o: Operands) -> Control:
    mode = o.instruction.modifiers[1]
    target, value, by, clamp, members = o.instruction.args
    name, _, valid = target.partition("|")
    write = o.write(name.strip(), "b32")
    write_valid = o.write(valid.strip(), "pred") if valid else None
    read, distance, limits = o.bits(value, 4), o.bits(by, 4), o.bits(clamp, 4)

    def perform(wave: Wave, mask: Array) -> None:
        lane = np.arange(wave.size) % LANES
        step = distance(wave).astype(np.int64) & 31
        limit = limits(wave).astype(np.int64)
        segment, clamped = limit >> 8 & 31, limit & 31
        lowest = lane & segment
        highest = lowest | (clamped & ~segment)
        source = {
            "up": lane - step, "down": lane + step, "bfly": lane ^ step,
            "idx": lowest | (step & ~segment),
        }[mode]  # fmt: skip
        inside = source >= highest if mode == "up" else source <= highest
        source = np.where(inside, source, lane) + (np.arange(wave.size) - lane)
        absent = mask & ~mask[source]
        if absent.any():
            first = int(np.flatnonzero(absent)[0])
            what = f"a shuffle reads lane {source[first] % LANES}, which takes no part"
            raise AbsentLane(what, first)
        values = np.broadcast_to(read(wave), wave.size)[source]
        write(wave, mask, values)
        if write_valid is not None:
            write_valid(wave, mask, np.broadcast_to(inside, wave.size))

    return Collective(o, members, perform)


@control("vote")
def _vote(o: Operands) -> Control:
    mode = o.instruction.modifiers[1]
    target, vote, members = o.instruction.args
    read = o.read(vote, "pred")
    write = o.write(target, "b32" if mode == "ballot" else "pred")

    def perform(wave: Wave, mask: Array) -> None:
        yes = integers.lane_bits(mask & read(wave))
        no = integers.lane_bits(mask & ~read(wave))
        result = {"ballot": yes, "any": yes != 0, "all": no == 0}.get(mode)
        if mode == "uni":
            result = (yes == 0) | (no == 0)
        write(wave, mask, np.repeat(result, LANES))

    return Collective(o, members, perform)


REDUCTIONS = {
    "add": np.add, "min": np.minimum, "max": np.maximum,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
}  # fmt: skip


@control("redux")
def _reduce(o: Operands) -> Control:
    kind, type_ = o.instruction.modifiers[1], o.instruction.type
    target, value, members = o.instruction.args
    if kind not in REDUCTIONS or type_ == "f32":
        raise o.unsupported()
    read, write = o.read(value, type_), o.write(target, type_)

    def perform(wave: Wave, mask: Array) -> None:
        values = np.broadcast_to(read(wave), wave.size)
        named = np.broadcast_to(o.bits(members, 4)(wave), wave.size)
        result = values.copy()
        for warp in np.unique(np.flatnonzero(mask) // LANES):
            own = slice(warp * LANES, warp * LANES + LANES)
            for word in np.unique(named[own][mask[own]]):
                chosen = (word >> np.arange(LANES, dtype=np.uint32) & 1).astype(bool)
                total = REDUCTIONS[kind].reduce(values[own][chosen], dtype=values.dtype)
                result[own][chosen & mask[own]] = total
        write(wave, mask, result)

    return Collective(o, members, perform)


@control("match")
def _match(o: Operands) -> Control:
    if o.instruction.modifiers[:2] != ["any", "sync"]:
        raise o.unsupported()
    target, value, members = o.instruction.args
    read, write = o.read(value, o.instruction.type), o.write(target, "b32")

    def perform(wave: Wave, mask: Array) -> None:
        values = np.broadcast_to(read(wave), wave.size).reshape(-1, LANES)
        taking = mask.reshape(-1, LANES)
        equal = (values[:, :, None] == values[:, None, :]) & taking[:, None, :]
        write(wave, mask, integers.lane_bits(equal.reshape(-1)))

    return Collective(o, members, perform)


@control("ldmatrix")
def _load_matrices(o: Operands) -> Control:
    return Collective(o, None, load_matrices(o))


@control("mma")
def _multiply_matrices(o: Operands) -> Control:
    return Collective(o, None, multiply_matrices(o))
