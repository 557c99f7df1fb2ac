"""Evaluation of a model on a split it does not train on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsekd.data import as_source
from sparsekd.modes import in_mode


@dataclass(frozen=True)
class Evaluation:
    """Mean loss and accuracy on a split."""

    loss: float
    accuracy: float


@torch.no_grad()
def evaluate(model: nn.Module, data: Any, batch_size: int = 500) -> Evaluation:
    """Compute the mean cross entropy and the accuracy of a model on a split.

    Args:
        model: evaluated in eval mode; the mode of every module is restored.
        data: a split of `sparsekd.data`, a Dataset of torch, or a DataLoader.
        batch_size: images per forward pass.

    Returns:
        The evaluation.

    Raises:
        ValueError: there are no images.
    """
    loss, correct, seen = 0.0, 0, 0
    with in_mode(model, training=False):
        for x, y in as_source(data).batches(batch_size):
            logits = model(x)
            loss += F.cross_entropy(logits, y, reduction="sum").item()
            correct += correct_predictions(logits, y)
            seen += len(y)
    if seen == 0:
        raise ValueError("data: expected at least one image, got an empty split")
    return Evaluation(loss / seen, correct / seen)


def correct_predictions(logits: Tensor, target: Tensor) -> int:
    """Count the inputs whose largest logit is that of their class.

    Args:
        logits: of a batch.
        target: class indices, or a probability of each class, of which the largest counts.

    Shape:
        ``logits`` ``[N, C]``, ``target`` ``[N]`` or ``[N, C]``.

    Example:
        >>> logits = torch.eye(3)
        >>> correct_predictions(logits, torch.tensor([0, 1, 1]))
        2
        >>> correct_predictions(logits, 0.6 * torch.eye(3) + 0.4 * torch.eye(3)[[2, 1, 0]])
        3
    """
    labels = target.argmax(1) if target.ndim == logits.ndim else target
    return int((logits.argmax(1) == labels).sum())
