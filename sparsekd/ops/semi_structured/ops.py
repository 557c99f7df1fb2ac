"""The semi-structured backend: torch's kernels for 2:4 weights, on sparse tensor cores.

It has linear layers, and 1x1 convolutions on channels_last maps, which are linear layers of pixels,
in 16 bits: the forward pass where the weight is 2:4, the input gradient where its transpose is,
too. Values are read as they are stored, and for the transpose copied in its order; an optimizer
step leaves nothing to compress again. Sums are float32 and rounded once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd._torch import has_semi_structured, semi_structured_addmm, semi_structured_mm
from sparsekd.errors import UnavailableError
from sparsekd.ops.checks import geometry
from sparsekd.ops.gpu.structure import structure_of
from sparsekd.ops.memory_format import matrix, memory_format_of, rows_cols
from sparsekd.ops.semi_structured import plans

if not any(has_semi_structured(torch.device("cuda", n)) for n in range(torch.cuda.device_count())):
    raise UnavailableError(
        "torch has kernels for 2:4 weights on Linux, for NVIDIA GPUs of compute capability 8.x"
    )

_DTYPES = (torch.float16, torch.bfloat16)
_ALIGNMENT = 16  # bytes


def takes(op: str, args: tuple[Any, ...]) -> bool:
    """Return whether these kernels compute a product on these operands.

    Args:
        op: one of this module.
        args: those of its schema.
    """
    first, _, crow, col = args[:4]
    weight_shape, *conv = geometry(op, args)
    transposed = op.endswith("dgrad")
    rows, cols = rows_cols(weight_shape)
    if transposed:
        rows, cols = cols, rows
    if (
        first.dtype not in _DTYPES
        or not first.numel()
        or not rows * cols
        or rows % plans.ROWS
        or cols % plans.COLS
        or first.numel() > cols * plans.MOST_OTHER_ROWS
        or 2 * col.shape[0] != rows * cols
        or (conv and not _multiplies_pixels(first, weight_shape, *conv))
        or not has_semi_structured(first.device)
    ):
        return False
    structure = structure_of(first, crow, col, weight_shape)
    return plans.is_compressible(structure, transposed=transposed)


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    weight = plans.compressed(structure_of(x, crow, col, weight_shape), transposed=False)
    return _product(matrix(x), values, weight, bias).view(*x.shape[:-1], -1)


def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    weight = plans.compressed(structure_of(grad, crow, col, weight_shape), transposed=True)
    return _product(matrix(grad), values, weight, None).view(*grad.shape[:-1], -1)


def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    *_conv: Any,
) -> Tensor:
    y = linear(_channels_last(x), values, crow, col, bias, weight_shape)
    return y.permute(0, 3, 1, 2)


def conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    input_shape: list[int],
    weight_shape: list[int],
    *_conv: Any,
) -> Tensor:
    dx = linear_dgrad(_channels_last(grad), values, crow, col, weight_shape)
    return dx.permute(0, 3, 1, 2)


def _multiplies_pixels(
    maps: Tensor,
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> bool:
    """Return whether a convolution is a linear layer on rows of memory, one for each pixel."""
    return (
        rows_cols(weight_shape[1:])[1] == 1  # taps
        and max(stride) == 1
        and max(padding) == 0
        and groups == 1
        and memory_format_of(maps) == torch.channels_last
    )


def _channels_last(maps: Tensor) -> Tensor:
    """View maps `[N, C, H, W]` as `[N, H, W, C]`."""
    return maps.permute(0, 2, 3, 1)


def _product(x: Tensor, values: Tensor, weight: plans.Compressed, bias: Tensor | None) -> Tensor:
    """Multiply rows `x` by the transpose of a weight; return the rows of the result."""
    if weight.order is not None:
        values = values.index_select(0, weight.order)
    rows = x.shape[0]
    if rows % plans.OTHER_ROWS:
        x = F.pad(x, (0, 0, 0, -rows % plans.OTHER_ROWS))
    packed = _aligned(values).view(weight.metadata.shape[0], -1)
    operands = packed, weight.metadata, _aligned(x).t()
    if bias is None:
        y = semi_structured_mm(*operands)
    else:
        y = semi_structured_addmm(bias.contiguous(), *operands)
    # The weight comes first in these kernels, and so do its rows in what they write.
    return y[:, :rows].t().contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Return a tensor that vectors of 16 bytes can be read from: itself, or a copy."""
    tensor = tensor.contiguous()
    return tensor.clone() if tensor.data_ptr() % _ALIGNMENT else tensor
