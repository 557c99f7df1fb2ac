"""The CUDA backend: one call of csrc/cuda an op, which packs maps, multiplies and unpacks.

Kernels accumulate in float32 and round once. Everything is queued on torch's current stream and
nothing waits for the device, except where a structure is seen for the first time, and growth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparsekd import cuda_library
from sparsekd.ops import reference
from sparsekd.ops.borders import Geometry, reaches_far
from sparsekd.ops.checks import conv2d_shape
from sparsekd.ops.gpu import gather_plans
from sparsekd.ops.gpu.convolution import conv_of, covers
from sparsekd.ops.gpu.gather_plans import GatherPlan
from sparsekd.ops.gpu.growth import FreePositions
from sparsekd.ops.gpu.structure import structure_of
from sparsekd.ops.memory_format import memory_format_of, pixels

_library = cuda_library.load()
_POINTWISE = ([1, 1], [0, 0, 0, 0], [1, 1], 1)


class _Maps(NamedTuple):
    """A tensor as api.h sees maps."""

    data: Tensor
    batch: int
    channels: int
    height: int
    width: int
    stride_n: int
    stride_c: int
    stride_h: int
    stride_w: int


def _maps(x: Tensor) -> _Maps:
    return _Maps(x, *x.shape, *x.stride())


@lru_cache(maxsize=4096)
def _size(name: str, dtype: torch.dtype, *args: Any) -> int:
    """Return what a function of the library says of sizes alone, which tuples of four stand for."""
    filled = ([(None, *arg, 0, 0, 0, 0)] if isinstance(arg, tuple) else arg for arg in args)
    return _library.size(name, dtype, *filled)


def _workspace(like: Tensor, name: str, *args: Any) -> Tensor:
    return like.new_empty(_size(name, like.dtype, *args), dtype=torch.uint8)


def _product(plan: GatherPlan) -> tuple[Any, ...]:
    return plan.order.shape[0], plan.crow, plan.offset, plan.order, plan.slots, *plan.window


def _gather(
    x: _Maps,
    padding: Sequence[int],
    plans: Sequence[GatherPlan],
    values: Tensor,
    bias: Tensor | None,
    y: _Maps,
    whole: bool = True,
) -> None:
    """Write what plans name of y; zeros elsewhere, unless they are the `whole` of it."""
    work = _workspace(x.data, "gather_bytes", x[1:5], *padding, y[1:5])
    bias = None if bias is None else bias.contiguous()
    _library.run(
        "gather", work.device, x.data.dtype, [x], *padding, len(plans),
        [_product(plan) for plan in plans], values.contiguous(), bias, [y], int(whole), work,
    )  # fmt: skip


def _sample(grad: _Maps, x: _Maps, padding: Sequence[int], plan: GatherPlan, row: Tensor) -> Tensor:
    """Return the gradients of the values."""
    nnz = row.shape[0]
    work = _workspace(x.data, "sample_bytes", grad[1:5], x[1:5], *padding, nnz)
    dvalues = x.data.new_empty(nnz)
    _library.run(
        "sample", work.device, x.data.dtype, [grad], [x], *padding, [_product(plan)], nnz, row,
        dvalues, work,
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
) -> Tensor:
    conv = conv_of(weight_shape, stride, padding, dilation, groups)
    shape = conv2d_shape(x.shape, *conv)
    if reaches_far(Geometry(x.shape[2:], shape[2:], *conv)):
        return reference.conv2d(
            x, values, crow, col, bias, weight_shape, stride, padding, dilation, groups
        )
    structure = structure_of(x, crow, col, weight_shape)
    plan = gather_plans.forward(structure, conv, x.shape[2:], shape[2:])
    y = _empty(x, shape)
    _gather(_maps(x), conv.padding, [plan], values, bias, _maps(y))
    return y


def _empty(like: Tensor, shape: Sequence[int]) -> Tensor:
    layout = memory_format_of(like)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=layout)


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
    size = input_shape[2:]
    if reaches_far(Geometry(size, grad.shape[2:], *conv)):
        return reference.conv2d_dgrad(
            grad, values, crow, col, input_shape, weight_shape, stride, padding, dilation, groups
        )
    structure = structure_of(grad, crow, col, weight_shape)
    plan = gather_plans.input_gradient(structure, conv, size, grad.shape[2:])
    dx = _empty(grad, input_shape)
    whole = covers(len(plan.phases), conv, size)
    _gather(_maps(grad), plan.padding, plan.phases, values, None, _maps(dx), whole)
    return dx


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
    return _sample(_maps(grad), _maps(x), conv.padding, plan, structure.rows())


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
