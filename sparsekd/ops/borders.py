"""Convolutions tap by tap, where only positions inside the maps take part.

Torch's convolutions multiply padding, and weights that are not stored, by zero. That is fast and of
finite numbers the same; of infinity it is NaN. They also pay for padding that no output needs. What
is here is slow, exact in both cases, and costs what the outputs do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_AT_ONCE = 1 << 24  # products of one tap held at a time
_FAR, _TIMES = 1 << 16, 16


class Geometry(NamedTuple):
    """Sizes of the maps and what a schema says of a convolution."""

    input_size: Sequence[int]
    output_size: Sequence[int]
    weight_shape: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]
    groups: int


class Tap(NamedTuple):
    """A place in the kernel: the output positions it reaches, what they read, and its nonzeros."""

    outputs: tuple[slice, slice]
    inputs: tuple[slice, slice]
    slots: Tensor
    row: Tensor
    channel: Tensor


def reaches_far(geometry: Geometry) -> bool:
    """Return whether stride and padding span far more than the maps.

    Libraries then allocate, or walk over, what no output needs.
    """
    top, bottom, left, right = geometry.padding
    (high, wide), (out_high, out_wide) = geometry.input_size, geometry.output_size
    down, across = geometry.stride
    area = (high + top + bottom + down) * (wide + left + right + across)
    return area > max(_FAR, _TIMES * (high * wide + out_high * out_wide))


def conv2d(
    x: Tensor, values: Tensor, row: Tensor, col: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """Return the forward pass in float64; `row` and `col` are those of each nonzero."""
    shape = x.shape[0], geometry.weight_shape[0], *geometry.output_size
    y = torch.zeros(shape, dtype=torch.float64, device=x.device)
    if bias is not None:
        y += bias.double()[:, None, None]
    x, values = x.double(), values.double()[:, None, None]
    for tap in _taps(x.shape[0], row, col, geometry):
        products = x[(..., *tap.inputs)][:, tap.channel] * values[tap.slots]
        y[(..., *tap.outputs)].index_add_(1, tap.row, products)
    return y


def conv2d_dgrad(
    grad: Tensor, values: Tensor, row: Tensor, col: Tensor, geometry: Geometry
) -> Tensor:
    """Return the input gradient in float64."""
    channels = geometry.weight_shape[1] * geometry.groups
    shape = grad.shape[0], channels, *geometry.input_size
    dx = torch.zeros(shape, dtype=torch.float64, device=grad.device)
    grad, values = grad.double(), values.double()[:, None, None]
    for tap in _taps(grad.shape[0], row, col, geometry):
        products = grad[(..., *tap.outputs)][:, tap.row] * values[tap.slots]
        dx[(..., *tap.inputs)].index_add_(1, tap.channel, products)
    return dx


def conv2d_wgrad(grad: Tensor, x: Tensor, row: Tensor, col: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient at the nonzeros in float64."""
    dvalues = torch.zeros(col.shape[0], dtype=torch.float64, device=x.device)
    grad, x = grad.double(), x.double()
    for tap in _taps(x.shape[0], row, col, geometry):
        upper, lower = grad[(..., *tap.outputs)][:, tap.row], x[(..., *tap.inputs)][:, tap.channel]
        dvalues[tap.slots] = (upper * lower).sum((0, 2, 3))
    return dvalues


def dense_wgrad(grad: Tensor, x: Tensor, geometry: Geometry) -> Tensor:
    """Return the gradient of the whole weight, in the dtype of the operands."""
    groups, (_, _, *kernel) = geometry.groups, geometry.weight_shape
    dweight = grad.new_zeros(list(geometry.weight_shape))
    by_group = dweight.unflatten(0, (groups, -1))
    down, across = ([_overlap(geometry, axis, t) for t in range(kernel[axis])] for axis in (0, 1))
    for i, rows in enumerate(down):
        for j, cols in enumerate(across):
            upper = grad[:, :, rows[0], cols[0]].unflatten(1, (groups, -1))
            lower = x[:, :, rows[1], cols[1]].unflatten(1, (groups, -1))
            by_group[..., i, j] = torch.einsum("ngohw,ngchw->goc", upper, lower)
    return dweight


def _taps(images: int, row: Tensor, col: Tensor, geometry: Geometry) -> Iterator[Tap]:
    """Return the taps that meet any input, each with a part of its nonzeros."""
    rows, channels, high, wide = geometry.weight_shape
    area = high * wide
    met_rows, met_cols = (_meets(geometry, axis, col.device) for axis in (0, 1))
    place = col.long() % area
    slots = (met_rows[place // wide] & met_cols[place % wide]).nonzero().squeeze(1)
    slots = slots[torch.argsort(place[slots], stable=True)]
    group = row.long() // max(rows // geometry.groups, 1)
    channel = group * channels + col.long() // area
    found, counts = place[slots].unique_consecutive(return_counts=True)
    for tap, several in zip(found.tolist(), slots.split(counts.tolist()), strict=True):
        down, across = _overlap(geometry, 0, tap // wide), _overlap(geometry, 1, tap % wide)
        outputs, inputs = (down[0], across[0]), (down[1], across[1])
        positions = images * _length(outputs[0]) * _length(outputs[1])
        for part in several.split(max(_MOST_AT_ONCE // max(positions, 1), 1)):
            yield Tap(outputs, inputs, part, row[part].long(), channel[part])


def _meets(geometry: Geometry, axis: int, device: torch.device) -> Tensor:
    """Return for every tap of an axis whether any output reads an input through it."""
    stride, size = geometry.stride[axis], geometry.input_size[axis]
    kernel = torch.arange(geometry.weight_shape[2 + axis], device=device)
    at = kernel * geometry.dilation[axis] - geometry.padding[2 * axis]
    first = (-at).clamp(min=0).add(stride - 1).div(stride, rounding_mode="floor")
    return (first < geometry.output_size[axis]) & (first * stride + at < size)


def _overlap(geometry: Geometry, axis: int, tap: int) -> tuple[slice, slice]:
    """Return the outputs that read through a tap, and what they read; empty without any."""
    stride, size = geometry.stride[axis], geometry.input_size[axis]
    at = tap * geometry.dilation[axis] - geometry.padding[2 * axis]
    first = max(0, -(at // stride))
    last = min(geometry.output_size[axis] - 1, (size - 1 - at) // stride)
    if first > last:
        return slice(0), slice(0)
    begin = first * stride + at
    return slice(first, last + 1), slice(begin, last * stride + at + 1, stride)


def _length(positions: slice) -> int:
    return len(range(positions.stop)[positions])
