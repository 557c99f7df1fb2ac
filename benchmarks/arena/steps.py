"""Races of training steps, with the bytes that a step moves as computed from its model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekd.bench.steps import StepRace
from sparsekd.models.norm_act import BatchNormAct2d
from sparsekd.train import Row

_WORD = 4
# Reads and writes of a whole map over forward and backward, each layer by itself.
_BATCH_NORM = 3 + 5  # statistics and normalisation; sums, then the gradient
_RELU = 2 + 3
_UPDATE = 5  # words a parameter: read weight, gradient, momentum; write weight and momentum


@dataclass(frozen=True)
class ArenaStepRace(StepRace):
    """A race over training steps whose rows count the bytes that a step moves, too."""

    def count(self, model: nn.Module) -> Row:
        """Count the work of a step with a model on the meta device."""
        moved = step_bytes(model, (self.case.batch, *self.case.input_shape))
        return {**super().count(model), "bytes": moved}


@torch.no_grad()
def step_bytes(model: nn.Module, input_shape: Sequence[int]) -> int:
    """Count the bytes a float32 training step reads and writes, every layer by itself.

    A convolution or linear layer reads or writes two maps in each of its three passes, and its
    nonzeros with an int32 index each; BatchNorm and ReLU move their map eight and five times; SGD
    with momentum moves five words a parameter. Additions, pooling and the loss are left out, and
    nothing is assumed to stay in a cache.

    Args:
        model: dense or sparse.
        input_shape: of a batch.

    Returns:
        The bytes.

    Example:
        >>> step_bytes(nn.Linear(8, 4, bias=False), (1, 8)) == 4 * (3 * (8 + 4 + 32) + 5 * 32)
        True
    """
    words = 0

    def record(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        nonlocal words
        if isinstance(module, nn.BatchNorm2d):
            words += _BATCH_NORM * output.numel()
            if isinstance(module, BatchNormAct2d) and module.act:
                words += _RELU * output.numel()
        elif isinstance(module, nn.ReLU):
            words += _RELU * output.numel()
        else:
            words += 3 * (args[0].numel() + output.numel() + _stored(module))

    handles = [
        module.register_forward_hook(record)
        for module in model.modules()
        if isinstance(module, nn.BatchNorm2d | nn.ReLU | nn.Conv2d | nn.Linear)
        or hasattr(module, "topology")
    ]
    training = model.training
    try:
        device = next(model.parameters()).device
        model.eval()(torch.zeros(tuple(input_shape), device=device))
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    words += _UPDATE * sum(parameter.numel() for parameter in model.parameters())
    return _WORD * words


def _stored(module: Any) -> int:
    """Words of the weight: an index beside every value if it is sparse."""
    if hasattr(module, "topology"):
        return 2 * module.topology.nnz
    return math.prod(module.weight.shape)
