"""The memory of a training step, counted in tensors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak(model: torch.nn.Module, step: Callable[[], object]) -> int:
    """Return the most bytes that a training step of a model needs at any moment.

    Counted are `held` and all tensors of the step. Gradients are dropped before: the profiler does
    not see that a step frees tensors which were there when it began to watch, and would count the
    old gradients beside the new ones.

    Args:
        model: trained by a step at least once.
        step: trains it once more, and drops old gradients, if there are any, before.
    """
    kept = held(model)
    for parameter in model.parameters():
        if parameter.grad is not None:
            kept -= parameter.grad.untyped_storage().nbytes()
            parameter.grad = None
    return kept + _allocated(step)


def held(model: torch.nn.Module) -> int:
    """Count the bytes of what lives as long as training, with momentum as large as gradients."""
    parameters = list(model.parameters())
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    tensors = [*parameters, *model.buffers(), *gradients]
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) + sum(4 * gradient.numel() for gradient in gradients)


def _allocated(call: Callable[[], object]) -> int:
    """Return the most bytes that tensors made during a call took at any moment."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # it would write lines to the terminal
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        call()
    events = trace.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes), default=0)
