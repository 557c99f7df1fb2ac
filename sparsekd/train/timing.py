"""Measure what a training step costs, sparse and dense, side by side."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparsekd.nn import densify, sparse_modules, unfuse
from sparsekd.train.loop import Objective, to_channels_last

_WARM_UPS = 5
_FEW_FAULTS = 256  # pages, 1 MiB


@dataclass(frozen=True)
class StepTimes:
    """Hold the median times of one training step in milliseconds.

    Args:
        sparse_ms: of the model as it is, in channels_last; None for a dense model.
        dense_contiguous_ms: of the same weights in dense storage.
        dense_channels_last_ms: likewise, in channels_last.
        rounds: steps timed of each.
        batch_size: images per step.
        threads: of torch.
    """

    sparse_ms: float | None
    dense_contiguous_ms: float
    dense_channels_last_ms: float
    rounds: int
    batch_size: int
    threads: int

    @property
    def dense_ms(self) -> float:
        """Return the time of the better dense layout, the one to compare with."""
        return min(self.dense_contiguous_ms, self.dense_channels_last_ms)


def time_step(
    model: nn.Module, x: Tensor, y: Tensor, objective: Objective, *, rounds: int = 7
) -> StepTimes:
    """Time forward, loss, backward and SGD step of a model against its dense twins.

    The arms take turns, so that a change in the machine's load meets all of them, and each is
    represented by its median. What the objective costs, a teacher for instance, is part of every
    arm.

    Args:
        model: sparse or dense; not changed.
        x: a batch of images.
        y: its labels.
        objective: the loss, called with epoch 0.
        rounds: steps timed of each arm, after one that is not.

    Returns:
        The times.

    Example:
        >>> from sparsekd.train import CrossEntropy
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
        >>> x, y = torch.randn(8, 1, 8, 8), torch.zeros(8, dtype=torch.long)
        >>> times = time_step(model, x, y, CrossEntropy(), rounds=1)
    """
    dense = unfuse(densify(copy.deepcopy(model)))  # plain torch is what to compare with
    x_last = x.to(memory_format=torch.channels_last)
    entries = {
        "contiguous": (dense, x),
        "channels_last": (to_channels_last(copy.deepcopy(dense)), x_last),
    }
    if any(True for _ in sparse_modules(model)):
        entries["sparse"] = (copy.deepcopy(model), x_last)
    arms = {
        name: partial(training_step(entry, objective), images, y)
        for name, (entry, images) in entries.items()
    }
    times = interleave(arms, rounds)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return StepTimes(
        sparse_ms=medians.get("sparse"),
        dense_contiguous_ms=medians["contiguous"],
        dense_channels_last_ms=medians["channels_last"],
        rounds=rounds,
        batch_size=len(y),
        threads=torch.get_num_threads(),
    )


def do_not_wait() -> None:
    """Stand for a device, the CPU, whose work is done when a call returns."""


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    *,
    least: float = 0.0,
    pause: float = 0.0,
    slow: float = math.inf,
    wait: Callable[[], None] = do_not_wait,
) -> dict[str, list[float]]:
    """Time several calls in turns, so that a change in the machine's load meets all of them.

    Args:
        calls: what to time, by name; before the first round they are called in turn until memory
            has settled, five times at most: allocations of one move those of the others.
        rounds: turns of each.
        least: seconds that a turn should last; a shorter call is repeated within it.
        pause: seconds of rest before a turn, for the threads of the call before to fall asleep.
        slow: a call that takes more seconds than this takes part in the first three rounds only.
        wait: returns when the device has done what was queued.

    Returns:
        Milliseconds of one call, one entry a turn.

    Example:
        >>> times = interleave({"sum": lambda: sum(range(10))}, rounds=5)
        >>> len(times["sum"])
        5
    """
    for _ in range(_WARM_UPS):
        before = _page_faults()
        once = {name: _seconds(call, 1, wait) for name, call in calls.items()}
        if _page_faults() - before < _FEW_FAULTS:
            break
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds):
        for name, call in calls.items():
            if once[name] > slow and number >= 3:
                continue
            time.sleep(pause)
            repeats = max(1, math.ceil(least / once[name]))
            times[name].append(_seconds(call, repeats, wait) * 1e3 / repeats)
    return times


def _page_faults() -> int:
    try:
        import resource
    except ImportError:  # not a POSIX system: one warm-up then
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _seconds(call: Callable[[], object], repeats: int, wait: Callable[[], None]) -> float:
    wait()
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    wait()
    return time.perf_counter() - start


def training_step(model: nn.Module, objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    """Prepare a call that trains a model on a batch: forward, loss, backward, SGD with momentum.

    Args:
        model: trained by every call, in training mode.
        objective: the loss, called with epoch 0.

    Returns:
        The call; it takes images and labels and returns the loss.

    Example:
        >>> from sparsekd.train import CrossEntropy
        >>> step = training_step(nn.Linear(4, 2), CrossEntropy())
        >>> step(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)).ndim
        0
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = objective(model(x), x, y, 0)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
