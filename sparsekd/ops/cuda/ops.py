"""The CUDA backend: pack the maps, queue the kernels of csrc/cuda, unpack the result.

Kernels accumulate in float32 and round once. Everything is queued on torch's current stream and
nothing waits for the device, except where a structure is seen for the first time, and growth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparsekd import cuda_library
from sparsekd.ops import reference
from sparsekd.ops.borders import Geometry, reaches_far
from sparsekd.ops.checks import conv2d_shape
from sparsekd.ops.gpu import gather_plans
from sparsekd.ops.gpu.convolution import conv_of, new_input_gradient
from sparsekd.ops.gpu.gather_plans import GatherPlan
from sparsekd.ops.gpu.growth import FreePositions
from sparsekd.ops.gpu.structure import structure_of
from sparsekd.ops.memory_format import memory_format_of, pixels

_library = cuda_library.load()
_NO_PADDING = (0, 0, 0, 0)
_POINTWISE = ([1, 1], [0, 0, 0, 0], [1, 1], 1)


def _pack(maps: Tensor, padding: tuple[int, ...]) -> Tensor:
    """Return `[channels, height, width, lanes]`, padding included; see api.h."""
    batch, channels, high, wide = maps.shape
    top, bottom, left, right = padding
    lanes = _library.size("lanes", maps.dtype, batch)
    packed = maps.new_empty((channels, high + top + bottom, wide + left + right, lanes))
    _library.run(
        "pack", maps.device, maps.dtype, maps, *maps.shape, *maps.stride(), *padding, packed, lanes
    )
    return packed


def _unpack(packed: Tensor, batch: int, layout: torch.memory_format) -> Tensor:
    shape = (batch, *packed.shape[:3])
    maps = torch.empty(shape, dtype=packed.dtype, device=packed.device, memory_format=layout)
    _library.run(
        "unpack", maps.device, maps.dtype, maps, *shape, *maps.stride(), packed, packed.shape[3]
    )
    return maps


def _inside(packed: Tensor, padding: tuple[int, ...]) -> tuple[int, ...]:
    """Return where in packed maps the maps themselves are; see api.h."""
    (high, wide), (top, bottom, left, right) = packed.shape[1:3], padding
    return high, wide, top, left, high - top - bottom, wide - left - right


def _gather(
    plan: GatherPlan,
    values: Tensor,
    bias: Tensor | None,
    x: Tensor,
    padding: tuple[int, ...],
    y: Tensor,
) -> None:
    """Write the outputs that a plan names, of packed maps, into packed maps."""
    values = values.contiguous() if plan.slots is None else values.index_select(0, plan.slots)
    bias = None if bias is None else bias.contiguous()
    rows, high, wide, lanes = y.shape
    window = plan.window
    _library.run(
        "gather", x.device, x.dtype, rows, plan.crow, plan.offset, plan.order, values, bias, x,
        lanes, *_inside(x, padding), *window[:4], y, high * wide, *window[4:],
    )  # fmt: skip


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
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    batch, channels, *size = conv2d_shape(x.shape, *conv)
    if reaches_far(Geometry(x.shape[2:], size, *conv)):
        return reference.conv2d(
            x, values, crow, col, bias, weight_shape, stride, padding, dilation, groups
        )
    structure = structure_of(x, crow, col, weight_shape)
    plan = gather_plans.forward(structure, conv, x.shape[2:], size)
    packed = _pack(x, conv.padding)
    y = packed.new_empty((channels, *size, packed.shape[3]))
    _gather(plan, values, bias, packed, conv.padding, y)
    return _unpack(y, batch, memory_format_of(x))


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
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    batch, channels, *size = input_shape
    if reaches_far(Geometry(size, grad.shape[2:], *conv)):
        return reference.conv2d_dgrad(
            grad, values, crow, col, input_shape, weight_shape, stride, padding, dilation, groups
        )
    structure = structure_of(grad, crow, col, weight_shape)
    plan = gather_plans.input_gradient(structure, conv, size, grad.shape[2:])
    packed = _pack(grad, plan.padding)
    shape = channels, *size, packed.shape[3]
    dx = new_input_gradient(packed, shape, len(plan.phases), conv, size)
    for phase in plan.phases:
        _gather(phase, values, None, packed, plan.padding, dx)
    return _unpack(dx, batch, memory_format_of(grad))


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
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    if reaches_far(Geometry(x.shape[2:], grad.shape[2:], *conv)):
        return reference.conv2d_wgrad(
            grad, x, crow, col, weight_shape, stride, padding, dilation, groups
        )
    structure = structure_of(x, crow, col, weight_shape)
    plan = gather_plans.forward(structure, conv, x.shape[2:], grad.shape[2:])
    upper, packed = _pack(grad, _NO_PADDING), _pack(x, conv.padding)
    nnz, (high, wide, lanes) = col.shape[0], upper.shape[1:]
    parts = _library.size("parts", x.dtype, nnz, high * wide, lanes)
    partial = x.new_empty((parts, nnz), dtype=torch.float32)
    dvalues = x.new_empty(nnz)
    _library.run(
        "sample", x.device, x.dtype, nnz, structure.rows(), plan.offset, upper, packed, lanes,
        *_inside(packed, conv.padding), *plan.window[:4], partial, parts, dvalues,
    )  # fmt: skip
    return dvalues


def linear(
    x: Tensor,
    values: Tensor,
    crow: Tensor,
    col: Tensor,
    bias: Tensor | None,
    weight_shape: list[int],
) -> Tensor:
    shape = [*weight_shape, 1, 1]
    y = conv2d(pixels(x), values, crow, col, bias, shape, *_POINTWISE)
    return y.view(*x.shape[:-1], weight_shape[0])


def linear_dgrad(
    grad: Tensor, values: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    images, shape = pixels(grad), [*weight_shape, 1, 1]
    input_shape = [images.shape[0], weight_shape[1], 1, 1]
    dx = conv2d_dgrad(images, values, crow, col, input_shape, shape, *_POINTWISE)
    return dx.view(*grad.shape[:-1], weight_shape[1])


def linear_wgrad(
    grad: Tensor, x: Tensor, crow: Tensor, col: Tensor, weight_shape: list[int]
) -> Tensor:
    return conv2d_wgrad(pixels(grad), pixels(x), crow, col, [*weight_shape, 1, 1], *_POINTWISE)


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
