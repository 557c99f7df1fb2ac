"""Time several ways to compute the same thing against each other: the one timer of the project.

The calls take turns in one process, so that whatever disturbs the machine meets all of them. How
many turns there are is either given or decided from the times so far.
"""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TypeVar

import torch

Name = TypeVar("Name", bound=Hashable)
Enough = Callable[[list[list[float]]], bool]

_WARM_UPS = 5
_FEW_FAULTS = 256  # pages, 1 MiB
_SLOW_TURNS = 3
_FEWEST_TURNS, _MANY_TURNS = 3, 9
_LEAST_MS, _MOST_MS = 20.0, 500.0
_CLEAR = 1.3
_SETTLED = 1.1


def decided(times: list[list[float]]) -> bool:
    """Return whether the two fastest turns of each call agree and it is clear which call wins.

    Short calls are repeated for some milliseconds, longer than another process usually keeps a
    core; calls too close to tell apart get a few turns more, and on a busy machine the search ends
    after half a second.

    Args:
        times: of each call so far, in milliseconds.
    """
    turns, spent = len(times[0]), sum(map(sum, times))
    if turns < _FEWEST_TURNS or spent < _LEAST_MS:
        return False
    fastest = [sorted(taken)[:2] for taken in times]
    if spent < _MOST_MS and any(second > _SETTLED * first for first, second in fastest):
        return False
    first, *others = sorted(best for best, _ in fastest)
    return turns >= _MANY_TURNS or all(other > _CLEAR * first for other in others)


def interleave(
    calls: Mapping[Name, Callable[[], object]],
    rounds: int | Enough = decided,
    *,
    settle: bool = False,
    shuffle: bool = False,
    least: float = 0.0,
    pause: float = 0.0,
    slow: float = math.inf,
    device: torch.device | None = None,
    clock: Callable[[], float] | None = None,
) -> dict[Name, list[float]]:
    """Time calls in turns.

    The first turn of each is not counted: it makes plans and faults in memory.

    Args:
        calls: what to time, by name.
        rounds: turns of each; or a function that takes the times of each call so far, in
            milliseconds, and returns whether they are enough.
        settle: warm up until memory has settled, five turns at most: allocations of one call move
            those of the others.
        shuffle: take the calls in another order in every round: what ran before leaves its data in
            the caches.
        least: seconds that a turn should last; a shorter call is repeated within it.
        pause: seconds of rest before a turn, for the threads of the call before to fall asleep.
        slow: a call that takes more seconds than this takes part in the first three rounds only.
        device: where the calls compute; a turn ends when the device has done what was queued.
        clock: returns seconds, `time.perf_counter` by default.

    Returns:
        Milliseconds of one call, one entry a turn.

    Example:
        >>> times = interleave({"sum": lambda: sum(range(1000)), "formula": lambda: 999 * 500})
        >>> len(times["sum"]) == len(times["formula"]) > 2
        True
        >>> len(interleave({"sum": lambda: sum(range(10))}, rounds=5)["sum"])
        5
    """
    clock = clock or time.perf_counter

    def enough(turn: int) -> bool:
        return turn >= rounds if isinstance(rounds, int) else rounds(list(times.values()))

    def seconds(call: Callable[[], object], repeats: int = 1) -> float:
        synchronize(device)
        start = clock()
        for _ in range(repeats):
            call()
        synchronize(device)
        return (clock() - start) / repeats

    for _ in range(_WARM_UPS if settle else 1):
        before = _page_faults()
        usual = {name: seconds(call) for name, call in calls.items()}
        if _page_faults() - before < _FEW_FAULTS:
            break
    times: dict[Name, list[float]] = {name: [] for name in calls}
    order, turn = list(calls.items()), 0
    while calls and not enough(turn):
        if shuffle:
            random.Random(turn).shuffle(order)
        for name, call in order:
            if usual[name] > slow and turn >= _SLOW_TURNS:
                continue
            if pause:
                time.sleep(pause)
            repeats = math.ceil(least / usual[name]) if 0 < usual[name] < least else 1
            times[name].append(seconds(call, repeats) * 1e3)
        turn += 1
    return times


def fastest(times: Mapping[Name, Sequence[float]]) -> dict[Name, float]:
    """Return the fastest turn of each call: whatever disturbs a turn only makes it slower.

    Example:
        >>> fastest({"sparse": [2.0, 1.5], "dense": [3.0, 3.5]})
        {'sparse': 1.5, 'dense': 3.0}
    """
    return {name: min(taken) for name, taken in times.items()}


def spread(times: Sequence[float]) -> float:
    """Return how far the times of equal runs lie apart: the median above the fastest, relative.

    Example:
        >>> spread([2.0, 9.0, 2.5])
        0.25
    """
    least = min(times)
    return statistics.median(times) / least - 1 if least > 0 else 0.0


def synchronize(device: torch.device | None) -> None:
    """Wait until a GPU has done what was queued; the CPU has nothing to wait for."""
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize(device)


def _page_faults() -> int:
    try:
        import resource
    except ImportError:  # not a POSIX system: one warm-up then
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
