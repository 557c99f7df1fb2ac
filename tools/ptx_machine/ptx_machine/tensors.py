"""Instructions of tensor cores: ldmatrix and mma, for all warps at once.

Products are exact and added in float64; the sum is rounded to float32 once. Real tensor cores align
and truncate the addends in ways that are not published, so their results differ in the last bits.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from .operands import Operands
from .parse import members
from .values import FORMATS, float16, from_bfloat16, from_float16
from .wave import LANES, Wave

Perform = Callable[[Wave, Array], None]
LANE = np.arange(LANES)
GROUP, PLACE = (
    LANE // 4,
    LANE % 4,
)  # a fragment's lane is at row (or column) GROUP, near column PLACE


def warps_of(mask: Array) -> Array:
    return np.flatnonzero(mask.reshape(-1, LANES)[:, 0])


def load_matrices(o: Operands) -> Perform:
    """Load 8 x 8 matrices of halves; lane 8 i + r names row r of matrix i."""
    modifiers = o.instruction.modifiers
    if o.instruction.type != "b16" or "m8n8" not in modifiers:
        raise o.unsupported()
    targets = members(o.instruction.args[0])
    writes = [o.write(text, "b32") for text in targets]
    address, transposed = o.address(o.instruction.args[1], 4), "trans" in modifiers

    def perform(wave: Wave, mask: Array) -> None:
        naming = mask & (np.arange(wave.size) % LANES < 8 * len(writes))
        lanes = np.flatnonzero(naming)
        addresses = np.broadcast_to(address(wave), wave.size)[lanes]
        rows = wave.shared.load(wave, lanes, addresses, 2, 8)
        tiles = rows.reshape(-1, len(writes), 8, 8)  # [warp, matrix, row, column]
        if transposed:
            tiles = tiles.swapaxes(2, 3)
        words = np.ascontiguousarray(tiles).view(np.uint32).reshape(-1, len(writes), LANES)
        warps = warps_of(mask)
        for i, write in enumerate(writes):
            found = np.zeros((wave.size // LANES, LANES), np.uint32)
            found[warps] = words[:, i]
            write(wave, mask, found.reshape(-1))

    return perform


def _halves(decode: Callable[[Array], Array]) -> Callable[[Array], Array]:
    return lambda words: decode(np.ascontiguousarray(words)[..., None].view(np.uint16))


# How a 32-bit register of a fragment becomes numbers, [..., in the register].
ELEMENTS: dict[str, Callable[[Array], Array]] = {
    "f16": _halves(from_float16),
    "bf16": _halves(from_bfloat16),
    "tf32": lambda words: (words & np.uint32(0xFFFFE000)).view(np.float32)[..., None],
}


def _fragments(o: Operands, text: str) -> Callable[[Wave, Array], Array]:
    """Return a function that gives [warps, lanes, registers]."""
    reads = [o.bits(part, 4) for part in members(text)]

    def gather(wave: Wave, warps: Array) -> Array:
        columns = [np.broadcast_to(read(wave), wave.size).reshape(-1, LANES) for read in reads]
        return np.stack([column[warps] for column in columns], axis=-1)

    return gather


def multiply_matrices(o: Operands) -> Perform:
    """Multiply [16, k] by [k, 8] and add [16, 8]."""
    shape, *_, to, of_a, of_b, of_c = o.instruction.modifiers
    shape = next(m for m in o.instruction.modifiers if m.startswith("m16n8k"))
    depth = int(shape.removeprefix("m16n8k"))
    if of_a != of_b or of_a not in ELEMENTS or to != of_c or to not in ("f32", "f16"):
        raise o.unsupported()
    texts = o.instruction.args
    first, second, addend = (_fragments(o, text) for text in texts[1:])
    writes = [o.write(text, "b32") for text in members(texts[0])]
    decode = ELEMENTS[of_a]

    def perform(wave: Wave, mask: Array) -> None:
        warps = warps_of(mask)
        a = _matrix_a(decode(first(wave, warps)), depth)
        b = _matrix_b(decode(second(wave, warps)), depth)
        c = _unpack_sums(addend(wave, warps), to)
        product = np.einsum("wik,wkj->wij", a.astype(np.float64), b.astype(np.float64))
        total = product + c
        for write, words in zip(writes, _pack_sums(total, to), strict=True):
            found = np.zeros((wave.size // LANES, LANES), np.uint32)
            found[warps] = words
            write(wave, mask, found.reshape(-1))

    return perform


def _matrix_a(parts: Array, depth: int) -> Array:
    """Place [warps, lanes, registers, in the register] in [warps, 16, depth]."""
    per = parts.shape[-1]
    matrix = np.zeros((len(parts), 16, depth))
    for register in range(parts.shape[2]):
        row, column = GROUP + 8 * (register % 2), PLACE * per + 4 * per * (register // 2)
        for i in range(per):
            matrix[:, row, column + i] = parts[:, :, register, i]
    return matrix


def _matrix_b(parts: Array, depth: int) -> Array:
    per = parts.shape[-1]
    matrix = np.zeros((len(parts), depth, 8))
    for register in range(parts.shape[2]):
        row = PLACE * per + 4 * per * register
        for i in range(per):
            matrix[:, row + i, GROUP] = parts[:, :, register, i]
    return matrix


def _unpack_sums(words: Array, type_: str) -> Array:
    """Place the addend's fragments in [warps, 16, 8]."""
    numbers = words.view(np.float32)[..., None] if type_ == "f32" else ELEMENTS["f16"](words)
    numbers = numbers.reshape(len(words), LANES, 4)
    matrix = np.zeros((len(words), 16, 8))
    for i in range(4):
        matrix[:, GROUP + 8 * (i // 2), PLACE * 2 + i % 2] = numbers[:, :, i]
    return matrix


def _pack_sums(matrix: Array, type_: str) -> list[Array]:
    numbers = [matrix[:, GROUP + 8 * (i // 2), PLACE * 2 + i % 2] for i in range(4)]
    if type_ == "f32":
        return [FORMATS["f32"].encode(x) for x in numbers]
    halves = [float16(x).astype(np.uint32) for x in numbers]
    return [halves[i] | halves[i + 1] << np.uint32(16) for i in (0, 2)]
