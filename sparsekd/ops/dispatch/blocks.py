"""Whether a block of layers runs in the blocked layout or by ordinary ops: by measurement.

A block with a new cache key runs both ways, forward and backward, a few times in turn. The layout
is used where it is faster by more than timings vary, in this process and, through a file, in every
later one. What is measured at one density decides others, too: where the layout wins it also wins
with fewer nonzeros, and where ordinary ops do, they also win with more.
"""

from __future__ import annotations

import logging
import math
import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsekd.ops.dispatch.cache_key import DENSITY_STEP, Key
from sparsekd.ops.dispatch.choices import surroundings
from sparsekd.ops.single import Single
from sparsekd.ops.store import Store, path_of
from sparsekd.timing import fastest, interleave

logger = logging.getLogger(__name__)

_CLEAR = 1.03
"""How many times longer ordinary ops must take: ties go to what a user would get without."""
_FEWEST_TURNS, _LEAST_MS = 3, 30.0
_MOST_TURNS, _MOST_MS = 9, 1000.0
_FAR, _SETTLED = 1.3, 1.05


@dataclass(frozen=True)
class BlockTimes:
    """Milliseconds of a block, forward and backward, in the layout and by ordinary ops."""

    layout_ms: float
    ordinary_ms: float

    @property
    def layout(self) -> bool:
        """Whether the layout is faster by more than timings vary."""
        return self.layout_ms * _CLEAR < self.ordinary_ms

    @classmethod
    def of(cls, row: dict[str, Any]) -> BlockTimes:
        """Parse a line; raises ValueError, KeyError or TypeError if it is damaged."""
        times = [float(row[name]) for name in ("layout_ms", "ordinary_ms")]
        if not all(math.isfinite(ms) and ms > 0 for ms in times):
            raise ValueError("times")
        return cls(*times)


class BlockChooser:
    """The choice between the layout and ordinary ops.

    Args:
        store: what was measured before.
    """

    def __init__(self, store: Store[BlockTimes]) -> None:
        self.store = store
        self._lock = threading.RLock()  # measurements must not disturb each other

    def layout_wins(
        self, key: Key, layout: Callable[[], object], ordinary: Callable[[], object]
    ) -> bool:
        """Return whether a block runs in the layout, by a measurement now if nothing is known.

        Args:
            key: of the block; its steps are those of the density and of the batch.
            layout: runs it in the layout, forward and backward.
            ordinary: runs it by ordinary ops.
        """
        with self._lock:
            times = self.store.get(*key)
            if times is None:
                implied = self._implied(key)
                if implied is not None:
                    return implied
                calls = {"layout": layout, "ordinary": ordinary}
                found = fastest(interleave(calls, _enough))
                times = BlockTimes(*(max(found[name], 1e-6) for name in calls))
                times = self.store.add(*key, times)
                logger.info(
                    "%s at density %.3g: in the layout %.3f ms, by ordinary ops %.3f ms",
                    key.kind, DENSITY_STEP ** key.step[0], times.layout_ms, times.ordinary_ms,
                )  # fmt: skip
            return times.layout

    def _implied(self, key: Key) -> bool | None:
        """Return what measurements at other densities tell; None if nothing, or a contradiction."""
        density, *sizes = key.step
        told = {
            times.layout
            for (other, *others), times in self.store.of_kind(key.kind)
            if others == sizes and (other >= density if times.layout else other <= density)
        }
        return told.pop() if len(told) == 1 else None


def _enough(times: list[list[float]]) -> bool:
    turns, spent = len(times[0]), sum(map(sum, times))
    if turns < _FEWEST_TURNS or spent < _LEAST_MS:
        return False
    if turns >= _MOST_TURNS or spent >= _MOST_MS:
        return True
    best = [sorted(taken)[:2] for taken in times]
    low, high = sorted(first for first, _ in best)
    return high > _FAR * low and all(second <= _SETTLED * first for first, second in best)


@Single
def chooser() -> BlockChooser:
    """Return the chooser of this process."""
    return BlockChooser(Store(path_of("blocks", surroundings()), BlockTimes.of))
