"""The dense GPU backend: each call densifies the weight and runs torch's own kernels.

It is for layers with few zeros, and for those that tensor cores serve better whatever the weight.
The dense weight, or its gradient, exists only during the call.

Torch multiplies weights that are not stored, and padding, by zero. If that may have made NaN,
because a result is not finite, csrc/cuda computes it again; the device finds out, nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd._torch import without_autocast
from sparsekd.ops import dense_products
from sparsekd.ops.borders import Geometry, reaches_far
from sparsekd.ops.checks import conv2d_shape
from sparsekd.ops.cuda import ops as cuda
from sparsekd.ops.cuda import plans
from sparsekd.ops.gpu.convolution import conv_of
from sparsekd.ops.gpu.structure import Structure, structure_of
from sparsekd.ops.memory_format import matrix, memory_format_of

_below_autocast = without_autocast("cuda")


def _positions(structure: Structure, channels: int) -> Tensor:
    """Return where each nonzero is in the memory of the dense weight, int64 `[nnz]`.

    Args:
        structure: of the weight; it keeps the result.
        channels: of a tap that lie side by side, all of them in channels_last, else 1.
    """

    def make(made: Structure) -> Tensor:
        taps, col = made.size[1] // channels, made.col.long()
        if channels > 1:
            col = col % taps * channels + col // taps
        return made.to_device(made.row.long() * made.size[1] + col)

    return structure.plan(("positions in the dense weight", channels), make)


def _densify(
    values: Tensor,
    structure: Structure,
    weight_shape: Sequence[int],
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    weight = torch.empty(
        weight_shape, dtype=values.dtype, device=values.device, memory_format=layout
    ).zero_()
    memory, channels = _memory(weight)
    memory.scatter_(0, _positions(structure, channels), values)
    return weight


def _gather(dweight: Tensor, structure: Structure) -> Tensor:
    memory, channels = _memory(dweight)
    return memory.index_select(0, _positions(structure, channels))


def _memory(weight: Tensor) -> tuple[Tensor, int]:
    """Return a weight as it lies in memory, and how many channels of a tap lie side by side.

    It is a view of one that is contiguous or channels_last, and else a contiguous copy.
    """
    inner = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
    if inner and not weight.is_contiguous():
        return weight.permute(0, 2, 3, 1).reshape(-1), weight.shape[1]
    return weight.reshape(-1), 1


def _leaves(input_size: Sequence[int], output_size: Sequence[int], *conv: Any) -> bool:
    """Return whether a convolution is left to the backend "cuda".

    Kernels that it cannot correct it computes tap by tap, whatever torch's make of them; and those
    would walk over all that stride and padding span, be it far more than the maps.
    """
    return plans.is_large(conv_of(*conv)) or reaches_far(Geometry(input_size, output_size, *conv))


def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    *conv: Any,
) -> Tensor:
    args = x, values, crow, col, bias, weight_shape, *conv
    y_size = conv2d_shape(x.shape, weight_shape, *conv)[2:]
    if _leaves(x.shape[2:], y_size, weight_shape, *conv):
        return cuda.conv2d(*args)
    structure = structure_of(x, crow, col, weight_shape)
    weight = _densify(values, structure, weight_shape, memory_format_of(x))
    with _below_autocast():
        y = dense_products.conv2d(x, weight, bias, *conv)
        return cuda.conv2d(*args, correct=y)


def conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    input_shape: list[int],
    weight_shape: list[int],
    *conv: Any,
) -> Tensor:
    args = grad, values, crow, col, input_shape, weight_shape, *conv
    if _leaves(input_shape[2:], grad.shape[2:], weight_shape, *conv):
        return cuda.conv2d_dgrad(*args)
    structure = structure_of(grad, crow, col, weight_shape)
    weight = _densify(values, structure, weight_shape, memory_format_of(grad))
    with _below_autocast():
        dx = dense_products.conv2d_dgrad(grad, weight, input_shape, *conv)
        return cuda.conv2d_dgrad(*args, correct=dx)


def conv2d_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int], *conv: Any
) -> Tensor:
    args = grad, x, crow, col, weight_shape, *conv
    if _leaves(x.shape[2:], grad.shape[2:], weight_shape, *conv):
        return cuda.conv2d_wgrad(*args)
    structure = structure_of(x, crow, col, weight_shape)
    with _below_autocast():
        dvalues = _gather(dense_products.conv2d_wgrad(grad, x, weight_shape, *conv), structure)
        return cuda.conv2d_wgrad(*args, correct=dvalues)


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    weight = _densify(values, structure_of(x, crow, col, weight_shape), weight_shape)
    with _below_autocast():
        y = F.linear(x, weight, bias).contiguous()
        return cuda.linear(x, values, crow, col, bias, weight_shape, correct=y)


def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    weight = _densify(values, structure_of(grad, crow, col, weight_shape), weight_shape)
    with _below_autocast():
        dx = (grad @ weight).contiguous()
        return cuda.linear_dgrad(grad, values, crow, col, weight_shape, correct=dx)


def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    structure = structure_of(x, crow, col, weight_shape)
    with _below_autocast():
        dvalues = _gather(matrix(grad).T @ matrix(x), structure)
        return cuda.linear_wgrad(grad, x, crow, col, weight_shape, correct=dvalues)
