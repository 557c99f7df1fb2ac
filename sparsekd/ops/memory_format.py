"""Memory layout of results, the weight seen as a matrix, and a matrix seen as maps."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekd._torch import transformed


def memory_format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of the result of an op on the maps `x`.

    A single channel fits both formats; as in torch, its stride then tells which one is meant.
    """
    if (
        x.stride(1) == 1
        and x.shape[2] * x.shape[3] > 1
        and not transformed(x)  # torch cannot tell there
        and x.is_contiguous(memory_format=torch.channels_last)
    ):
        return torch.channels_last
    return torch.contiguous_format


def in_format_of(x: Tensor, result: Tensor) -> Tensor:
    """Return `result` in the memory format of the maps `x`, as it is inside a transform of torch.

    There is no other format than torch's default inside of a batch.
    """
    if transformed(result):
        return result
    return result.contiguous(memory_format=memory_format_of(x))


def rows_cols(weight_shape: Sequence[int]) -> tuple[int, int]:
    """Return the shape of the weight as a matrix: output channels by everything else."""
    return weight_shape[0], math.prod(weight_shape[1:])


def matrix(features: Tensor) -> Tensor:
    """View rows of features, in any number of dimensions, as one matrix."""
    rows = math.prod(features.shape[:-1])  # -1 is ambiguous where there are no features
    return features.reshape(rows, features.shape[-1])


def pixels(features: Tensor) -> Tensor:
    """View rows of features as images of one pixel, for a linear layer as a 1x1 convolution."""
    rows = math.prod(features.shape[:-1])
    return features.reshape(rows, features.shape[-1], 1, 1)  # one view, as each costs a call
