"""A convolution as GPU plans see it: its parameters, and the taps that an input pixel meets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.ops.gpu.structure import Structure


class Conv(NamedTuple):
    """Parameters of a convolution that plans depend on."""

    weight_shape: tuple[int, ...]
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def conv_of(
    weight_shape: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
) -> Conv:
    """Return a schema's lists as a Conv, which can be part of a key."""
    return Conv(tuple(weight_shape), tuple(stride), tuple(padding), tuple(dilation), groups)


class AxisPhase(NamedTuple):
    """The pixels of an axis that meet the same taps: `first`, and every stride-th after it.

    `output[t]` is the output position in which tap `t`, if it `reaches` them, meets the first one.
    """

    first: int
    pixels: int
    reaches: Tensor
    output: Tensor


def input_phases(conv: Conv, size: Sequence[int]) -> list[list[AxisPhase]]:
    """Return the phases of an input of a size, along y and along x, that taps reach.

    A stride longer than the kernel has others.
    """
    before, kernel = conv.padding[::2], conv.weight_shape[2:]
    return [
        _axis_phases(size[d], before[d], kernel[d], conv.stride[d], conv.dilation[d])
        for d in (0, 1)
    ]


def _axis_phases(
    size: int, before: int, kernel: int, stride: int, dilation: int
) -> list[AxisPhase]:
    taps = torch.arange(kernel) * dilation
    reached = set(((taps - before) % stride).tolist())
    found = []
    for first in sorted(first for first in reached if first < size):
        distance = first + before - taps
        output = torch.div(distance, stride, rounding_mode="floor")
        pixels = len(range(first, size, stride))
        found.append(AxisPhase(first, pixels, distance % stride == 0, output))
    return found


def taps(structure: Structure, conv: Conv) -> tuple[Tensor, Tensor, Tensor]:
    """Return the input channel, and the place in the kernel, of each nonzero."""
    rows, channels, high, wide = conv.weight_shape
    tap = structure.col % (high * wide)
    group = structure.row // (rows // conv.groups)
    return group * channels + structure.col // (high * wide), tap // wide, tap % wide


def covers(phases: int, conv: Conv, size: Sequence[int]) -> bool:
    """Return whether some phases together write all of an input gradient of a size."""
    return phases == min(conv.stride[0], size[0]) * min(conv.stride[1], size[1])


def new_input_gradient(
    like: Tensor, shape: Sequence[int], phases: int, conv: Conv, size: Sequence[int]
) -> Tensor:
    """Allocate an input gradient that some phases write: zeros unless they cover all of it."""
    return like.new_empty(shape) if covers(phases, conv, size) else like.new_zeros(shape)
