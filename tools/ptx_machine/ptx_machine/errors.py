"""What the machine reports, each with kernel, instruction, source line, block and thread."""

from __future__ import annotations


class PtxError(RuntimeError):
    """Base of all errors in a kernel or its launch."""

    def __init__(self, what: str, lane: int | None = None) -> None:
        super().__init__(what)
        self.lane = lane  # of the wave, from which the machine says which thread it was


class OutOfBounds(PtxError):
    """An address is in no buffer of the launch, or outside the block's shared memory."""


class Misaligned(PtxError):
    """An address is no multiple of the size of what is accessed there."""


class Uninitialised(PtxError):
    """Shared memory is read that nobody has written."""


class Race(PtxError):
    """Two threads access the same memory, one of them writes, and nothing orders them."""


class AbsentLane(PtxError):
    """A warp's collective names a lane that takes no part in it."""


class DivergentBarrier(PtxError):
    """Threads of a block wait at different barriers."""


class Deadlock(PtxError):
    """Threads wait for each other, or run for ever."""


class Trap(PtxError):
    """The kernel has given up by itself."""


class Unsupported(PtxError):
    """The machine does not know an instruction, or a form of it."""
