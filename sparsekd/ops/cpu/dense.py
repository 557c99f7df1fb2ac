"""The dense CPU backend: each call densifies the weight and runs torch's own kernels (oneDNN).

For layers with few zeros, where that is faster. The dense weight exists only during the call; for a
weight without zeros it is a view of `values`.

Torch multiplies weights that are not stored, and in some kernels padding, by zero. If that may have
made NaN, because the result is not finite, or if oneDNN would walk over far more than the maps, the
sparse kernels compute instead.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import sparsekd._C as _C
from sparsekd._torch import onednn_computes, without_autocast
from sparsekd.ops import borders, dense_products
from sparsekd.ops.checks import conv2d_shape
from sparsekd.ops.cpu import cpp
from sparsekd.ops.memory_format import matrix, memory_format_of, rows_cols

_below_autocast = without_autocast("cpu")


@cache
def _computed_in(dtype: torch.dtype) -> torch.dtype:
    """Return `dtype` where oneDNN computes it with float32 sums, else the dtype to convert to."""
    return dtype if onednn_computes(dtype) else torch.float32


def _product(op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute what oneDNN does not have in float32, rounded once, or by the sparse kernels."""
    sparse = getattr(cpp, op.__name__)

    @wraps(op)
    def run(first: Tensor, *args: object) -> Tensor:
        dtype = _computed_in(first.dtype)
        if dtype == first.dtype:
            result = op(first, *args)
        else:
            wide = [
                arg.to(dtype) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
                for arg in args
            ]
            result = op(first.to(dtype), *wide).to(first.dtype)
        return result if _is_finite(result) else sparse(first, *args)

    return run


def _is_finite(result: Tensor) -> bool:
    """Return False where a number is not finite, or the sum of all is too large."""
    wide = torch.float32 if result.dtype == torch.float16 else result.dtype
    return math.isfinite(result.sum(dtype=wide))


def _densify(
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: Sequence[int],
    layout: torch.memory_format = torch.contiguous_format,
) -> Tensor:
    """Return the dense weight, in `layout` unless it is a view."""
    rows, cols = rows_cols(weight_shape)
    nnz = col.shape[0]
    if nnz == rows * cols:
        return values.reshape(weight_shape)
    weight = torch.empty(weight_shape, dtype=values.dtype, memory_format=layout)
    matrix, taps = _as_matrix(weight)
    _C.scatter(values.contiguous(), crow, col, matrix, taps, torch.get_num_threads())
    return weight


def _gather(dweight: Tensor, crow: Tensor, col: Tensor) -> Tensor:
    """Return the entries of a dense gradient, contiguous or channels_last, at the nonzeros."""
    nnz = col.shape[0]
    if nnz == dweight.numel():
        return dweight.reshape(nnz)
    matrix, taps = _as_matrix(dweight)
    dvalues = dweight.new_empty(nnz)
    _C.gather(matrix, crow, col, dvalues, taps, torch.get_num_threads())
    return dvalues


def _as_matrix(weight: Tensor) -> tuple[Tensor, int]:
    """Return the rows in the order of memory, and how many kernel positions come outermost."""
    rows = weight.shape[0]
    if weight.is_contiguous():
        return weight.view(rows, -1), 1
    return weight.permute(0, 2, 3, 1).view(rows, -1), weight.shape[2] * weight.shape[3]


def _reaches_far(x_size: Sequence[int], y_size: Sequence[int], *conv: Any) -> bool:
    return borders.reaches_far(borders.Geometry(x_size, y_size, *conv))


@_product
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
    conv = weight_shape, stride, padding, dilation, groups
    if _reaches_far(x.shape[2:], conv2d_shape(x.shape, *conv)[2:], *conv):
        return cpp.conv2d(x, values, crow, col, bias, *conv)
    weight = _densify(values, crow, col, weight_shape, memory_format_of(x))
    return dense_products.conv2d(x, weight, bias, *conv[1:])


@_product
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
    conv = weight_shape, stride, padding, dilation, groups
    if _reaches_far(input_shape[2:], grad.shape[2:], *conv):
        return cpp.conv2d_dgrad(grad, values, crow, col, input_shape, *conv)
    weight = _densify(values, crow, col, weight_shape, memory_format_of(grad))
    return dense_products.conv2d_dgrad(grad, weight, input_shape, *conv[1:])


@_product
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
    conv = weight_shape, stride, padding, dilation, groups
    if _reaches_far(x.shape[2:], grad.shape[2:], *conv):
        return cpp.conv2d_wgrad(grad, x, crow, col, *conv)
    return _gather(dense_products.conv2d_wgrad(grad, x, *conv), crow, col)


@_product
def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    with _below_autocast():
        return F.linear(x, _densify(values, crow, col, weight_shape), bias).contiguous()


@_product
def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    # A backward pass may run inside autocast, which must not lower what came out of it.
    with _below_autocast():
        return (grad @ _densify(values, crow, col, weight_shape)).contiguous()


@_product
def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    with _below_autocast():
        return _gather(matrix(grad).T @ matrix(x), crow, col)


def whole_conv2d(
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
) -> Tensor | None:
    """Run a convolution without zeros as torch does, its derivative included.

    None says that torch may not be right: the result is not finite, or the geometry is one that
    torch walks over. Of a derivative that is not finite the sparse kernels make what torch passes
    on.
    """
    conv = weight_shape, stride, padding, dilation, groups
    if _reaches_far(x.shape[2:], conv2d_shape(x.shape, *conv)[2:], *conv):
        return None
    dtype = _computed_in(x.dtype)
    wide = x.to(dtype)
    padded, sides = dense_products.symmetric(wide, padding)
    weight = values.view(weight_shape).to(dtype)
    wide_bias = None if bias is None else bias.to(dtype)
    y = F.conv2d(padded, weight, wide_bias, stride, sides, dilation, groups)
    if not _is_finite(y.detach()):
        return None
    if y.grad_fn is not None:
        y.grad_fn.register_hook(partial(_repaired_gradients, wide, weight, crow, col, conv))
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


def _repaired_gradients(
    x: Tensor,
    weight: Tensor,
    crow: Tensor,
    col: Tensor,
    conv: tuple[Any, ...],
    inputs: tuple[Tensor | None, ...],
    outputs: tuple[Tensor, ...],
) -> tuple[Tensor | None, ...] | None:
    """Return the gradients of a convolution's input, weight and bias, None for as they are."""
    dx, dweight, *rest = inputs
    grad, (top, bottom, left, right) = outputs[0], conv[2]
    wrong = [g is not None and not _is_finite(g.detach()) for g in (dx, dweight)]
    if not any(wrong):
        return None
    if wrong[0]:
        values = weight.reshape(-1)
        dx_inside = torch.ops.sparsekd.conv2d_dgrad(grad, values, crow, col, list(x.shape), *conv)
        even = dx is not None and dx.shape == x.shape
        dx = dx_inside if even else F.pad(dx_inside, (left, right, top, bottom))
    if wrong[1]:
        dvalues = torch.ops.sparsekd.conv2d_wgrad(grad, x, crow, col, *conv)
        dweight = dvalues.view(weight.shape)
    return dx, dweight, *rest


def whole_linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    """Run a linear layer without zeros as torch does, its derivative included."""
    dtype = _computed_in(x.dtype)
    weight, bias = values.view(weight_shape).to(dtype), None if bias is None else bias.to(dtype)
    return F.linear(x.to(dtype), weight, bias).to(x.dtype)
