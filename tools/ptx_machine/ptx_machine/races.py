"""Find accesses to the same memory that nothing orders.

Every access leaves a stamp: the thread, how many barriers its block has passed, how many its warp.
A later access by another thread is ordered after it if a barrier of the block lies between, or one
of the warp that both belong to; between blocks of a launch nothing is. A granule is as large as the
smallest access of the kernel.
"""

from __future__ import annotations

import numpy as np
from numpy import ndarray as Array

# A stamp is one number; zero is nobody. Scope says who else has been there since the last barrier.
ONE_THREAD, ONE_WARP, ONE_BLOCK, MANY_BLOCKS = range(4)
THREAD_BITS, SCOPE_BITS, COUNT_BITS = 20, 2, 20
_THREADS = (1 << THREAD_BITS) - 1
_COUNTS = (1 << COUNT_BITS) - 1
_WARP_AT = THREAD_BITS + SCOPE_BITS
_BLOCK_AT = _WARP_AT + COUNT_BITS

PASSED_BY_WARP = 1 << _WARP_AT  # is added to the stamp of a thread that passes a barrier
PASSED_BY_BLOCK = 1 << _BLOCK_AT


def first_stamps(threads: Array) -> Array:
    if threads.size and int(threads.max()) > _THREADS:
        raise ValueError(f"too many threads to tell apart: {int(threads.max()) + 1}")
    return threads.astype(np.int64) + PASSED_BY_BLOCK


def thread_of(stamp: Array) -> Array:
    return stamp & _THREADS


class Shadow:
    """The last accesses to every granule of a piece of memory.

    Args:
        granules: how many there are.
        warps: of a block, to know which threads are of the same one.
        lenient: overlook a write of what is there already, as compilers let several warps do.
    """

    def __init__(self, granules: int, warps: int, lenient: bool) -> None:
        self.warps = warps
        self.lenient = lenient
        self.writers = np.zeros(granules, np.int64)
        self.readers = np.zeros(granules, np.int64)
        self.atomic = np.zeros(granules, bool)
        self.untouched = True  # nobody has written yet
        self._reads: list[tuple[Array, Array]] = []  # until somebody does

    def read(self, at: Array, stamps: Array) -> Array:
        """Return for every lane, of [lanes, granules of its access], whether it races."""
        if self.untouched:
            self._reads.append((at, stamps))
            return np.zeros(len(at), bool)
        stamps = np.broadcast_to(stamps[:, None], at.shape)
        racing = self._unordered(self.writers[at], stamps)
        self._merge(self.readers, at, stamps)
        return racing.any(axis=1)

    def write(self, at: Array, stamps: Array, changed: Array, atomic: bool = False) -> Array:
        """Return the same for a write; ``changed`` is where it writes something new."""
        if self.untouched:
            self.untouched = False
            for earlier, theirs in self._reads:
                self._merge(self.readers, earlier, np.broadcast_to(theirs[:, None], earlier.shape))
            self._reads.clear()
        stamps = np.broadcast_to(stamps[:, None], at.shape)
        after_write = self._unordered(self.writers[at], stamps)
        if self.lenient:
            after_write &= changed[:, None]
        if atomic:
            after_write &= ~self.atomic[at]
            self._merge(self.writers, at, stamps)
        else:
            self.writers[at] = stamps
            if not self.lenient:  # two at once, of which one stands
                after_write |= (self.writers[at] ^ stamps) & _THREADS != 0
        racing = after_write | self._unordered(self.readers[at], stamps)
        self.atomic[at] = atomic
        return racing.any(axis=1)

    def who(self, at: Array) -> str:
        """Describe the last accesses to one lane's granules."""
        names = []
        for what, stamps in (("written", self.writers[at]), ("read", self.readers[at])):
            latest = int(stamps.max())
            if latest:
                thread = latest & _THREADS
                names.append(f"{what} by thread {thread % (32 * self.warps)} of block "
                             f"{thread // (32 * self.warps)}")  # fmt: skip
        return ", ".join(names)

    def _unordered(self, then: Array, now: Array) -> Array:
        if not then.any():
            return np.zeros(then.shape, bool)
        scope = then >> THREAD_BITS & 3
        same_thread = (then ^ now) & _THREADS == 0
        warp, my_warp = (then & _THREADS) >> 5, (now & _THREADS) >> 5
        same_block = (scope != MANY_BLOCKS) & (warp // self.warps == my_warp // self.warps)
        before_block = then >> _BLOCK_AT < now >> _BLOCK_AT
        before_warp = (then >> _WARP_AT & _COUNTS) < (now >> _WARP_AT & _COUNTS)
        same_warp = (scope <= ONE_WARP) & (warp == my_warp)
        mine = same_warp & (before_warp | (same_thread & (scope == ONE_THREAD)))
        return (then != 0) & ~(same_block & (before_block | mine))

    def _merge(self, log: Array, at: Array, stamps: Array) -> None:
        """Add accesses that do not race with each other; who comes last stands for all."""
        before = log[at]
        others = self._unordered(before, stamps)
        scope = np.where(
            others, np.maximum(self._scope(before, stamps), before >> THREAD_BITS & 3), 0
        )
        own = stamps | scope << THREAD_BITS
        log[at] = own
        standing = log[at]
        lost = (standing ^ own) & _THREADS != 0
        if lost.any():
            scope = np.maximum(
                self._scope(standing, own), np.maximum(scope, standing >> THREAD_BITS & 3)
            )
            for level in (ONE_WARP, ONE_BLOCK, MANY_BLOCKS):
                here = lost & (scope >= level)
                log[at[here]] = standing[here] & ~(3 << THREAD_BITS) | level << THREAD_BITS

    def _scope(self, a: Array, b: Array) -> Array:
        first, second = (a & _THREADS) >> 5, (b & _THREADS) >> 5
        inside = np.where(first // self.warps == second // self.warps, ONE_BLOCK, MANY_BLOCKS)
        return np.where(
            (a ^ b) & _THREADS == 0, ONE_THREAD, np.where(first == second, ONE_WARP, inside)
        )
