"""The dense CPU backend: each call densifies the weight and runs torch's own kernels (oneDNN).

For layers with too few zeros, where that is faster. The dense weight lives as long as the call; a
weight without zeros is a view of `values`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, wraps

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekd._C as _C
from sparsekd.ops.layout import memory_format_of, rows_cols

_BELOW_AUTOCAST = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastCPU)


def _as_dtyped(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute in the dtype of the operands: a backward pass inside autocast must not lower it."""

    @wraps(op)
    def run(*args: object) -> Tensor:
        with torch._C._ExcludeDispatchKeyGuard(_BELOW_AUTOCAST):
            return op(*args)

    return run


@cache
def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` where oneDNN computes it with float32 sums, else the dtype to convert to."""
    if dtype == torch.bfloat16:
        return dtype if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    if dtype == torch.float16:
        return dtype if torch.ops.mkldnn._is_mkldnn_fp16_supported() else torch.float32
    return dtype


def _array(tensor: Tensor):
    tensor = tensor.detach()
    return (tensor.view(torch.int16) if tensor.itemsize == 2 else tensor).numpy()


def _densify(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: Sequence[int],
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Return the dense weight, in channels_last if `layout` says so and it makes a difference."""
    rows, cols = rows_cols(weight_shape)
    values = values.contiguous()
    if values.shape[0] == rows * cols:
        return values.view(weight_shape)
    weight = values.new_empty((rows, cols))
    taps = math.prod(weight_shape[2:]) if layout == torch.channels_last else 1
    _C.scatter(
        _array(values), crow.numpy(), col.numpy(), _array(weight), taps, torch.get_num_threads()
    )
    if layout == torch.channels_last:
        out, channels, high, wide = weight_shape
        return weight.view(out, high, wide, channels).permute(0, 3, 1, 2)
    return weight.view(weight_shape)


def _gather(dweight: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """Return the entries of a dense gradient, contiguous or channels_last, at the nonzeros."""
    if col.shape[0] == dweight.numel():
        return dweight.contiguous().view(-1)
    taps = 1
    if not dweight.is_contiguous():
        taps = math.prod(dweight.shape[2:])
        dweight = dweight.permute(0, 2, 3, 1)
    matrix = dweight.reshape(dweight.shape[0], -1)
    dvalues = matrix.new_empty(col.shape[0])
    _C.gather(
        _array(matrix), crow.numpy(), col.numpy(), _array(dvalues), taps, torch.get_num_threads()
    )
    return dvalues


def _symmetric(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """Return the input and what is left of its padding, as torch has it: one number a side."""
    top, bottom, left, right = padding
    if top == bottom and left == right:
        return x, [top, left]
    return F.pad(x, (left, right, top, bottom)), [0, 0]


@_as_dtyped
def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    layout, dtype = memory_format_of(x), _computed_in(x.dtype)
    weight = _densify(values, crow, col, weight_shape, layout).to(dtype)
    padded, sides = _symmetric(x.to(dtype), padding)
    bias = None if bias is None else bias.to(dtype)
    y = torch.convolution(padded, weight, bias, stride, sides, dilation, False, [0, 0], groups)
    return y.to(x.dtype).contiguous(memory_format=layout)


@_as_dtyped
def conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    input_shape: list[int],
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    layout, dtype = memory_format_of(grad), _computed_in(grad.dtype)
    weight = _densify(values, crow, col, weight_shape, layout).to(dtype)
    # only its shape is read
    x = torch.empty(input_shape, dtype=dtype, memory_format=layout)
    padded, sides = _symmetric(x, padding)
    dx, _, _ = torch.ops.aten.convolution_backward.default(
        grad.to(dtype), padded, weight, None,
        stride, sides, dilation, False, [0, 0], groups, [True, False, False],
    )  # fmt: skip
    if padded is not x:
        top, _, left, _ = padding
        dx = dx[:, :, top : top + x.shape[2], left : left + x.shape[3]]
    return dx.to(grad.dtype).contiguous(memory_format=layout)


@_as_dtyped
def conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    dtype = _computed_in(x.dtype)
    weight = torch.empty(weight_shape, dtype=dtype)  # only its shape is read
    padded, sides = _symmetric(x.to(dtype), padding)
    _, dweight, _ = torch.ops.aten.convolution_backward.default(
        grad.to(dtype), padded, weight, None,
        stride, sides, dilation, False, [0, 0], groups, [False, True, False],
    )  # fmt: skip
    return _gather(dweight, crow, col).to(x.dtype)


@_as_dtyped
def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    dtype = _computed_in(x.dtype)
    weight = _densify(values, crow, col, weight_shape).to(dtype)
    bias = None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight, bias).to(x.dtype).contiguous()


@_as_dtyped
def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    dtype = _computed_in(grad.dtype)
    weight = _densify(values, crow, col, weight_shape).to(dtype)
    return (grad.to(dtype) @ weight).to(grad.dtype).contiguous()


@_as_dtyped
def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    rows, cols = weight_shape
    dtype = _computed_in(x.dtype)
    dweight = grad.to(dtype).reshape(-1, rows).T @ x.to(dtype).reshape(-1, cols)
    return _gather(dweight, crow, col).to(x.dtype)
