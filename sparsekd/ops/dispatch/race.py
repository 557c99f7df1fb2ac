"""Time several ways to compute the same thing against each other."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, TypeVar

Name = TypeVar("Name", bound=Hashable)

_FEWEST_TURNS, _MANY_TURNS = 3, 9
_LEAST_MS, _MOST_MS = 20.0, 500.0
_CLEAR = 1.3
_SETTLED = 1.1


def decided(times: list[list[float]]) -> bool:
    """Say whether the two fastest runs of each arm agree and it is clear which arm wins.

    Short arms are repeated for some milliseconds, longer than another process usually keeps a core;
    arms too close to tell apart get a few turns more, and on a busy machine the search ends after
    half a second.

    Args:
        times: of each arm so far, in milliseconds.
    """
    turns, spent = len(times[0]), sum(map(sum, times))
    if turns < _FEWEST_TURNS or spent < _LEAST_MS:
        return False
    fastest = [sorted(taken)[:2] for taken in times]
    if spent < _MOST_MS and any(second > _SETTLED * first for first, second in fastest):
        return False
    first, *others = sorted(best for best, _ in fastest)
    return turns >= _MANY_TURNS or all(other > _CLEAR * first for other in others)


def laps(
    arms: Mapping[Name, Callable[[], Any]], enough: Callable[[list[list[float]]], bool] = decided
) -> dict[Name, list[float]]:
    """Run the arms in turn until that is enough.

    The first run of each is not timed: it makes plans and faults in memory.

    Args:
        arms: what to run, by name.
        enough: called with the times of each arm so far, in milliseconds, before every turn.

    Returns:
        The times of each arm in milliseconds, in turn.

    Example:
        >>> times = laps({"sum": lambda: sum(range(1000)), "formula": lambda: 999 * 500})
        >>> len(times["sum"]) == len(times["formula"]) > 2
        True
    """
    for run in arms.values():
        run()
    times: dict[Name, list[float]] = {name: [] for name in arms}
    while not enough(list(times.values())):
        for name, run in arms.items():
            start = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - start) * 1e3)
    return times


def race(
    arms: Mapping[Name, Callable[[], Any]], enough: Callable[[list[list[float]]], bool] = decided
) -> dict[Name, float]:
    """Run the arms in turn until that is enough, and take the fastest run of each.

    Whatever disturbs a run only makes it slower.

    Args:
        arms: what to run, by name.
        enough: called with the times of each arm so far, in milliseconds, before every turn.

    Returns:
        The time of each arm in milliseconds.

    Example:
        >>> times = race({"sum": lambda: sum(range(1000)), "formula": lambda: 999 * 500})
        >>> sorted(times)
        ['formula', 'sum']
    """
    return {name: min(taken) for name, taken in laps(arms, enough).items()}


def spread(times: Sequence[float]) -> float:
    """Return how far the times of equal runs lie apart: the median above the fastest, relative.

    Example:
        >>> spread([2.0, 9.0, 2.5])
        0.25
    """
    fastest = min(times)
    return statistics.median(times) / fastest - 1 if fastest > 0 else 0.0
