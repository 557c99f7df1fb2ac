"""Losses that the training loop minimises."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F


class Objective(Protocol):
    """The loss of an epoch, as a function of the logits and the batch they came from."""

    def __call__(self, logits: Tensor, x: Tensor, y: Tensor, epoch: int) -> Tensor: ...


@dataclass(frozen=True)
class CrossEntropy:
    """Cross entropy with the labels: the objective of a run without a teacher.

    Args:
        label_smoothing: as in `torch.nn.functional.cross_entropy`.

    Example:
        >>> import torch
        >>> objective = CrossEntropy()
        >>> loss = objective(torch.zeros(2, 3), torch.zeros(2, 4), torch.tensor([0, 1]), epoch=0)
    """

    label_smoothing: float = 0.0

    def __call__(self, logits: Tensor, x: Tensor, y: Tensor, epoch: int) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=self.label_smoothing)
