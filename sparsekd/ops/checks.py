"""Checks of the arguments of each op, and the shape of its result.

Kernels and fakes run the same check, so a traced model fails where an eager one does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sparsekd.errors import ShapeError, TopologyError, UnsupportedError

Ints = Sequence[int]


def conv2d(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> list[int]:
    _structure(crow, col, weight_shape[0])
    _values(values, col)
    _bias(bias, weight_shape[0])
    _like("values", values, x)
    _like("bias", bias, x)
    _has_elements(weight_shape)
    return conv2d_shape(x.shape, weight_shape, stride, padding, dilation, groups)


def conv2d_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    input_shape: Ints,
    weight_shape: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> list[int]:
    _structure(crow, col, weight_shape[0])
    _values(values, col)
    _like("values", values, grad)
    _has_elements(weight_shape)
    shape = conv2d_shape(input_shape, weight_shape, stride, padding, dilation, groups)
    _shape("grad", grad, shape)
    return list(input_shape)


def conv2d_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: Ints,
    stride: Ints,
    padding: Ints,
    dilation: Ints,
    groups: int,
) -> list[int]:
    _structure(crow, col, weight_shape[0])
    _like("x", x, grad)
    _has_elements(weight_shape)
    shape = conv2d_shape(x.shape, weight_shape, stride, padding, dilation, groups)
    _shape("grad", grad, shape)
    return list(col.shape)


def linear(
    x: Tensor, values: Tensor, crow: Tensor, col: Tensor, bias: Tensor | None, weight_shape: Ints
) -> list[int]:
    rows, cols = weight_shape
    _structure(crow, col, rows)
    _values(values, col)
    _bias(bias, rows)
    _like("values", values, x)
    _like("bias", bias, x)
    _features("x", x, cols)
    return [*x.shape[:-1], rows]


def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: Ints
) -> list[int]:
    rows, cols = weight_shape
    _structure(crow, col, rows)
    _values(values, col)
    _like("values", values, grad)
    _features("grad", grad, rows)
    return [*grad.shape[:-1], cols]


def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: Ints
) -> list[int]:
    rows, cols = weight_shape
    _structure(crow, col, rows)
    _like("x", x, grad)
    _features("x", x, cols)
    _shape("grad", grad, [*x.shape[:-1], rows])
    return list(col.shape)


def grow_topk(score: Tensor, crow: Tensor, col: Tensor, k: int) -> list[int]:
    rows = crow.shape[0] - 1
    _structure(crow, col, rows)
    if rows < 0 or (score.numel() % rows if rows else score.numel()):
        raise ShapeError(f"score: expected a multiple of {rows} rows, got {list(score.shape)}")
    free = score.numel() - col.shape[0]
    if not 0 <= k <= free:
        raise ShapeError(f"k: expected 0 <= k <= {free} free positions, got {k}")
    return [k]


def batch_moments(x: Tensor) -> list[int]:
    if x.ndim != 4:
        raise ShapeError(f"x: expected shape [N, C, H, W], got {list(x.shape)}")
    if x.dtype not in (torch.float32, torch.float64):
        raise UnsupportedError(f"x: expected float32 or float64, got {x.dtype}")
    return [x.shape[1]]


def norm_act(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    *_: object,
) -> list[int]:
    channels = batch_moments(x)
    _like("residual", residual, x)
    if residual is not None:
        _shape("residual", residual, x.shape)
    for name, vector in {"weight": weight, "bias": bias, "mean": mean, "var": var}.items():
        _like(name, vector, x)
        if vector is not None:
            _shape(name, vector, channels)
    return list(x.shape)


def norm_act_backward(
    grad: Tensor,
    x: Tensor,
    y: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    relu: bool,
    frozen: bool,
    param_grads: bool,
) -> list[int]:
    if y is not None and not relu:
        raise ShapeError("y: expected None without a ReLU, it is only its mask")
    if not (frozen or param_grads):
        raise ShapeError("param_grads: expected True for a norm that is not frozen, got False")
    _like("grad", grad, x)
    _shape("grad", grad, x.shape)
    return norm_act(x, y, weight, bias, mean, var)


def geometry(op: str, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return weight_shape and, for a convolution, stride, padding, dilation and groups."""
    one_more = op in ("conv2d", "linear", "conv2d_dgrad")  # a bias, or the shape of the input
    return args[5:] if one_more else args[4:]


def conv2d_shape(
    input_shape: Ints, weight_shape: Ints, stride: Ints, padding: Ints, dilation: Ints, groups: int
) -> list[int]:
    """Return `[N, C_out, H_out, W_out]`, or raise ShapeError where the geometry does not fit."""
    rows, group_channels, kh, kw = weight_shape
    if groups < 1 or rows % groups:
        raise ShapeError(f"groups: expected a divisor of the {rows} output channels, got {groups}")
    if len(input_shape) != 4 or input_shape[1] != group_channels * groups:
        raise ShapeError(
            f"x: expected shape [N, {group_channels * groups}, H, W] for a weight of shape "
            f"{list(weight_shape)} with groups={groups}, got {list(input_shape)}"
        )
    if min(*stride, *dilation) < 1 or min(padding) < 0:
        raise ShapeError(
            "stride, dilation, padding: expected stride >= 1, dilation >= 1, padding >= 0, got "
            f"stride={list(stride)}, dilation={list(dilation)}, padding={list(padding)}"
        )
    top, bottom, left, right = padding
    high = input_shape[2] + top + bottom - dilation[0] * (kh - 1)
    wide = input_shape[3] + left + right - dilation[1] * (kw - 1)
    if high < 1 or wide < 1:
        raise ShapeError(
            f"x: expected a map no smaller than the kernel, {dilation[0] * (kh - 1) + 1} x "
            f"{dilation[1] * (kw - 1) + 1} with padding {list(padding)}, got {list(input_shape)}"
        )
    return [input_shape[0], rows, (high - 1) // stride[0] + 1, (wide - 1) // stride[1] + 1]


def refuse_onnx() -> None:
    """Raise UnsupportedError during torch.onnx export, which has no operator for ours."""
    if torch.onnx.is_in_onnx_export():
        raise UnsupportedError(
            "torch.onnx: ONNX has no operators for sparse weights; export the dense model, "
            "torch.onnx.export(skd.densify(model), ...)"
        )


def _has_elements(weight_shape: Ints) -> None:
    """Refuse what torch refuses; of no input channels it makes no output channels either."""
    if min(weight_shape) < 1:
        raise ShapeError(f"weight: expected at least one element, got shape {list(weight_shape)}")


def _structure(crow: Tensor, col: Tensor, rows: int) -> None:
    if crow.dtype != torch.int32 or col.dtype != torch.int32:
        raise TopologyError(f"crow, col: expected dtype int32, got {crow.dtype} and {col.dtype}")
    if crow.ndim != 1 or crow.shape[0] != rows + 1 or col.ndim != 1:
        raise TopologyError(
            f"crow, col: expected shapes [{rows + 1}] and [nnz], "
            f"got {list(crow.shape)} and {list(col.shape)}"
        )


def _values(values: Tensor, col: Tensor) -> None:
    if values.ndim != 1 or values.shape[0] != col.shape[0]:
        raise ShapeError(
            f"values: expected shape [{col.shape[0]}], one per nonzero, got {list(values.shape)}"
        )


def _bias(bias: Tensor | None, rows: int) -> None:
    if bias is not None and (bias.ndim != 1 or bias.shape[0] != rows):
        raise ShapeError(f"bias: expected shape [{rows}], got {list(bias.shape)}")


def _features(name: str, tensor: Tensor, features: int) -> None:
    if tensor.ndim < 1 or tensor.shape[-1] != features:
        raise ShapeError(f"{name}: expected shape [..., {features}], got {list(tensor.shape)}")


def _shape(name: str, tensor: Tensor, shape: Ints) -> None:
    if list(tensor.shape) != list(shape):
        raise ShapeError(f"{name}: expected shape {list(shape)}, got {list(tensor.shape)}")


def _like(name: str, tensor: Tensor | None, x: Tensor) -> None:
    if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
        raise UnsupportedError(
            f"{name}: expected dtype and device of the input, {x.dtype} on {x.device}, "
            f"got {tensor.dtype} on {tensor.device}"
        )
