"""Plans of products that read packed maps nonzero by nonzero, for kernels/gather.py.

In a map that is stored with its padding, the input of a nonzero lies at a fixed distance from the
position where its output's window starts. So a plan is one offset for each nonzero, and inner
loops need to know nothing of channels, taps, dilation or borders. The input gradient is the same
product with the transpose, with one plan for each phase of the stride: input pixels that are
`stride` apart meet the same taps, so that no phase multiplies what the others are for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparsekd.ops.gpu.convolution import AxisPhase, Conv, input_phases, taps
from sparsekd.ops.gpu.structure import Structure


class Window(NamedTuple):
    """The outputs of a product: how many, and where in their maps they and their inputs are.

    `in_row` and `in_col` are the steps in the packed input from one output to the next, `out_row`
    and `out_col` those in the output, from `out_origin` on; `top` to `right` are the padding of the
    packed input. See kernels/gather.py.
    """

    height: int
    width: int
    in_row: int
    in_col: int
    out_origin: int
    out_row: int
    out_col: int
    top: int
    bottom: int
    left: int
    right: int

    @property
    def padding(self) -> tuple[int, int, int, int]:
        """How far the packed input reaches beyond its map: top, bottom, left, right."""
        return self.top, self.bottom, self.left, self.right


class GatherPlan(NamedTuple):
    """A product: where its rows start, the offset of each nonzero's input, rows by their length.

    `slots`, if there are any, say which of the weight's values belong to the nonzeros.
    """

    crow: Tensor
    offset: Tensor
    order: Tensor
    slots: Tensor | None
    window: Window


class InputGradient(NamedTuple):
    """One plan for each phase of the stride, and how the output gradient is padded for them."""

    padding: tuple[int, int, int, int]
    phases: tuple[GatherPlan, ...]


def forward(
    structure: Structure, conv: Conv, input_size: Sequence[int], output_size: Sequence[int]
) -> GatherPlan:
    """Plan the forward pass; the weight gradient reads the same positions.

    Args:
        structure: of the weight; it keeps the plan.
        conv: the layer.
        input_size: of the maps that it reads.
        output_size: of those that it writes.
    """
    sizes = tuple(input_size), tuple(output_size)
    return structure.plan(("rows", conv, *sizes), lambda made: _forward(made, conv, *sizes))


def input_gradient(
    structure: Structure, conv: Conv, input_size: Sequence[int], output_size: Sequence[int]
) -> InputGradient:
    """Plan the input gradient, a product with the transpose; arguments as for `forward`."""
    sizes = tuple(input_size), tuple(output_size)
    key = ("rows of the input gradient", conv, *sizes)
    return structure.plan(key, lambda made: _input_gradient(made, conv, *sizes))


def _forward(
    structure: Structure, conv: Conv, input_size: Sequence[int], output_size: Sequence[int]
) -> GatherPlan:
    top, bottom, left, right = conv.padding
    high, wide = input_size[0] + top + bottom, input_size[1] + left + right
    channel, i, j = taps(structure, conv)
    offset = (channel * high + i * conv.dilation[0]) * wide + j * conv.dilation[1]
    in_row, in_col = conv.stride[0] * wide, conv.stride[1]
    steps = in_row, in_col, 0, output_size[1], 1
    window = Window(output_size[0], output_size[1], *steps, *conv.padding)
    return _plan(structure, structure.crow, offset, None, window)


def _input_gradient(
    structure: Structure, conv: Conv, input_size: Sequence[int], output_size: Sequence[int]
) -> InputGradient:
    channels, axes = conv.weight_shape[1], input_phases(conv, input_size)
    (top, bottom), (left, right) = (
        _reach(axis, size) for axis, size in zip(axes, output_size, strict=True)
    )
    high, wide = output_size[0] + top + bottom, output_size[1] + left + right
    channel, i, j = taps(structure, conv)
    phases = []
    for down in axes[0]:
        for across in axes[1]:
            reached = (down.reaches[i] & across.reaches[j]).nonzero().squeeze(1)
            slots = reached[torch.argsort(channel[reached], stable=True)]
            lengths = torch.bincount(channel[slots], minlength=channels * conv.groups)
            crow = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)])
            y = down.output[i[slots]] + top
            offset = (structure.row[slots] * high + y) * wide + across.output[j[slots]] + left
            window = Window(
                down.pixels, across.pixels, wide, 1,
                down.first * input_size[1] + across.first,
                conv.stride[0] * input_size[1], conv.stride[1],
                top, bottom, left, right,
            )  # fmt: skip
            phases.append(_plan(structure, crow, offset, slots, window))
    return InputGradient((top, bottom, left, right), tuple(phases))


def _plan(
    structure: Structure, crow: Tensor, offset: Tensor, slots: Tensor | None, window: Window
) -> GatherPlan:
    order = torch.argsort(crow.diff(), descending=True, stable=True)
    upload = structure.upload
    if slots is not None:
        # Room for all nonzeros: other taps may be reached after the structure has changed.
        unused = [0, structure.col.shape[0] - slots.shape[0]]
        slots, offset = (torch.nn.functional.pad(t, unused) for t in (slots, offset))
    which = None if slots is None else upload(slots)
    return GatherPlan(upload(crow), upload(offset), upload(order), which, window)


def _reach(phases: list[AxisPhase], size: int) -> tuple[int, int]:
    """Return by how much outputs that the phases meet lie before the first and after the last."""
    before = after = 0
    for phase in phases:
        met = phase.output[phase.reaches]
        if len(met):
            before = max(before, -int(met.min()))
            after = max(after, int(met.max()) + phase.pixels - size)
    return before, after
