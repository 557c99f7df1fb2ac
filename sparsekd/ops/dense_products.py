"""Torch's own convolutions with a dense weight, for the backends that densify.

Maps have padding on four sides, results the memory format of the operand that the op is named for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.ops.memory_format import memory_format_of

_NONE = [0, 0]


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: list[int],
    padding: Sequence[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the forward pass."""
    padded, sides = symmetric(x, padding)
    y = torch.convolution(padded, weight, bias, stride, sides, dilation, False, _NONE, groups)
    return y.contiguous(memory_format=memory_format_of(x))


def conv2d_dgrad(
    grad: Tensor,
    weight: Tensor,
    input_shape: Sequence[int],
    stride: list[int],
    padding: Sequence[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the input gradient."""
    top, bottom, left, right = padding
    high, wide = input_shape[2:]
    if not high * wide:
        return grad.new_empty(list(input_shape))
    even = top == bottom and left == right
    sides = [top, left] if even else _NONE
    padded = (high, wide) if even else (high + top + bottom, wide + left + right)
    # The transposed convolution is the same kernel as torch's backward pass, without an input to be
    # allocated just for its shape.
    rest = [
        padded[d] + 2 * sides[d]
        - (grad.shape[2 + d] - 1) * stride[d] - dilation[d] * (weight.shape[2 + d] - 1) - 1
        for d in (0, 1)
    ]  # fmt: skip
    dx = torch.convolution(grad, weight, None, stride, sides, dilation, True, rest, groups)
    if not even:
        dx = dx[:, :, top : top + high, left : left + wide]
    return dx.contiguous(memory_format=memory_format_of(grad))


def conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: Sequence[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Return the gradient of the dense weight."""
    # Only its shape and layout are read.
    weight = torch.empty(
        weight_shape, dtype=x.dtype, device=x.device, memory_format=memory_format_of(x)
    )
    padded, sides = symmetric(x, padding)
    _, dweight, _ = torch.ops.aten.convolution_backward.default(
        grad, padded, weight, None,
        stride, sides, dilation, False, _NONE, groups, [False, True, False],
    )  # fmt: skip
    return dweight


def symmetric(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Return the input and what is left of its padding, as torch has it: one number a side."""
    top, bottom, left, right = padding
    if top == bottom and left == right and x.numel():  # torch refuses maps without pixels
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom)), _NONE
