"""A machine that executes PTX, the assembly that nvcc and Triton make for NVIDIA GPUs, with numpy.

``Module(text)[name].launch(grid, block, arguments, buffers)`` runs every thread of every block and
changes the buffers. What GPUs leave undefined is an error that names the thread, see errors. It
knows what our kernels use of sm_80; any other instruction is refused when its kernel is asked for.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

import numpy as np

from . import transfers  # noqa: F401  (registers its instructions)
from .arithmetic import BUILDERS
from .collectives import CONTROLS
from .counts import Counts
from .errors import (
    AbsentLane,
    Deadlock,
    DivergentBarrier,
    Misaligned,
    OutOfBounds,
    PtxError,
    Race,
    Trap,
    Uninitialised,
    Unsupported,
)
from .memory import Global
from .operands import Operands, Step
from .parse import BYTES, Instruction, Kernel, parse
from .wave import LANES, Program, Wave

__all__ = [
    "AbsentLane",
    "Counts",
    "Deadlock",
    "DivergentBarrier",
    "Executable",
    "Misaligned",
    "Module",
    "OutOfBounds",
    "PtxError",
    "Race",
    "Trap",
    "Uninitialised",
    "Unsupported",
]

LANES_AT_ONCE = 4096
MOST_THREADS = 1024
FORMS = {"u8": "B", "u16": "H", "u32": "I", "u64": "Q", "f32": "f", "f64": "d"}


class Module:
    """The kernels of a PTX text, each prepared when it is first looked up."""

    def __init__(self, text: str) -> None:
        self.kernels = parse(text)
        self._ready: dict[str, Executable] = {}

    def __getitem__(self, name: str) -> Executable:
        if name not in self._ready:
            self._ready[name] = Executable(self.kernels[name])
        return self._ready[name]


class Executable:
    """A kernel that can be launched."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        steps: list[Step | None] = []
        controls = {}
        for i, instruction in enumerate(kernel.code):
            operands = Operands(kernel, instruction)
            if instruction.op in CONTROLS:
                controls[i] = CONTROLS[instruction.op](operands)
                steps.append(None)
            elif instruction.op in BUILDERS:
                steps.append(_predicated(BUILDERS[instruction.op](operands), operands))
            else:
                raise operands.unsupported()
        self.program = Program(steps, controls, set(kernel.labels.values()))
        self.granule = _granule(kernel.code)

    def arguments(self, *values: float | bytes) -> bytes:
        """Lay arguments out as the kernel expects them; structures are given as bytes."""
        data = bytearray(self.kernel.parameter_bytes)
        for parameter, value in zip(self.kernel.parameters, values, strict=True):
            if isinstance(value, bytes | bytearray):
                part = bytes(value)
            elif parameter.type[0] == "f":
                part = struct.pack(FORMS[parameter.type], value)
            else:
                part = (int(value) & (1 << 8 * parameter.size) - 1).to_bytes(
                    parameter.size, "little"
                )
            data[parameter.offset : parameter.offset + len(part)] = part
        return bytes(data)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: bytes,
        buffers: Iterable[tuple[int, int]],
        dynamic_shared: int = 0,
    ) -> Counts:
        """Run all threads.

        Args:
            grid, block: up to three sizes each.
            arguments: the bytes of the parameters.
            buffers: (address, bytes) of the memory that the kernel may touch.
            dynamic_shared: bytes of shared memory beyond what the kernel declares.

        Returns:
            What was executed and moved.

        Raises:
            PtxError: the kernel does what is undefined, or is not known; see errors.
        """
        grid, block = ((*sizes, 1, 1)[:3] for sizes in (grid, block))
        threads, blocks = int(np.prod(block)), int(np.prod(grid))
        if not 0 < threads <= MOST_THREADS or blocks <= 0:
            raise ValueError(f"invalid launch: {blocks} blocks of {threads} threads")
        warps = -(-threads // LANES)
        memory = Global(buffers, self.granule, warps)
        at_once = max(1, LANES_AT_ONCE // (warps * LANES))
        counts = Counts()
        with np.errstate(all="ignore"):
            for first in range(0, blocks, at_once):
                numbers = range(first, min(first + at_once, blocks))
                wave = Wave(self.program, self.kernel, grid, block, numbers, arguments, memory,
                            dynamic_shared, self.granule)  # fmt: skip
                wave.run()
                wave.executed.into(counts)
        for traffic in memory.traffic.values():
            traffic.into(counts)
        return counts


def _predicated(step: Step, o: Operands) -> Step:
    if o.instruction.predicate is None:
        return step
    read = o.read(("!" if o.instruction.negated else "") + o.instruction.predicate, "pred")

    def conditional(wave: Wave, mask: np.ndarray) -> None:
        doing = mask & read(wave)
        if doing.any():
            step(wave, doing)

    return conditional


def _granule(code: list[Instruction]) -> int:
    """Return the size of the smallest access, which is what races are told apart by."""
    accesses = [i for i in code if i.op in ("ld", "st", "atom", "red")]
    return min([4, *(BYTES[i.type] for i in accesses if "param" not in i.modifiers)])
