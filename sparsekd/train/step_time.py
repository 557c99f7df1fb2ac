"""Time and memory of a training step, sparse and dense, side by side."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from sparsekd.nn import densify, sparse_modules, unfuse
from sparsekd.timing import interleave
from sparsekd.train.loop import to_channels_last
from sparsekd.train.objective import Objective
from sparsekd.train.step_memory import held, peak


@dataclass(frozen=True)
class StepTimes:
    """Median times of one training step, in milliseconds, and its memory in bytes.

    Args:
        sparse_ms: of the model as it is, in channels_last; None for a dense model.
        dense_contiguous_ms: of the same weights in dense storage.
        dense_channels_last_ms: likewise, in channels_last.
        rounds: steps timed of each.
        batch_size: images per step.
        threads: of torch.
        held: parameters, indices, gradients, momentum and buffers, by "dense" and "sparse"; None in
            what an earlier version measured.
        peak: the same and all tensors of a step, at the most that there are at a time.
    """

    sparse_ms: float | None
    dense_contiguous_ms: float
    dense_channels_last_ms: float
    rounds: int
    batch_size: int
    threads: int
    held: dict[str, int] | None = None
    peak: dict[str, int] | None = None

    @property
    def dense_ms(self) -> float:
        """Time of the better dense layout, the one to compare with."""
        return min(self.dense_contiguous_ms, self.dense_channels_last_ms)


def time_step(
    model: nn.Module, x: Tensor, y: Tensor, objective: Objective, *, rounds: int = 7
) -> StepTimes:
    """Measure forward, loss, backward and SGD step of a model against its dense twins.

    The models take turns, so that a change in the machine's load meets all of them, and each is
    represented by its median. What the objective costs, a teacher for instance, is part of every
    step. The dense memory is that of the layout which needs less.

    Args:
        model: sparse or dense; not changed.
        x: a batch of images.
        y: its labels.
        objective: the loss, called with epoch 0.
        rounds: steps timed of each model, after one that is not.

    Returns:
        Times and memory.

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
    steps = {
        name: partial(training_step(entry, objective), images, y)
        for name, (entry, images) in entries.items()
    }
    times = interleave(steps, rounds, settle=True)
    medians = {name: round(statistics.median(values), 3) for name, values in times.items()}
    kept = {name: held(entry) for name, (entry, _) in entries.items()}
    most = {name: peak(entries[name][0], step) for name, step in steps.items()}
    return StepTimes(
        sparse_ms=medians.get("sparse"),
        dense_contiguous_ms=medians["contiguous"],
        dense_channels_last_ms=medians["channels_last"],
        rounds=rounds,
        batch_size=len(y),
        threads=torch.get_num_threads(),
        held=_better(kept),
        peak=_better(most),
    )


def _better(found: dict[str, int]) -> dict[str, int]:
    """Keep the better of the dense layouts."""
    sparse = {"sparse": found["sparse"]} if "sparse" in found else {}
    return {"dense": min(found["contiguous"], found["channels_last"]), **sparse}


def training_step(model: nn.Module, objective: Objective) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a call that trains a model on a batch: forward, loss, backward, SGD with momentum.

    Args:
        model: trained by every call, in training mode.
        objective: the loss, called with epoch 0.

    Returns:
        A function of images and labels that returns the loss.

    Example:
        >>> from sparsekd.train import CrossEntropy
        >>> step = training_step(nn.Linear(4, 2), CrossEntropy())
        >>> step(torch.randn(8, 4), torch.zeros(8, dtype=torch.long)).ndim
        0
    """
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9, foreach=True)
    model.train()

    def step(x: Tensor, y: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = objective(model(x), x, y, 0)
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step
