"""Run blocks of threads: every element of an array is a thread, those at one place go on together.

All blocks of a wave run at once. Lanes part where a branch takes them to different places; those at
the lowest instruction go first, and lanes that meet at one go on as one.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy import ndarray as Array

from . import races
from .counts import Executed
from .errors import AbsentLane, Deadlock, DivergentBarrier, PtxError
from .memory import Global, Shared

LANES = 32
MOST_STEPS = 2_000_000  # of a wave, before it is taken to run for ever

Control = Callable[["Wave", Array, int], None]


class Program:
    """A kernel's steps, split into straight-line pieces."""

    def __init__(self, steps: list, controls: dict[int, Control], leaders: set[int]) -> None:
        self.steps = steps
        self.controls = controls
        ends = sorted({*controls, *leaders, len(steps)})
        self.end_from = [0] * len(steps)
        for start in range(len(steps)):
            position = int(np.searchsorted(ends, start, "left"))
            if ends[position] == start and start not in controls:
                position += 1
            self.end_from[start] = ends[position]


class Wave:
    """Blocks of a launch that run together.

    Args:
        program: what every thread does.
        kernel: whose program it is.
        grid, block: the sizes of the launch.
        blocks: the numbers of the blocks that run.
        parameters: the bytes of the arguments.
        memory: the buffers of the launch.
        dynamic: how many bytes of shared memory the launch adds.
        granule: see races.
    """

    def __init__(self, program, kernel, grid, block, blocks, parameters, memory, dynamic, granule):
        self.program, self.kernel, self.parameters = program, kernel, parameters
        threads = int(np.prod(block))
        self.warps = -(-threads // LANES)
        self.padded = self.warps * LANES
        self.blocks = np.asarray(blocks)
        self.size = len(blocks) * self.padded
        in_block = np.tile(np.arange(self.padded), len(blocks))
        self.block_of = np.repeat(np.arange(len(blocks)), self.padded)  # of the wave
        self.alive = in_block < threads
        self.none = np.zeros(self.size, bool)
        self.special = _special(grid, block, self.blocks, in_block, self.block_of)
        self.registers = {
            name: np.full(self.size, -1, bool if size == 1 else f"i{size}").view(
                bool if size == 1 else f"u{size}"
            )
            for name, size in kernel.registers.items()
        }
        self.stamps = races.first_stamps(self.blocks[self.block_of] * self.padded + in_block)
        self.memory: Global = memory
        self.shared = Shared(len(blocks), kernel.shared_bytes + dynamic, self.warps, granule)
        self.ready: dict[int, Array] = {0: self.alive.copy()}
        self.parked: dict[int, Array] = {}  # at collectives
        self.barrier = np.full(self.size, -1)  # at which barrier a lane waits
        self.steps = 0
        self.executed = Executed(kernel.code)

    def run(self) -> None:
        while self.ready:
            pc = min(self.ready)
            self._advance(pc, self.ready.pop(pc))
        if self.alive.any():
            self._report_stuck()

    def _advance(self, pc: int, mask: Array) -> None:
        program = self.program
        end = program.end_from[pc]
        self.steps += end - pc + 1
        self.executed.add(pc, end if end in program.controls else end - 1, mask)
        if self.steps > MOST_STEPS:
            raise self.explained(Deadlock("it runs for ever"), pc, mask)
        steps = program.steps
        i = pc
        try:
            for i in range(pc, end):
                steps[i](self, mask)
            i = end
            control = program.controls.get(end)
            if control is not None:
                control(self, mask, end)
            elif end == len(steps):
                self.leave(mask)
            else:
                self.go(end, mask)
        except PtxError as error:
            raise self.explained(error, min(i, len(steps) - 1), mask) from None

    def go(self, pc: int, mask: Array) -> None:
        """Let lanes go on from an instruction."""
        there = self.ready.get(pc)
        self.ready[pc] = mask if there is None else there | mask

    def leave(self, mask: Array) -> None:
        self.alive &= ~mask
        if (self.barrier >= 0).any():
            self.release(mask)

    def wait(self, pc: int, mask: Array) -> None:
        """Let lanes wait at a barrier of their block."""
        self.barrier[mask] = pc
        self.release(mask)

    def pass_warp(self, mask: Array) -> None:
        """Order what lanes of a warp did before behind what they do from now on."""
        self.stamps[mask] += races.PASSED_BY_WARP

    def release(self, mask: Array) -> None:
        """Let blocks go on, of those in the mask, whose threads all wait."""
        waiting = self.barrier >= 0
        complete = (waiting | ~self.alive).reshape(-1, self.padded).all(axis=1)
        complete &= (waiting & self.alive).reshape(-1, self.padded).any(axis=1)
        lanes = np.repeat(complete, self.padded) & self.alive
        if not lanes.any():
            return
        at = np.where(lanes, self.barrier, -1).reshape(-1, self.padded)
        first = at.max(axis=1, keepdims=True)
        apart = (at >= 0) & (at != first)
        if apart.any():
            raise DivergentBarrier(
                "threads of a block wait at different barriers, this one at "
                f"{self.text(int(at[apart][0]))!r}, others at "
                f"{self.text(int(first[apart.any(axis=1)][0, 0]))!r}",
                int(np.flatnonzero(apart)[0]),
            )
        self.barrier[lanes] = -1
        self.stamps[lanes] += races.PASSED_BY_BLOCK
        for pc in np.unique(first[complete]):
            there = lanes & (np.repeat(first[:, 0], self.padded) == pc)
            self.go(int(pc) + 1, there)

    def gather(self, pc: int, mask: Array, members: Array) -> Array:
        """Let lanes meet at a collective; return those whose members have all come.

        Args:
            pc: of the collective.
            mask: the lanes that come.
            members: of every lane, as a word; all lanes of the wave.
        """
        if pc in self.parked:
            mask = mask | self.parked.pop(pc)
        table = members.reshape(-1, LANES)
        present = np.packbits(mask.reshape(-1, LANES), axis=1, bitorder="little").view(np.uint32)
        lane_bit = np.uint32(1) << np.arange(LANES, dtype=np.uint32)
        outside = mask.reshape(-1, LANES) & (table & lane_bit == 0)
        if outside.any():
            raise AbsentLane("the mask does not name the calling lane", int(outside.argmax()))
        complete = ((table & ~present) == 0).reshape(-1) & mask
        for warp in np.flatnonzero((present[:, 0] != 0) & (np.ptp(table, axis=1) > 0)):
            self._same_masks(warp, complete, table[warp])
        rest = mask & ~complete
        if rest.any():
            self.parked[pc] = rest
        return complete

    def _same_masks(self, warp: int, complete: Array, masks: Array) -> None:
        for lane in np.flatnonzero(complete[warp * LANES : warp * LANES + LANES]):
            for other in range(LANES):
                if masks[lane] >> other & 1 and masks[other] != masks[lane]:
                    raise AbsentLane("lanes meet with different masks", int(warp * LANES + lane))

    def text(self, pc: int) -> str:
        return self.kernel.code[min(pc, len(self.kernel.code) - 1)].text

    def place(self, lane: int) -> str:
        block, thread = int(self.blocks[lane // self.padded]), lane % self.padded
        return f"block {block}, thread {thread} (lane {lane % LANES} of warp {thread // LANES})"

    def explained(self, error: PtxError, pc: int, mask: Array) -> PtxError:
        """Return the error with the place where it happened."""
        if error.args and "\n" in str(error.args[0]):
            return error
        instruction = self.kernel.code[pc]
        lane = error.lane if error.lane is not None else int(np.flatnonzero(mask)[0])
        source = f" ({instruction.source})" if instruction.source else ""
        error.args = (
            f"{error.args[0]}\n  in {self.kernel.name}{source}: {instruction.text}\n"
            f"  {self.place(lane)}",
        )
        return error

    def _report_stuck(self) -> None:
        """Raise the error that explains why the remaining lanes are stuck."""
        for pc, mask in self.parked.items():
            lane = int(np.flatnonzero(mask)[0])
            warp = slice(lane // LANES * LANES, lane // LANES * LANES + LANES)
            members = self.program.controls[pc].members(self).reshape(-1)[lane]
            named = (int(members) >> np.arange(LANES) & 1).astype(bool)
            gone = np.flatnonzero(named & ~self.alive[warp])
            if gone.size:
                what = f"the collective names lane {gone[0]}, which has left"
                raise self.explained(AbsentLane(what, lane), pc, mask)
            for other, lanes in self.parked.items():
                if other != pc and (lanes[warp] & named).any():
                    what = (
                        f"lanes of a warp meet in different collectives, one {self.text(other)!r}"
                    )
                    raise self.explained(AbsentLane(what, lane), pc, mask)
            waiting = np.flatnonzero(named & (self.barrier[warp] >= 0))
            what = f"deadlock: the collective waits for lane {waiting[0]}, which waits at a barrier"
            raise self.explained(Deadlock(what, lane), pc, mask)
        lane = int(np.flatnonzero(self.barrier >= 0)[0])
        raise self.explained(Deadlock("deadlock: threads wait at a barrier", lane),
                             int(self.barrier[lane]), self.alive)  # fmt: skip


def _special(grid, block, blocks: Array, in_block: Array, block_of: Array) -> dict[str, Array]:
    """Return the registers that say where a thread is."""
    number = blocks[block_of]
    size = len(in_block)
    lane = (in_block % LANES).astype(np.uint32)
    below = (np.uint64(1) << lane.astype(np.uint64)) - np.uint64(1)
    found = {
        "%laneid": lane,
        "%warpid": in_block // LANES,
        "%lanemask_lt": below,
        "%lanemask_le": below << np.uint64(1) | np.uint64(1),
        "%lanemask_eq": below + np.uint64(1),
        "%lanemask_gt": ~(below << np.uint64(1) | np.uint64(1)) & np.uint64(0xFFFFFFFF),
        "%lanemask_ge": ~below & np.uint64(0xFFFFFFFF),
    }
    for name, index, extent in (("tid", in_block, block), ("ctaid", number, grid)):
        found[f"%{name}.x"] = index % extent[0]
        found[f"%{name}.y"] = index // extent[0] % extent[1]
        found[f"%{name}.z"] = index // (extent[0] * extent[1])
        for axis, count in zip("xyz", extent, strict=True):
            found[f"%n{name}.{axis}"] = np.full(size, count)
    return {name: array.astype(np.uint64) for name, array in found.items()}
