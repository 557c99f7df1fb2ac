"""The memories of a launch: buffers in global memory, and for every block shared memory."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
from numpy import ndarray as Array

from .counts import Traffic
from .errors import Misaligned, OutOfBounds, Race, Uninitialised
from .races import Shadow
from .values import UNSIGNED

if TYPE_CHECKING:
    from .wave import Wave

ALIGNMENT = 16


class Bytes:
    """Memory that lanes access in numbers or vectors; a shadow records each access.

    Args:
        data: the bytes; they start at a multiple of 16.
        granule, warps, lenient: see races.
    """

    def __init__(self, data: Array, granule: int, warps: int, lenient: bool) -> None:
        self.data = data
        self.granule = granule
        self.shadow = Shadow(-(-len(data) // granule), warps, lenient)
        self.typed = {
            size: data[: len(data) // size * size].view(type_) for size, type_ in UNSIGNED.items()
        }

    def granules(self, offsets: Array, total: int) -> Array:
        return (offsets // self.granule)[:, None] + np.arange(max(1, total // self.granule))

    def _where(self, offsets: Array, size: int, count: int) -> Array:
        return (offsets // size)[:, None] + np.arange(count)

    def load(self, wave: Wave, lanes: Array, offsets: Array, size: int, count: int) -> Array:
        """Return [lanes, count] numbers of ``size`` bytes."""
        at = self.granules(offsets, size * count)
        racing = self.shadow.read(at, wave.stamps[lanes])
        self._report(racing, "reads", at, lanes)
        return self.typed[size][self._where(offsets, size, count)]

    def store(self, wave: Wave, lanes: Array, offsets: Array, values: Array) -> None:
        """Write [lanes, count] numbers."""
        size, count = values.dtype.itemsize, values.shape[1]
        where, memory = self._where(offsets, size, count), self.typed[size]
        changed = (memory[where] != values).any(axis=1)
        at = self.granules(offsets, size * count)
        racing = self.shadow.write(at, wave.stamps[lanes], changed)
        self._report(racing, "writes", at, lanes)
        memory[where] = values
        lost = (memory[where] != values).any(axis=1)
        if lost.any():
            lane = int(lanes[np.flatnonzero(lost)[0]])
            raise Race("several threads write different numbers to one place at once", lane)

    def exchange(self, wave: Wave, lanes: Array, offsets: Array, size: int, update) -> Array:
        """Let lanes update numbers one after another; return what each has found there."""
        at = self.granules(offsets, size)
        everywhere = np.ones(len(lanes), bool)
        racing = self.shadow.write(at, wave.stamps[lanes], everywhere, atomic=True)
        self._report(racing, "atomically updates", at, lanes)
        memory, places = self.typed[size], offsets // size
        before = np.empty(len(lanes), UNSIGNED[size])
        left = np.arange(len(lanes))
        while left.size:
            _, first = np.unique(places[left], return_index=True)
            now = left[first]
            before[now] = memory[places[now]]
            memory[places[now]] = update(before[now], now)
            left = np.delete(left, first)
        return before

    def _report(self, racing: Array, what: str, at: Array, lanes: Array) -> None:
        if racing.any():
            i = int(np.flatnonzero(racing)[0])
            others = self.shadow.who(at[i])
            raise Race(
                f"race: the thread {what} memory that was {others}, unordered", int(lanes[i])
            )


def check_alignment(addresses: Array, size: int, lanes: Array) -> None:
    wrong = addresses % size != 0
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        what = f"misaligned: {size} bytes at address {int(addresses[i]):#x}"
        raise Misaligned(what, int(lanes[i]))


class Global:
    """Global memory: the buffers of a launch, at their real addresses.

    Args:
        buffers: (address, bytes) of each; the caller keeps them alive.
        granule, warps: see races.
    """

    def __init__(self, buffers: Iterable[tuple[int, int]], granule: int, warps: int) -> None:
        self.parts: list[tuple[int, int, Bytes]] = []
        self.traffic: dict[int, Traffic] = {}  # by where a buffer starts
        for start, size in sorted({b for b in buffers if b[1]}):
            if start % ALIGNMENT:
                raise ValueError(f"a buffer must start at a multiple of {ALIGNMENT}: {start:#x}")
            data = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(start))
            self.parts.append((start, start + size, Bytes(data, granule, warps, lenient=False)))
            self.traffic[start] = Traffic(size)

    def _split(self, addresses: Array, total: int, lanes: Array):
        """Yield the buffers that are accessed and which of the lanes do."""
        check_alignment(addresses, total, lanes)
        todo = np.ones(len(addresses), bool)
        for start, end, data in self.parts:
            here = (addresses >= start) & (addresses + total <= end)
            if here.any():
                yield start, data, here
                todo &= ~here
                if not todo.any():
                    return
        i = int(np.flatnonzero(todo)[0])
        raise OutOfBounds(self._outside(int(addresses[i]), total), int(lanes[i]))

    def _outside(self, address: int, total: int) -> str:
        where = "there are none"
        if self.parts:
            start, end, _ = min(
                self.parts, key=lambda p: min(abs(address - p[0]), abs(address - p[1]))
            )
            where = (
                f"{address - start:+d} bytes from the start of the nearest, of {end - start} bytes"
            )
        return f"out of bounds: {total} bytes at {address:#x}, in no buffer of the launch ({where})"

    def load(self, wave: Wave, lanes: Array, addresses: Array, size: int, count: int) -> Array:
        found = np.empty((len(lanes), count), UNSIGNED[size])
        for start, data, here in self._split(addresses, size * count, lanes):
            offsets = addresses[here] - start
            self.traffic[start].add("read", lanes[here], offsets, size * count)
            found[here] = data.load(wave, lanes[here], offsets, size, count)
        return found

    def store(self, wave: Wave, lanes: Array, addresses: Array, values: Array) -> None:
        total = values.dtype.itemsize * values.shape[1]
        for start, data, here in self._split(addresses, total, lanes):
            offsets = addresses[here] - start
            self.traffic[start].add("written", lanes[here], offsets, total)
            data.store(wave, lanes[here], offsets, values[here])

    def exchange(self, wave: Wave, lanes: Array, addresses: Array, size: int, update) -> Array:
        before = np.empty(len(lanes), UNSIGNED[size])
        for start, data, here in self._split(addresses, size, lanes):
            chosen = np.flatnonzero(here)
            offsets = addresses[here] - start
            for what in ("read", "written"):
                self.traffic[start].add(what, lanes[here], offsets, size)
            before[here] = data.exchange(
                wave, lanes[here], offsets, size,
                lambda old, i, chosen=chosen: update(old, chosen[i]),
            )  # fmt: skip
        return before


class Shared:
    """The shared memory of all blocks of a wave, one after the other.

    Copies by cp.async arrive when a thread waits for them, as late as they may on a GPU; until then
    nobody may touch their place.
    """

    def __init__(self, blocks: int, size: int, warps: int, granule: int) -> None:
        self.size = size
        self.stride = -(-max(size, 1) // 128) * 128
        filled = np.full(blocks * self.stride // 8, -1, np.int64)
        self.memory = Bytes(filled.view(np.uint8), granule, warps, lenient=True)
        self.in_flight = np.zeros(len(self.memory.shadow.writers), np.int16)
        self.flights: list[tuple[Array, Array, Array, Array]] = []
        self.group = np.zeros(blocks * warps * 32, np.int64)  # that the next copy is part of

    def _offsets(self, wave: Wave, lanes: Array, addresses: Array, total: int) -> Array:
        check_alignment(addresses, total, lanes)
        outside = (addresses < 0) | (addresses + total > self.size)
        if outside.any():
            i = int(np.flatnonzero(outside)[0])
            what = f"{total} bytes at {int(addresses[i])} of {self.size} of shared memory"
            raise OutOfBounds(f"out of bounds: {what}", int(lanes[i]))
        offsets = addresses + wave.block_of[lanes] * self.stride
        if self.flights:
            busy = self.in_flight[self.memory.granules(offsets, total)].any(axis=1)
            if busy.any():
                lane = int(lanes[np.flatnonzero(busy)[0]])
                raise Race("race: a copy by cp.async to this place has not been waited for", lane)
        return offsets

    def _check_written(self, offsets: Array, total: int, lanes: Array) -> None:
        unwritten = (self.memory.shadow.writers[self.memory.granules(offsets, total)] == 0).any(
            axis=1
        )
        if unwritten.any():
            i = int(np.flatnonzero(unwritten)[0])
            raise Uninitialised("shared memory is read that nobody has written", int(lanes[i]))

    def load(self, wave: Wave, lanes: Array, addresses: Array, size: int, count: int) -> Array:
        offsets = self._offsets(wave, lanes, addresses, size * count)
        self._check_written(offsets, size * count, lanes)
        return self.memory.load(wave, lanes, offsets, size, count)

    def store(self, wave: Wave, lanes: Array, addresses: Array, values: Array) -> None:
        total = values.dtype.itemsize * values.shape[1]
        self.memory.store(wave, lanes, self._offsets(wave, lanes, addresses, total), values)

    def exchange(self, wave: Wave, lanes: Array, addresses: Array, size: int, update) -> Array:
        offsets = self._offsets(wave, lanes, addresses, size)
        self._check_written(offsets, size, lanes)
        return self.memory.exchange(wave, lanes, offsets, size, update)

    def take_off(self, wave: Wave, lanes: Array, addresses: Array, data: Array) -> None:
        """Begin to copy [lanes, words] to shared memory."""
        total = data.dtype.itemsize * data.shape[1]
        offsets = self._offsets(wave, lanes, addresses, total)
        at = self.memory.granules(offsets, total)
        changed = np.ones(len(lanes), bool)
        racing = self.memory.shadow.write(at, wave.stamps[lanes], changed)
        self.memory._report(racing, "writes by cp.async", at, lanes)
        np.add.at(self.in_flight, at, 1)
        self.flights.append((lanes, offsets, data, self.group[lanes]))

    def land(self, wave: Wave, mask: Array, but: int | None) -> None:
        """Let the copies of the lanes arrive, except for the latest groups; None is all of them."""
        staying = []
        for lanes, offsets, data, group in self.flights:
            down = mask[lanes]
            if but is not None:
                down = down & (group < self.group[lanes] - but)
            if down.any():
                np.add.at(self.in_flight, self.memory.granules(offsets[down], data[0].nbytes), -1)
                self.memory.store(wave, lanes[down], offsets[down], data[down])
            if not down.all():
                up = ~down
                staying.append((lanes[up], offsets[up], data[up], group[up]))
        self.flights = staying
