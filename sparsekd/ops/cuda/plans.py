"""Plans of the products of csrc/cuda: which patch of outputs a block computes, and in which order.

A block has 64 rows of the weight and a patch of outputs, and reads the window of the patch a chunk
of channels at a time, see csrc/cuda/patch.cuh. So nonzeros are ordered by blocks of rows, by chunks
and by rows, and each is one number: how far in the window its input lies from where the window of
its output starts. The input gradient is the same product with the transpose, once for each phase
of the stride: input pixels that are `stride` apart meet the same taps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.ops.gpu.convolution import AxisPhase, Conv, input_phases, taps
from sparsekd.ops.gpu.sizes import ceil_div, next_power_of_two
from sparsekd.ops.gpu.structure import Structure

# Of patch.cuh: lanes of a warp, rows of a block, and vectors of the window that it holds at once.
_LANES, _ROWS, _VECTORS = 32, 64, 1152
_ROW_SHIFT = 16  # of gather.cuh: a place has the row of its block above the vector
# What outputs and chunks cost a block, where loading a vector of the window costs one: a vector is
# used several times, and a chunk is waited for.
_USES, _WAIT = 4, 512
_ENOUGH_BLOCKS = 1024  # fill the largest devices several times over
_LEAST_PATCHES = 8  # of a part; fewer are not worth a sum of their own


class Maps(NamedTuple):
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


class Axis(NamedTuple):
    """The outputs of a product along y or x; see api.h."""

    outputs: int
    patch: int
    spacing: int
    start: int
    stride: int
    window: int
    pitch: int
    out_start: int
    out_step: int

    @property
    def patches(self) -> int:
        """How many patches there are."""
        return self.spacing * ceil_div(ceil_div(self.outputs, self.spacing), self.patch)


class Product(NamedTuple):
    """A product as api.h sees it, and its axes."""

    rows: int
    rows_of_group: int
    channels_of_group: int
    chunk: int
    chunks: int
    images: int
    starts: Tensor
    places: Tensor
    slots: Tensor
    axes: tuple[Axis, Axis]

    def parts(self, x: Tensor) -> int:
        """Return in how many parts the weight gradient at inputs x is summed, to fill a GPU."""
        of_images = ceil_div(_vectors(x), self.images)
        patches = of_images * self.axes[0].patches * self.axes[1].patches
        cells = 2 * ceil_div(self.rows, _ROWS) * self.chunks  # half a block each
        return max(1, min(_ENOUGH_BLOCKS // (cells + 1), patches // _LEAST_PATCHES))


class Cut(NamedTuple):
    """How maps are cut: patches along y and x, vectors of images in one, channels of a chunk."""

    axes: tuple[Axis, Axis]
    images: int
    chunk: int


class _Line(NamedTuple):
    """An axis that is not yet cut into patches; its outputs read `taps` pixels, `pitch` apart."""

    outputs: int
    start: int
    stride: int
    taps: int
    pitch: int
    out_start: int
    out_step: int

    @property
    def spacing(self) -> int:
        """How far outputs are apart that read pixels of one grid."""
        return self.pitch // math.gcd(self.pitch, self.stride)

    def cut(self, patch: int) -> Axis:
        step = self.spacing * self.stride // self.pitch
        window = (patch - 1) * step + self.taps
        return Axis(
            self.outputs, patch, self.spacing, self.start, self.stride, window, self.pitch,
            self.out_start, self.out_step,
        )  # fmt: skip


class _Nonzeros(NamedTuple):
    """Those of a product in any order: row, channel, tap along each axis, and slot."""

    row: Tensor
    channel: Tensor
    y: Tensor
    x: Tensor
    slot: Tensor


def is_large(conv: Conv) -> bool:
    """Return whether not even one channel of a window fits: torch's ops compute, tap by tap."""
    return math.prod(conv.weight_shape[2:]) | 1 > _VECTORS


def forward_cut(conv: Conv, x: Tensor, output_size: Sequence[int]) -> Cut:
    """Return how the forward pass cuts maps; the weight gradient reads the same.

    Args:
        conv: the layer.
        x: the input, or a tensor of its dtype and batch.
        output_size: of the maps that are written.

    Example:
        >>> conv = Conv((256, 256, 3, 3), (1, 1), (1, 1, 1, 1), (1, 1), 1)
        >>> cut = forward_cut(conv, torch.empty(128), (16, 16))
        >>> [(axis.patch, axis.window) for axis in cut.axes], cut.images, cut.chunk
        ([(4, 6), (8, 10)], 1, 16)
    """
    _, channels = _channels(*_forward_shape(conv))
    return _cut(*_forward_lines(conv, output_size), _images(x), channels)


def forward(structure: Structure, conv: Conv, x: Tensor, output_size: Sequence[int]) -> Product:
    """Plan the forward pass; the weight gradient reads the same.

    Args:
        structure: of the weight; it keeps the plan.
        conv: the layer.
        x: the input, of whose batch the plan has the order of magnitude.
        output_size: of the maps that are written.
    """
    size, images = tuple(output_size), _images(x)
    key = ("products", conv, size, images)
    return structure.plan(key, lambda made: _forward(made, conv, size, images))


def input_gradient(
    structure: Structure, conv: Conv, grad: Tensor, input_size: Sequence[int]
) -> tuple[Product, ...]:
    """Plan the input gradient, a product with the transpose for each phase of the stride.

    Args:
        structure: of the weight; it keeps the plan.
        conv: the layer.
        grad: the output gradient, of whose batch the plan has the order of magnitude.
        input_size: of the maps that were read.
    """
    size, images = tuple(input_size), _images(grad)
    key = ("products of the input gradient", conv, size, images)
    return structure.plan(key, lambda made: _input_gradient(made, conv, size, images))


def _vectors(x: Tensor) -> int:
    """Return how many vectors of 16 bytes, of an element where there are fewer, a batch has."""
    images = 16 // x.element_size()
    return ceil_div(x.shape[0], images) if x.shape[0] >= images else x.shape[0]


def _images(x: Tensor) -> int:
    """Return the most vectors of images that a patch needs, so that batches alike share a plan."""
    return min(_LANES, next_power_of_two(_vectors(x)))


def _forward(structure: Structure, conv: Conv, output_size: Sequence[int], images: int) -> Product:
    channel, i, j = taps(structure, conv)
    slot = torch.arange(len(structure.row))
    nonzeros = _Nonzeros(structure.row, channel, i, j, slot)
    lines = _forward_lines(conv, output_size)
    return _product(structure, nonzeros, _forward_shape(conv), lines, images)


def _forward_shape(conv: Conv) -> tuple[int, int, int]:
    """Return rows, and of a group the rows and the channels."""
    rows, channels = conv.weight_shape[:2]
    return rows, max(rows // conv.groups, 1), channels


def _forward_lines(conv: Conv, output_size: Sequence[int]) -> list[_Line]:
    """Return y and x."""
    kernel, lines = conv.weight_shape[2:], []
    for d in (0, 1):
        # A single tap has no pitch of its own, so that a window has the pixels that are read.
        pitch = conv.dilation[d] if kernel[d] > 1 else conv.stride[d]
        start = -conv.padding[2 * d]
        lines.append(_Line(output_size[d], start, conv.stride[d], kernel[d], pitch, 0, 1))
    return lines


def _input_gradient(
    structure: Structure, conv: Conv, input_size: Sequence[int], images: int
) -> tuple[Product, ...]:
    rows, channels = conv.weight_shape[:2]
    phases = input_phases(conv, input_size)
    channel, i, j = taps(structure, conv)
    shape = channels * conv.groups, max(channels, 1), rows // conv.groups
    products = []
    for down in phases[0]:
        for across in phases[1]:
            slot = (down.reaches[i] & across.reaches[j]).nonzero().squeeze(1)
            (y, line_y), (x, line_x) = _line(down, conv.stride[0]), _line(across, conv.stride[1])
            nonzeros = _Nonzeros(channel[slot], structure.row[slot], y[i[slot]], x[j[slot]], slot)
            products.append(_product(structure, nonzeros, shape, (line_y, line_x), images))
    return tuple(products)


def _line(phase: AxisPhase, stride: int) -> tuple[Tensor, _Line]:
    """Return which pixel of an output's window each tap meets, and the axis of a phase."""
    met = phase.output[phase.reaches]
    first = int(met.min())
    pitch = math.gcd(*(met - first).tolist()) or 1
    reach = (int(met.max()) - first) // pitch + 1
    line = _Line(phase.pixels, first, 1, reach, pitch, phase.first, stride)
    return (phase.output - first) // pitch, line


def _product(
    structure: Structure,
    nonzeros: _Nonzeros,
    shape: tuple[int, int, int],
    lines: Sequence[_Line],
    most: int,
) -> Product:
    """Order the nonzeros of a product.

    Args:
        structure: which keeps the plan.
        nonzeros: of the product.
        shape: rows, and of a group the rows and the channels.
        lines: y and x.
        most: the most vectors of images that a patch needs.
    """
    first, channels = _channels(*shape)
    (y, x), images, chunk = _cut(*lines, most, channels)
    chunks = ceil_div(channels, chunk)
    plane = images * y.window * x.window | 1
    of_block, local = nonzeros.row // _ROWS, nonzeros.row % _ROWS
    channel = nonzeros.channel - first[of_block]
    key = (of_block * chunks + channel // chunk) * _ROWS + local
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key, minlength=len(first) * chunks * _ROWS)
    starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    vector = channel % chunk * plane + nonzeros.y * x.window + nonzeros.x
    # Room for all nonzeros: other taps may be reached after the structure has changed.
    unused = [0, structure.col.shape[0] - order.shape[0]]
    places, slots = (
        structure.upload(torch.nn.functional.pad(of[order], unused))
        for of in (local << _ROW_SHIFT | vector, nonzeros.slot)
    )
    return Product(*shape, chunk, chunks, images, structure.upload(starts), places, slots, (y, x))


def _channels(rows: int, rows_of_group: int, channels_of_group: int) -> tuple[Tensor, int]:
    """Return the first channel that each block of rows reads, and how many one reads at most."""
    block = torch.arange(0, rows, _ROWS)
    first = block // rows_of_group * channels_of_group
    last = (block + _ROWS - 1).clamp(max=rows - 1) // rows_of_group
    return first, max(((last + 1) * channels_of_group - first).tolist(), default=0)


@lru_cache(maxsize=1024)
def _cut(y: _Line, x: _Line, most: int, channels: int) -> Cut:
    """Choose how large patches are, of at most so many vectors of images.

    Large patches read the fewest pixels twice, but reach past the borders of small maps, and leave
    less memory for channels.
    """
    sizes = [1 << power for power in range(_LANES.bit_length())]
    best = math.inf
    for wide in sizes:
        for high in sizes:
            for images in sizes:
                down, across = y.cut(high), x.cut(wide)
                plane = images * down.window * across.window | 1
                if images > most or high * wide * images > _LANES or plane > _VECTORS:
                    continue
                chunk = _chunk(_VECTORS // plane, channels)
                cost = _USES * _LANES + plane + _WAIT / chunk
                cost *= down.patches * across.patches / images
                if cost <= best:  # of equal ones the last, which is wide
                    best, chosen = cost, Cut((down, across), images, chunk)
    return chosen


def _chunk(most: int, channels: int) -> int:
    """Return the channels of a chunk: whole sectors of memory, where there are as many."""
    most = min(most, max(channels, 1))
    return most - most % 16 if most >= 16 else most - most % 8 if most >= 8 else most
