"""Turn the operands of instructions into functions that read and write the registers of a wave."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from .errors import Unsupported
from .parse import BYTES, Instruction, Kernel, members
from .values import FORMATS, INTEGERS, SIGNED, UNSIGNED

if TYPE_CHECKING:
    from .wave import Wave

Read = Callable[["Wave"], Array]
Write = Callable[["Wave", Array, Array], None]  # of the lanes of a mask
Step = Callable[["Wave", Array], None]

# The registers that say where a thread is.
SPECIAL = {
    "%laneid",
    "%warpid",
    *(f"%lanemask_{which}" for which in ("lt", "le", "eq", "ge", "gt")),
}
SPECIAL |= {f"%{n}{of}.{axis}" for n in ("", "n") for of in ("tid", "ctaid") for axis in "xyz"}
# Generic addresses from here on are of shared memory.
SHARED_WINDOW = 1 << 56


class Operands:
    """The operands of an instruction, as functions on arrays with one element a lane."""

    def __init__(self, kernel: Kernel, instruction: Instruction) -> None:
        self.kernel = kernel
        self.instruction = instruction

    def unsupported(self, what: str = "") -> Unsupported:
        return Unsupported(f"instruction not known: {self.instruction.text} {what}".strip())

    def read(self, text: str, type_: str) -> Read:
        """Return a function that gives the operand's values, floats as numbers."""
        if type_ == "pred":
            return self._predicate(text)
        if type_ in FORMATS:
            form = FORMATS[type_]
            if not self._is_register(text) and type_ in ("f32", "f64"):
                constant = form.decode(self._float_bits(text, type_))
                return lambda wave: constant
            bits, decode = self.bits(text, np.dtype(form.bits).itemsize), form.decode
            return lambda wave: decode(bits(wave))
        dtype = INTEGERS[type_]
        raw = self.bits(text, np.dtype(dtype).itemsize)
        return lambda wave: raw(wave).view(dtype)

    def write(self, text: str, type_: str) -> Write:
        """Return a function that sets a register; a wider one is filled with sign or zeros."""
        if text == "_":
            return lambda wave, mask, value: None
        if text not in self.kernel.registers:
            raise self.unsupported(f"(no register {text})")
        size = self.kernel.registers[text]
        if type_ == "pred":

            def set_predicate(wave: Wave, mask: Array, value: Array) -> None:
                np.copyto(wave.registers[text], value, where=mask)

            return set_predicate
        encode = FORMATS[type_].encode if type_ in FORMATS else None
        bits = UNSIGNED[size]
        extended = SIGNED[size] if type_[0] == "s" else UNSIGNED[size]

        def set_register(wave: Wave, mask: Array, value: Array) -> None:
            if encode is not None:
                value = encode(value)
            if value.dtype.itemsize != size:
                value = value.astype(extended)
            np.copyto(wave.registers[text], value.view(bits), where=mask)

        return set_register

    def bits(self, text: str, size: int) -> Read:
        """Return a function that gives the operand's lowest bytes."""
        dtype = UNSIGNED[size]
        if text in self.kernel.registers:
            width = self.kernel.registers[text]
            if width == size:
                return lambda wave: wave.registers[text]
            return lambda wave: wave.registers[text].astype(dtype)
        if text in SPECIAL:
            return lambda wave: wave.special[text].astype(dtype)
        if text.startswith("{"):
            return self._packed(members(text), size)
        if text in self.kernel.shared:
            constant = np.array([self.kernel.shared[text]], dtype)
        elif text[:2] in ("0f", "0d", "0F", "0D"):
            constant = np.array([int(text[2:], 16)], dtype)
        else:
            constant = np.array([self.integer(text) & (1 << 8 * size) - 1], dtype)
        return lambda wave: constant

    def integer(self, text: str) -> int:
        try:
            return int(text.rstrip("U"), 0)
        except ValueError:
            raise self.unsupported(f"(operand {text})") from None

    def address(self, text: str, size: int = 8) -> Read:
        """Return a function that gives the addresses of ``[register + constant]``."""
        base, sign, offset = text.strip("[] ").partition("+")
        base = base.strip()
        shift = np.array([int(offset, 0) if sign else 0], np.int64)
        if base in self.kernel.registers:
            size = self.kernel.registers[base]
        raw = self.bits(base, size)
        return lambda wave: raw(wave).astype(np.int64) + shift

    def _is_register(self, text: str) -> bool:
        return text in self.kernel.registers or text[0] in "%{"

    def _float_bits(self, text: str, type_: str) -> Array:
        if text[:2].lower() in ("0f", "0d"):
            return np.array([int(text[2:], 16)], FORMATS[type_].bits)
        return FORMATS[type_].encode(np.array([float(text)]))

    def _predicate(self, text: str) -> Read:
        negated, name = text.startswith("!"), text.lstrip("!")
        if name not in self.kernel.registers:
            constant = np.array([bool(self.integer(name)) != negated])
            return lambda wave: constant
        if negated:
            return lambda wave: ~wave.registers[name]
        return lambda wave: wave.registers[name]

    def _packed(self, parts: list[str], size: int) -> Read:
        reads = [self.bits(part, size // len(parts)) for part in parts]

        def gather(wave: Wave) -> Array:
            columns = np.broadcast_arrays(wave.none, *(read(wave) for read in reads))[1:]
            return np.stack(columns, axis=1).view(UNSIGNED[size]).reshape(-1)

        return gather


def type_size(type_: str) -> int:
    return BYTES[type_]
