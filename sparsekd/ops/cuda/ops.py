"""The CUDA backend: one call of csrc/cuda an op, on maps of any strides.

Kernels accumulate in float32 and round once. Everything is queued on torch's current stream and
nothing waits for the device, except where a structure is seen for the first time, and growth.

Products take a result to `correct`, of kernels that multiply weights that are not stored, or
padding, by zero: it is computed again if it is not finite throughout, which the device finds out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparsekd import cuda_library
from sparsekd.errors import UnsupportedError
from sparsekd.ops import reference
from sparsekd.ops.checks import conv2d_shape
from sparsekd.ops.cuda import plans
from sparsekd.ops.cuda.plans import Maps, Product
from sparsekd.ops.gpu.convolution import conv_of, covers
from sparsekd.ops.gpu.growth import FreePositions
from sparsekd.ops.gpu.structure import structure_of
from sparsekd.ops.memory_format import memory_format_of, pixels

_library = cuda_library.load()
_MOST_SPAN = 2**31 - 1025  # what 32 bits can index, as kernels.cu requires
_POINTWISE = ([1, 1], [0, 0, 0, 0], [1, 1], 1)


def _maps(x: Tensor) -> Maps:
    maps = Maps(x, *x.shape, *x.stride())
    span = maps.height * maps.stride_h + maps.width * maps.stride_w
    if span > _MOST_SPAN:
        raise UnsupportedError(
            "x: backend 'cuda' supports maps and gradients in which the pixels of a channel span "
            f"at most {_MOST_SPAN} elements, got {span}, of shape {tuple(x.shape)}"
        )
    return maps


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    layout = memory_format_of(like)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


def _check(result: Tensor | None) -> Tensor | None:
    """Return a number that is finite only if all of a result is."""
    return None if result is None else result.sum(dtype=torch.float32)


def _gather(
    x: Tensor,
    products: Sequence[Product],
    values: Tensor,
    bias: Tensor | None,
    y: Tensor,
    check: Tensor | None,
) -> Tensor:
    """Write the outputs that products name into y."""
    bias = None if bias is None else bias.contiguous()
    _library.run(
        "gather", x.device, x.dtype, [_maps(x)], len(products), [p[:-1] for p in products],
        [axis for p in products for axis in p.axes], values.contiguous(), bias, check, [_maps(y)],
    )  # fmt: skip
    return y


def _sample(
    grad: Tensor, x: Tensor, product: Product, dvalues: Tensor, check: Tensor | None
) -> Tensor:
    """Write the gradients of the values."""
    parts, nnz = product.parts(x), dvalues.shape[0]
    partial = x.new_empty(parts * nnz, dtype=torch.float32)
    _library.run(
        "sample", x.device, x.dtype, [_maps(grad)], [_maps(x)], [product[:-1]], product.axes, nnz,
        parts, partial, check, dvalues,
    )  # fmt: skip
    return dvalues


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
    *,
    correct: Tensor | None = None,
) -> Tensor:
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    if plans.is_large(conv):
        return reference.conv2d(
            x, values, crow, col, bias, weight_shape, stride, padding, dilation, groups
        )
    structure = structure_of(x, crow, col, weight_shape)
    shape = conv2d_shape(x.shape, *conv)
    product = plans.forward(structure, conv, x, shape[2:])
    y = _empty(x, shape) if correct is None else correct
    return _gather(x, [product], values, bias, y, _check(correct))


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
    *,
    correct: Tensor | None = None,
) -> Tensor:
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    if plans.is_large(conv):
        return reference.conv2d_dgrad(
            grad, values, crow, col, input_shape, weight_shape, stride, padding, dilation, groups
        )
    structure = structure_of(grad, crow, col, weight_shape)
    products = plans.input_gradient(structure, conv, grad, input_shape[2:])
    dx, check = _empty(grad, input_shape) if correct is None else correct, _check(correct)
    if not covers(len(products), conv, input_shape[2:]):
        if check is None:
            dx.zero_()
        else:
            dx.masked_fill_(~check.isfinite(), 0.0)
    return _gather(grad, products, values, None, dx, check)


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
    *,
    correct: Tensor | None = None,
) -> Tensor:
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    if plans.is_large(conv):
        return reference.conv2d_wgrad(
            grad, x, crow, col, weight_shape, stride, padding, dilation, groups
        )
    structure = structure_of(x, crow, col, weight_shape)
    product = plans.forward(structure, conv, x, grad.shape[2:])
    dvalues = x.new_empty(structure.col.shape[0]) if correct is None else correct
    return _sample(grad, x, product, dvalues, _check(correct))


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
    *,
    correct: Tensor | None = None,
) -> Tensor:
    shape, wrong = [*weight_shape, 1, 1], None if correct is None else pixels(correct)
    y = conv2d(pixels(x), values, crow, col, bias, shape, *_POINTWISE, correct=wrong)
    return y.view(*x.shape[:-1], weight_shape[0])


def linear_dgrad(
    grad: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: list[int],
    *,
    correct: Tensor | None = None,
) -> Tensor:
    images, shape = pixels(grad), [*weight_shape, 1, 1]
    input_shape = [images.shape[0], weight_shape[1], 1, 1]
    wrong = None if correct is None else pixels(correct)
    dx = conv2d_dgrad(images, values, crow, col, input_shape, shape, *_POINTWISE, correct=wrong)
    return dx.view(*grad.shape[:-1], weight_shape[1])


def linear_wgrad(
    grad: Tensor,
    x: Tensor,
    crow: Tensor,
    col: Tensor,
    weight_shape: list[int],
    *,
    correct: Tensor | None = None,
) -> Tensor:
    shape = [*weight_shape, 1, 1]
    return conv2d_wgrad(pixels(grad), pixels(x), crow, col, shape, *_POINTWISE, correct=correct)


class LargestK(FreePositions):
    """The k best positions outside a structure, over rectangles of scores."""

    def __init__(
        self, crow: Tensor, col: Tensor, rows: int, cols: int, k: int, dtype: torch.dtype
    ) -> None:
        super().__init__(crow, col, rows, cols, k, empty=0, nan=col.new_zeros(1))

    def offer(self, scores: Tensor, row: int, col: int, magnitude: bool) -> None:
        self._check_device(scores)
        scores, k, device = scores.contiguous(), self._best.shape[0], self._best.device
        keys = self._best.new_empty(k + scores.numel())
        _library.run(
            "grow_keys", device, scores.dtype, scores, row, scores.shape[0], col, scores.shape[1],
            self._cols, magnitude, self._taken[0].shape[0], *self._taken, keys[k:],
        )  # fmt: skip
        scratch = torch.empty(_library.size("grow_scratch"), dtype=torch.uint8, device=device)
        with self._lock:
            keys[:k] = self._best
            best = torch.zeros_like(self._best)
            _library.run("grow_select", device, keys.shape[0], keys, k, best, scratch, self._nan)
            self._best = best
