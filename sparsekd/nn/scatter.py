"""Nonzeros in a dense tensor."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor


def scatter_dense(values: Tensor, flat: Tensor, shape: Sequence[int]) -> Tensor:
    """Return values at flat positions of a dense tensor that is zero elsewhere.

    Args:
        values: one entry per nonzero.
        flat: int64 positions in the flat tensor.
        shape: of the result.

    Returns:
        A new tensor, differentiable with respect to `values`.

    Example:
        >>> import torch
        >>> scatter_dense(torch.ones(1), torch.tensor([2]), (2, 2))
        tensor([[0., 0.],
                [1., 0.]])
    """
    return values.new_zeros(math.prod(shape)).scatter(0, flat, values).view(*shape)
