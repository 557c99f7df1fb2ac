"""Measure what a training step costs, sparse and dense, side by side."""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsekd.nn import densify, sparse_modules
from sparsekd.train.loop import Objective, to_channels_last


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
    dense = densify(copy.deepcopy(model))
    x_last = x.to(memory_format=torch.channels_last)
    arms = {
        "contiguous": _step(dense, x, y, objective),
        "channels_last": _step(
            to_channels_last(copy.deepcopy(dense)),
            x_last,
            y,
            objective,
        ),
    }
    if any(True for _ in sparse_modules(model)):
        arms["sparse"] = _step(copy.deepcopy(model), x_last, y, objective)
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds + 1):
        for name, step in arms.items():
            start = time.perf_counter()
            step()
            if number > 0:
                times[name].append((time.perf_counter() - start) * 1e3)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    return StepTimes(
        sparse_ms=medians.get("sparse"),
        dense_contiguous_ms=medians["contiguous"],
        dense_channels_last_ms=medians["channels_last"],
        rounds=rounds,
        batch_size=len(y),
        threads=torch.get_num_threads(),
    )


def _step(model: nn.Module, x: Tensor, y: Tensor, objective: Objective) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    model.train()

    def step() -> None:
        optimizer.zero_grad()
        objective(model(x), x, y, 0).backward()
        optimizer.step()

    return step
