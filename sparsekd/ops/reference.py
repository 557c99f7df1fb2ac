"""The oracle: every op through a dense weight in plain torch, for any floating dtype and device.

It validates the structure on every call and computes half precision in float32, as the compiled
kernels do. It is what they are tested against, and the fallback where they cannot run.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekd.csr import flat_indices, validate
from sparsekd.ops.layout import memory_format_of, rows_cols


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _positions(crow: Tensor, col: Tensor, weight_shape: Sequence[int]) -> Tensor:
    rows, cols = rows_cols(weight_shape)
    validate(crow, col, rows, cols)
    return flat_indices(crow, col, cols)


def _dense(values: Tensor, crow: Tensor, col: Tensor, weight_shape: Sequence[int]) -> Tensor:
    rows, cols = rows_cols(weight_shape)
    weight = values.new_zeros(rows * cols, dtype=_accumulation_dtype(values.dtype))
    weight[_positions(crow, col, weight_shape)] = values.to(weight.dtype)
    return weight.view(list(weight_shape))


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
    weight = _dense(values, crow, col, weight_shape)
    padded = _pad(x.to(weight.dtype), padding)
    bias = None if bias is None else bias.to(weight.dtype)
    y = F.conv2d(padded, weight, bias, stride, 0, dilation, groups)
    return y.to(x.dtype).contiguous(memory_format=memory_format_of(x))


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
    weight = _dense(values, crow, col, weight_shape)
    top, bottom, left, right = padding
    n, channels, high, wide = input_shape
    padded = weight.new_empty((n, channels, high + top + bottom, wide + left + right))
    dx, _, _ = torch.ops.aten.convolution_backward(
        grad.to(weight.dtype), padded, weight, None,
        stride, [0, 0], dilation, False, [0, 0], groups, [True, False, False],
    )  # fmt: skip
    dx = dx[:, :, top : top + high, left : left + wide]
    return dx.to(grad.dtype).contiguous(memory_format=memory_format_of(grad))


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
    positions = _positions(crow, col, weight_shape)
    padded = _pad(x.to(_accumulation_dtype(x.dtype)), padding)
    weight = padded.new_empty(weight_shape)
    _, dweight, _ = torch.ops.aten.convolution_backward(
        grad.to(weight.dtype), padded, weight, None,
        stride, [0, 0], dilation, False, [0, 0], groups, [False, True, False],
    )  # fmt: skip
    return dweight.reshape(-1)[positions].to(x.dtype)


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    weight = _dense(values, crow, col, weight_shape)
    bias = None if bias is None else bias.to(weight.dtype)
    return F.linear(x.to(weight.dtype), weight, bias).to(x.dtype).contiguous()


def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    weight = _dense(values, crow, col, weight_shape)
    return (grad.to(weight.dtype) @ weight).to(grad.dtype).contiguous()


def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    positions = _positions(crow, col, weight_shape)
    rows, cols = weight_shape
    dtype = _accumulation_dtype(x.dtype)
    dweight = grad.to(dtype).reshape(-1, rows).T @ x.to(dtype).reshape(-1, cols)
    return dweight.reshape(-1)[positions].to(x.dtype)


def grow_topk(score: Tensor, crow: Tensor, col: Tensor, k: int) -> Tensor:
    rows = crow.shape[0] - 1
    free = torch.ones(score.numel(), dtype=torch.bool, device=score.device)
    free[_positions(crow, col, (rows, score.numel() // max(rows, 1)))] = False
    candidates = free.nonzero().squeeze(1)
    scores = score.reshape(-1)[candidates]
    if scores.isnan().any():
        raise ValueError("score: NaN among the positions that could grow")
    order = torch.sort(scores, descending=True, stable=True).indices  # ties: the lower position
    return candidates[order[:k]].sort().values


def _pad(x: Tensor, padding: Sequence[int]) -> Tensor:
    top, bottom, left, right = padding
    return F.pad(x, (left, right, top, bottom)) if any(padding) else x
