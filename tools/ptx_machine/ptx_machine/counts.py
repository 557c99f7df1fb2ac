"""What a launch executes and moves, as a GPU's own counters would have it. Nothing is timed."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy import ndarray as Array

from .parse import Instruction

SECTOR = 32  # bytes that memory moves at once
LANES = 32

_MEMORY = {"ld", "st", "atom", "red", "cp", "ldmatrix"}
_TOGETHER = {"bar", "barrier", "shfl", "vote", "match", "redux", "activemask"}
_CONTROL = {"bra", "ret", "exit", "trap"}
_FLOATS = re.compile(r"(b?f16|f32|f64|tf32)(x2)?")
_OPERATIONS = {"fma": 2, "mad": 2, "add": 1, "sub": 1, "mul": 1, "div": 1}


def kind(instruction: Instruction) -> str:
    """Return the class of an instruction: tensor, float, integer, global, shared, ...

    Example:
        >>> kind(Instruction("ld.global.b32 ...", "ld", ["global", "b32"], [], None, False, ""))
        'global'
    """
    op, modifiers = instruction.op, instruction.modifiers
    if op in ("mma", "wgmma"):
        return "tensor"
    if op in _MEMORY:
        if "commit_group" in modifiers or "wait_group" in modifiers or "wait_all" in modifiers:
            return "together"
        if "param" in modifiers:
            return "parameters"
        shared = op == "ldmatrix" or ("shared" in modifiers and op != "cp")
        return "shared" if shared else "global"
    if op in _TOGETHER:
        return "together"
    if op in _CONTROL:
        return "control"
    return "float" if op in _OPERATIONS and _FLOATS.fullmatch(modifiers[-1]) else "integer"


def operations(instruction: Instruction) -> tuple[int, int]:
    """Return the floating-point operations of a lane, and those of a warp on tensor cores."""
    found = kind(instruction)
    if found == "tensor":
        shape = next(m for m in instruction.modifiers if re.fullmatch(r"m\d+n\d+k\d+", m))
        return 0, 2 * int(np.prod([int(size) for size in re.findall(r"\d+", shape)]))
    if found != "float":
        return 0, 0
    packed = 2 if instruction.modifiers[-1].endswith("x2") else 1
    return packed * _OPERATIONS[instruction.op], 0


@dataclass
class Counts:
    """Sums over all warps of a launch, or of several.

    Args:
        instructions: that warps have executed, by class.
        flops: multiplications and additions in floating point outside of tensor cores.
        tensor_flops: those of tensor cores.
        asked: bytes of global memory that lanes have read or written.
        read, written: bytes between the multiprocessors and L2: whole sectors of 32 bytes, each
            once for every access of a warp.
        read_once, written_once: bytes of the sectors that were touched at all, the least that
            memory moves.
    """

    instructions: Counter[str] = field(default_factory=Counter)
    flops: int = 0
    tensor_flops: int = 0
    asked: int = 0
    read: int = 0
    written: int = 0
    read_once: int = 0
    written_once: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def _all(self) -> Sequence[object]:
        return tuple(getattr(self, name) for name in self.__dataclass_fields__)

    @property
    def coalesced(self) -> float:
        """Share of the bytes moved that lanes asked for; 1 if there were none."""
        moved = self.read + self.written
        return self.asked / moved if moved else 1.0


class Executed:
    """How many warps, and lanes of them, have executed each instruction."""

    def __init__(self, code: Sequence[Instruction]) -> None:
        self.code = code
        self.warps = np.zeros(len(code) + 1, np.int64)
        self.lanes = np.zeros(len(code) + 1, np.int64)

    def add(self, first: int, last: int, mask: Array) -> None:
        """Count instructions [first, last] of the lanes in a mask."""
        self.warps[first : last + 1] += np.count_nonzero(mask.reshape(-1, LANES).any(axis=1))
        self.lanes[first : last + 1] += np.count_nonzero(mask)

    def into(self, counts: Counts) -> None:
        """Add what was executed to counts."""
        for instruction, warps, lanes in zip(self.code, self.warps, self.lanes, strict=False):
            counts.instructions[kind(instruction)] += int(warps)
            of_lane, of_warp = operations(instruction)
            counts.flops += of_lane * int(lanes)
            counts.tensor_flops += of_warp * int(warps)


class Traffic:
    """Sectors of one buffer that were touched.

    Args:
        size: bytes of the buffer.
    """

    def __init__(self, size: int) -> None:
        sectors = -(-size // SECTOR)
        self.touched = {"read": np.zeros(sectors, bool), "written": np.zeros(sectors, bool)}
        self.moved = Counter[str]()
        self.asked = 0

    def add(self, what: str, lanes: Array, offsets: Array, total: int) -> None:
        """Count an access of ``total`` bytes by each of some lanes."""
        sectors = offsets.astype(np.int64) // SECTOR
        self.touched[what][sectors] = True
        # Sorting is ten times faster than np.unique.
        of_warps = np.sort((lanes.astype(np.int64) // LANES) << 40 | sectors)
        self.moved[what] += SECTOR * (1 + np.count_nonzero(of_warps[1:] != of_warps[:-1]))
        self.asked += total * len(lanes)

    def into(self, counts: Counts) -> None:
        """Add what was moved to counts."""
        counts.asked += self.asked
        counts.read += self.moved["read"]
        counts.written += self.moved["written"]
        counts.read_once += SECTOR * int(np.count_nonzero(self.touched["read"]))
        counts.written_once += SECTOR * int(np.count_nonzero(self.touched["written"]))
