"""Soft-error, the gap between the worlds, and when the real world has fitted its sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional as F

from sparsekd.data import Source
from sparsekd.modes import in_mode
from sparsekd.train import Row


@dataclass(frozen=True)
class Errors:
    """Errors on a split.

    Args:
        soft: mean of 1 - the probability of the true class; smooth where `hard` jumps.
        hard: share of wrong classes.
        loss: mean cross entropy.
    """

    soft: float
    hard: float
    loss: float


@torch.no_grad()
def errors(model: nn.Module, data: Source, batch_size: int = 500) -> Errors:
    """Compute the errors of a network in eval mode.

    Args:
        model: only read.
        data: the split.
        batch_size: images per forward pass.

    Raises:
        ValueError: the split is empty.

    Source: arXiv 2010.08127, section 3: soft-error.
    """
    soft = hard = loss = 0.0
    if not len(data):
        raise ValueError("data: expected at least one image, got an empty split")
    with in_mode(model, training=False):
        for x, y in data.batches(batch_size):
            log = F.log_softmax(model(x).double(), 1)
            true = log.gather(1, y[:, None]).squeeze(1)
            soft += float((1 - true.exp()).sum())
            hard += int((log.argmax(1) != y).sum())
            loss -= float(true.sum())
    return Errors(soft / len(data), hard / len(data), loss / len(data))


def stopping_time(rows: Sequence[Row], delta: float) -> int:
    """Return T(n): the last measured step at which the training soft-error is `delta` or more.

    Args:
        rows: of the real world, each with "step" and "train_soft", in the order of steps.
        delta: the level.

    Returns:
        The step; the last one of a run that has not fitted its sample.

    Source: arXiv 2010.08127, section 4.

    Example:
        >>> stopping_time([{"step": s, "train_soft": 0.3 / (s + 1)} for s in range(100)], 0.01)
        29
    """
    above = [row["step"] for row in rows if row["train_soft"] >= delta]
    return above[-1] if above else rows[0]["step"]


def gaps(real: Sequence[Row], ideal: Sequence[Row], key: str = "test_soft") -> dict[int, float]:
    """Return the real world's test error less the ideal world's, at every step both measured.

    Args:
        real: rows with "step" and `key`.
        ideal: likewise.
        key: which error.

    Returns:
        Step -> gap.
    """
    there = {row["step"]: row[key] for row in ideal}
    return {row["step"]: row[key] - there[row["step"]] for row in real if row["step"] in there}
