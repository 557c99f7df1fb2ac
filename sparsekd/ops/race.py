"""Time several ways to compute the same thing against each other."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

_FEWEST_TURNS, _MANY_TURNS = 3, 9
_LEAST_MS, _MOST_MS = 20.0, 500.0
_CLEAR = 1.3
_SETTLED = 1.1


def race(arms: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Run the arms in turn until the two fastest runs of each agree and it is clear which wins.

    The first run of each is not timed: it makes plans and faults in memory. Of the others the
    fastest counts, as whatever disturbs a run only makes it slower. Short arms are repeated for
    some milliseconds, longer than another process usually keeps a core; arms too close to tell
    apart get a few turns more, and on a busy machine the search ends after half a second.

    Args:
        arms: what to run, by name.

    Returns:
        The time of each arm in milliseconds.

    Example:
        >>> times = race({"sum": lambda: sum(range(1000)), "formula": lambda: 999 * 500})
        >>> sorted(times)
        ['formula', 'sum']
    """
    for run in arms.values():
        run()
    times: dict[str, list[float]] = {name: [] for name in arms}
    while not _decided(list(times.values())):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return {name: min(taken) for name, taken in times.items()}


def _decided(times: list[list[float]]) -> bool:
    turns, spent = len(times[0]), sum(map(sum, times))
    if turns < _FEWEST_TURNS or spent < _LEAST_MS:
        return False
    fastest = [sorted(taken)[:2] for taken in times]
    if spent < _MOST_MS and any(second > _SETTLED * first for first, second in fastest):
        return False
    first, *others = sorted(best for best, _ in fastest)
    return turns >= _MANY_TURNS or all(other > _CLEAR * first for other in others)
